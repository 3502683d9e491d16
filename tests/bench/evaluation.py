"""(h) All Inception metrics from one pass against torch-fidelity's FID alone; second networks against their own forward.

Both read the same two folders of PNGs by turns in one process with one thread; weights are random, in files of the
published forms. Ours are the units and the end of the evaluate stage as it stands: features of samples and reference,
files, hashes and ledger included, then FID with its error and extrapolation, sFID, KID, precision, recall, density,
coverage and the inception score. The processor's clock is told beside the wall's: it does not count what others do.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import Clocks, Table, by_clocks

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

import networks  # noqa: E402 - after the path that makes it importable
import toy_run  # noqa: E402

from eval_jobs import evaluate, sample  # noqa: E402
from hpc_gen.config.loader import Resolved  # noqa: E402
from hpc_gen.metrics import fidelity, suite  # noqa: E402
from hpc_gen.runtime import commit  # noqa: E402
from hpc_gen.runtime.run_folder import RunFolder  # noqa: E402
from hpc_gen.sampling import index  # noqa: E402
from hpc_gen.sampling.images import png_bytes  # noqa: E402
from hpc_gen.stages.units import StageContext, Unit  # noqa: E402

SIDE, BATCH = 256, 32
METRICS = ("fid", "sfid", "kid", "prc", "density_coverage", "isc")
SECOND = {"clip_fid": "clip", "fd_dinov2": "dinov2"}
SECOND_NAMES = {"clip": "clip-vit-b-32", "dinov2": "dinov2-vit-s-14"}


def bench(quick: bool) -> Iterator[Table]:
    """Three tables: the whole evaluation, its end at a real number of images, the second networks."""
    torch.set_num_threads(1)
    images, rounds, many = (16, 1, 64) if quick else (64, 2, 4096)
    try:
        with tempfile.TemporaryDirectory(prefix="hpc-gen-bench-") as name:
            scene = Scene.made(Path(name), images)
            whole, clocks = _whole(scene, rounds)
            yield whole
            yield _end(many, clocks, images)
            yield _second(scene, rounds)
    finally:
        torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Scene:
    """A run of samples and a folder of real images, as many, and the sections that score them."""

    folder: Path
    images: int
    run: RunFolder
    resolved: Resolved

    @classmethod
    def made(cls, folder: Path, images: int) -> Scene:
        """Write everything: random networks at their published sizes, PNGs like photographs."""
        made = {
            "inception": networks.write_inception(folder / "inception.pth"),
            "clip": networks.write_whole_clip(folder / "clip"),
            "dinov2": networks.write_dinov2(folder / "dinov2"),
        }
        toy_run.write_table(folder / "tables" / "train", rows=8, shard_rows=8, size=SIDE, channels=3)
        second = ", ".join(
            f"{key}: {{name: {name}, weights: {key}, sha256: {made[key]}}}" for key, name in SECOND_NAMES.items()
        )
        run, resolved = toy_run.make_run(
            folder,
            f"method.image_size={SIDE}",
            "method.channels=3",
            "method.patch_size=64",
            f"sample={{num_images: {images}, block_images: {images}, batch: {images}, settings: {{steps: 1}}}}",
            f"evaluate={{metrics: [{', '.join([*METRICS, *SECOND])}], kid_subset_size: {images // 2}, batch: {BATCH}, "
            f"block_images: 256, {second}, reference: {{images: real}}, "
            f"extractor: {{name: inception, weights: inception.pth, sha256: {made['inception']}}}}}",
        )
        scene = cls(folder, images, run, resolved)
        scene._write_samples()
        (folder / "real").mkdir()
        for i, image in enumerate(photographs(images, seed=2)):
            (folder / "real" / f"{i:05d}.png").write_bytes(png_bytes(image))
        return scene

    def _write_samples(self) -> None:
        """Samples that look like photographs, in place of those of a network that was never trained."""
        plan = sample.worker(self.context("sample")).plan
        folder = self.run.samples("main")
        for block in plan.blocks():
            found = photographs(len(block.ids), seed=1)
            here = commit.make_folder(index.block_folder(folder, block.name))
            for i, image in zip(block.ids, found, strict=True):
                (here / index.image_name(i)).write_bytes(png_bytes(image))
            facts = index.describe_block(block, found)
            commit.write_json(here / index.BLOCK_NAME, index.block_json(plan, facts))
        index.write_index(folder, plan)

    def context(self, stage: str, *changes: str) -> StageContext:
        """What a worker is given."""
        from hpc_gen.config import loader
        from hpc_gen.stages import run_setup

        resolved = run_setup.typed(loader.loads(self.resolved.to_yaml(), list(changes))) if changes else self.resolved
        return toy_run.context(self.run, resolved, self.folder, stage)

    def evaluation(self, metrics: tuple[str, ...]) -> evaluate.EvaluateWorker:
        """The evaluate stage before its first unit: nothing of it is there yet."""
        for gone in (self.run.features("main"), self.run.ledger("evaluate"), self.run.metrics("main")):
            shutil.rmtree(gone) if gone.is_dir() else gone.unlink(missing_ok=True)
        return evaluate.worker(self.context("evaluate", f"evaluate.metrics=[{', '.join(metrics)}]"))


def photographs(count: int, seed: int) -> torch.Tensor:
    """uint8 [N, 3, SIDE, SIDE]: smooth with a little noise, so that a PNG of them is of an ordinary size."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=generator) * 255
    fine = F.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic")
    return (fine + 6 * torch.randn(fine.shape, generator=generator)).clamp(0, 255).to(torch.uint8)


