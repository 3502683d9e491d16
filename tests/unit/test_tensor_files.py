"""Tensor files of others: every kind is read, and what we write is read by the library."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.runtime.tensor_files import Inert, metadata_of, read_nested, read_tensors, write_tensors
from tests.support.reference_file import WRITERS, official, refuses

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
DTYPES += [torch.int8, torch.uint8, torch.bool]


@pytest.mark.parametrize("writer", WRITERS)
def test_a_checkpoint_of_a_reference_is_read_and_its_classes_stay_inert(tmp_path: Path, writer: str) -> None:
    path = tmp_path / "checkpoint.pth"
    content = official(path, writer)
    found = read_nested(path)
    assert list(found) == list(content)
    for key in ("model", "model_ema"):
        assert list(found[key]) == list(content[key])
        assert all(torch.equal(found[key][name], value) for name, value in content[key].items())
        assert all(found[key][name].dtype == value.dtype for name, value in content[key].items())
    state = content["optimizer"]["state"][0]
    assert torch.equal(found["optimizer"]["state"][0]["exp_avg"], state["exp_avg"])
    assert found["optimizer"]["param_groups"][0]["params"] == [0, 1, 2, 3]
    assert (found["epoch"], found["scaler"], found["seen"]) == (7, content["scaler"], {"a", "b"})
    assert isinstance(found["args"], Inert) and found["args"].name == "argparse.Namespace"
    assert found["args"].state["model"] == "base" and found["args"].state["device"].name == "torch.device"
    assert isinstance(found["best"], Inert) and found["log"].items == [("loss", [0.5])]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_is_read_bit_for_bit(tmp_path: Path, dtype: torch.dtype, writer: str) -> None:
    tensor = (torch.arange(-6, 6) * 3).to(dtype).reshape(3, 4)
    content = {
        "a": tensor,
        "transposed": tensor.t(),
        "slice": tensor[1:, 1:],
        "scalar": tensor[2, 3],
        "none": tensor[:0],
    }
    torch.save(content, tmp_path / "a.pt", **WRITERS[writer])
    found = read_tensors(tmp_path / "a.pt")
    for name, value in content.items():
        assert found[name].dtype == dtype and found[name].shape == value.shape
        assert torch.equal(found[name], value), name
    if dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        return
    special = torch.tensor([float("nan"), float("inf"), -0.0, 6e-8], dtype=dtype)
    torch.save({"a": special}, tmp_path / "b.pt", **WRITERS[writer])
    assert read_tensors(tmp_path / "b.pt")["a"].view(torch.uint8).tolist() == special.view(torch.uint8).tolist()


@pytest.mark.parametrize("writer", WRITERS)
def test_views_of_one_storage_share_it_and_the_file_is_never_written(tmp_path: Path, writer: str) -> None:
    base = torch.arange(8.0)
    torch.save({"a": base, "b": base[2:6], "p": nn.Parameter(base[::2])}, tmp_path / "a.pt", **WRITERS[writer])
    before = (tmp_path / "a.pt").read_bytes()
    found = read_tensors(tmp_path / "a.pt")
    found["b"].fill_(-1.0)
    assert found["a"].tolist() == [0, 1, -1, -1, -1, -1, 6, 7] and found["p"].tolist() == [0, -1, -1, 6]
    assert not any(tensor.requires_grad for tensor in found.values())
    assert (tmp_path / "a.pt").read_bytes() == before


def test_tensors_outlive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({f"t{n}": torch.full((1000,), float(n)) for n in range(4)}, path)
    found = read_tensors(path)
    path.unlink()
    assert [float(found[f"t{n}"][-1]) for n in range(4)] == [0, 1, 2, 3]


def test_a_file_larger_than_the_memory_is_mapped_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.zeros(2**24)}, path)
    code = f"""
from hpc_gen.runtime.tensor_files import read_tensors
own = lambda: sum(int(line.split()[1]) for line in open("/proc/self/smaps") if line.startswith("Anonymous:"))
before = own()
found = read_tensors({str(path)!r})
assert float(found["a"].sum()) == 0.0
assert own() - before < 20_000, own() - before
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


# -- which part of the file is meant --------------------------------------------------------------------------------


def test_the_key_is_found_where_there_is_one_choice(tmp_path: Path) -> None:
    weights = {"a": torch.ones(2)}
    for content in (weights, {"model": weights}, {"state_dict": weights, "epoch": 3, "optimizer": {"state": {}}}):
        torch.save(content, tmp_path / "a.pt")
        assert list(read_tensors(tmp_path / "a.pt")) == ["a"]
    torch.save({"outer": {"inner": weights}, "x.y": {"b": torch.ones(1)}}, tmp_path / "a.pt")
    assert list(read_tensors(tmp_path / "a.pt", key="outer.inner")) == ["a"]
    assert list(read_tensors(tmp_path / "a.pt", key="x.y")) == ["b"]


