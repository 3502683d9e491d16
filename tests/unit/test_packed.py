"""Shards that are packed alike are mapped without being parsed: the same tensors, and the same sentences for bad ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from shard_files import DAMAGES, latents

from hpc_gen.data import packed, table
from hpc_gen.data.index import LABELS
from hpc_gen.data.order import BlockShuffle
from hpc_gen.data.ordered import OrderedReader
from hpc_gen.data.ptshard import open_shard
from hpc_gen.data.table import Table
from hpc_gen.data.write import write_table
from hpc_gen.runtime.errors import DataError


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that torch has opened."""
    names: list[str] = []

    def watched(path: Path, *rest: object, **named: object) -> dict[str, torch.Tensor]:
        names.append(path.name)
        return open_shard(path, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(packed, "open_shard", watched)
    return names


def test_only_the_first_shard_of_each_size_is_parsed(tmp_path: Path, parsed: list[str]) -> None:
    columns = latents(52)
    write_table(tmp_path, columns, shard_rows=8, num_classes=4)
    found = Table.open(tmp_path).read(np.arange(52), tuple(columns))
    assert parsed == ["shard_00000.pt", "shard_00006.pt"]  # the last one is shorter
    assert all(torch.equal(found[name], columns[name]) for name in columns)


def test_what_lies_otherwise_is_parsed(tmp_path: Path, parsed: list[str]) -> None:
    columns = latents(16)
    write_table(tmp_path / "a", columns, shard_rows=8)
    shared = torch.arange(16.0).reshape(8, 2)
    torch.save({"x": shared, "y": shared, LABELS: torch.arange(8)}, tmp_path / "a" / "s.pt")  # one storage for two
    opener = packed.ShardOpener({})
    for _ in range(2):
        found = opener.open(tmp_path / "a" / "s.pt", 8, (tmp_path / "a" / "s.pt").stat().st_size, "says")
        assert torch.equal(found["x"], shared) and torch.equal(found["y"], shared)
    assert parsed == ["s.pt", "s.pt"]
    half = {"moments": columns["moments"][:8], "moments_flip": columns["moments_flip"][:8], LABELS: torch.arange(8)}
    torch.save(half, tmp_path / "a" / "shard_00001.pt")  # the file's name stands inside: another directory
    size = (tmp_path / "a" / "shard_00001.pt").stat().st_size
    first = packed.ShardOpener({})
    first.open(tmp_path / "a" / "shard_00001.pt", 8, size, "says")
    torch.save({**half, "moments": half["moments"].bfloat16()}, tmp_path / "a" / "shard_00001.pt")
    again = first.open(tmp_path / "a" / "shard_00001.pt", 8, (tmp_path / "a" / "shard_00001.pt").stat().st_size, "says")
    assert again["moments"].dtype == torch.bfloat16  # the same size and places, another pickle


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_behind_a_good_one(tmp_path: Path, damage: str) -> None:
    write_table(tmp_path, latents(24), shard_rows=8, num_classes=4)
    opened = Table.open(tmp_path)
    opened.read([0], (LABELS,))
    DAMAGES[damage](tmp_path / "shard_00001.pt")
    if damage == "bit-flipped":
        assert len(opened.verify()) == 1
        return
    with pytest.raises(DataError, match=r"shard \S+shard_00001.pt (has \d+ bytes, the index says|cannot be opened)"):
        opened.read([9], (LABELS,))


def test_a_file_of_the_right_size_and_the_wrong_content(tmp_path: Path) -> None:
    write_table(tmp_path, latents(24), shard_rows=8, num_classes=4)
    opened = Table.open(tmp_path)
    opened.read([0], (LABELS,))
    path = tmp_path / "shard_00001.pt"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DataError, match=r"shard_00001.pt cannot be read \(.*\); restore it or encode the table again"):
        opened.read([9], (LABELS,))


def test_the_block_that_follows_is_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_table(tmp_path, latents(64), shard_rows=8, num_classes=4)
    announced: list[str] = []
    monkeypatch.setattr(table, "will_need", lambda paths: announced.extend(path.name for path in paths))
    opened = Table.open(tmp_path)
    order = BlockShuffle(opened.shard_rows, 0, 2)
    reader = OrderedReader(opened, order, (LABELS,))
    reader.read(0, 4)

    def shards(position: int) -> set[str]:
        return {f"shard_{row // 8:05d}.pt" for row in order.block(position)[1].tolist()}

    assert set(announced) == shards(0)  # whoever waits for the first batch pays for no more
    announced.clear()
    reader.read(4, 8)
    assert set(announced) == shards(16)
    announced.clear()
    reader.read(8, 12)
    assert not announced
    reader.read(16, 20)
    reader.read(20, 24)
    assert shards(32) <= set(announced) <= shards(16) | shards(32)


def test_an_announced_file_that_is_gone_is_for_the_reader_to_say(tmp_path: Path) -> None:
    table._advise(tmp_path / "missing.pt")
    (tmp_path / "there.pt").write_bytes(bytes(9))
    table.will_need([tmp_path / "there.pt", tmp_path / "missing.pt"])
    table.will_need([])
