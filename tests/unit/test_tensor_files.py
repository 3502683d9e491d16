"""Tensor files of others: every kind is read, nothing of them is run, and what is wrong is one sentence."""

from __future__ import annotations

import argparse
import builtins
import collections
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError, ExitCode, HpcGenError, UserError
from hpc_gen.runtime.tensor_files import Inert, metadata_of, read_nested, read_tensors, write_tensors

WRITERS = {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
DTYPES += [torch.int8, torch.uint8, torch.bool]


def official(path: Path, writer: str = "zip") -> dict[str, Any]:
    """A checkpoint as the references write them: two state dicts, optimizer, numbers, a pickled Namespace."""
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    content = {
        "model": network.state_dict(),
        "model_ema": collections.OrderedDict((k, v * 2) for k, v in network.state_dict().items()),
        "optimizer": optimizer.state_dict(),
        "epoch": 7,
        "scaler": {"scale": 65536.0, "growth": [1, 2]},
        "args": argparse.Namespace(model="base", device=torch.device("cpu")),
        "best": np.float64(1.5),
        "seen": {"a", "b"},
        "log": collections.defaultdict(list, {"loss": [0.5]}),
    }
    torch.save(content, path, **WRITERS[writer])
    return content


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


# -- damaged and hostile files --------------------------------------------------------------------------------------


def refuses(kind: type[HpcGenError], action: Callable[[], Any], part: str) -> str:
    """`action` raises exactly `kind` with one sentence that holds `part`."""
    with pytest.raises(kind, match=re.escape(part)) as info:
        action()
    assert type(info.value) is kind and "\n" not in str(info.value)
    return str(info.value)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_file_cut_anywhere_or_with_a_flipped_bit_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.bin"
    weights = {"a": torch.arange(300.0), "b": torch.arange(7)}
    write_tensors(path, weights, {}) if kind == "safetensors" else torch.save({"model": weights}, path, **WRITERS[kind])
    whole = path.read_bytes()
    for size in [*range(0, 60, 12), *range(60, len(whole) - 1, 331), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(DataError) as info:
            read_tensors(path)
        assert str(path) in str(info.value) and "\n" not in str(info.value), size
    if kind == "zip":  # the others have no checksums of their own: --sha256 is for that
        at = whole.index(torch.arange(300.0).numpy().tobytes()[:400])
        path.write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
        refuses(DataError, lambda: read_tensors(path), "is cut off or damaged")


def test_random_damage_never_does_more_than_refuse(tmp_path: Path) -> None:
    """Bytes of the pickle itself replaced, with checksums off: any outcome but our two errors or a value is a bug."""
    torch.save(official(tmp_path / "a.pt"), tmp_path / "b.pt")
    with zipfile.ZipFile(tmp_path / "b.pt") as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    generator = np.random.default_rng(0)
    outcomes = collections.Counter()
    for _ in range(150):
        damaged = bytearray(members["b/data.pkl"])
        for _ in range(generator.integers(1, 4)):
            damaged[generator.integers(len(damaged))] = generator.integers(256)
        path = rezip(tmp_path / "c.pt", {**members, "b/data.pkl": bytes(damaged)})
        try:
            read_nested(path)
            outcomes["read"] += 1
        except DataError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
    assert outcomes["refused"] > 50


def rezip(path: Path, members: dict[str, bytes], **options: Any) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def hostile(path: Path, pickled: bytes, storages: dict[str, bytes] | None = None, **extra: bytes) -> Path:
    """A zip file of torch with this pickle and these storages."""
    members = {"a/data.pkl": pickled, "a/byteorder": b"little", "a/version": b"3\n"}
    members |= {f"a/data/{key}": content for key, content in (storages or {}).items()}
    return rezip(path, members | {f"a/{name}": content for name, content in extra.items()})


class Call:
    """Pickles as a call of anything."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.reduced = (function, args)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


@pytest.mark.parametrize("protocol", range(1, 6))
def test_calls_of_a_hostile_pickle_are_never_made(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "executed"
    calls = [
        Call(os.system, f"touch {mark}"),
        Call(eval, f"open({str(mark)!r}, 'w')"),
        Call(builtins.exec, f"open({str(mark)!r}, 'w')"),
        Call(getattr, Call(__import__, "os"), "system"),
        Call(subprocess.Popen, ["touch", str(mark)]),
        Call(open, str(mark), "w"),
        Call(torch.load, str(mark)),
        Call(nn.Linear, 10**6, 10**6),
        Call(np.zeros, 10**12),
    ]
    for call in calls:
        for value in ({"a": call}, [call], call):
            found = read_nested(hostile(tmp_path / "a.pt", pickle.dumps(value, protocol)))
            inner = found["a"] if isinstance(found, dict) else found[0] if isinstance(found, list) else found
            assert isinstance(inner, Inert)
            assert not mark.exists()


@pytest.mark.parametrize(
    ("pickled", "sentence"),
    [
        (b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00idQ.", "something that is not a storage"),
        (b"\x80\x02((X\x01\x00\x00\x000QQ.", "refused"),  # persistent ids of persistent ids
        (b"Pfile\n.", "instruction PERSID"),
        (b"\x80\x02\x82\x01.", "instruction EXT1"),
        (b"\x80\x02K\x01K\x02R.", "calls something that is not a named function"),
        (b"\x80\x02]}b.", "sets attributes of a list"),
        (b"\x80\x02K\x01K\x02a.", "appends to a int"),
        (b"\x80\x02}(K\x01u.", "a key without a value"),
        (b"\x80\x02}]K\x01s.", "a key that is neither text nor a number"),
        (b"\x80\x02}" + b")" + b"\x85" * 20_000 + b"K\x01s.", "a key that is neither text nor a number"),
        (b"\x80\x02u.", "closes what it never opened"),
        (b"\x80\x02\x87.", "empty stack"),
        (b"\x80\x02.", "cannot be read"),
        (b"\x80\x02h\x05.", "cannot be read"),
        (b"\x80\x02K\x01", "cannot be read"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"abc.", "cannot be read"),
        (b"\x80\x02\x8a\xff" + b"\x01" * 3, "cannot be read"),
        (b"I" + b"9" * 5000 + b"\n.", "cannot be read"),
        (b"\xff\xfe.", "cannot be read"),
        (b"", "cannot be read"),
        (b"\x80\x02ccollections\nOrderedDict\nK\x05\x85R.", "cannot be read"),
        (b"\x80\x02K\x01K\x02\x93.", "something that is not text"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "cannot be read"),
        (b"\x80\x02ctorch._utils\n_rebuild_parameter\nK\x01\x85R.", "not a tensor"),
    ],
)
def test_a_pickle_out_of_shape_is_one_sentence(tmp_path: Path, pickled: bytes, sentence: str) -> None:
    refuses(DataError, lambda: read_nested(hostile(tmp_path / "a.pt", pickled)), sentence)


class TensorPickler(pickle.Pickler):
    """Pickles `Storage`s as torch's persistent ids."""

    def persistent_id(self, value: Any) -> Any:
        return value.identity if isinstance(value, Storage) else None


class Storage:
    def __init__(self, *identity: Any) -> None:
        self.identity = identity


def tensor_file(path: Path, identity: tuple[Any, ...], *args: Any, stored: bytes = bytes(16), **extra: bytes) -> Path:
    """A file with one tensor: its storage's persistent id, then offset, size, stride, as the case wants them."""
    stream = io.BytesIO()
    call = Call(torch._utils._rebuild_tensor_v2, Storage(*identity), *args, False, collections.OrderedDict())
    TensorPickler(stream, 2).dump({"a": call})
    return hostile(path, stream.getvalue(), {"0": stored}, **extra)


FLOATS = ("storage", torch.FloatStorage, "0", "cpu", 4)


def test_the_crafted_file_is_right_before_it_is_made_wrong(tmp_path: Path) -> None:
    assert read_tensors(tensor_file(tmp_path / "a.pt", FLOATS, 0, (2, 2), (2, 1)))["a"].tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("identity", "args", "sentence"),
    [
        (FLOATS, (1, (4,), (1,)), "reaches beyond its storage of 4 values"),
        (FLOATS, (0, (2, 2), (3, 1)), "reaches beyond its storage"),
        (FLOATS, (0, (2**40,), (0,)), "reaches beyond its storage"),  # terabytes from one value, if it were copied
        (FLOATS, (0, (2**61, 2**61), (1, 1)), "reaches beyond its storage"),
        (FLOATS, (-1, (2,), (1,)), "not made of counts"),
        (FLOATS, (0, (-2,), (1,)), "not made of counts"),
        (FLOATS, (0, (2,), (-1,)), "not made of counts"),
        (FLOATS, (2**80, (2,), (1,)), "not made of counts"),
        (FLOATS, (0, (True,), (1,)), "not made of counts"),
        (FLOATS, (0, (2.0,), (1,)), "not made of counts"),
        (FLOATS, (0, (2, 2), (1,)), "without a proper shape"),
        (FLOATS, (0, [2], [1]), "without a proper shape"),
        (FLOATS, (0, (1,) * 40, (1,) * 40), "without a proper shape"),
        (FLOATS[:4] + (400,), (0, (4,), (1,)), "has 16 bytes, but the file says 1600"),
        (FLOATS[:4] + (-4,), (0, (4,), (1,)), "in a way that torch does not"),
        (("storage", torch.FloatStorage, "7", "cpu", 4), (0, (4,), (1,)), "lacks the storage '7'"),
        (("storage", torch.FloatStorage, "../x", "cpu", 4), (0, (4,), (1,)), "lacks the storage '../x'"),
        (("storage", torch.FloatStorage, 0, "cpu", 4), (0, (4,), (1,)), "in a way that torch does not"),
        (("storage", os.system, "0", "cpu", 4), (0, (4,), (1,)), "a storage of the type posix.system"),
        (("storage", "torch.FloatStorage", "0", "cpu", 4), (0, (4,), (1,)), "in a way that torch does not"),
        (("module", torch.FloatStorage, "0", "cpu", 4), (0, (4,), (1,)), "something that is not a storage"),
        (FLOATS[:4], (0, (4,), (1,)), "something that is not a storage"),
    ],
)
def test_a_tensor_that_is_not_in_its_file_is_refused(
    tmp_path: Path, identity: tuple[Any, ...], args: tuple[Any, ...], sentence: str
) -> None:
    path = tensor_file(tmp_path / "a.pt", identity, *args)
    assert str(path) in refuses(DataError, lambda: read_nested(path), sentence)


def test_zip_files_that_torch_would_not_write_are_refused(tmp_path: Path) -> None:
    path, pickled = tmp_path / "a.pt", pickle.dumps({"a": 1}, 2)
    assert read_nested(hostile(path, pickled)) == {"a": 1}
    for members, options, sentence in (
        ({"a/data.pkl": pickled, "a/byteorder": b"big"}, {}, "big-endian"),
        ({"a/data.pkl": pickled, "a/constants.pkl": pickled}, {}, "a TorchScript program"),
        ({"a/data.pkl": pickled, "b/data.pkl": pickled}, {}, "two top folders"),
        ({"a/data": pickled}, {}, "without data.pkl"),
        ({"data.pkl": pickled}, {}, "without data.pkl"),
        ({"a/data.pkl": pickled}, {"compression": zipfile.ZIP_DEFLATED}, "compressed or encrypted"),
    ):
        rezip(path, members, **options)
        refuses(DataError, lambda: read_nested(path), sentence)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/data.pkl", pickled)
    refuses(DataError, lambda: read_nested(path), "a member twice")


def test_the_old_format_from_a_big_endian_machine_or_with_other_storages_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.arange(9.0)}, path, **WRITERS["legacy"])
    whole = path.read_bytes()
    at = whole.index(b"little_endian")
    flag = whole.index(b"\x88", at)  # NEWTRUE
    path.write_bytes(whole[:flag] + b"\x89" + whole[flag + 1 :])
    refuses(DataError, lambda: read_nested(path), "big-endian")
    path.write_bytes(whole.replace(b"\xe9\x03", b"\xea\x03", 1))  # protocol 1002
    refuses(DataError, lambda: read_nested(path), "unknown form")


