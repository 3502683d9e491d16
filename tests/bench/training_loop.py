"""(a) The training loop on two ranks against bare PyTorch loops that do the same maths.

All loops live in the same two processes and take turns: a round is a stretch of our loop, then the same number of steps
of each bare loop. The bare loops are what one would write for this model alone: torch's DistributedDataParallel, AdamW,
clipping, one average, nothing that could be resumed.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from facts import ROOT
from in_training import RANKS, make_run, run_ranks, train_with, write_result
from measure import Spread, Table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

CONFIG = ROOT / "job_configs" / "demo" / "mnist16.yaml"
OURS, READY, READY_SAME_KERNELS, OWN = "hpc-gen", "bare, ready", "bare, ready, deterministic", "bare, own reading"
ROWS, SIZE, CLASSES = 8_192, 16, 10
GLOBAL_BATCH = 64
Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # clean samples, timesteps, labels (null class included), noise


@dataclass(frozen=True)
class Settings:
    """Steps per stretch: `warm` of them do not count."""

    rounds: int
    warm: int
    timed: int

    @property
    def steps(self) -> int:
        """Steps of each loop."""
        return self.rounds * (self.warm + self.timed)


def bench(quick: bool) -> list[Table]:
    """One table: seconds per step of each loop and the ratio of ours to it."""
    from hpc_gen.data.write import write_table

    chosen = Settings(3, 1, 3) if quick else Settings(7, 4, 20)
    with tempfile.TemporaryDirectory(prefix="hpc-gen-bench-") as name:
        folder = Path(name)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (ROWS, 1, SIZE, SIZE), generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, CLASSES, (ROWS,), generator=generator)
        columns = {"pixels": pixels, "labels": labels}
        write_table(folder / "tables" / "bench", columns, shard_rows=1024, num_classes=CLASSES)
        np.save(folder / "pixels.npy", pixels.numpy())
        np.save(folder / "labels.npy", labels.numpy())
        resolved = make_run(folder, CONFIG, _overrides(quick, chosen))
        settings = {"rounds": chosen.rounds, "warm": chosen.warm, "timed": chosen.timed}
        found = run_ranks(__file__, folder, settings)
    return [_table(found, chosen, resolved.identity)]


def _overrides(quick: bool, settings: Settings) -> list[str]:
    images = settings.steps * GLOBAL_BATCH
    small = ["method.hidden=32", "method.depth=1"] if quick else []
    return [
        *small,
        "data.table=tables/bench",
        f"train.global_batch={GLOBAL_BATCH}",
        f"train.total_images={images}",
        "train.schedule.warmup_images=0",
        f"train.log_every={10 * GLOBAL_BATCH}",
        f"train.save_every={images}",
        "train.keep_every=null",
        "train.validate=null",
        "train.preview=null",
        "stages=[train]",
    ]


def _table(found: dict[str, Any], settings: Settings, identity: str) -> Table:
    told = {
        OURS: "hpc-gen: train stage, ddp engine, feed with draws and digest, journal",
        READY: "bare loop, the same batches and draws lying ready in memory",
        READY_SAME_KERNELS: "the same with torch's deterministic mode on, as hpc-gen sets it",
        OWN: "bare loop that reads a memmap and draws by torch's generator itself, in line",
    }
    table = Table(
        "Training loop, 2 ranks",
        f"Model of job_configs/demo/mnist16.yaml on random pixels ({found['parameters']:,} parameters, "
        f"global batch {GLOBAL_BATCH}, one thread per rank); {settings.rounds} rounds by turns of {settings.timed} steps that "
        f"count after {settings.warm} that do not. Mean loss of the first steps: hpc-gen {found['loss'][0]:.6f}, bare "
        f"{found['loss'][1]:.6f}. CPU time is that of rank 0, all threads. Ratio: wall time per step of hpc-gen over "
        "that of the row (issue 4 asks for at most 1.03 over a bare loop).",
        ("loop", "ms per step", "CPU ms per step", "ratio, wall", "ratio, CPU"),
        identity=identity,
    )
    wall = {name: Spread.of(values) for name, values in found["wall_s"].items()}
    cpu = {name: Spread.of(values) for name, values in found["cpu_s"].items()}
    for name, words in told.items():
        ratios = wall[OURS].over(wall[name]).show("{:.3f}"), cpu[OURS].over(cpu[name]).show("{:.3f}")
        table.add(words, wall[name].show("{:.1f}", 1e3), cpu[name].show("{:.1f}", 1e3), *ratios)
    return table


# -- what each rank does --------------------------------------------------------------------------------------------


class BareLoop:
    """A model, torch's DDP around it, AdamW, clipping and one average; one call of `step` per global batch."""

    def __init__(self, job: Any, table_classes: int) -> None:
        from hpc_gen.methods.energy.objective import ROLE, EnergyDiffusion
        from hpc_gen.methods.materialise import materialise

        config = job.config
        method = EnergyDiffusion(job.method.config, table_classes)
        self.model: nn.Module = materialise(method, seed=0)[ROLE]
        self.model.train()
        self.ddp = DistributedDataParallel(self.model, broadcast_buffers=False, gradient_as_bucket_view=True)
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.parameters = list(named.values())
        no_decay = [p for name, p in named.items() if p.ndim == 1 or name.endswith(".bias")]
        decay = [p for name, p in named.items() if not (p.ndim == 1 or name.endswith(".bias"))]
        weight_decay = config.optimizer.weight_decay
        self.optimizer = torch.optim.AdamW(
            [{"params": no_decay, "weight_decay": 0.0}, {"params": decay, "weight_decay": weight_decay}],
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
        )
        self.average = [p.detach().clone() for p in self.parameters]
        self.decay, self.clip = config.ema["main"].decay, config.optimizer.clip
        self.config, self.images = config, 0
        steps = job.method.config.diffusion_timesteps
        kept = torch.from_numpy(np.cumprod(1 - np.linspace(0.1 / steps, 20 / steps, steps)))
        self.signal, self.noise = kept.sqrt().float(), (1 - kept).sqrt().float()

    def step(self, batch: Batch) -> Tensor:
        """One step; the loss of this rank's share, detached."""
        x0, t, y, noise = batch
        x_t = self.signal[t].view(-1, 1, 1, 1) * x0 + self.noise[t].view(-1, 1, 1, 1) * noise
        loss = (noise - self.ddp(x_t, t, y)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.clip)
        low, peak = self.config.schedule.min_lr, self.config.learning_rate
        rate = low + (peak - low) * 0.5 * (1 + np.cos(np.pi * self.images / self.config.total_images))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_mul_(self.average, self.decay)
            torch._foreach_add_(self.average, self.parameters, alpha=1 - self.decay)
        self.images += self.config.global_batch
        return loss.detach()


