"""What `hpc-gen prove-resume` makes of an experiment: the same method, data and numbers, a few hundred images long."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_gen.config import loader
from hpc_gen.config.engine import EngineConfig
from hpc_gen.config.experiment import TrainConfig
from hpc_gen.config.loader import Resolved
from hpc_gen.config.width import fits_engine
from hpc_gen.runtime.errors import UserError
from hpc_gen.stages import run_setup, width

BATCHES = 6  # global batches between two kills, where --images does not say it
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
"""Largest relative difference of a logged value between world sizes: their sums are formed in another order."""


@dataclass(frozen=True)
class Proof:
    """One proof: runs of `images` images, killed once in each of `kills` windows, on `world_sizes` ranks.

    The first size is that of the undisturbed run and of the run that must have its bytes; with more than one, another
    run changes to the next size at each resume. `resolved` is the shrunk experiment; `preparing`: its stages before
    training, by which the table is made where it is not there.
    """

    resolved: Resolved
    kills: int
    seed: int
    world_sizes: tuple[int, ...]
    window: int
    images: int
    batch: int
    preparing: tuple[str, ...] = ()

    @property
    def tolerance(self) -> float:
        """Of values in rows, for other world sizes."""
        return TOLERANCE[self.train.precision]

    @property
    def train(self) -> TrainConfig:
        """The shrunk train section."""
        assert self.resolved.experiment.train is not None
        return self.resolved.experiment.train


def make(
    config: Path | str,
    overrides: Sequence[str],
    *,
    kills: int,
    seed: int,
    images: int | None,
    world_sizes: Sequence[int] | None,
) -> Proof:
    """Shrink an experiment. Keys that the command line gives stay as given. Raises UserError, ConfigError."""
    given = run_setup.typed(loader.load(config, overrides))
    train = given.experiment.train
    if train is None:
        raise UserError(f"experiment '{given.experiment.name}' has no 'train' section, so there is nothing to resume")
    if kills < 1:
        raise UserError(f"--kills is {kills}; at least one kill proves something")
    sizes = tuple(world_sizes) if world_sizes else _default_sizes(train)
    _check_sizes(sizes, train.engine)
    chosen = {override.partition("=")[0] for override in overrides}
    micro = train.micro_batch if "train.micro_batch" in chosen else _micro(train)
    batch = train.global_batch if "train.global_batch" in chosen else 2 * math.lcm(*sizes) * (micro or 1)
    window = BATCHES * batch if images is None else images // (kills + 1) // batch * batch
    if window < 2 * batch:
        raise UserError(
            f"--images {images} leaves less than two batches of {batch} images between {kills} kills; give at least "
            f"{2 * batch * (kills + 1)}, fewer --kills or fewer --world-sizes"
        )
    total = window * (kills + 1)
    shrunk = _overrides(train, given.experiment.name, batch, micro, window, total, sizes)
    ours = [f"{key}={value}" for key, value in shrunk.items() if key not in chosen]
    resolved = run_setup.typed(loader.load(config, [*overrides, *ours]))
    order = given.experiment.stage_order()
    preparing = order[: order.index("train")] if "train" in order else []
    return Proof(resolved, kills, seed, sizes, window, total, batch, tuple(preparing))


def _default_sizes(train: TrainConfig) -> tuple[int, ...]:
    """The experiment's own number of ranks, and another: half of it, or two beside one."""
    base = width.choose_here(train)
    other = base // 2 if base > 1 else 2
    return (base, other) if fits_engine(train.engine, other) else (base,)


def _check_sizes(sizes: Sequence[int], engine: EngineConfig) -> None:
    if min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise UserError(f"--world-sizes are {', '.join(map(str, sizes))}; give different numbers of ranks, at least 1")
    for size in sizes:
        if not fits_engine(engine, size):
            raise UserError(
                f"--world-sizes has {size}, which train.engine.tensor_parallel = {engine.tensor_parallel} or "
                f"train.engine.shards = {engine.shards} does not divide; give multiples"
            )
    gpus = width.num_gpus()
    if gpus and max(sizes) > gpus:
        raise UserError(f"--world-sizes asks for {max(sizes)} ranks and there are {gpus} GPUs; give sizes up to {gpus}")


def _micro(train: TrainConfig) -> int:
    """Two samples, or one whole coupling group."""
    return max(2, train.coupling_group)


def _overrides(
    train: TrainConfig, name: str, batch: int, micro: int | None, window: int, total: int, sizes: Sequence[int]
) -> dict[str, str]:
    """Keys that make the experiment small, and quiet; what the method computes per image is left alone."""
    save = max(batch, window // 2 // batch * batch)
    shrunk = {
        "name": f"{name}-proof",
        "stages": "[train]",
        "tracking.wandb": "disabled",
        "notify": "null",
        "train.global_batch": str(batch),
        "train.micro_batch": str(micro),
        "train.total_images": str(total),
        "train.ranks": str(sizes[0]),
        "train.width": "null",
        "train.log_every": str(batch),
        "train.save_every": str(save),
        "train.keep_last": "2",
        "train.keep_every": "null",
        "train.stop_at_images": "null",
        "train.time_limit_s": "null",
        "train.schedule.warmup_images": str(min(train.schedule.warmup_images, window)),
        "train.preview": "null",
        "train.evaluate": "null",
    }
    if train.validate is not None:
        shrunk["train.validate.every_images"] = str(save)
        shrunk["train.validate.num_images"] = str(min(train.validate.num_images, 2 * batch))
    return shrunk


def lines(proof: Proof) -> list[str]:
    """What would be done, a line each."""
    train = proof.train
    sizes = ", ".join(map(str, proof.world_sizes))
    others = " and once more on changing numbers of ranks" if len(proof.world_sizes) > 1 else ""
    return [
        f"experiment  {proof.resolved.experiment.name}, identity {proof.resolved.identity}",
        f"training    {proof.images} images in global batches of {proof.batch}, micro-batches of {train.micro_batch}, "
        f"a checkpoint every {train.save_every} images, {train.precision}, engine {train.engine.name}",
        f"kills       {proof.kills}, one in each {proof.window} images, seed {proof.seed}{others}",
        f"world sizes {sizes}",
    ]
