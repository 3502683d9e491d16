"""index.json: what it must hold, what its identity covers, and how odd ones are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hpc_gen.data.index import INDEX_NAME, ColumnInfo, ShardInfo, TableIndex
from hpc_gen.runtime.errors import DataError


def make_index() -> TableIndex:
    return TableIndex(
        columns={"pixels": ColumnInfo("uint8", (1, 4, 4)), "labels": ColumnInfo("int64", ())},
        shards=(
            ShardInfo("shard_00000.pt", 8, 1000, "a" * 64, "b" * 64),
            ShardInfo("shard_00001.pt", 3, 900, "c" * 64, "d" * 64),
        ),
        num_classes=10,
        class_names=tuple("0123456789"),
        tokenizer={"name": "identity"},
        statistics={"columns": {"pixels": {"mean": [1.5], "std": [0.25]}}},
        recipe={"source": "mnist", "image_size": 4},
        bad_images=("train/x.png: not a readable image",),
    )


def test_round_trip(tmp_path: Path) -> None:
    index = make_index()
    index.write(tmp_path)
    read = TableIndex.read(tmp_path)
    assert read == index
    assert read.rows == 11
    document = json.loads((tmp_path / INDEX_NAME).read_text())
    assert document["identity"] == index.identity
    assert {"columns", "shards", "rows", "tokenizer", "statistics", "num_classes", "class_names", "recipe"} <= set(
        document
    )
    assert str(tmp_path) not in (tmp_path / INDEX_NAME).read_text()


@pytest.mark.parametrize(
    "changes",
    [
        {"columns": {"pixels": ColumnInfo("uint8", (1, 4, 4))}},
        {"columns": {"pixels": ColumnInfo("uint8", (3, 4, 4)), "labels": ColumnInfo("int64", ())}},
        {"num_classes": 11},
        {"class_names": tuple("abcdefghij")},
        {"tokenizer": {"name": "vae"}},
        {"recipe": {"source": "mnist", "image_size": 8}},
        {"shards": make_index().shards[:1]},
        {"shards": make_index().shards[::-1]},
    ],
)
def test_identity_covers_what_changes_numbers(changes: dict) -> None:
    assert replace(make_index(), **changes).identity != make_index().identity


def test_identity_leaves_out_files_and_what_follows_from_the_rest() -> None:
    index = make_index()
    other_files = tuple(replace(s, file="x" + s.file, bytes=1, sha256="e" * 64) for s in index.shards)
    assert replace(index, shards=other_files, statistics={}, bad_images=()).identity == index.identity


def test_no_index(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no index\.json; name an encoded table"):
        TableIndex.read(tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        TableIndex.read(tmp_path / "absent")
    (tmp_path / "shard_00000.pt").write_bytes(b"x")
    with pytest.raises(DataError, match=r"holds shards but no index\.json"):
        TableIndex.read(tmp_path)


def edit(folder: Path, **changes: object) -> None:
    make_index().write(folder)
    path = folder / INDEX_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "hpc-gen-table-9"}, "is not an index of format"),
        ({"rows": 12}, "says rows 12 but its own fields give 11"),
        ({"num_classes": 9}, "says identity .* it was edited or damaged"),
        ({"shards": []}, "no shards"),
        ({"shards": [{"file": "a"}]}, "lacks or misstates a field"),
        ({"shards": [{"file": "../a", "rows": 1, "bytes": 1, "sha256": "", "content": ""}]}, "outside the table"),
        ({"shards": [{"file": "/a", "rows": 1, "bytes": 1, "sha256": "", "content": ""}]}, "outside the table"),
        ({"shards": [{"file": "a", "rows": 0, "bytes": 1, "sha256": "", "content": ""}]}, "0 rows"),
        ({"columns": {"pixels": 3}}, "lacks or misstates a field"),
        ({"columns": None}, "lacks or misstates a field"),
    ],
)
def test_odd_index_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    edit(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        TableIndex.read(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00\xff", '{"format": 3}'])
def test_garbage_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX_NAME).write_text(text)
    with pytest.raises(DataError, match=INDEX_NAME):
        TableIndex.read(tmp_path)
