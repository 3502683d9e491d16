"""The commit door: order of operations, whole or absent at every kill, nothing lost in a power cut."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

from hpc_gen.runtime import commit
from hpc_gen.runtime.commit_log import DurabilityLog
from hpc_gen.runtime.errors import FencedError, UserError


@pytest.fixture(autouse=True)
def _no_observer_left() -> Iterator[None]:
    yield
    commit.ops.observer = None


class _Recorder:
    """Observer and fence at once: what happened, in order."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def __call__(self, name: str, path: Path) -> None:
        self.seen.append((name, path.name))

    def check(self) -> None:
        self.seen.append(("fence", ""))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.seen]


class _Closed:
    """A fence that refuses."""

    def check(self) -> None:
        raise FencedError("attempt 2 has taken over")


def _staged(folder: Path, files: dict[str, bytes]) -> Path:
    staging = commit.staging_path(folder / "final")
    for name, data in files.items():
        commit.make_folder((staging / name).parent)
        with commit.CommitStream(staging / name) as stream:
            stream.write(data)
    return staging


def _content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# -- single files ------------------------------------------------------------------------------------------------


def test_write_bytes_syncs_content_then_asks_the_fence_then_renames_then_syncs_the_folder(
    tmp_path: Path,
) -> None:
    recorder = _Recorder()
    commit.ops.observer = recorder
    commit.write_bytes(tmp_path / "a", b"content", fence=recorder)
    assert recorder.names == ["open", "write", "fsync", "fence", "rename", "fsync_dir"]
    paths = dict(recorder.seen)
    assert paths["open"] == paths["fsync"] and paths["open"].startswith(".tmp-a-")
    assert paths["rename"] == "a" and paths["fsync_dir"] == tmp_path.name
    assert _content(tmp_path) == {"a": b"content"}


def test_a_new_folder_is_made_durable_before_anything_is_put_into_it(tmp_path: Path) -> None:
    recorder = _Recorder()
    commit.ops.observer = recorder
    commit.make_folder(tmp_path / "x" / "y")
    assert recorder.seen == [
        ("mkdir", "x"), ("fsync_dir", tmp_path.name), ("mkdir", "y"), ("fsync_dir", "x"),
    ]  # fmt: skip
    commit.make_folder(tmp_path / "x" / "y")
    assert len(recorder.seen) == 4
    commit.write_text(tmp_path / "file", "")
    with pytest.raises(UserError, match="is a file where a folder is needed"):
        commit.make_folder(tmp_path / "file")


def test_a_folder_in_which_none_can_be_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder can be made in /proc \(.*\); use another workspace"):
        commit.make_folder("/proc/hpc-gen/runs")


def test_the_final_name_holds_old_or_new_at_every_operation(tmp_path: Path) -> None:
    final = tmp_path / "a"
    commit.write_bytes(final, b"old")
    held: list[bytes] = []
    commit.ops.observer = lambda name, path: held.append(final.read_bytes())
    with final.open("rb") as reader:
        commit.write_bytes(final, b"new")
        assert reader.read() == b"old"  # not overwritten in place
    assert set(held) == {b"old", b"new"} and held == sorted(held, reverse=True)


def test_a_closed_fence_leaves_the_old_file_and_no_rubbish(tmp_path: Path) -> None:
    commit.write_bytes(tmp_path / "a", b"old")
    with pytest.raises(FencedError):
        commit.write_bytes(tmp_path / "a", b"new", fence=_Closed())
    assert _content(tmp_path) == {"a": b"old"}


def test_json_is_sorted_and_refuses_nan(tmp_path: Path) -> None:
    commit.write_json(tmp_path / "a.json", {"b": 1, "a": [0.1, "ü"]})
    assert (tmp_path / "a.json").read_text() == '{\n "a": [\n  0.1,\n  "ü"\n ],\n "b": 1\n}\n'
    with pytest.raises(ValueError, match="a.json"):
        commit.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": 1, "a": [0.1, "ü"]}


def test_a_full_disk_is_the_users_to_solve_and_names_path_and_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit.write_bytes(tmp_path / "a", b"old")

    def full(descriptor: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(UserError, match=r"cannot write 12345 bytes to .*\.tmp-a-.*disk is full"):
            commit.write_bytes(tmp_path / "a", bytes(12345))
    assert _content(tmp_path) == {"a": b"old"}


def test_short_writes_of_the_kernel_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:7]))
    data = os.urandom(100)
    commit.write_bytes(tmp_path / "a", data)
    assert (tmp_path / "a").read_bytes() == data


def test_commit_file_syncs_what_a_foreign_library_wrote(tmp_path: Path) -> None:
    staged = commit.staging_path(tmp_path / "a")
    staged.write_bytes(b"by PIL")
    recorder = _Recorder()
    commit.ops.observer = recorder
    commit.commit_file(staged, tmp_path / "a")
    assert recorder.names == ["fsync", "rename", "fsync_dir"]


