"""Damaged and hostile tensor files: nothing of them is run, and what is wrong is one sentence."""

from __future__ import annotations

import builtins
import collections
import io
import os
import pickle
import struct
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hpc_gen.runtime.errors import DataError, ExitCode, UserError
from hpc_gen.runtime.tensor_files import Inert, metadata_of, read_nested, read_tensors, write_tensors
from tests.support.reference_file import WRITERS, official, refuses


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
