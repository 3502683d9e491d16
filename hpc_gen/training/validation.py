"""Validation: the training loss on fixed rows of a held-out table with draws that never change."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from hpc_gen.config.experiment import ValidateConfig
from hpc_gen.data.table import Table
from hpc_gen.methods.protocol import Method, Turn
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
    poll: Callable[[], None],
) -> dict[str, float]:
    """Mean of each loss term over the first `num_images` rows, with the current weights of the engine's roles.

    Row i always gets the draws of (seed, seed_purpose, i), so the curve moves with the weights alone. Rank r takes
    every world-size-th block of rows; sums and counts meet in float64. Terms of several turns are prefixed by the
    turn's purpose.
    """
    rows = min(config.num_images, table.rows) // coupling_group * coupling_group
    if rows == 0:
        raise UserError(
            f"validation has no whole coupling group: {min(config.num_images, table.rows)} rows of {table.folder} and "
            f"train.coupling_group {coupling_group}; raise train.validate.num_images or encode more rows"
        )
    starts = range(0, rows, micro_batch)
    out: dict[str, float] = {}
    turns = method.turns(0, 0)
    for turn in turns:
        micros: list[MicroBatch] = []
        for start in starts[ranks.rank :: ranks.world_size]:
            poll()
            chosen = np.arange(start, min(start + micro_batch, rows))
            micros.append(_micro(method, turn, table, config, seed, chosen, coupling_group))
        means = engine.evaluate(turn, micros)
        prefix = f"{turn.purpose}/" if len(turns) > 1 else ""
        out.update({f"{prefix}{name}": value for name, value in means.items()})
    return out


def _micro(
    method: Method, turn: Turn, table: Table, config: ValidateConfig, seed: int, rows: np.ndarray, group: int
) -> MicroBatch:
    batch = table.read(rows, tuple(method.columns()))
    draws: dict[str, torch.Tensor] = {}
    for name, draw in method.draws(turn).items():
        ids = rows if draw.per == "sample" else rows[::group] // group
        draws[name] = Stream(seed, f"{config.seed_purpose}/{turn.purpose}/{name}").batch(draw, ids.tolist())
    return batch, draws
