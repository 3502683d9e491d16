"""Tensors written in pieces: torch and our reader get the whole; a source that changes is told; nothing half is left."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from shard_files import killed_at

from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError
from hpc_gen.runtime.tensor_files import Pieces, read_nested, read_tensors, write_tensors, write_torch


def rows(count: int = 1000, width: int = 7, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0)).to(dtype)


def in_pieces(tensor: torch.Tensor, piece: int) -> Pieces:
    return Pieces(tuple(tensor.shape), tensor.dtype, lambda: tensor.split(piece))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_torch_reads_what_came_in_pieces(tmp_path: Path, dtype: torch.dtype) -> None:
    whole, path = rows(dtype=dtype), tmp_path / "bank.pth"
    digest = write_torch(path, in_pieces(whole, 300))
    assert digest == commit.sha256_file(path)
    for mapped in (False, True):
        assert torch.equal(torch.load(path, weights_only=True, mmap=mapped), whole)
    assert torch.equal(read_nested(path), whole) and zipfile.ZipFile(path).testzip() is None


def test_a_dict_of_tensors_and_numbers(tmp_path: Path) -> None:
    path, big = tmp_path / "low.pth", rows()
    value = {"C": in_pieces(big, 64), "M": big[:5].T, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3),
             "latent_dim": 5, "large": 2**40, "minus": -129}  # fmt: skip
    write_torch(path, value)
    for found in (
        torch.load(path, weights_only=True),
        torch.load(path, weights_only=True, mmap=True),
        read_nested(path),
    ):
        assert list(found) == list(value)
        assert torch.equal(found["C"], big) and torch.equal(found["M"], big[:5].T) and found["scalar"] == 2.5
        assert found["empty"].shape == (0, 3) and (found["latent_dim"], found["large"], found["minus"]) == (
            5,
            2**40,
            -129,
        )
    assert all(
        each.data_ptr() % 64 == 0 for each in torch.load(path, mmap=True).values() if isinstance(each, torch.Tensor)
    )


def test_the_bytes_depend_on_the_content_alone(tmp_path: Path) -> None:
    whole = rows()
    digests = {
        write_torch(tmp_path / f"{n}.pth", each)
        for n, each in enumerate((whole, *(in_pieces(whole, p) for p in (1, 9, 1000))))
    }
    assert len(digests) == 1
    one = write_tensors(tmp_path / "a.safetensors", {"x": whole, "y": whole[:3]}, {"k": "v"})
    two = write_tensors(tmp_path / "b.safetensors", {"x": in_pieces(whole, 77), "y": whole[:3]}, {"k": "v"})
    assert one == two and torch.equal(read_tensors(tmp_path / "b.safetensors")["x"], whole)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (rows(999), "999 rows came of a tensor of 1000"),
        (rows(1001), "does not belong to a tensor"),
        (
            rows(1000, 6),
            "a piece of torch.float32 \\[400, 6\\] does not belong to a tensor of torch.float32 \\[1000, 7\\]",
        ),
        (rows(dtype=torch.float16), "a piece of torch.float16"),
    ],
)
@pytest.mark.parametrize("name", ["bank.pth", "bank.safetensors"])
def test_pieces_of_another_tensor_are_refused_and_nothing_is_left(
    tmp_path: Path, name: str, made: torch.Tensor, words: str
) -> None:
    other = Pieces((1000, 7), torch.float32, lambda: made.split(400))
    with pytest.raises(DataError, match=words):
        if name.endswith(".pth"):
            write_torch(tmp_path / name, other)
        else:
            write_tensors(tmp_path / name, {"x": other}, {})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match=r"cannot write a tensor of torch\.bool in pieces"):
        write_torch(tmp_path / name, torch.zeros(3, dtype=torch.bool))


def test_killed_at_any_write_the_old_file_stands(tmp_path: Path) -> None:
    path, old, new = tmp_path / "bank.pth", rows(30), rows(500_000, 1)
    operation = 0
    while True:
        write_torch(path, old)
        killed = killed_at(operation, lambda: write_torch(path, in_pieces(new, 200_000)))
        found = read_nested(path)
        assert any(found.shape == whole.shape and torch.equal(found, whole) for whole in (old, new))
        if not killed:
            assert torch.equal(read_nested(path), new)
            break
        operation += 1
    assert operation > 5
