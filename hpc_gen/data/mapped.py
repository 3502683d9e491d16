"""Shards that are mapped into memory, and the gather of rows from all of them in one call per column.

A batch of a shuffled order takes a few rows from each of many shards. One numpy call per shard costs more than the
copy itself, and a loop over rows costs a fifth on top of it; so all open shards are seen as one byte array, and one
indexed read collects the rows, each from its own address.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.stride_tricks import as_strided
from torch import Tensor

from hpc_gen.data.index import ColumnInfo

Int64Array = npt.NDArray[np.int64]
Shard = dict[str, Tensor]  # column -> tensor [rows of the shard, ...], each row contiguous

_FOREIGN = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8, torch.float8_e5m2: torch.uint8}
NOT_OPEN = np.iinfo(np.int64).min // 2  # stays negative whatever offset of a row is added


@dataclass(frozen=True)
class _Column:
    """One column of all open shards.

    `rows_at` [numbers from the first shard to the last]: element a, of all bytes of a row, is the row that begins a
    numbers after the first shard's. Between the shards lies memory that is not ours: only rows of open shards are ever
    indexed.
    `first` [shards]: where row 0 of the *table* would begin if all rows lay as those of this shard do; NOT_OPEN for
    shards that are not mapped.
    """

    rows_at: npt.NDArray[np.void]
    first: Int64Array
    steps: int | Int64Array  # numbers from one row to the next: the row's own, more in tars; of all shards or of each
    shape: tuple[int, ...]  # of a row
    held: np.dtype[Any]
    stored: torch.dtype | None  # where numpy lacks it: `held` is then an integer of its size


@dataclass(frozen=True)
class _Window:
    """The shards open at one moment. A reader keeps the window it began with, so nothing is unmapped under it."""

    shards: Mapping[int, Shard]
    columns: Mapping[str, _Column]


class PlannedRows:
    """Rows whose places in memory are known; their shards stay mapped as long as this lives."""

    def __init__(self, window: _Window, places: Mapping[str, Int64Array]) -> None:
        """`places`: where each row begins in each column of the window."""
        self._window = window
        named = [(name, found, window.columns[name]) for name, found in places.items()]
        # tuples, and no look-up per batch: beside the copy of a batch each call counts
        self._parts = [(name, found, c.rows_at, np.dtype((c.held, c.shape)), c.stored) for name, found, c in named]

    def read(self, begin: int, end: int) -> dict[str, Tensor]:
        """Rows number `begin` to `end` of the plan, at least one: {column: Tensor [n, ...]}, the caller's own."""
        batch: dict[str, Tensor] = {}
        for name, places, rows_at, row, stored in self._parts:
            rows = torch.from_numpy(rows_at[places[begin:end]].view(row))
            batch[name] = rows if stored is None else rows.view(stored)
        return batch


