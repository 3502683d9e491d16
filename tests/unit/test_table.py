"""A table: gathers are exact in any order, damage is found and named."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from hpc_gen.data.index import ColumnInfo, ShardInfo, TableIndex
from hpc_gen.data.ptshard import columns_of, content_sha256, write_shard
from hpc_gen.data.table import Table
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError

SIZES = [7, 4, 9, 1]


def make_table(folder: Path, sizes: list[int] = SIZES, num_classes: int = 5) -> dict[str, torch.Tensor]:
    """A table of odd shards; returns its columns in row order."""
    rows = sum(sizes)
    generator = torch.Generator().manual_seed(0)
    whole = {
        "pixels": torch.randint(0, 256, (rows, 3, 4, 4), generator=generator).to(torch.uint8),
        "moments": torch.randn(rows, 4, 2, 2, generator=generator).half(),
        "bf": torch.randn(rows, 3, generator=generator).bfloat16(),
        "labels": torch.randint(0, num_classes, (rows,), generator=generator),
    }
    folder.mkdir(parents=True, exist_ok=True)
    infos, start = [], 0
    for number, size in enumerate(sizes):
        part = {name: column[start : start + size] for name, column in whole.items()}
        path = folder / f"shard_{number:05d}.pt"
        write_shard(path, part)
        infos.append(ShardInfo(path.name, size, path.stat().st_size, commit.sha256_file(path), content_sha256(part)))
        start += size
    TableIndex(columns_of(whole), tuple(infos), num_classes=num_classes).write(folder)
    return whole


@pytest.mark.parametrize("open_shards", [1, 2, 256])
def test_read_gives_the_rows_in_the_order_asked(tmp_path: Path, open_shards: int) -> None:
    whole = make_table(tmp_path)
    table = Table.open(tmp_path)
    table.keep_open(open_shards)
    assert table.rows == 21 and table.shard_rows == SIZES
    rng = np.random.default_rng(0)
    for rows in (np.arange(21), rng.permutation(21), rng.integers(0, 21, 200), np.array([20]), np.array([3, 3, 3])):
        batch = table.read(rows, tuple(whole))
        for name, column in whole.items():
            assert batch[name].dtype == column.dtype
            assert torch.equal(batch[name], column[rows]), name
    assert torch.equal(table.read(torch.tensor([5, 0]), ("labels",))["labels"], whole["labels"][[5, 0]])
    assert table.read([], ("pixels",))["pixels"].shape == (0, 3, 4, 4)


def test_what_is_read_is_the_callers_own(tmp_path: Path) -> None:
    whole = make_table(tmp_path)
    table = Table.open(tmp_path)
    table.read([0, 1], ("labels",))["labels"].fill_(77)
    assert torch.equal(table.read([0, 1], ("labels",))["labels"], whole["labels"][:2])


def test_threads_share_a_table(tmp_path: Path) -> None:
    whole = make_table(tmp_path)
    table = Table.open(tmp_path)
    table.keep_open(2)
    wrong: list[object] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(100):
                rows = rng.integers(0, 21, 16)
                if not torch.equal(table.read(rows, ("pixels",))["pixels"], whole["pixels"][rows]):
                    wrong.append(rows)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_few_shards_stay_mapped_and_rows_read_before_stay(tmp_path: Path) -> None:
    whole = make_table(tmp_path)
    table = Table.open(tmp_path)
    table.keep_open(2)
    kept = [(n, table.read([n], ("moments", "bf"))) for n in (0, 8, 12, 20)]  # a row of each shard
    assert table.num_open == 2
    for n, batch in kept:  # copies: their shards may be gone
        assert torch.equal(batch["moments"], whole["moments"][[n]]) and torch.equal(batch["bf"], whole["bf"][[n]])
    planned = table.plan(np.array([0, 20, 3]), ("pixels",))
    table.read(np.arange(7, 20), ("pixels",))  # the other two shards: those of the plan are let go
    assert torch.equal(planned.read(0, 3)["pixels"], whole["pixels"][[0, 20, 3]])
    assert torch.equal(planned.read(1, 2)["pixels"], whole["pixels"][[20]])
    table.read(np.arange(21), ("labels",))  # all four at once
    assert table.num_open == 4
    table.read([0], ("labels",))
    table.keep_open(1)
    table.keep_open(3)
    assert torch.equal(table.read([8], ("labels",))["labels"], whole["labels"][[8]])


def test_shards_used_of_late_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_table(tmp_path)
    table = Table.open(tmp_path)
    table.keep_open(2)
    opened: list[int] = []
    original = table._mapped._open_shard
    monkeypatch.setattr(table._mapped, "_open_shard", lambda number: opened.append(number) or original(number))
    for rows in ([0], [8], [12], [8], [12], [0]):
        table.read(rows, ("labels",))
    assert opened == [0, 1, 2, 0]


def test_columns_that_lie_between_the_multiples_of_their_size(tmp_path: Path) -> None:
    """Such shards are not written by torch; the gather must not read them shifted."""
    whole = make_table(tmp_path)
    table = Table.open(tmp_path)
    original = table._mapped._open_shard

    def shifted(number: int) -> dict[str, torch.Tensor]:
        shard = original(number)
        memory = bytearray(1) + bytearray(shard["moments"].numpy().tobytes())
        moments = torch.frombuffer(memory, dtype=torch.uint8)[1:]
        crooked = torch.frombuffer(memory, dtype=torch.float16, offset=1)
        assert crooked.data_ptr() == moments.data_ptr()
        return {**shard, "moments": crooked.view_as(shard["moments"])}

    table._mapped._open_shard = shifted
    assert torch.equal(table.read(np.arange(21), ("moments",))["moments"], whole["moments"])


@pytest.mark.parametrize("sizes", [[4, 4, 4], [4, 4, 2], [4, 4, 6], [5, 4, 4]])
def test_shards_of_even_and_uneven_size(tmp_path: Path, sizes: list[int]) -> None:
    whole = make_table(tmp_path, sizes)
    table = Table.open(tmp_path)
    rows = np.random.default_rng(1).permutation(sum(sizes))
    assert torch.equal(table.read(rows, ("pixels",))["pixels"], whole["pixels"][rows])
    for outside in ([sum(sizes)], [0, sum(sizes) + 1], [-1]):
        with pytest.raises(DataError, match=f"has {sum(sizes)} rows; asked for"):
            table.read(outside, ("pixels",))


def test_bad_requests(tmp_path: Path) -> None:
    make_table(tmp_path)
    table = Table.open(tmp_path)
    with pytest.raises(DataError, match=r"has no column 'pixel' \(did you mean 'pixels'\?\)"):
        table.read([0], ("pixel",))
    for rows in ([21], [-1], [0, 10**12]):
        with pytest.raises(DataError, match="has 21 rows; asked for"):
            table.read(rows, ("pixels",))


def test_missing_shard_is_named(tmp_path: Path) -> None:
    make_table(tmp_path)
    (tmp_path / "shard_00001.pt").unlink()
    table = Table.open(tmp_path)
    table.read([0], ("labels",))  # rows of other shards can still be read
    with pytest.raises(DataError, match=r"shard_00001\.pt cannot be opened"):
        table.read([8], ("labels",))
    assert len(table.verify()) == 1
    with pytest.raises(DataError, match=r"failed verification: shard .*shard_00001\.pt"):
        Table.open(tmp_path, verify=True)


def test_truncated_shard_is_named(tmp_path: Path) -> None:
    make_table(tmp_path)
    path = tmp_path / "shard_00002.pt"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"shard_00002\.pt has \d+ bytes, the index says \d+"):
        Table.open(tmp_path).read([15], ("labels",))
    assert "shard_00002.pt" in Table.open(tmp_path).verify(full=False)[0]


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    make_table(tmp_path)
    path = tmp_path / "shard_00000.pt"
    good = path.read_bytes()
    for place in range(0, len(good), 97):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        problems = Table.open(tmp_path).verify()
        assert len(problems) == 1 and "shard_00000.pt" in problems[0], place
    path.write_bytes(good)
    assert Table.open(tmp_path, verify=True).verify() == []


def test_flipped_data_is_told_from_flipped_packing(tmp_path: Path) -> None:
    whole = make_table(tmp_path)
    path = tmp_path / "shard_00000.pt"
    good = path.read_bytes()
    place = good.index(whole["pixels"][3].numpy().tobytes())
    path.write_bytes(good[:place] + bytes([good[place] ^ 128]) + good[place + 1 :])
    assert "another SHA-256 than the index says (its rows differ)" in Table.open(tmp_path).verify()[0]


def test_unlisted_shard(tmp_path: Path) -> None:
    make_table(tmp_path)
    (tmp_path / "shard_00009.pt").write_bytes(b"x")
    assert "shard_00009.pt is not in the index" in Table.open(tmp_path).verify()[0]


def rewrite(folder: Path, number: int, change: dict[str, torch.Tensor | None]) -> None:
    """Replace columns of one shard and make the index's sizes fit, as a broken writer would."""
    index = TableIndex.read(folder)
    path = folder / index.shards[number].file
    columns = {name: t.clone() for name, t in torch.load(path, weights_only=True).items()} | change
    path.unlink()
    torch.save({name: t for name, t in columns.items() if t is not None}, path)
    shards = list(index.shards)
    shards[number] = ShardInfo(path.name, shards[number].rows, path.stat().st_size, commit.sha256_file(path), "0" * 64)
    TableIndex(index.columns, tuple(shards), index.num_classes).write(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "has no column 'labels'"),
        ({"labels": torch.zeros(4, dtype=torch.int32)}, "column 'labels': rows are int32"),
        (
            {"pixels": torch.zeros(4, 1, 4, 4, dtype=torch.uint8)},
            r"rows are uint8 \[1, 4, 4\], the index says uint8 \[3, 4, 4\]",
        ),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, "one and the same number of rows"),
        ({"labels": torch.tensor([0, 1, 2, 5])}, "labels run from 0 to 5, the index has 5 classes"),
        ({"labels": torch.tensor([0, 1, -1, 4])}, "labels run from -1 to 4"),
    ],
)
def test_shard_unlike_the_index(tmp_path: Path, change: dict, message: str) -> None:
    make_table(tmp_path)
    rewrite(tmp_path, 1, change)
    table = Table.open(tmp_path)
    with pytest.raises(DataError, match=rf"shard_00001\.pt.*{message}"):
        table.read([8], ("pixels",))
    assert len(table.verify()) == 1


def test_unlabelled_table_has_no_label_check(tmp_path: Path) -> None:
    make_table(tmp_path, num_classes=5)
    index = TableIndex.read(tmp_path)
    TableIndex(index.columns, index.shards, num_classes=0).write(tmp_path)
    assert Table.open(tmp_path).verify() == []


def test_unknown_dtype(tmp_path: Path) -> None:
    make_table(tmp_path)
    index = TableIndex.read(tmp_path)
    for name in ("float12", "nn"):
        TableIndex(dict(index.columns) | {"x": ColumnInfo(name, ())}, index.shards).write(tmp_path)
        with pytest.raises(DataError, match=f"unknown dtype '{name}'"):
            Table.open(tmp_path)


def test_a_moved_table_works(tmp_path: Path) -> None:
    make_table(tmp_path / "here")
    identity = Table.open(tmp_path / "here").identity
    (tmp_path / "here").rename(tmp_path / "there")
    table = Table.open(tmp_path / "there", verify=True)
    assert table.identity == identity
    assert json.loads((tmp_path / "there" / "index.json").read_text())["identity"] == identity