def test_several_or_no_state_dicts_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    official(path)
    assert list(read_tensors(path, key="model_ema")) == list(read_tensors(path, key="model"))
    refuses(
        UserError,
        lambda: read_tensors(path),
        f"{path} holds several state dicts: model, model_ema; say which with --key",
    )
    refuses(
        UserError, lambda: read_tensors(path, key="model_emma"), "no entry 'model_emma' (did you mean 'model_ema'?)"
    )
    refuses(
        DataError,
        lambda: read_tensors(path, key="epoch"),
        "'epoch' is no state dict but a int; the file has: model (a dict)",
    )
    refuses(DataError, lambda: read_tensors(path, key="args"), "'args' is no state dict but a argparse.Namespace")
    refuses(DataError, lambda: read_tensors(path, key="scaler"), "its entry 'scale' is a float")
    for content, sentence in (({"epoch": 3}, "no state dict"), ([1, 2], "a list, not tensors"), ({}, "empty")):
        torch.save(content, path)
        refuses(DataError, lambda: read_tensors(path), sentence)


def test_the_hash_is_compared_before_anything_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(2)}, path)
    digest = commit.sha256_file(path)
    assert read_tensors(path, sha256=digest.upper())["a"].tolist() == [1, 1]
    refuses(DataError, lambda: read_tensors(path, sha256="0" * 64), f"has the SHA-256 {digest}, not {'0' * 64}")
    refuses(UserError, lambda: read_tensors(path, sha256="abc"), "'abc' is not a SHA-256")
    path.write_bytes(b"garbage")
    refuses(DataError, lambda: read_tensors(path, sha256=digest), "has the SHA-256")


# -- safetensors ----------------------------------------------------------------------------------------------------


def test_written_files_are_read_by_the_library_and_by_us(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file

    tensors = {f"t.{dtype}": (torch.arange(-6, 6) * 3).to(dtype).reshape(3, 4) for dtype in DTYPES}
    tensors |= {
        "odd": torch.arange(3, dtype=torch.uint8),
        "transposed": torch.randn(3, 5).t(),
        "scalar": torch.tensor(2.5),
    }
    tensors |= {"none": torch.empty(0, 3), "grad": nn.Parameter(torch.ones(2))}
    path = tmp_path / "below" / "a.safetensors"
    digest = write_tensors(path, tensors, {"b": "größer", "a": json.dumps({"x": 1})})
    assert digest == commit.sha256_file(path)
    for found in (load_file(path), read_tensors(path), read_nested(path, digest)):
        assert found.keys() == tensors.keys()
        assert all(
            torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in tensors.items()
        )
    assert metadata_of(path) == {"a": '{"x": 1}', "b": "größer"}
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata() == metadata_of(path)


def test_equal_content_gives_equal_bytes_in_any_order(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(3).half(), "a": torch.ones(2), "c": torch.ones(1, dtype=torch.bool)}
    metadata = {str(n): str(n) for n in range(20)}
    first = write_tensors(tmp_path / "1", tensors, metadata)
    second = write_tensors(tmp_path / "2", dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert first == second
    assert metadata_of(tmp_path / "1") == metadata
    write_tensors(tmp_path / "3", {}, {})
    assert metadata_of(tmp_path / "3") == {} and read_nested(tmp_path / "3") == {}


def test_a_write_is_whole_or_absent_at_every_kill(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    old = write_tensors(path, {"a": torch.zeros(4)}, {})
    new = None

    class Killed(BaseException):
        pass

    for point in range(1, 50):
        seen = [0]

        def observer(*_: Any, seen: list[int] = seen, point: int = point) -> None:
            seen[0] += 1
            if seen[0] == point:
                raise Killed

        commit.ops.observer, before = observer, commit.ops.observer
        try:
            new = write_tensors(path, {"a": torch.ones(4)}, {})
            break
        except Killed:
            assert commit.sha256_file(path) in (old, new or commit.sha256_file(path))
            assert read_tensors(path)["a"].unique().numel() == 1
        finally:
            commit.ops.observer = before
    assert new is not None and point > 3


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise UserError("disk full")

    monkeypatch.setattr(commit.ops, "write", full)
    refuses(UserError, lambda: write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(4)}, {}), "disk full")
    assert list(tmp_path.iterdir()) == []


def test_a_type_without_a_name_is_refused_before_a_file_appears(tmp_path: Path) -> None:
    for name, tensor in (("a", torch.ones(1, dtype=torch.complex64)), ("__metadata__", torch.ones(1))):
        refuses(
            DataError,
            lambda n=name, t=tensor: write_tensors(tmp_path / "a", {n: t}, {}),
            f"cannot write tensor '{name}'",
        )
    assert list(tmp_path.iterdir()) == []
