"""Validation: the training loss on fixed rows of a held-out table with draws that never change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial

import numpy as np
import torch

from hpc_gen.config.experiment import ValidateConfig
from hpc_gen.data.table import Table
from hpc_gen.methods.protocol import Method, Turn
from hpc_gen.runtime.agreement import Shared
from hpc_gen.runtime.errors import UserError
from hpc_gen.runtime.randomness import Stream
from hpc_gen.runtime.ranks import Ranks
from hpc_gen.training.engines.base import Engine, MicroBatch


def validate(
    method: Method,
    engine: Engine,
    table: Table,
    config: ValidateConfig,
    *,
    seed: int,
    micro_batch: int,
    coupling_group: int,
    ranks: Ranks,
    shared: Shared,
) -> dict[str, float]:
    """Mean of each loss term over the first `num_images` rows, with the current weights of the engine's roles.

    Row i always gets the draws of (seed, seed_purpose, i), so the curve moves with the weights alone. Rank r takes
    every world-size-th block of rows; sums and counts meet in float64. Terms of several turns are prefixed by the
    turn's purpose. `shared` opens a stretch of work in which all ranks look at the stop token, at each micro-batch;
    StopRequested comes out on all of them.
    """
    rows = min(config.num_images, table.rows) // coupling_group * coupling_group
    if rows == 0:
        raise UserError(
            f"validation has no whole coupling group: {min(config.num_images, table.rows)} rows of {table.folder} and "
            f"train.coupling_group {coupling_group}; raise train.validate.num_images or encode more rows"
        )
    starts = range(0, rows, micro_batch)[ranks.rank :: ranks.world_size]
    blocks = [np.arange(start, min(start + micro_batch, rows)) for start in starts]
    out: dict[str, float] = {}
    turns = method.turns(0, 0)
    for turn in turns:
        make = partial(_micro, method, turn, table, config, seed, coupling_group)
        with closing(_one_by_one(blocks, make, shared)) as micros:
            means = engine.evaluate(turn, micros)
        prefix = f"{turn.purpose}/" if len(turns) > 1 else ""
        out.update({f"{prefix}{name}": value for name, value in means.items()})
    return out


def _one_by_one(
    blocks: Sequence[np.ndarray], make: Callable[[np.ndarray], MicroBatch], shared: Shared
) -> Iterator[MicroBatch]:
    """Micro-batches of one rank; it ends only when those of all ranks have ended, so that the sums can meet."""
    with shared() as poll:
        for rows in blocks:
            poll()
            yield make(rows)


def _micro(
    method: Method, turn: Turn, table: Table, config: ValidateConfig, seed: int, group: int, rows: np.ndarray
) -> MicroBatch:
    batch = table.read(rows, tuple(method.columns()))
    draws: dict[str, torch.Tensor] = {}
    for name, draw in method.draws(turn).items():
        ids = rows if draw.per == "sample" else rows[::group] // group
        draws[name] = Stream(seed, f"{config.seed_purpose}/{turn.purpose}/{name}").batch(draw, ids.tolist())
    return batch, draws