class MappedShards:
    """Open shards of one table, at most `limit` and those of the last plan. Safe to share between threads."""

    def __init__(
        self, starts: Int64Array, columns: Mapping[str, ColumnInfo], open_shard: Callable[[int], Shard], limit: int
    ) -> None:
        """`starts` [shards + 1]: first row of each shard, then the number of rows. `open_shard` maps one shard."""
        self.limit = limit
        self._starts, self._open_shard = starts, open_shard
        sizes = np.diff(starts)
        self._even = int(sizes[0]) if (sizes[:-1] == sizes[0]).all() and sizes[-1] <= sizes[0] else 0  # rows per shard
        self._columns = columns
        self._lock = threading.Lock()
        self._window = self._see({})

    @property
    def num_open(self) -> int:
        """Shards that are mapped now."""
        return len(self._window.shards)

    def missing(self, rows: Int64Array) -> list[int]:
        """The shards of these rows that are not mapped now, in order; rows outside the table have none."""
        shards = self._window.shards
        return [number for number in _each_once(self._shard_of(rows), len(self._starts) - 1) if number not in shards]

    def plan(self, rows: Int64Array, columns: Sequence[str]) -> PlannedRows | None:
        """Open the shards of rows [n], n >= 1, and find each row in them; None: a row is outside the table."""
        if int(rows.min()) < 0 or int(rows.max()) >= self._starts[-1]:
            return None
        shard_of = self._shard_of(rows)
        window = self._window
        places = _places(window, rows, shard_of, columns)
        if places is None:
            window = self._open(shard_of)
            places = _places(window, rows, shard_of, columns)
            assert places is not None, "a shard was opened and is not open"
        return PlannedRows(window, places)

    def _shard_of(self, rows: Int64Array) -> Int64Array:
        """The shard of each row."""
        if self._even:  # a twentieth of the time of the search
            return rows // self._even
        return self._starts.searchsorted(rows, side="right") - 1

    def _open(self, shard_of: Int64Array) -> _Window:
        """A window that holds all these shards; others leave it, those that were asked for longest ago first."""
        with self._lock:
            shards = dict(self._window.shards)
            needed = _each_once(shard_of, len(self._starts) - 1)
            for number in needed:  # in the order in which they were asked for; only looked at when one is missing
                shards[number] = shards.pop(number, None) or _aligned(self._open_shard(number))
            for number in list(shards)[: max(0, min(len(shards) - self.limit, len(shards) - len(needed)))]:
                del shards[number]
            self._window = self._see(shards)
            return self._window

    def _see(self, shards: Mapping[int, Shard]) -> _Window:
        """The window of these shards."""
        numbers = np.array(sorted(shards), dtype=np.int64)
        columns: dict[str, _Column] = {}
        for name, column in self._columns.items():
            dtype: torch.dtype = getattr(torch, column.dtype)
            held = _as_numpy(torch.empty(0, dtype=dtype)).dtype
            row_numbers = math.prod(column.shape)
            row_type = f"V{row_numbers * dtype.itemsize}"
            first = np.full(len(self._starts) - 1, NOT_OPEN, dtype=np.int64)
            steps: int | Int64Array = row_numbers
            rows_at: npt.NDArray[np.void] = np.empty(0, dtype=row_type)
            if len(numbers):
                tensors = [shards[number][name] for number in numbers.tolist()]
                addresses = np.array([tensor.data_ptr() for tensor in tensors]) // dtype.itemsize
                lowest = int(addresses.argmin())
                addresses -= addresses[lowest]
                apart = np.array([_step(tensor, row_numbers) for tensor in tensors], dtype=np.int64)
                lasts = addresses + apart * (np.diff(self._starts)[numbers] - 1)
                row = _as_numpy(tensors[lowest][0].reshape(-1)).view(row_type)
                rows_at = as_strided(row, (int(lasts.max()) + 1,), (dtype.itemsize,), writeable=False)  # they overlap
                first[numbers] = addresses - self._starts[numbers] * apart
                if (apart == apart[0]).all():
                    steps = int(apart[0])
                else:
                    steps = np.full(len(self._starts) - 1, row_numbers, dtype=np.int64)
                    steps[numbers] = apart
            stored = dtype if dtype in _FOREIGN else None
            columns[name] = _Column(rows_at, first, steps, column.shape, held, stored)
        return _Window(shards, columns)


def _places(
    window: _Window, rows: Int64Array, shard_of: Int64Array, columns: Sequence[str]
) -> dict[str, Int64Array] | None:
    """Where each row begins in each column of the window; None when a row is in no shard of it."""
    found: dict[str, Int64Array] = {}
    for name in columns:
        column = window.columns[name]
        steps = column.steps if isinstance(column.steps, int) else column.steps[shard_of]
        places = column.first[shard_of] + rows * steps
        if places.min() < 0:
            return None
        found[name] = places
    return found


def _each_once(numbers: Int64Array, count: int) -> list[int]:
    """The numbers below `count`, each once, in order: a fiftieth of the time that sorting them takes."""
    seen = np.zeros(count, dtype=bool)
    seen[numbers[(numbers >= 0) & (numbers < count)]] = True
    found: list[int] = seen.nonzero()[0].tolist()
    return found


def _step(tensor: Tensor, row_numbers: int) -> int:
    """Numbers from one row of a shard to the next."""
    return tensor.stride(0) if len(tensor) > 1 else row_numbers


def _aligned(shard: Shard) -> Shard:
    """A shard whose numbers lie at multiples of their size, as torch packs them; copied where another tool did not."""
    return {name: t if t.data_ptr() % t.element_size() == 0 else t.clone().contiguous() for name, t in shard.items()}


def _as_numpy(tensor: Tensor) -> npt.NDArray[Any]:
    """The same memory; dtypes that numpy lacks as integers of their size."""
    if tensor.dtype in _FOREIGN:
        tensor = tensor.view(_FOREIGN[tensor.dtype])
    array: npt.NDArray[Any] = tensor.numpy()
    return array
