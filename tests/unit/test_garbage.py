"""`hpc-gen gc`: what goes, what stays, and that nothing goes while an attempt may be at work."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from experiments import LINEAR, Workspace, contents, make_workspace, scratch_folder

from hpc_gen.runtime import clock, commit, journal
from hpc_gen.runtime.errors import ExitCode, UserError
from hpc_gen.runtime.fence import Fence, claim_attempt, process_start_ticks
from hpc_gen.runtime.journal import Journal
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import garbage, run_setup
from hpc_gen.stages.garbage import BROKEN, RETIRED, UNFINISHED
from hpc_gen.training.checkpoint import read

OLD = 1_600_000_000.0


def silent(line: str) -> None:
    """Nobody listens."""


@pytest.fixture(scope="module")
def trained() -> Iterator[Workspace]:
    """A workspace with a run of six checkpoints."""
    with scratch_folder() as folder:
        workspace = make_workspace(folder)
        assert workspace.train(workspace.run("toy", "train.keep_last=9", text=LINEAR)) is ExitCode.DONE
        yield workspace


@pytest.fixture
def run(trained: Workspace, tmp_path: Path) -> RunFolder:
    """A copy of it in a workspace of its own."""
    shutil.copytree(trained.path / "runs" / "toy", tmp_path / "runs" / "toy")
    return RunFolder(tmp_path / "runs" / "toy")


def leave(path: Path, size: int = 100, when: float = OLD) -> Path:
    """A file that was last touched long ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    for each in (path, *path.parents):
        if each.name == "runs":
            break
        os.utime(each, (when, when))
    return path


def kinds(run: RunFolder) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for each in garbage.collect(run):
        found.setdefault(each.kind, []).append(each.path.relative_to(run.path).as_posix())
    return found


def places(run: RunFolder) -> list[int]:
    return [info.images_seen for info in read.list_checkpoints(run)]


def test_a_tidy_run_has_nothing_to_remove(run: RunFolder) -> None:
    said: list[str] = []
    before = contents(run.path)
    assert garbage.clean(run, said.append) == 0
    assert said == ["toy: nothing to remove"] and contents(run.path) == before


def test_what_killed_attempts_were_writing_goes_wherever_it_lies(run: RunFolder) -> None:
    leave(run.path / ".tmp-config.yaml-1-a")
    leave(run.checkpoints / ".tmp-000000000112-0003" / "__0_0.distcp", 5000)
    leave(run.checkpoints / ".trash-000000000008-1-b" / "manifest.json")
    leave(run.path / "staging" / ".tmp-sample-000001-7-c" / "a.png")
    leave(run.path / "samples" / "main" / ".tmp-index.json-9-d")
    leave(run.path / "code" / ".tmp-kept")
    leave(run.path / "logs" / "tmp-log")
    assert sorted(kinds(run)) == [UNFINISHED] and len(kinds(run)[UNFINISHED]) == 5
    said: list[str] = []
    freed = garbage.clean(run, said.append)
    assert freed >= 5000 and "toy: removing unfinished writes of killed attempts: 5, " in said[0]
    assert kinds(run) == {} and (run.path / "code" / ".tmp-kept").exists() and (run.path / "logs" / "tmp-log").exists()
    assert not list((run.path / "staging").iterdir())


def test_dry_run_removes_nothing(run: RunFolder) -> None:
    leave(run.checkpoints / ".tmp-x" / "a", 3000)
    run_setup.change_run(run, ["train.keep_last=2"])
    before, said = contents(run.path), []
    freed = garbage.clean(run, said.append, dry_run=True)
    assert freed > 3000 and contents(run.path) == before
    assert any("would remove checkpoints beyond the retention: 4, " in line for line in said)
    assert not run.lock.exists() or json.loads(run.lock.read_text())["released"]


def test_checkpoints_beyond_the_retention_of_now(run: RunFolder) -> None:
    assert places(run) == [16, 32, 48, 64, 80, 96]
    run_setup.change_run(run, ["train.keep_last=1", "train.keep_every=32"])
    assert kinds(run) == {RETIRED: [f"checkpoints/{place:012d}" for place in (16, 48, 80)]}
    garbage.clean(run, silent)
    assert places(run) == [32, 64, 96] and all(read.verify(info.path) == [] for info in read.list_checkpoints(run))