def ready_batches(job: Any, settings: Settings, null: int) -> Iterator[Batch]:
    """The batches and draws of our own feed, all of them made before the clock starts."""
    dropout, found = job.method.config.label_dropout, []
    with job.open_feed(0, 0) as feed:
        for _ in range(settings.steps):
            micro = next(feed).micro_batches[0]
            draws = micro.draws["denoise"]
            y = torch.where(draws["drop"] < dropout, null, micro.batch["labels"])
            found.append((micro.batch["pixels"].float() / 127.5 - 1, draws["t"], y, draws["noise"]))
    return iter(found)


def own_batches(job: Any, folder: Path, null: int) -> Iterator[Batch]:
    """What such a loop does where draws need not be repeatable: a shuffled memmap, and a generator that runs on."""
    pixels, labels = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("pixels", "labels"))
    generator, rank = torch.Generator().manual_seed(job.ranks.rank), job.ranks.rank
    share, config = job.config.global_batch // job.ranks.world_size, job.method.config
    for epoch in range(1_000_000):
        order = np.random.default_rng(epoch).permutation(len(pixels))[rank :: job.ranks.world_size]
        for begin in range(0, len(order) - share + 1, share):
            rows = order[begin : begin + share]
            x0 = torch.from_numpy(pixels[rows]).float() / 127.5 - 1
            noise = torch.randn(x0.shape, generator=generator)
            t = torch.randint(0, config.diffusion_timesteps, (share,), generator=generator)
            dropped = torch.rand(share, generator=generator) < config.label_dropout
            yield x0, t, torch.where(dropped, null, torch.from_numpy(labels[rows])), noise


