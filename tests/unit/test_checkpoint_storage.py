"""What torch's checkpoint format may do on our disk: its metadata is a pickle, read by one that knows plain data only."""

from __future__ import annotations

import builtins
import enum
import io
import os
import pickle
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import CheckpointError, UserError
from hpc_gen.training.checkpoint import storage

STATE = {"model/net/weight": torch.arange(6.0).reshape(2, 3), "train/images_seen": torch.tensor(8)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    storage.save(STATE, tmp_path, None)
    return tmp_path


class Call:
    """A pickle of it calls something when it is read."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize(
    "evil",
    [
        Call(os.system, "touch pwned"),
        Call(builtins.eval, "open('pwned', 'w')"),
        Call(builtins.exec, "open('pwned', 'w')"),
        Call(subprocess.check_call, ["touch", "pwned"]),
        Call(getattr, "", "join"),
        Call(__import__, "antigravity"),
        Call(torch.load, "pwned"),
    ],
    ids=lambda evil: evil.call[0].__name__,
)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_no_code_in_the_metadata_is_run(
    folder: Path, evil: Call, protocol: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    hidden = {"storage_data": [1, 2, evil]}  # deep inside, too
    for content in (evil, hidden):
        (folder / storage.METADATA).write_bytes(pickle.dumps(content, protocol=protocol))
        with pytest.raises(CheckpointError, match="which is not allowed"):
            storage.read_metadata(folder)
    assert not (folder / "pwned").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch", "load"),
        ("torch", "_C"),
        ("torch.serialization", "os"),
        ("torch.distributed.checkpoint.metadata", "os"),
        ("torch.distributed.checkpoint.filesystem", "pickle"),
        ("torch.distributed.checkpoint.metadata", "Metadata.__init__.__globals__"),
        ("torch", "Size.__class__.__subclasses__"),
    ],
)
def test_names_beside_the_allowed_ones_are_refused(folder: Path, module: str, name: str) -> None:
    """Protocol 4 looks up dotted names piece by piece; only whole names are allowed."""
    stream = io.BytesIO()
    for text in (module, name):
        data = text.encode()
        stream.write(b"\x8c" + bytes([len(data)]) + data)
    (folder / storage.METADATA).write_bytes(b"\x80\x04" + stream.getvalue() + b"\x93.")
    with pytest.raises(CheckpointError, match="which is not allowed"):
        storage.read_metadata(folder)


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"\x80\x04N.", b"\x80\x04]q.", b"not a pickle", b"\x80\xff."])
def test_what_is_no_metadata_is_refused(folder: Path, content: bytes) -> None:
    (folder / storage.METADATA).write_bytes(content)
    with pytest.raises(CheckpointError):
        storage.read_metadata(folder)


def test_any_damage_to_the_metadata_is_a_checkpoint_error_or_harmless(folder: Path) -> None:
    """Normally the manifest has found it before; this is the second line."""
    whole = (folder / storage.METADATA).read_bytes()
    draw = random.Random(0)
    refused = 0
    for _ in range(3000):
        content = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        (folder / storage.METADATA).write_bytes(
            content[: draw.randint(1, len(content))] if draw.random() < 0.2 else content
        )
        try:
            storage.keys(folder)
        except CheckpointError:
            refused += 1
    assert refused > 1000


def test_the_metadata_is_the_same_whoever_wrote_it(tmp_path: Path) -> None:
    """No path, no random id, no memo references to objects that happen to be shared."""
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        state = {str("model/net/" + "weight"): torch.ones(2, 3), "train/images_seen": torch.tensor(8)}
        written = storage.save(state, tmp_path / name, None)
        assert set(written) == {"__0_0.distcp", storage.METADATA}
        found.append(written)
    assert found[0] == found[1]
    assert str(tmp_path).encode() not in (tmp_path / "a" / storage.METADATA).read_bytes()


def test_the_metadata_is_the_same_whichever_python_wrote_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11.0 to 3.11.3 pickle members of an enum through getattr, which no reader of ours would call."""
    tensors = {"a": torch.arange(4.0)}
    storage.save(tensors, tmp_path / "new", None)
    monkeypatch.setattr(enum.Enum, "__reduce_ex__", lambda self, protocol: (getattr, (type(self), self._name_)))
    storage.save(tensors, tmp_path / "old", None)
    new, old = ((tmp_path / name / storage.METADATA).read_bytes() for name in ("new", "old"))
    assert new == old and b"getattr" not in old


def test_data_that_does_not_fit_the_metadata_is_refused(folder: Path) -> None:
    (folder / "__0_0.distcp").write_bytes(b"nothing that torch.load knows" * 40)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        storage.load(folder)


def test_a_prefix_reads_no_more_than_asked(folder: Path) -> None:
    assert set(storage.load(folder, "model/")) == {"model/net/weight"}
    assert storage.load(folder, "optim/") == {}
    assert storage.keys(folder)["train/images_seen"] == (torch.int64, torch.Size([]))


def test_only_tensors_are_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'note' is not a tensor"):
        storage.save({"note": "words"}, tmp_path, None)  # type: ignore[dict-item]


def test_a_failing_write_is_raised_as_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch wraps it into a BaseException of its own, which nobody would catch."""

    def full(descriptor: int, data: memoryview, path: Path) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr(commit.ops, "write", full)
    with pytest.raises(UserError, match="the disk is full"):
        storage.save(STATE, tmp_path, None)