def _whole(scene: Scene, rounds: int) -> tuple[Table, dict[str, Clocks]]:
    def ours() -> None:
        worker = scene.evaluation(METRICS)
        toy_run.do_units(scene.run, worker)
        worker.finish()

    def theirs() -> None:
        fidelity._module("metrics").calculate_metrics(
            input1=str(scene.run.samples("main") / "units"),
            input2=str(scene.folder / "real"),
            feature_extractor="inception-v3-compat",
            feature_extractor_weights_path=str(scene.folder / "inception.pth"),
            batch_size=BATCH,
            samples_find_deep=True,
            save_cpu_ram=True,  # no worker processes: all of it in this process, as ours
            cuda=False,
            verbose=False,
            cache=False,
            fid=True,
        )

    table = Table(
        f"Evaluation of {scene.images} images against {scene.images}",
        f"One thread, PNGs of {SIDE} pixels, batches of {BATCH}; {rounds} round(s), the order reversed in every second. "
        f"Ours: {', '.join(METRICS)}, with errors. torch-fidelity {fidelity.version()}.",
        ("what", "wall, s", "processor, s", "over torch-fidelity's FID alone, wall", "processor"),
    )
    clocks = by_clocks({"theirs": theirs, "ours": ours}, rounds)
    words = {"theirs": "torch-fidelity: FID alone", "ours": "evaluate stage: all Inception metrics"}
    for name, found in clocks.items():
        ratio = found.over(clocks["theirs"])
        seconds = (found.wall.show("{:.1f}"), found.cpu.show("{:.1f}"))
        table.add(words[name], *seconds, ratio.wall.show(), ratio.cpu.show())
    return table, clocks


