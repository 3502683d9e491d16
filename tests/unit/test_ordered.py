"""Reading along the order: the same rows as position by position, and a start anywhere costs the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpc_gen.data import order as ordering
from hpc_gen.data.feed import Feed, FeedPlan
from hpc_gen.data.order import BlockShuffle
from hpc_gen.data.ordered import OrderedReader
from hpc_gen.data.table import Table
from hpc_gen.data.write import write_table


def make(folder: Path, rows: int, shard_rows: int) -> Table:
    generator = torch.Generator().manual_seed(0)
    columns = {"x": torch.randn(rows, 3, generator=generator), "labels": torch.arange(rows) % 4}
    write_table(folder, columns, shard_rows=shard_rows, num_classes=4)
    return Table.open(folder)


@pytest.mark.parametrize(("shard_rows", "shuffle_shards"), [(5, 2), (1, 3), (7, 1), (64, 4)])
def test_the_same_rows_as_by_position(tmp_path: Path, shard_rows: int, shuffle_shards: int) -> None:
    table = make(tmp_path / "t", 43, shard_rows)
    reader = OrderedReader(table, BlockShuffle(table.shard_rows, 3, shuffle_shards), ("x", "labels"))
    plain = BlockShuffle(table.shard_rows, 3, shuffle_shards)
    everything = table.read(np.arange(43), ("x", "labels"))
    spans = [(n, n + 4) for n in range(0, 120, 4)] + [(7, 8), (100, 143), (0, 43), (10**6, 10**6 + 9), (3, 5)]
    for first, end in spans:
        rows, batch = reader.read(first, end)
        expected = plain.rows(np.arange(first, end))
        assert np.array_equal(rows, expected), (first, end)
        for name, column in everything.items():
            assert torch.equal(batch[name], column[torch.from_numpy(expected.copy())]), (name, first)
            assert batch[name].is_contiguous() and batch[name].dtype is column.dtype


def test_rows_of_a_block_cannot_be_changed_by_a_reader(tmp_path: Path) -> None:
    table = make(tmp_path / "t", 40, 5)
    reader = OrderedReader(table, BlockShuffle(table.shard_rows, 0, 4), ("x",))
    rows, batch = reader.read(0, 4)
    with pytest.raises(ValueError, match="read-only"):
        rows[0] = 1
    batch["x"].zero_()
    assert reader.read(0, 4)[1]["x"].abs().sum() > 0


def test_only_two_blocks_stay_mapped(tmp_path: Path) -> None:
    table = make(tmp_path / "t", 120, 5)
    reader = OrderedReader(table, BlockShuffle(table.shard_rows, 0, 3), ("x",))
    mapped = []
    for first in range(0, 480, 4):
        reader.read(first, first + 4)
        mapped.append(table.num_open)
    assert max(mapped) <= 6 and max(mapped[60:]) == max(mapped[:60])


def test_the_first_batch_after_a_resume_costs_the_same_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operations are counted, for times depend on the machine: shards opened, numbers permuted, batches read."""
    make(tmp_path / "t", 240, 10)
    counts: dict[str, int] = {}

    def counted(name: str, owner: Any, attribute: str, size: Any = lambda *args: 1) -> None:
        original = getattr(owner, attribute)

        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + size(*args)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, attribute, call)

    counted("permuted", ordering, "permutation", lambda seed, purpose, n, count: count)
    counted("opened", Table, "_open")
    counted("planned", Table, "plan", lambda table, rows, columns: len(rows))
    plan = FeedPlan(seed=1, global_batch=8, micro_batch=8, rank=0, world_size=1, columns=("x",), prefetch=1)

    def cost(position: int) -> dict[str, int]:
        counts.clear()
        fresh = Table.open(tmp_path / "t")
        feed = Feed(fresh, BlockShuffle(fresh.shard_rows, 1, 4), plan, lambda seen: [], position, 0, position + 8)
        with feed:
            next(feed)
        return dict(counts)

    at_the_start = cost(0)
    assert at_the_start == {"permuted": 24 + 40, "opened": 4, "planned": 40}
    for position in (8, 64, 232, 240 * 7 + 120, 240 * 10**9 + 16):
        assert cost(position) == at_the_start, position
