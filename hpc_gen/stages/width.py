"""How many ranks an attempt of training has: what is there, of the numbers that `train.width` allows.

The global batch, the order of rows, the draws and the schedule are functions of the clock, so they are the same at any
width; only the number of micro-batches that a rank accumulates changes.
"""

from __future__ import annotations

import os

from hpc_gen.config.experiment import TrainConfig
from hpc_gen.runtime.errors import UserError


def choose(config: TrainConfig, places: int, what: str = "places for ranks") -> int:
    """The largest width that fits into so many places; `train.ranks` where no width is given.

    Raises UserError, calling the places `what`, when not even the smallest fits.
    """
    if config.width is None:
        return config.ranks
    fitting = [width for width in config.width if width <= places]
    if not fitting:
        raise UserError(
            f"'train.width' = {config.width} allows no less than {min(config.width)} ranks, and there are {places} "
            f"{what}; ask for more, or allow {max(1, places)}"
        )
    return max(fitting)


def check(config: TrainConfig, world_size: int) -> None:
    """Refuse an attempt that a launcher (srun, torchrun) started with a number of ranks that is not allowed.

    Raises UserError naming the nearest number of ranks below that would do.
    """
    allowed = config.width
    if allowed is None or world_size in allowed:
        return
    smaller = [width for width in allowed if width < world_size]
    fix = f"start {max(smaller)} of them" if smaller else f"start at least {min(allowed)}"
    raise UserError(f"this attempt has {world_size} ranks, and 'train.width' allows {allowed}; {fix}")


def choose_here(config: TrainConfig) -> int:
    """The number of ranks for the local runner: one per GPU, else one per `train.threads` usable cores.

    A CPU is shared, if need be, so there the smallest width always starts.
    """
    if config.width is None:
        return config.ranks
    gpus = num_gpus()
    if gpus:
        return choose(config, gpus, "GPUs")
    return choose(config, max(_cores() // config.threads, min(config.width)))


def num_gpus() -> int:
    """GPUs that this process sees; 0 on a CPU."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