# -- the stream --------------------------------------------------------------------------------------------------


def test_stream_knows_its_hash_and_size_and_goes_forward_only(tmp_path: Path) -> None:
    parts = [b"small", os.urandom(3 << 20), b"", bytearray(b"tail")]
    with commit.CommitStream(tmp_path / "a") as stream:
        for part in parts:
            assert stream.write(part) == len(part)
        assert stream.tell() == stream.seek(stream.tell()) == stream.seek(0, os.SEEK_CUR) == sum(map(len, parts))
        assert not stream.seekable() and not stream.readable() and stream.writable()
        with pytest.raises(io.UnsupportedOperation):
            stream.seek(0)
    data = (tmp_path / "a").read_bytes()
    assert data == b"".join(parts)
    assert (stream.sha256, stream.bytes) == (hashlib.sha256(data).hexdigest(), len(data))
    assert stream.closed and commit.sha256_file(tmp_path / "a") == stream.sha256
    with pytest.raises(ValueError, match="closed"):
        stream.write(b"x")
    with pytest.raises(FileExistsError):
        commit.CommitStream(tmp_path / "a")


def test_stream_takes_any_contiguous_buffer(tmp_path: Path) -> None:
    numbers = torch.arange(6, dtype=torch.int32).reshape(2, 3).numpy()
    with commit.CommitStream(tmp_path / "a") as stream:
        assert stream.write(memoryview(numbers)) == 24
        assert stream.write(memoryview(numbers[:0])) == 0
    assert (tmp_path / "a").read_bytes() == numbers.tobytes()


def test_bytes_written_behind_the_streams_back_are_noticed(tmp_path: Path) -> None:
    stream = commit.CommitStream(tmp_path / "a")
    os.write(stream.fileno(), b"by a library that asks for the descriptor")
    with pytest.raises(AssertionError, match="went through its stream"):
        stream.close()
    assert stream.closed


def test_torch_save_into_a_stream(tmp_path: Path) -> None:
    tensors = {"x": torch.arange(300_000), "y": torch.ones(3, dtype=torch.bfloat16)}
    for name in ("a", "b"):
        with commit.CommitStream(tmp_path / name) as stream:
            torch.save(tensors, stream)
    loaded = torch.load(tmp_path / "a", weights_only=True, mmap=True)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()  # no file name inside


def test_distributed_checkpoint_writes_through_the_stream(tmp_path: Path) -> None:
    streams: list[commit.CommitStream] = []

    class _FileSystem(dcp.filesystem.FileSystem):  # type: ignore[name-defined]
        def create_stream(self, path: Path, mode: str):  # type: ignore[no-untyped-def]
            if mode == "rb":
                return super().create_stream(path, mode)
            streams.append(commit.CommitStream(path))
            return streams[-1]

        def rename(self, path: Path, new_path: Path) -> None:
            commit.rename_staged(path, new_path)

    staging = commit.make_folder(commit.staging_path(tmp_path / "final"))
    writer = dcp.FileSystemWriter(staging, sync_files=True)
    writer.fs = _FileSystem()
    state = {"w": torch.randn(1000, 3), "n": torch.tensor(5)}
    dcp.state_dict_saver.save(state, storage_writer=writer, no_dist=True)
    assert all(stream.closed for stream in streams) and len(streams) == 2
    assert commit.commit_directory(staging, tmp_path / "final")  # all of it known as durable, .metadata too
    found = {"w": torch.zeros(1000, 3), "n": torch.tensor(0)}
    dcp.state_dict_loader.load(found, checkpoint_id=tmp_path / "final", no_dist=True)
    assert torch.equal(found["w"], state["w"]) and int(found["n"]) == 5


# -- folders -----------------------------------------------------------------------------------------------------


def test_commit_directory_syncs_folders_innermost_first_then_fence_rename_parent(tmp_path: Path) -> None:
    staging = _staged(tmp_path, {"a": b"1", "sub/deep/b": b"2"})
    recorder = _Recorder()
    commit.ops.observer = recorder
    assert commit.commit_directory(staging, tmp_path / "final", fence=recorder)
    assert recorder.seen == [
        ("fsync_dir", "deep"),
        ("fsync_dir", "sub"),
        ("fsync_dir", staging.name),
        ("fence", ""),
        ("rename", "final"),
        ("fsync_dir", tmp_path.name),
    ]
    assert _content(tmp_path) == {"final/a": b"1", "final/sub/deep/b": b"2"}


