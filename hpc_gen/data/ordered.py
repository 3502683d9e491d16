"""Reading a table along its order: what a block of the order has in common is prepared once, not in every batch.

The rows of a block and their places in the mapped shards are found when the block begins (about a millisecond for
16,000 rows); a batch inside it is then one slice and one copy per column. The shards of the block that follows are
announced to the system then, so that a slow disk reads them whole and ahead, not page by page when a row is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from hpc_gen.data.mapped import Int64Array
from hpc_gen.data.table import RowReads, Table


class Order(Protocol):
    """What reading in order needs of one; `BlockShuffle` is one."""

    @property
    def shards_at_once(self) -> int:
        """Shards of the table that batches in order read from at a time."""
        ...

    def rows(self, positions: Int64Array) -> Int64Array:
        """Row of each position."""
        ...

    def block(self, position: int) -> tuple[int, Int64Array]:
        """The stretch of the order that holds a position: where it begins, and its rows."""
        ...


class OrderedReader:
    """Rows of a table by position. One instance belongs to one thread, as its order does."""

    def __init__(self, table: Table, order: Order, columns: Sequence[str]) -> None:
        """Nothing is opened yet."""
        table.keep_open(order.shards_at_once)
        self._table, self._order, self._columns = table, order, tuple(columns)
        self._first = self._end = 0  # positions of the block in hand
        self._is_new = False  # and whether the one that follows has yet to be announced
        self._next: tuple[int, Int64Array] | None = None  # the one that follows, once it was announced
        self._rows: Int64Array = np.empty(0, dtype=np.int64)
        self._planned: RowReads | None = None

    def read(self, first: int, end: int) -> tuple[Int64Array, dict[str, Tensor]]:
        """Positions `first` to `end`, at least one: their rows [n] and {column: Tensor [n, ...]}.

        Raises DataError as `Table.read`.
        """
        if not (self._first <= first and end <= self._end):
            block_first, rows = self._block(first)
            if end > block_first + len(rows):  # across blocks: rare, unless a block is smaller than a batch
                rows = self._order.rows(np.arange(first, end, dtype=np.int64))
                return rows, self._table.read(rows, self._columns)
            self._table.announce(rows)
            self._planned = self._table.plan(rows, self._columns)
            self._rows, self._first, self._end = rows, block_first, block_first + len(rows)
            self._is_new = True
        elif self._is_new:  # after the first batch, which somebody waits for
            self._is_new = False
            self._next = self._order.block(self._end)
            self._table.announce(self._next[1])
        assert self._planned is not None  # a block in hand has been planned
        begin, stop = first - self._first, end - self._first
        return self._rows[begin:stop], self._planned.read(begin, stop)

    def _block(self, position: int) -> tuple[int, Int64Array]:
        """The block that holds a position; the one that was announced is not shuffled a second time."""
        if self._next is not None and self._next[0] <= position < self._next[0] + len(self._next[1]):
            return self._next
        return self._order.block(position)
