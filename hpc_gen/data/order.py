"""The order of training: a pure function from position to row (DESIGN section 4).

Block shuffle: each epoch permutes the shards, takes them in blocks of `shuffle_shards`, and permutes the rows of each
block, so a run reads from few shards at a time and still mixes well. Finding the row of a position costs the same
anywhere in the stream: nothing is replayed on resume.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hpc_gen.runtime.errors import UserError
from hpc_gen.runtime.randomness import permutation

Int64Array = npt.NDArray[np.int64]

KEPT_EPOCHS = 2
KEPT_BLOCKS = 8


@dataclass(frozen=True)
class _Epoch:
    shards: Int64Array  # shard numbers in this epoch's order
    block_starts: Int64Array  # [num_blocks + 1]: place in the epoch at which each block begins


class BlockShuffle:
    """Rows of a table in training order. One instance belongs to one thread (it keeps the last few blocks)."""

    def __init__(self, shard_rows: Sequence[int], seed: int, shuffle_shards: int) -> None:
        """`shard_rows`: rows of each shard in table order; `shuffle_shards`: shards per block."""
        if not shard_rows or min(shard_rows) < 1:
            raise UserError(f"an order needs shards of at least one row each, got {list(shard_rows)[:8]}")
        if shuffle_shards < 1:
            raise UserError(f"data.shuffle_shards must be at least 1, got {shuffle_shards}")
        self.seed = seed
        self.shuffle_shards = shuffle_shards
        self._shard_rows = np.asarray(shard_rows, dtype=np.int64)
        self._shard_starts = np.cumsum(self._shard_rows) - self._shard_rows
        self.num_rows = int(self._shard_rows.sum())
        self.num_blocks = -(-len(shard_rows) // shuffle_shards)
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._blocks: OrderedDict[int, Int64Array] = OrderedDict()

    @property
    def shards_at_once(self) -> int:
        """Shards that batches in order read from at a time: those of two blocks, for a batch may lie across both."""
        return 2 * self.shuffle_shards

    def rows(self, positions: npt.NDArray[np.int64]) -> Int64Array:
        """Row of each position, int64 [n]; positions may come in any order and cross epochs."""
        positions = np.asarray(positions, dtype=np.int64)
        assert positions.ndim == 1 and (positions.size == 0 or positions.min() >= 0), "positions are 0 or more"
        epochs, places = np.divmod(positions, self.num_rows)
        rows = np.empty_like(positions)
        for epoch_number in np.unique(epochs).tolist():
            epoch = self._epoch(epoch_number)
            in_epoch = np.flatnonzero(epochs == epoch_number)
            blocks = np.searchsorted(epoch.block_starts, places[in_epoch], side="right") - 1
            for block in np.unique(blocks).tolist():
                here = in_epoch[blocks == block]
                rows[here] = self._block(epoch_number, block)[places[here] - epoch.block_starts[block]]
        return rows

    def block(self, position: int) -> tuple[int, Int64Array]:
        """The block that holds a position: the position at which it begins, and its rows in order (read-only)."""
        epoch_number, place = divmod(position, self.num_rows)
        starts = self._epoch(epoch_number).block_starts
        block = int(np.searchsorted(starts, place, side="right")) - 1
        return epoch_number * self.num_rows + int(starts[block]), self._block(epoch_number, block)

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            shards = permutation(self.seed, "order/shards", number, len(self._shard_rows))
            ends = np.cumsum(self._shard_rows[shards])
            last = np.minimum(np.arange(1, self.num_blocks + 1) * self.shuffle_shards, len(shards)) - 1
            self._epochs[number] = _Epoch(shards, np.concatenate([[0], ends[last]]).astype(np.int64))
            while len(self._epochs) > KEPT_EPOCHS:
                self._epochs.popitem(last=False)
        return self._epochs[number]

    def _block(self, epoch_number: int, block: int) -> Int64Array:
        """Rows of one block in training order."""
        key = epoch_number * self.num_blocks + block
        if key in self._blocks:
            self._blocks.move_to_end(key)
            return self._blocks[key]
        first = block * self.shuffle_shards
        shards = self._epoch(epoch_number).shards[first : first + self.shuffle_shards]
        table_order = np.concatenate(
            [np.arange(self._shard_starts[s], self._shard_starts[s] + self._shard_rows[s]) for s in shards]
        )
        rows: Int64Array = table_order[permutation(self.seed, "order/block", key, table_order.size)]
        rows.setflags(write=False)
        self._blocks[key] = rows
        while len(self._blocks) > KEPT_BLOCKS:
            self._blocks.popitem(last=False)
        return rows
