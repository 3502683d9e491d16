"""The model of a power cut: it loses what was not synced and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_gen.runtime import commit
from hpc_gen.runtime.commit_log import DurabilityLog


class _Killed(BaseException):
    pass


def _raise() -> None:
    raise _Killed


@pytest.fixture
def log(tmp_path: Path) -> Iterator[DurabilityLog]:
    log = DurabilityLog(tmp_path / "scratch")
    commit.ops.observer = log
    yield log
    commit.ops.observer = None


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def test_after_a_commit_nothing_is_at_stake(log: DurabilityLog, root: Path) -> None:
    commit.write_bytes(root / "sub" / "a", b"x")
    log.settle()
    assert (log.unsynced(), log.undurable_renames()) == ([], [])
    assert log.apply_power_cut("lose") == []
    assert (root / "sub" / "a").read_bytes() == b"x"


def test_unsynced_content_is_emptied_or_torn_and_followed_through_renames(log: DurabilityLog, root: Path) -> None:
    stream = commit.CommitStream(root / "a")
    stream.write(b"12345678")
    stream.flush()
    commit.ops.rename(root / "a", root / "b")
    log.settle()
    assert log.unsynced() == [root / "b"]
    log.apply_power_cut("keep", "torn")
    assert (root / "b").read_bytes() == b"1234"
    log.apply_power_cut("keep")
    assert (root / "b").read_bytes() == b""


def test_bytes_written_after_a_sync_are_at_stake_again(log: DurabilityLog, root: Path) -> None:
    stream = commit.CommitStream(root / "a")
    stream.write(b"1")
    stream.fsync()
    log.settle()
    assert log.unsynced() == []
    stream.write(b"2")
    stream.flush()
    assert log.unsynced() == [root / "a"]


def test_names_and_renames_of_an_unsynced_folder_are_lost_and_replaced_files_come_back(
    log: DurabilityLog, root: Path
) -> None:
    commit.write_bytes(root / "a", b"old")
    commit.write_bytes(root / "moved", b"m")
    with commit.CommitStream(root / "new") as stream:
        stream.write(b"new")
    commit.ops.rename(root / "new", root / "a")
    commit.ops.rename(root / "moved", root / "elsewhere")
    commit.ops.mkdir(root / "folder")
    log.settle()
    lost = log.apply_power_cut("lose")
    assert len(lost) == 3
    assert {p.name: p.read_bytes() for p in root.iterdir()} == {"a": b"old", "moved": b"m"}


def test_a_renamed_folder_takes_its_unsynced_files_along(log: DurabilityLog, root: Path) -> None:
    commit.make_folder(root / "staging")
    stream = commit.CommitStream(root / "staging" / "part")
    stream.write(b"x")
    stream.flush()
    commit.ops.rename(root / "staging", root / "final")
    commit.ops.fsync_dir(root)
    log.settle()
    assert log.unsynced() == [root / "final" / "part"]
    log.apply_power_cut("lose")
    assert list((root / "final").iterdir()) == []


def test_the_last_operation_counts_only_when_it_returned(log: DurabilityLog, root: Path) -> None:
    stream = commit.CommitStream(root / "a")
    stream.write(b"x")
    stream.fsync()
    assert log.unsynced() == [root / "a"]  # announced, perhaps killed inside
    log.settle()
    assert log.unsynced() == []


def test_a_kill_comes_before_the_operation_and_a_record_can_be_replayed(tmp_path: Path, root: Path) -> None:
    log = DurabilityLog(tmp_path / "scratch", kill_at=4, kill=_raise)  # open, write, fsync, then the rename
    commit.ops.observer = log
    try:
        with pytest.raises(_Killed):
            commit.write_bytes(root / "a", b"x")
    finally:
        commit.ops.observer = None
    assert [p.name[:7] for p in root.iterdir()] == [".tmp-a-"]  # a kill tidies nothing up
    replayed = DurabilityLog.replay(tmp_path / "scratch")
    assert replayed.operations == log.operations and replayed.count == 3
    assert replayed.unsynced() == log.unsynced()
    assert DurabilityLog.replay(tmp_path / "never used").count == 0