def test_the_best_and_the_one_that_is_sampled_stay(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    run_setup.change_run(
        run, ["train.keep_last=1", "sample={num_images: 4, block_images: 4, batch: 4, checkpoint: 16}"]
    )
    load = garbage.storage.load

    def with_best(folder: Path, prefix: str = "") -> dict[str, torch.Tensor]:
        found = load(folder, prefix)
        assert found["train/best_images"].item() == -1
        return {**found, "train/best_images": torch.tensor(48)}

    monkeypatch.setattr(garbage.storage, "load", with_best)
    assert kinds(run) == {RETIRED: [f"checkpoints/{place:012d}" for place in (32, 64, 80)]}


def test_never_the_newest_whole_checkpoint(run: RunFolder) -> None:
    run_setup.change_run(run, ["train.keep_last=1"])
    for place in (96, 80):
        data = next(path for path in (run.checkpoints / f"{place:012d}").iterdir() if path.suffix == ".distcp")
        data.write_bytes(data.read_bytes()[:-1])
    garbage.clean(run, silent)
    assert places(run) == [64, 80, 96]  # the damaged ones are training's to judge, loudly


def test_broken_ones_go_while_a_whole_one_is_there(run: RunFolder) -> None:
    leave(run.checkpoints / "broken-000000000112" / "manifest.json")
    assert kinds(run) == {BROKEN: ["checkpoints/broken-000000000112"]}
    for info in read.list_checkpoints(run):
        (info.path / "manifest.json").write_text("{}")
    assert kinds(run) == {}  # it may be all there is


def test_what_is_being_written_now_stays(run: RunFolder) -> None:
    leave(run.path / ".tmp-now", when=clock.now() + 10)
    assert kinds(run) == {}


def test_the_removal_is_in_the_journal_and_the_fence_is_free(run: RunFolder) -> None:
    leave(run.path / ".tmp-a")
    garbage.clean(run, silent)
    events = [event for event in journal.read(run) if event.stage == "gc"]
    assert [event.kind for event in events] == ["attempt_start", "removed", "attempt_end"]
    assert events[1].fields["path"] == ".tmp-a" and events[1].fields["what"] == UNFINISHED
    assert json.loads(run.lock.read_text())["released"]


# --- a living holder


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def hold(run: RunFolder, pid: int, stage: str = "train", host: str | None = None, lock: bool = True) -> int:
    """An attempt of another process, in the words of the fence."""
    number = claim_attempt(run, stage)
    facts = {"host": host or socket.gethostname(), "pid": pid, "pid_start": process_start_ticks(pid)}
    path = run.journal / f"{number:04d}.attempt"
    commit.write_json(path, {**json.loads(path.read_text()), **facts, "stage": stage})
    if lock:
        commit.write_json(run.lock, {"attempt": number, "token": "t", **facts, "time": clock.now()})
    book = Journal(run, number, stage)
    book.event("attempt_start", world_size=1, rank=0, host=facts["host"])
    book.close()
    return number


@pytest.mark.parametrize(("stage", "lock"), [("train", True), ("sample", False)])
def test_nothing_goes_while_an_attempt_is_alive(
    run: RunFolder, sleeper: subprocess.Popen[bytes], stage: str, lock: bool
) -> None:
    leave(run.checkpoints / ".tmp-000000000112-0003" / "a")
    number = hold(run, sleeper.pid, stage, lock=lock)
    before = contents(run.path)
    message = rf"nothing is removed from .*toy: attempt {number} \({stage}\) is at work in process {sleeper.pid}"
    for dry_run in (False, True):
        with pytest.raises(UserError, match=message):
            garbage.clean(run, silent, dry_run=dry_run)
    assert contents(run.path) == before
    said: list[str] = []
    garbage.clean_all(run.path.parent.parent, said.append)
    assert any("toy: left alone: nothing is removed" in line for line in said) and contents(run.path) == before
    sleeper.kill()
    sleeper.wait()
    assert kinds(run) == {UNFINISHED: ["checkpoints/.tmp-000000000112-0003"]}


def test_a_process_of_another_host_counts_as_alive_for_a_day(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(run.path / ".tmp-a")
    number = hold(run, 1, host="node17")
    with pytest.raises(UserError, match=rf"attempt {number} \(train\) on node17 did not say that it ended"):
        garbage.collect(run)
    with clock.use(clock.FakeClock(clock.now() + garbage.SILENT_S + 60)):
        assert kinds(run) == {UNFINISHED: [".tmp-a"]}


def test_a_later_attempt_fences_off_training_of_another_host(run: RunFolder) -> None:
    leave(run.path / ".tmp-a")
    hold(run, 1, host="node17")
    Fence.take(run, claim_attempt(run, "train")).release("done")
    assert kinds(run) == {UNFINISHED: [".tmp-a"]}
    hold(run, 1, "sample", host="node17", lock=False)  # units are not fenced
    with pytest.raises(UserError, match=r"\(sample\) on node17"):
        garbage.collect(run)


# --- the whole workspace


def test_all_runs_and_run_folders_that_were_never_finished(run: RunFolder, tmp_path: Path) -> None:
    leave(run.path / ".tmp-a")
    leave(tmp_path / "runs" / ".tmp-fork-1-a" / "config.yaml", 4000)
    young = leave(tmp_path / "runs" / ".tmp-fork-2-b" / "config.yaml", when=clock.now())
    os.utime(tmp_path / "runs" / ".tmp-fork-1-a", (OLD, OLD))
    broken = tmp_path / "runs" / "broken"
    broken.mkdir()
    (broken / "config.yaml").write_text("a: [")
    said: list[str] = []
    assert garbage.clean_all(tmp_path, said.append) > 4000
    assert not (run.path / ".tmp-a").exists() and not (tmp_path / "runs" / ".tmp-fork-1-a").exists() and young.exists()
    assert any(line.startswith("broken: left alone: ") for line in said) and said[-1].startswith("freed ")
