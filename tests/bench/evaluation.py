"""(h) All Inception metrics from one pass against torch-fidelity's FID alone; second networks against their own forward.

Both on the same two folders of PNGs, by turns, one thread, weights random (in files of the published forms). Ours are
the units and the end of the evaluate stage: features of samples and reference, files and hashes included, then FID with
its error and extrapolation, sFID, KID, precision, recall, density, coverage and the inception score.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import Spread, Table, by_turns

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

import networks  # noqa: E402 - after the path that makes it importable
import toy_run  # noqa: E402

from eval_jobs import evaluate, sample  # noqa: E402
from eval_jobs.looks import MAIN, Look, look_at  # noqa: E402
from hpc_gen.metrics import fidelity  # noqa: E402
from hpc_gen.metrics.extractors import NetworkExtractor  # noqa: E402
from hpc_gen.sampling.images import png_bytes  # noqa: E402
from hpc_gen.stages.networks import extractor_spec  # noqa: E402

SIDE, BATCH = 32, 32
METRICS = "fid, sfid, kid, prc, density_coverage, isc"


def bench(quick: bool) -> list[Table]:
    """Two tables: the whole evaluation, the second networks."""
    torch.set_num_threads(1)
    images, rounds = (24, 1) if quick else (250, 1)
    with tempfile.TemporaryDirectory(prefix="hpc-gen-bench-") as name:
        return [_whole(Path(name), images, rounds), _second(Path(name), 8 if quick else 64, 1 if quick else 3)]


def _whole(folder: Path, images: int, rounds: int) -> Table:
    sha256 = networks.write_inception(folder / "inception.pth")
    toy_run.write_table(folder / "tables" / "train", rows=images, shard_rows=images, size=SIDE, channels=3)
    run, resolved = toy_run.make_run(
        folder,
        f"method.image_size={SIDE}",
        "method.channels=3",
        f"sample={{num_images: {images}, block_images: {images}, batch: {images}, settings: {{steps: 1}}}}",
        f"evaluate={{metrics: [{METRICS}], kid_subset_size: {images // 2}, batch: {BATCH}, "
        f"extractor: {{name: inception, weights: inception.pth, sha256: {sha256}}}, reference: {{images: real}}}}",
    )
    made = sample.worker(toy_run.context(run, resolved, folder, "sample"))
    toy_run.do_units(run, made)
    made.finish()
    (folder / "real").mkdir()
    pixels = torch.randint(
        0, 256, (images, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(2), dtype=torch.uint8
    )
    for i, image in enumerate(pixels):
        (folder / "real" / f"{i:05d}.png").write_bytes(png_bytes(image))

    def ours() -> None:
        for gone in (run.features("main"), run.ledger("evaluate"), run.metrics("main")):
            shutil.rmtree(gone) if gone.is_dir() else gone.unlink(missing_ok=True)
        worker = evaluate.worker(toy_run.context(run, resolved, folder, "evaluate"))
        toy_run.do_units(run, worker)
        worker.finish()

    def theirs(**wanted: bool) -> Callable[[], None]:
        def measure() -> None:
            fidelity._module("metrics").calculate_metrics(
                input1=str(run.samples("main") / "units"),
                input2=str(folder / "real"),
                feature_extractor="inception-v3-compat",
                feature_extractor_weights_path=str(folder / "inception.pth"),
                batch_size=BATCH,
                kid_subset_size=images // 2,
                samples_find_deep=True,
                save_cpu_ram=True,
                cuda=False,
                verbose=False,
                cache=False,
                **wanted,
            )

        return measure

    actions = {"fid": theirs(fid=True), "ours": ours}
    seconds = by_turns(actions, rounds, warm_up=0)
    torch.use_deterministic_algorithms(False)
    table = Table(
        f"Evaluation of {images} images against {images}",
        f"One thread, {SIDE} pixels, batches of {BATCH}; {rounds} round(s). Ours: {METRICS}, with errors.",
        ("what", "seconds", "over torch-fidelity's FID alone"),
    )
    for name, words in (
        ("fid", "torch-fidelity: FID alone"),
        ("ours", "evaluate stage: all Inception metrics"),
    ):
        table.add(words, seconds[name].show("{:.1f}"), seconds[name].over(seconds["fid"]).show("{:.2f}"))
    return table


def _second(folder: Path, images: int, rounds: int) -> Table:
    """What the stage adds to the forward pass of a network: hashes, checks, copies."""
    table = Table(
        "Second networks beside their own forward",
        f"{images} images of {SIDE} pixels in batches of {BATCH}, one thread, {rounds} rounds; random weights.",
        ("network", "forward, s", "stage, s", "stage over forward"),
    )
    for name, write in (("clip-vit-b-32", networks.write_whole_clip), ("dinov2-vit-s-14", networks.write_dinov2)):
        sha256 = write(folder / name)
        spec = extractor_spec(name, name, sha256, folder)
        network: Any = spec.build()
        assert isinstance(network, NetworkExtractor)
        pixels = torch.randint(
            0, 256, (images, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(3), dtype=torch.uint8
        )
        look = Look(MAIN, spec, ("fid",), None, network)
        names = [str(i) for i in range(images)]

        def forward(network: NetworkExtractor = network, pixels: torch.Tensor = pixels) -> None:
            with torch.inference_mode():
                for part in pixels.split(BATCH):
                    network.network(part)

        def stage(look: Look = look, pixels: torch.Tensor = pixels, names: list[str] = names) -> None:
            look_at(look, pixels, names, BATCH, torch.device("cpu"), lambda: None)

        seconds: dict[str, Spread] = by_turns({"forward": forward, "stage": stage}, rounds)
        ratio = seconds["stage"].over(seconds["forward"])
        table.add(name, seconds["forward"].show(), seconds["stage"].show(), ratio.show("{:.3f}"))
    return table
