"""`shards stats`: mean and standard deviation of a column by channel, exact over all rows or over a drawn part."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpc_gen.data.statistics import ChannelSums
from hpc_gen.data.table import Table
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.runtime.progress import Progress
from hpc_gen.runtime.randomness import permutation

ROWS_AT_ONCE = 1024

Say = Callable[[str], None]


def channel_statistics(table: Table, column: str, rows: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Mean, population and unbiased standard deviation of each channel of a column [N, C, ...], in float64.

    `rows`: over so many rows drawn by `seed`; None: over all. Raises UserError for a column without channels, DataError
    when a value is not finite.
    """
    info = table.index.columns.get(column)
    if info is None:
        raise UserError(f"table {table.folder} has no column {column!r}; it has {', '.join(table.index.columns)}")
    if not info.shape:
        raise UserError(f"column {column!r} of {table.folder} is one number per row and has no channels")
    picked = np.arange(table.rows)
    if rows is not None and rows < table.rows:
        picked = np.sort(permutation(seed, "shards/stats", 0, table.rows)[:rows])
    total: ChannelSums | None = None
    with Progress(len(picked), f"stats of {column}", unit="rows") as progress:
        for begin in range(0, len(picked), ROWS_AT_ONCE):
            part = table.read(picked[begin : begin + ROWS_AT_ONCE], (column,))[column]
            if part.dtype.is_floating_point and not bool(torch.isfinite(part).all()):
                where = f"table {table.folder}, column {column!r}"
                raise DataError(f"{where} holds values that are not finite; encode it again")
            own = ChannelSums.of(part)
            total = own if total is None else ChannelSums.merge([total, own])
            progress.update(begin + len(part))
    assert total is not None  # a table has rows
    found = total.mean_and_std()
    unbiased = [std * math.sqrt(total.count / max(1, total.count - 1)) for std in found["std"]]
    return {"column": column, "rows": len(picked), **found, "std_unbiased": unbiased, "table": table.identity}


def write_statistics(path: Path, found: dict[str, Any], shape: tuple[int, ...], say: Say) -> None:
    """`.pt`: {mean, std} float32 [1, C, 1, ...], as latents_stats.pt of LightningDiT and GMem; `.json`: all numbers.

    The std of the .pt is the unbiased one, as theirs.
    Raises UserError for another ending.
    """
    if path.suffix == ".json":
        commit.write_json(path, found)
    elif path.suffix == ".pt":
        like = (1, shape[0], *(1 for _ in shape[1:]))
        tensors = {
            name: torch.tensor(found[key], dtype=torch.float32).reshape(like)
            for name, key in (("mean", "mean"), ("std", "std_unbiased"))
        }
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        commit.write_bytes(path, buffer.getvalue())
    else:
        raise UserError(f"{path} ends with neither .pt nor .json; name one of these")
    say(f"{path}: mean and std of {shape[0]} channels over {found['rows']:,} rows")


def lines(found: dict[str, Any], table: Table) -> list[str]:
    """For people: the column's channels, then the histogram of the labels where the index has one."""
    told = [f"{found['column']}, {found['rows']:,} rows"]
    for channel, (mean, std) in enumerate(zip(found["mean"], found["std"], strict=True)):
        told.append(f"  channel {channel:3d}  mean {mean:12.6f}  std {std:12.6f}")
    histogram = table.index.statistics.get("label_histogram", {})
    counts = sorted(histogram.values())
    if counts:
        told.append(f"classes {len(counts)}, rows per class {counts[0]:,} to {counts[-1]:,}")
    return told
