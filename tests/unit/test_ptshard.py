"""One shard: deterministic bytes, the published layout, and refusal of everything that is not what the index says."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import pytest
import torch

from hpc_gen.data.index import ColumnInfo
from hpc_gen.data.ptshard import columns_of, content_sha256, open_shard, write_shard
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError

COLUMNS = {"pixels": ColumnInfo("uint8", (1, 4, 4)), "labels": ColumnInfo("int64", ())}


def make_columns(rows: int = 5) -> dict[str, torch.Tensor]:
    pixels = torch.arange(rows * 16).to(torch.uint8).reshape(rows, 1, 4, 4)
    return {"pixels": pixels, "labels": torch.arange(rows) % 3}


def test_bytes_depend_on_the_columns_alone(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.pt", make_columns())
    write_shard(tmp_path / "another_name.pt", make_columns())
    with commit.CommitStream(tmp_path / "streamed.pt") as stream:
        write_shard(stream, make_columns())
    contents = {path.read_bytes() for path in tmp_path.glob("*.pt")}
    assert len(contents) == 1
    assert stream.sha256 == commit.sha256_file(tmp_path / "a.pt")


def test_a_view_is_stored_without_what_lies_behind_it(tmp_path: Path) -> None:
    whole = make_columns(1000)
    part = {name: column[10:15] for name, column in whole.items()}
    write_shard(tmp_path / "part.pt", part)
    assert (tmp_path / "part.pt").stat().st_size < 4000
    shard = open_shard(tmp_path / "part.pt", COLUMNS, rows=5)
    assert all(torch.equal(shard[name], part[name]) for name in part)


def test_published_latent_layout_is_read(tmp_path: Path) -> None:
    """The reference writes torch.save(dict, path) with float16 moments of an image and of its flip."""
    reference = {
        "moments": torch.randn(6, 32, 4, 4).half(),
        "moments_flip": torch.randn(6, 32, 4, 4).half(),
        "labels": torch.arange(6),
    }
    path = tmp_path / "shard_00000.pt"
    torch.save(reference, path)
    shard = open_shard(path, columns_of(reference), rows=6, num_bytes=path.stat().st_size)
    assert all(torch.equal(shard[name], reference[name]) for name in reference)
    assert content_sha256(shard) == content_sha256(reference)


def test_content_hash_sees_names_dtypes_shapes_and_bytes() -> None:
    columns = make_columns()
    hashes = {
        content_sha256(columns),
        content_sha256({"pixels": columns["pixels"]}),
        content_sha256({"pixel": columns["pixels"], "labels": columns["labels"]}),
        content_sha256(columns | {"labels": columns["labels"].to(torch.int32)}),
        content_sha256(columns | {"pixels": columns["pixels"].reshape(5, 1, 2, 8)}),
        content_sha256(columns | {"labels": columns["labels"] + 1}),
    }
    assert len(hashes) == 6
    assert content_sha256(dict(reversed(columns.items()))) == content_sha256(columns)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.bool, torch.int32])
def test_any_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    columns = {"x": torch.arange(12).reshape(3, 4).to(dtype)}
    write_shard(tmp_path / "a.pt", columns)
    assert torch.equal(open_shard(tmp_path / "a.pt", columns_of(columns))["x"], columns["x"])


def test_columns_must_agree() -> None:
    with pytest.raises(DataError, match="one and the same number of rows"):
        write_shard(io.BytesIO(), {"a": torch.zeros(3), "b": torch.zeros(4)})
    with pytest.raises(DataError, match="at least 1"):
        write_shard(io.BytesIO(), {"a": torch.zeros(0)})
    with pytest.raises(DataError, match="at least 1"):
        write_shard(io.BytesIO(), {})


def test_missing_shard(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"shard .*gone\.pt cannot be opened \(No such file"):
        open_shard(tmp_path / "gone.pt")


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_truncated_shard(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "a.pt"
    write_shard(path, make_columns(500))
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if keep < 1 and keep else int(keep)])
    with pytest.raises(DataError, match=r"a\.pt has \d+ bytes, the index says"):
        open_shard(path, COLUMNS, 500, len(data))
    with pytest.raises(DataError, match=r"a\.pt cannot be read"):
        open_shard(path, COLUMNS, 500)


def test_no_code_is_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "pwned",))

    for number, saved in enumerate(
        [lambda p: torch.save({"x": Evil()}, p), lambda p: p.write_bytes(pickle.dumps(Evil()))]
    ):
        path = tmp_path / f"{number}.pt"
        saved(path)
        with pytest.raises(DataError, match="cannot be read"):
            open_shard(path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("columns", "rows", "message"),
    [
        ({"moments": ColumnInfo("float16", (4,))}, 5, r"has no column 'moments' \(it has \['labels', 'pixels'\]\)"),
        (
            {"pixels": ColumnInfo("float16", (1, 4, 4))},
            5,
            r"column 'pixels': rows are uint8 \[1, 4, 4\], the index says float16",
        ),
        ({"pixels": ColumnInfo("uint8", (3, 4, 4))}, 5, r"the index says uint8 \[3, 4, 4\]"),
        (COLUMNS, 6, "has 5 rows, the index says 6"),
    ],
)
def test_wrong_columns_or_rows(tmp_path: Path, columns: dict, rows: int, message: str) -> None:
    write_shard(tmp_path / "a.pt", make_columns())
    with pytest.raises(DataError, match=message):
        open_shard(tmp_path / "a.pt", columns, rows)


def test_not_a_dict_of_tensors(tmp_path: Path) -> None:
    for name, thing in {"list": [torch.zeros(3)], "nested": {"a": {"b": torch.zeros(3)}}, "number": 3}.items():
        torch.save(thing, tmp_path / f"{name}.pt")
        with pytest.raises(DataError, match="not a dict of tensors"):
            open_shard(tmp_path / f"{name}.pt")


def test_not_contiguous(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(4, 3).t()}, tmp_path / "a.pt")
    with pytest.raises(DataError, match="column 'x' is not contiguous"):
        open_shard(tmp_path / "a.pt", {"x": ColumnInfo("float32", (4,))})