@dataclass
class Turns:
    """A periodic action after every step of our loop: times it, and lets the others run where a stretch ends."""

    job: Any
    settings: Settings
    others: dict[str, tuple[BareLoop, Iterator[Batch], bool]]
    wall_s: dict[str, list[float]] = field(default_factory=dict)
    cpu_s: dict[str, list[float]] = field(default_factory=dict)
    loss: list[float] = field(default_factory=list)
    _step: int = 0
    _begun: tuple[float, float] = (0.0, 0.0)

    def __call__(self, images_seen: int) -> dict[str, float]:
        """Between two steps of our loop."""
        self._step += 1
        place = self._step % (self.settings.warm + self.settings.timed)
        if place == self.settings.warm:
            self._begun = time.perf_counter(), time.process_time()
        if place == 0:
            self._note(OURS, self._begun)
            for name, (loop, batches, deterministic) in self.others.items():
                self._stretch(name, lambda loop=loop, batches=batches: loop.step(next(batches)), deterministic)
        return {}

    def _note(self, name: str, begun: tuple[float, float]) -> None:
        ended = time.perf_counter(), time.process_time()
        for found, begin, end in zip((self.wall_s, self.cpu_s), begun, ended):
            found.setdefault(name, []).append((end - begin) / self.settings.timed)

    def _stretch(self, name: str, step: Callable[[], Tensor], deterministic: bool) -> None:
        # our loop runs under torch.use_deterministic_algorithms; a bare one would not ask for it
        torch.use_deterministic_algorithms(deterministic)
        first = [step() for _ in range(self.settings.warm)]
        begun = time.perf_counter(), time.process_time()
        for _ in range(self.settings.timed):
            step()
        self._note(name, begun)
        torch.use_deterministic_algorithms(self.job.config.deterministic)
        if name == READY and len(self.loss) < 2:
            mean = torch.stack(first).double().mean().view(1)
            self.loss.append(float(self.job.ranks.all_reduce_sum_cpu(mean)) / RANKS)


def rank_body(folder: Path, settings: Settings) -> None:
    """One rank: our train stage with the bare loops in its pauses."""
    turns: list[Turns] = []

    def hook(job: Any) -> None:
        from hpc_gen.training.loop import Periodic

        null = job.method.num_classes
        others = {
            READY: (BareLoop(job, null), ready_batches(job, settings, null), False),
            READY_SAME_KERNELS: (BareLoop(job, null), ready_batches(job, settings, null), True),
            OWN: (BareLoop(job, null), own_batches(job, folder, null), False),
        }
        turns.append(Turns(job, settings, others))

        def first_loss(images_seen: int) -> dict[str, float]:
            if images_seen == settings.warm * job.config.global_batch:
                turns[0].loss.append(job.state.window["loss"] / job.state.window_steps)
            return {}

        every = job.config.global_batch
        job.periodic = [Periodic("first loss", every, first_loss), Periodic("turns", every, turns[0])]

    train_with(folder, hook)
    found = turns[0]
    same = abs(found.loss[0] - found.loss[1]) <= 1e-4 * abs(found.loss[0])
    assert same, f"the loops do not do the same maths: mean losses of the first steps {found.loss}"
    if found.job.ranks.is_main:
        parameters = sum(p.numel() for p in found.others[READY][0].model.parameters())
        content = {"wall_s": found.wall_s, "cpu_s": found.cpu_s, "loss": found.loss, "parameters": parameters}
        write_result(folder, content)


if __name__ == "__main__":
    rank_body(Path(sys.argv[1]), Settings(**json.loads(sys.argv[2])))