def _end(count: int, clocks: dict[str, Clocks], images: int) -> Table:
    """What comes after the features, of more images than features: few images have small matrices and flatter us."""
    generator = torch.Generator().manual_seed(4)
    kept = ("features", 2048), ("spatial", 2023)
    sets = [{n: torch.rand(count, width, generator=generator) for n, width in kept} for _ in range(2)]
    logits = torch.randn(count, 1008, generator=generator)
    choices = suite.Choices(kid_subset_size=min(1000, count // 2))
    one, other = sets
    reference = suite.Reference([other["features"]], None, {}, [other["spatial"]])

    def metric(name: str) -> Callable[[], None]:
        def measure() -> None:
            suite.numbers([name], [one["features"]], logits, reference, choices, [one["spatial"]])

        return measure

    def theirs() -> None:
        module: Any = fidelity._module("metric_fid")
        stats = [module.fid_features_to_statistics(each["features"]) for each in sets]
        module.fid_statistics_to_metric(*stats, False)

    actions = {"torch-fidelity: FID": theirs}
    actions |= {f"ours: {name}": metric(name) for name in METRICS if name != "density_coverage"}
    found = by_clocks(actions, 1)
    table = Table(
        f"After the features: {count} images against {count}",
        f"One thread, one round, random features of Inception's sizes; density_coverage shares the distances of prc. The "
        f"whole is computed: {2 * count} images at the processor seconds per image of the table above (which hold the building of "
        "the network and the end of those few images, too: against us), and this end.",
        ("what", "wall, s", "processor, s"),
    )
    for name, clock in found.items():
        table.add(name, clock.wall.show("{:.1f}"), clock.cpu.show("{:.1f}"))
    ends = {"theirs": found["torch-fidelity: FID"].cpu.values[0]}
    ends["ours"] = sum(clock.cpu.values[0] for name, clock in found.items() if name.startswith("ours"))
    pass_s = {name: sorted(each.cpu.values)[len(each.cpu.values) // 2] / (2 * images) for name, each in clocks.items()}
    whole = {name: pass_s[name] * 2 * count + ends[name] for name in ends}
    table.add("computed: torch-fidelity's FID alone, whole", "", f"{whole['theirs']:.0f}")
    table.add("computed: all Inception metrics, whole", "", f"{whole['ours']:.0f}")
    table.add("computed: ratio", "", f"{whole['ours'] / whole['theirs']:.2f}")
    return table


def _second(scene: Scene, rounds: int) -> Table:
    """What a further network costs the stage, beside its bare forward over images in memory."""
    worker = scene.evaluation(METRICS[:1] + tuple(SECOND))
    pixels = worker.samples.read(range(scene.images))
    table = Table(
        "Further networks beside their own forward",
        f"{scene.images} samples of {SIDE} pixels in batches of {BATCH}, one thread, {rounds} round(s); random weights. "
        "Forward: the bare network over images in memory. Stage: its units, reading, checks, files and ledger included, "
        "after those of the main network. End: its distance with error.",
        ("network", "forward, processor s", "stage, processor s", "stage over forward: wall", "processor", "end, s"),
    )
    for metric, key in SECOND.items():
        look = next(each for each in worker.looks if each.key == key)
        blocks = [block for block in worker.blocks if block.kind == evaluate.SAMPLES and block.look is look]
        units = [worker.unit_of(block) for block in blocks]
        network: Any = look.network(torch.device("cpu"))

        def forward(network: Any = network) -> None:
            with torch.inference_mode():
                for part in pixels.split(BATCH):
                    network.network(part)

        def stage(units: list[Unit] = units) -> None:
            shutil.rmtree(scene.run.ledger("evaluate"), ignore_errors=True)
            assert len(toy_run.do_units(scene.run, worker, units)) == len(units)

        forward()  # memory and kernels of the first pass are nobody's
        clocks = by_clocks({"forward": forward, "stage": stage}, rounds)
        ratio = clocks["stage"].over(clocks["forward"])
        width = network(pixels[:1]).features.shape[1]
        features = torch.rand(max(scene.images, 2 * width), width, generator=torch.Generator().manual_seed(5))
        reference = suite.Reference([features.square()])
        end = by_clocks({"": lambda m=metric, f=features, r=reference: _measured(m, f, r)}, 1)[""]
        name = SECOND_NAMES[key]
        spreads = (clocks["forward"].cpu.show(), clocks["stage"].cpu.show(), ratio.wall.show("{:.3f}"))
        table.add(name, *spreads, ratio.cpu.show("{:.3f}"), end.cpu.show())
    return table


def _measured(metric: str, features: torch.Tensor, reference: suite.Reference) -> None:
    suite.numbers([metric], [features], None, reference, suite.Choices(kid_subset_size=2))