@pytest.mark.parametrize(
    "content", [b"", b"x", b"<html>not found</html>", pickle.dumps({"a": 1}), b"PK\x03\x04", b"\x89PNG\r\n\x1a\n" * 9]
)
def test_what_is_no_tensor_file_is_said(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    assert "again" in refuses(DataError, lambda: read_nested(path), str(path))
    if not content.startswith(b"PK"):
        refuses(DataError, lambda: metadata_of(path), "neither a file of torch.save")


def test_a_path_that_is_none_is_the_users_mistake(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.pt", tmp_path):
        assert refuses(UserError, lambda p=path: read_nested(p), f"cannot read {path}")
    assert UserError.exit_code is ExitCode.USER and DataError.exit_code is ExitCode.DATA


def test_switched_off_checksums_of_torch_are_no_damage(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert read_tensors(tmp_path / "a.pt")["a"].tolist() == [1, 1, 1]


def test_metadata_of_a_torch_file_is_empty(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pt")
    assert metadata_of(tmp_path / "a.pt") == {}


def test_subclasses_and_parameters_are_plain_tensors(tmp_path: Path) -> None:
    class Named(Tensor):
        pass

    Named.__qualname__, Named.__module__ = "Named", __name__
    globals()["Named"] = Named
    try:
        torch.save({"a": torch.ones(2).as_subclass(Named), "b": nn.Parameter(torch.ones(2))}, tmp_path / "a.pt")
    finally:
        del globals()["Named"]
    assert all(type(value) is Tensor for value in read_tensors(tmp_path / "a.pt").values())