def test_commit_directory_refuses_content_that_was_not_synced(tmp_path: Path) -> None:
    staging = _staged(tmp_path, {"a": b"1"})
    (staging / "b").write_bytes(b"not through the door")
    with pytest.raises(AssertionError, match=r"b was not fsynced"):
        commit.commit_directory(staging, tmp_path / "final")
    commit.sync_file(staging / "b")
    with (staging / "a").open("ab") as stream:
        stream.write(b"grown")
    with pytest.raises(AssertionError, match="has 6 bytes, but 1 were fsynced"):
        commit.commit_directory(staging, tmp_path / "final")
    assert not (tmp_path / "final").exists()


def test_small_files_written_into_a_staged_folder_count_as_synced(tmp_path: Path) -> None:
    staging = _staged(tmp_path, {"part": b"1"})
    commit.write_json(staging / "manifest.json", {"part": 1})
    commit.rename_staged(staging / "part", staging / "renamed")
    assert commit.commit_directory(staging, tmp_path / "final")
    assert sorted(_content(tmp_path)) == ["final/manifest.json", "final/renamed"]


def test_a_stream_left_by_an_exception_is_not_durable(tmp_path: Path) -> None:
    staging = commit.make_folder(commit.staging_path(tmp_path / "final"))
    with pytest.raises(KeyError), commit.CommitStream(staging / "a") as stream:
        stream.write(b"half")
        raise KeyError
    assert stream.closed and commit.synced_files(staging) == {}
    with pytest.raises(AssertionError, match="was not fsynced"):
        commit.commit_directory(staging, tmp_path / "final")


