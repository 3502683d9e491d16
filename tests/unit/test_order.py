"""The order of training: each row once per epoch, found in constant time, mixed within blocks of shards."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_gen.data.order import BlockShuffle
from hpc_gen.runtime.errors import UserError

PINNED = [
    [1, 5, 3, 0, 6, 4, 7, 2, 13, 11, 10, 9, 8, 12],
    [11, 10, 8, 9, 12, 13, 4, 2, 3, 5, 7, 6, 1, 0],
]
SHARDS = st.lists(st.integers(1, 40), min_size=1, max_size=25)


@given(shards=SHARDS, seed=st.integers(0, 2**63 - 1), block=st.integers(1, 30), epoch=st.integers(0, 10**9))
@settings(max_examples=150, deadline=None)
def test_each_epoch_visits_each_row_once(shards: list[int], seed: int, block: int, epoch: int) -> None:
    total = sum(shards)
    rows = BlockShuffle(shards, seed, block).rows(np.arange(epoch * total, (epoch + 1) * total))
    assert rows.dtype == np.int64
    assert np.array_equal(np.sort(rows), np.arange(total))


@given(shards=SHARDS, block=st.integers(1, 8), positions=st.lists(st.integers(0, 10**6), min_size=1, max_size=60))
@settings(max_examples=100, deadline=None)
def test_rows_is_a_function_of_the_position_alone(shards: list[int], block: int, positions: list[int]) -> None:
    together = BlockShuffle(shards, 3, block).rows(np.array(positions))
    one_by_one = [int(BlockShuffle(shards, 3, block).rows(np.array([p]))[0]) for p in positions]
    assert together.tolist() == one_by_one


def test_pinned_order() -> None:
    """The order belongs to every resumed run: it may not change from one version to the next."""
    order = BlockShuffle([5, 3, 4, 2], seed=7, shuffle_shards=2)
    assert order.rows(np.arange(14)).tolist() == PINNED[0]
    assert order.rows(np.arange(14 * 10**6, 14 * 10**6 + 14)).tolist() == PINNED[1]


def test_epochs_and_seeds_differ() -> None:
    shards = [64] * 16
    first = BlockShuffle(shards, 0, 4)
    orders = [first.rows(np.arange(e * 1024, (e + 1) * 1024)) for e in range(3)]
    orders += [BlockShuffle(shards, 1, 4).rows(np.arange(1024)), BlockShuffle(shards, 0, 5).rows(np.arange(1024))]
    assert len({order.tobytes() for order in orders}) == 5


def test_a_block_reads_from_few_shards_and_mixes_them() -> None:
    order = BlockShuffle([64] * 32, seed=0, shuffle_shards=4)
    shard_of = order.rows(np.arange(32 * 64)) // 64
    for block in range(8):
        here = shard_of[block * 256 : (block + 1) * 256]
        assert len(set(here.tolist())) == 4
        assert np.count_nonzero(np.diff(here)) > 150  # neighbours come from other shards three times in four


def test_seek_costs_the_same_anywhere() -> None:
    def seconds(position: int) -> float:
        best = float("inf")
        for _ in range(5):
            order = BlockShuffle([1024] * 200, 0, 16)
            begun = time.perf_counter()
            order.rows(np.arange(position, position + 256))
            best = min(best, time.perf_counter() - begun)
        return best

    near, far = seconds(0), seconds(10**12)
    assert far < 5 * near + 0.01


def test_batches_across_epochs_and_blocks() -> None:
    order = BlockShuffle([3, 3, 3], 1, 1)
    all_rows = order.rows(np.arange(90))
    for start in range(0, 80, 7):
        assert np.array_equal(order.rows(np.arange(start, start + 10)), all_rows[start : start + 10])
    assert order.rows(np.array([], dtype=np.int64)).size == 0


def test_refusals() -> None:
    with pytest.raises(UserError, match="at least one row"):
        BlockShuffle([], 0, 1)
    with pytest.raises(UserError, match="at least one row"):
        BlockShuffle([3, 0], 0, 1)
    with pytest.raises(UserError, match=r"data\.shuffle_shards must be at least 1, got 0"):
        BlockShuffle([3], 0, 0)
    with pytest.raises(AssertionError, match="0 or more"):
        BlockShuffle([3], 0, 1).rows(np.array([-1]))
