"""A checkpoint of several ranks that was tampered with, lost a part, or is asked for on another number of ranks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from kill_sharded import END, SAVE_EVERY, full

from hpc_gen.runtime.errors import CheckpointError
from hpc_gen.runtime.journal import Journal
from hpc_gen.runtime.ranks import RankInfo, Ranks
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.training.checkpoint import manifest, read, storage
from hpc_gen.training.checkpoint.chain import CheckpointChain, Loaded, Retention

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Checkpoints that two ranks wrote, each its own boxes of cut tensors, at 16 and 32 images."""
    run = RunFolder(tmp_path_factory.mktemp("sharded") / "runs" / "sharded")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    command = [sys.executable, "-P", str(ROOT / "tests" / "support" / "kill_sharded.py"), str(run.path)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return run


@dataclass
class Copy:
    """A copy of it, and what one rank that loads it says."""

    run: RunFolder
    said: list[str] = field(default_factory=list)

    @property
    def newest(self) -> Path:
        return self.run.checkpoints / f"{END:012d}"

    def load(self) -> Loaded | None:
        ranks = Ranks(RankInfo(0, 1, 0, 1, "python"), "gloo", torch.device("cpu"))
        journal = Journal(self.run, 9, "train")
        return CheckpointChain(self.run, ranks, None, journal, Retention(9), self.said.append).load_newest()


@pytest.fixture
def copy(written: RunFolder, tmp_path: Path) -> Copy:
    shutil.copytree(written.path, tmp_path / "runs" / "sharded")
    return Copy(RunFolder(tmp_path / "runs" / "sharded"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap(folder: Path) -> None:
    first, second = folder / "__0_0.distcp", folder / "__1_0.distcp"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def edit(folder: Path, old: str, new: str) -> None:
    path = folder / manifest.NAME
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a rank's file is missing": (lambda f: (f / "__1_0.distcp").unlink(), "__1_0.distcp is missing"),
    "a rank's file is cut": (lambda f: os.truncate(f / "__1_0.distcp", 50), "has 50 bytes, the manifest says"),
    "a bit of a rank's file": (lambda f: flip(f / "__1_0.distcp"), "__1_0.distcp does not have the SHA-256"),
    "files of ranks swapped": (swap, "the manifest"),
    "a file of a third rank": (lambda f: (f / "__2_0.distcp").write_bytes(b"x"), "__2_0.distcp is not in the manifest"),
    "another world size": (
        lambda f: edit(f, '"world_size": 2', '"world_size": 4'),
        "does not have the SHA-256 that it",
    ),
    "no manifest": (lambda f: (f / manifest.NAME).unlink(), "the checkpoint was never committed"),
    "the other checkpoint's file": (
        lambda f: shutil.copy(f.parent / f"{SAVE_EVERY:012d}" / "__1_0.distcp", f / "__1_0.distcp"),
        "__1_0.distcp does not have the SHA-256",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_named_and_the_one_before_is_loaded(copy: Copy, damage: str) -> None:
    spoil, words = DAMAGES[damage]
    spoil(copy.newest)
    assert any(words in problem for problem in read.verify(copy.newest)), read.verify(copy.newest)
    loaded = copy.load()
    assert loaded is not None and loaded.images_seen == SAVE_EVERY
    assert words in copy.said[0] and "falling back to the one before it" in copy.said[0]
    assert (copy.run.checkpoints / f"broken-{copy.newest.name}").is_dir()
    for name, tensor in full(SAVE_EVERY).items():
        assert torch.equal(loaded.tensors[name], tensor), name


def test_another_number_of_ranks_loads_every_value(copy: Copy) -> None:
    """Written by two, read by one; other numbers are in tests/distributed/test_kill_sharded.py."""
    assert manifest.read(copy.newest).world_size == 2
    assert {path.name for path in copy.newest.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    loaded = copy.load()
    assert loaded is not None and loaded.images_seen == END and copy.said == []
    assert set(loaded.tensors) == set(full(END))
    for name, tensor in full(END).items():
        assert torch.equal(loaded.tensors[name], tensor), name


def test_a_part_that_goes_while_it_is_read_is_a_sentence(copy: Copy) -> None:
    """Verified, then lost: a file system that fails during the load."""
    loaded = copy.load()
    assert loaded is not None
    (copy.newest / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"cannot be loaded \(FileNotFoundError.*\); choose another checkpoint"):
        loaded.tensors["model/net/rows"]


def test_parts_that_leave_a_hole_are_refused_though_every_hash_fits(copy: Copy) -> None:
    """Whoever can write the metadata can write the manifest: the values must still be all there."""
    tensors = storage.StoredTensors(copy.newest)
    chunks = tensors._entries["optim/net/rows/exp_avg"].chunks
    assert len(chunks) >= 2
    chunks.pop()
    with pytest.raises(CheckpointError, match="the parts of 'optim/net/rows/exp_avg' do not cover it"):
        tensors["optim/net/rows/exp_avg"]