def test_other_ranks_vouch_for_what_they_synced(tmp_path: Path) -> None:
    staging = _staged(tmp_path, {"rank0": b"000"})
    read_end, write_end = os.pipe()
    if (child := os.fork()) == 0:
        with commit.CommitStream(staging / "rank1") as stream:
            stream.write(b"11")
        os.write(write_end, json.dumps(commit.synced_files(staging)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(AssertionError, match="rank1 was not fsynced"):
        commit.commit_directory(staging, tmp_path / "final")
    vouched = json.loads(os.read(read_end, 1000))
    assert vouched == {"rank0": 3, "rank1": 2}
    assert commit.commit_directory(staging, tmp_path / "final", vouched={"rank1": vouched["rank1"]})
    assert commit.synced_files(staging) == {}  # nothing is remembered after a commit


def test_equal_content_is_kept_and_other_content_replaced(tmp_path: Path) -> None:
    commit.commit_directory(_staged(tmp_path, {"a": b"1", "s/b": b"2"}), tmp_path / "final")
    inode = (tmp_path / "final").stat().st_ino
    assert not commit.commit_directory(_staged(tmp_path, {"a": b"1", "s/b": b"2"}), tmp_path / "final")
    assert (tmp_path / "final").stat().st_ino == inode
    assert commit.commit_directory(_staged(tmp_path, {"a": b"1", "s/b": b"X"}), tmp_path / "final")
    assert _content(tmp_path) == {"final/a": b"1", "final/s/b": b"X"}
    with pytest.raises(FencedError):
        commit.commit_directory(_staged(tmp_path, {"a": b"other"}), tmp_path / "final", fence=_Closed())
    assert _content(tmp_path / "final") == {"a": b"1", "s/b": b"X"}


def test_links_are_refused(tmp_path: Path) -> None:
    staging = _staged(tmp_path, {"a": b"1"})
    (staging / "link").symlink_to("/etc/hostname")
    with pytest.raises(AssertionError, match="is a link"):
        commit.commit_directory(staging, tmp_path / "final")


def test_many_tasks_on_one_unit_are_harmless(tmp_path: Path) -> None:
    outcomes: list[bool] = []
    stagings = [_staged(tmp_path, {"a": b"1" * 1000, "b": b"2"}) for _ in range(8)]
    start = threading.Barrier(8)

    def task(staging: Path) -> None:
        start.wait()
        outcomes.append(commit.commit_directory(staging, tmp_path / "final"))

    threads = [threading.Thread(target=task, args=(staging,)) for staging in stagings]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 8 and outcomes.count(True) >= 1
    assert _content(tmp_path) == {"final/a": b"1" * 1000, "final/b": b"2"}


def test_remove_tree_vanishes_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    commit.commit_directory(_staged(tmp_path, {"a": b"1", "s/b": b"2"}), folder)
    views: list[int] = []
    names: list[str] = []

    def observer(name: str, path: Path) -> None:
        views.append(len(_content(folder)) if folder.exists() else 0)
        names.append(name)

    commit.ops.observer = observer
    with pytest.raises(FencedError):
        commit.remove_tree(folder, fence=_Closed())
    commit.remove_tree(folder)
    assert views[0] == 2 and set(views[1:]) == {0} and list(tmp_path.iterdir()) == []
    assert names == ["rename", "fsync_dir", "unlink", "unlink", "rmdir", "rmdir"]  # gone for good, then taken apart
    commit.remove_tree(folder)  # absent: nothing
    commit.write_text(tmp_path / "file", "x")
    commit.remove_tree(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_remove_tree_does_not_follow_links(tmp_path: Path) -> None:
    commit.write_text(tmp_path / "outside" / "precious", "x")
    commit.make_folder(tmp_path / "folder")
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "outside")
    commit.remove_tree(tmp_path / "folder")
    assert _content(tmp_path) == {"outside/precious": b"x"}


def test_sweep_takes_what_earlier_attempts_left_and_nothing_else(tmp_path: Path) -> None:
    old, young, mixed = (_staged(tmp_path, {"a": b"1"}) for _ in range(3))
    commit.write_text(tmp_path / "kept", "x")
    hour_ago = time.time() - 3600
    for path in [old / "a", old, mixed, tmp_path / "kept"]:  # a file in `mixed` is still being written
        os.utime(path, (hour_ago, hour_ago))
    assert commit.sweep(tmp_path) == [old.name]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([young.name, mixed.name, "kept"])
    assert commit.sweep(tmp_path, older_than=time.time() + 1) == sorted([young.name, mixed.name])
    assert commit.sweep(tmp_path / "absent") == []


# -- kills and power cuts ----------------------------------------------------------------------------------------

_OLD = {"final/part": b"old part", "final/manifest.json": b"old", "state.json": b'{\n "n": 0\n}\n'}
_NEW = {"final/part": b"new part", "final/manifest.json": b"new", "state.json": b'{\n "n": 1\n}\n'}


def _save(root: Path, files: dict[str, bytes], n: int) -> None:
    """A save as the checkpoint chain does it: staged folder, commit, then a small file that points to it."""
    parts = {name.removeprefix("final/"): data for name, data in files.items() if name.startswith("final/")}
    commit.commit_directory(_staged(root, parts), root / "final")
    commit.write_json(root / "state.json", {"n": n})


def _in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked child; returns the signal that ended it, 0 for none."""
    if (child := os.fork()) == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def _number_of_operations(tmp_path: Path) -> int:
    root = commit.make_folder(tmp_path / "count")
    _save(root, _OLD, 0)
    log = DurabilityLog(tmp_path / "scratch-count")
    commit.ops.observer = log
    _save(root, _NEW, 1)
    commit.ops.observer = None
    return log.count


@pytest.mark.parametrize("power_cut", ["none", "keep-empty", "keep-torn", "lose-empty"])
def test_killed_at_every_operation_each_thing_is_whole_old_or_new(tmp_path: Path, power_cut: str) -> None:
    total = _number_of_operations(tmp_path)
    assert total > 15
    seen: set[bytes] = set()
    for kill_at in range(1, total + 2):
        root = commit.make_folder(tmp_path / str(kill_at))
        _save(root, _OLD, 0)
        scratch = tmp_path / f"scratch-{kill_at}"

        def work(root: Path = root, scratch: Path = scratch, kill_at: int = kill_at) -> None:
            commit.ops.observer = DurabilityLog(scratch, kill_at=kill_at)
            _save(root, _NEW, 1)

        ended_by = _in_child(work)
        assert ended_by == (signal.SIGKILL if kill_at <= total else 0)
        log = DurabilityLog.replay(scratch)
        if ended_by == 0:
            log.settle()
        if power_cut != "none":
            names, content = power_cut.split("-")
            log.apply_power_cut(names, content)  # type: ignore[arg-type]
        commit.sweep(root, older_than=time.time() + 1)
        found = _content(root)
        folder = {name: data for name, data in found.items() if name.startswith("final/")}
        old_and_new = [{n: d for n, d in files.items() if n.startswith("final/")} for files in (_OLD, _NEW)]
        assert folder in (*old_and_new, {}), f"killed at {kill_at}"  # {}: between moving away and moving in
        assert found["state.json"] in (_OLD["state.json"], _NEW["state.json"]), f"killed at {kill_at}"
        if found["state.json"] == _NEW["state.json"]:
            assert folder == old_and_new[1], f"killed at {kill_at}: the pointer is ahead of the folder"
        if ended_by == 0:
            assert found == _NEW
        seen.add(found["state.json"])
    assert len(seen) == 2


@pytest.mark.parametrize("left_out", ["fsync", "fsync_dir"])
def test_the_power_cut_finds_a_missing_sync(tmp_path: Path, left_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: without one of the syncs something committed is lost."""
    monkeypatch.setattr(commit.ops, left_out, lambda *arguments: None)
    log = DurabilityLog(tmp_path / "scratch")
    commit.ops.observer = log
    root = tmp_path / "root"
    commit.write_json(root / "state.json", {"n": 1})
    log.settle()
    commit.ops.observer = None
    assert log.apply_power_cut("keep" if left_out == "fsync" else "lose")
    assert not (root / "state.json").exists() or (root / "state.json").read_bytes() == b""
