"""Checkpoints that are cut anywhere, tampered with, or made to run code: passed over or refused, never trusted."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import experiments
import pytest
import torch
from experiments import LINEAR, Workspace

from hpc_gen.config.errors import ConfigError
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import CheckpointError, ExitCode
from hpc_gen.runtime.journal import read
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages.run_setup import load_run
from hpc_gen.training.checkpoint import manifest, storage
from hpc_gen.training.checkpoint import read as reading


def folder(run: RunFolder, position: int) -> Path:
    return run.checkpoints / f"{position:012d}"


@pytest.fixture
def trained(workspace: Workspace) -> RunFolder:
    """Checkpoints at 32 and 48 of 96 images."""
    run = workspace.run("a", text=LINEAR)
    assert workspace.train(run, "train.stop_at_images=48") == ExitCode.DONE
    return run


def places(size: int) -> list[int]:
    """Every byte of a small file; of a large one both ends, the edges of blocks, and places between."""
    if size <= 700:
        return list(range(size))
    edges = {edge + step for edge in range(0, size, 512) for step in (-1, 0, 1)}
    return sorted(place for place in {*range(40), *range(size - 40, size), *edges} if 0 <= place < size)


@pytest.mark.parametrize("name", [manifest.NAME, storage.METADATA, "__0_0.distcp"])
def test_a_checkpoint_cut_at_any_byte_is_not_whole(trained: RunFolder, name: str) -> None:
    path = folder(trained, 48) / name
    content = path.read_bytes()
    for place in places(len(content.rstrip())):  # without the last line break a manifest says what it said
        path.write_bytes(content[:place])
        found = reading.verify(folder(trained, 48))
        assert len(found) == 1, (place, found)
        assert str(folder(trained, 48)) in found[0] and "\n" not in found[0], (place, found)
    path.write_bytes(content)
    assert reading.verify(folder(trained, 48)) == []


@pytest.mark.parametrize("name", [manifest.NAME, storage.METADATA, "__0_0.distcp"])
@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
def test_a_run_goes_on_from_the_checkpoint_before(
    workspace: Workspace, trained: RunFolder, name: str, part: float, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder(trained, 48) / name
    size = len(path.read_bytes().rstrip())
    os.truncate(path, min(size - 1, int(part * size)))
    assert workspace.train(trained) == ExitCode.DONE
    said = capsys.readouterr().out
    assert f"checkpoint {48:012d} is not whole (" in said and "falling back to the one before it" in said
    assert "from 32 images" in said
    whole = workspace.run("b", text=LINEAR)
    assert workspace.train(whole) == ExitCode.DONE
    for position in (80, 96):
        assert experiments.contents(folder(trained, position)) == experiments.contents(folder(whole, position))
    assert (trained.checkpoints / f"broken-{48:012d}").is_dir()
    assert any(event.kind == "fault" for event in read(trained))


def rewrite_manifest(place: Path, name: str) -> None:
    """As somebody who can write the folder would: sizes, hashes and the manifest's own hash fit."""
    path = place / manifest.NAME
    content = json.loads(path.read_text())
    content["files"][name] = {"bytes": (place / name).stat().st_size, "sha256": commit.sha256_file(place / name)}
    del content["sha256"]
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["sha256"] = hashlib.sha256(canonical.encode()).hexdigest()
    path.write_text(json.dumps(content))


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_code_in_the_tensors_of_a_checkpoint_is_not_run(
    workspace: Workspace, trained: RunFolder, tmp_path: Path
) -> None:
    """Manifest and metadata are made to fit; the bytes of every tensor are a pickle that calls os.mkdir."""
    place = folder(trained, 48)
    buffer = io.BytesIO()
    torch.save(Evil(tmp_path / "pwned"), buffer)
    data = place / "__0_0.distcp"
    infos = storage.read_metadata(place).storage_data
    content = bytearray(max(info.offset for info in infos.values()) + len(buffer.getvalue()))
    for info in sorted(infos.values(), key=lambda info: info.offset):
        content[info.offset : info.offset + len(buffer.getvalue())] = buffer.getvalue()
    data.write_bytes(content)
    rewrite_manifest(place, data.name)
    with pytest.raises(CheckpointError) as caught:
        workspace.train(trained)
    assert re.fullmatch(rf"{place} cannot be loaded \(.*\); choose another checkpoint", str(caught.value), re.DOTALL)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.yaml", "!!python/object/apply:os.mkdir [{}]\n"),
        ("config.yaml", "name: !!python/object/apply:os.mkdir [{}]\n"),
    ],
)
def test_code_in_the_config_of_a_run_is_not_run(trained: RunFolder, tmp_path: Path, file: str, text: str) -> None:
    (trained.path / file).write_text(text.format(tmp_path / "pwned"))
    with pytest.raises(ConfigError, match="config.yaml"):
        load_run(trained)
    assert not (tmp_path / "pwned").exists()


def test_a_manifest_that_was_edited_is_told_from_a_whole_one(
    workspace: Workspace, trained: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody sets the facts to those of another experiment, to have its checkpoint taken."""
    path = folder(trained, 48) / manifest.NAME
    content = json.loads(path.read_text())
    content["facts"]["identity"] = "0" * 64
    path.write_text(json.dumps(content))
    assert workspace.train(trained) == ExitCode.DONE
    assert f"{path} does not have the SHA-256 that it was written with" in capsys.readouterr().out


def test_another_number_of_threads_is_refused_by_name(workspace: Workspace, trained: RunFolder) -> None:
    with pytest.raises(CheckpointError) as caught:
        workspace.train(trained, "train.threads=2")
    torch.set_num_threads(1)
    assert str(caught.value) == (
        f"{folder(trained, 48)} was trained with 1 threads per rank, now 'train.threads' is 2, which changes the last "
        "bits of every sum; set 'train.threads' back, or start a new run with another name"
    )
    assert workspace.train(trained) == ExitCode.DONE
