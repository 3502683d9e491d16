"""Shards that are mapped into memory, and the gather of rows from all of them in one call per column.

A batch of a shuffled order takes a few rows from each of many shards. One numpy call per shard costs more than the
copy itself, and a loop over rows costs a fifth on top of it; so all open shards are seen as one byte array, and one
indexed read collects the rows, each from its own address.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.stride_tricks import as_strided
from torch import Tensor

from hpc_gen.data.index import ColumnInfo

Int64Array = npt.NDArray[np.int64]
Shard = dict[str, Tensor]  # column -> contiguous tensor [rows of the shard, ...]

NOT_OPEN = np.iinfo(np.int64).min // 2  # stays negative whatever offset of a row is added


@dataclass(frozen=True)
class _Column:
    """One column of all open shards.

    `rows_at` [bytes from the first to the last shard, bytes per row]: element a is the row that begins a bytes after
    the first shard's. Between the shards lies memory that is not ours; only rows of open shards are ever indexed.
    `first` [shards + 1]: where row 0 of the *table* would begin if all rows lay as those of this shard do; NOT_OPEN for
    shards that are not mapped and, at the end, for rows outside the table.
    """

    rows_at: npt.NDArray[np.uint8]
    first: Int64Array
    row_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Window:
    """The shards open at one moment. A reader keeps the window it began with, so nothing is unmapped under it."""

    shards: Mapping[int, Shard]
    columns: Mapping[str, _Column]


@dataclass(frozen=True)
class PlannedRows:
    """Rows whose places in memory are known; their shards stay mapped as long as this lives."""

    _window: _Window
    _places: Mapping[str, Int64Array]

    def read(self, begin: int, end: int) -> dict[str, Tensor]:
        """Rows number `begin` to `end` of the plan, at least one: {column: Tensor [n, ...]}, the caller's own."""
        batch: dict[str, Tensor] = {}
        for name, places in self._places.items():
            column = self._window.columns[name]
            found = torch.frombuffer(column.rows_at[places[begin:end]], dtype=column.dtype)
            batch[name] = found.view(-1, *column.shape)
        return batch


class MappedShards:
    """Open shards of one table, at most `limit` and those of the last plan. Safe to share between threads."""

    def __init__(
        self, starts: Int64Array, columns: Mapping[str, ColumnInfo], open_shard: Callable[[int], Shard], limit: int
    ) -> None:
        """`starts` [shards + 1]: first row of each shard, then the number of rows. `open_shard` maps one shard."""
        self.limit = limit
        self._starts, self._open_shard = starts, open_shard
        self._dtypes = {name: getattr(torch, column.dtype) for name, column in columns.items()}
        self._shapes = {name: column.shape for name, column in columns.items()}
        self._lock = threading.Lock()
        self._window = self._see({})

    @property
    def num_open(self) -> int:
        """Shards that are mapped now."""
        return len(self._window.shards)

    def plan(self, rows: Int64Array, columns: Sequence[str]) -> PlannedRows | None:
        """Open the shards of rows [n], n >= 1, and find each row in them; None: a row is outside the table."""
        shard_of = self._starts.searchsorted(rows, side="right") - 1  # -1 and `shards` meet the end of `first`
        window = self._window
        places = _places(window, rows, shard_of, columns)
        if places is None:
            if int(shard_of.min()) < 0 or int(shard_of.max()) >= len(self._starts) - 1:
                return None
            window = self._open(shard_of)
            places = _places(window, rows, shard_of, columns)
            assert places is not None, "a shard was opened and is not open"
        return PlannedRows(window, places)

    def _open(self, shard_of: Int64Array) -> _Window:
        """A window that holds all these shards; others leave it, those that were asked for longest ago first."""
        with self._lock:
            shards = dict(self._window.shards)
            needed = np.unique(shard_of).tolist()
            for number in needed:  # in the order in which they were asked for; only looked at when one is missing
                shards[number] = shards.pop(number, None) or self._open_shard(number)
            for number in list(shards)[: max(0, min(len(shards) - self.limit, len(shards) - len(needed)))]:
                del shards[number]
            self._window = self._see(shards)
            return self._window

    def _see(self, shards: Mapping[int, Shard]) -> _Window:
        """The window of these shards."""
        numbers = np.array(sorted(shards), dtype=np.int64)
        columns: dict[str, _Column] = {}
        for name, shape in self._shapes.items():
            row_bytes = int(np.prod(shape, dtype=np.int64)) * self._dtypes[name].itemsize
            tensors = [shards[number][name] for number in numbers.tolist()]
            first = np.full(len(self._starts), NOT_OPEN, dtype=np.int64)
            rows_at = np.empty((0, row_bytes), dtype=np.uint8)
            if tensors and row_bytes:
                addresses = [tensor.data_ptr() for tensor in tensors]
                lowest = addresses.index(min(addresses))
                end = max(address + tensor.nbytes for address, tensor in zip(addresses, tensors, strict=True))
                seen = tensors[lowest].view(-1).view(torch.uint8).numpy()
                places = end - addresses[lowest] - row_bytes + 1
                rows_at = as_strided(seen, (places, row_bytes), (1, 1), writeable=False)
                first[numbers] = np.array(addresses) - addresses[lowest] - self._starts[numbers] * row_bytes
            columns[name] = _Column(rows_at, first, row_bytes, self._dtypes[name], shape)
        return _Window(shards, columns)



def _places(
    window: _Window, rows: Int64Array, shard_of: Int64Array, columns: Sequence[str]
) -> dict[str, Int64Array] | None:
    """Where each row begins in each column of the window; None when a row is in no shard of it."""
    found: dict[str, Int64Array] = {}
    for name in columns:
        column = window.columns[name]
        places = column.first[shard_of] + rows * column.row_bytes
        if places.min() < 0:
            return None
        found[name] = places
    return found
