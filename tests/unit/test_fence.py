"""Attempt numbers are claimed once; a process that lost the run folder cannot commit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from hpc_gen.runtime import clock, commit, fence
from hpc_gen.runtime.errors import FencedError, UserError
from hpc_gen.runtime.fence import Fence, Job, claim_attempt, read_attempt
from hpc_gen.runtime.run_folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def _change_lock(run: RunFolder, **facts: Any) -> None:
    commit.write_json(run.lock, {**json.loads(run.lock.read_text()), **facts})


def _sleeping_child() -> int:
    if (child := os.fork()) == 0:
        time.sleep(600)
        os._exit(0)
    return child


# -- attempts ----------------------------------------------------------------------------------------------------


def test_attempts_count_from_one_and_say_who_claimed_them(run: RunFolder) -> None:
    assert claim_attempt(run, "encode", Job()) == 1
    assert claim_attempt(run, "train", Job("123", 2), world_size=4) == 2
    facts = read_attempt(run, 2)
    assert facts["stage"] == "train" and facts["world_size"] == 4
    assert (facts["job_id"], facts["restart_count"], facts["pid"]) == ("123", 2, os.getpid())
    assert abs(facts["time"] - time.time()) < 60 and facts["pid_start"] == fence.process_start_ticks(os.getpid())
    assert sorted(p.name for p in run.journal.iterdir()) == ["0001.attempt", "0002.attempt"]


def test_a_claim_that_was_killed_uses_its_number_up(run: RunFolder) -> None:
    claim_attempt(run, "train", Job())
    fence.attempt_path(run, 7).touch()
    (run.journal / "0009_train_0.jsonl").touch()
    assert read_attempt(run, 7) == {} == read_attempt(run, 3)
    assert claim_attempt(run, "train", Job()) == 8


def test_claimers_at_once_get_different_numbers(run: RunFolder) -> None:
    numbers: list[int] = []
    threads = [threading.Thread(target=lambda: numbers.append(claim_attempt(run, "train", Job()))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 17))


def test_the_claim_is_durable(run: RunFolder) -> None:
    commit.make_folder(run.journal)
    seen: list[tuple[str, str]] = []
    commit.ops.observer = lambda name, path: seen.append((name, path.name))
    try:
        claim_attempt(run, "train", Job())
    finally:
        commit.ops.observer = None
    assert seen == [(op, "0001.attempt") for op in ("open", "write", "fsync")] + [("fsync_dir", "journal")]


def test_the_job_comes_from_slurms_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    assert Job.current() == Job("", 0)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert Job.current() == Job("77", 0)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    assert Job.current() == Job("70_0", 2)


# -- the fence ---------------------------------------------------------------------------------------------------


def test_a_zombie_cannot_commit(run: RunFolder) -> None:
    zombie = Fence.take(run, 1)
    commit.write_text(run.path / "state", "1", fence=zombie)
    _change_lock(run, host="a node that was lost")
    successor = Fence.take(run, 2)
    with pytest.raises(FencedError, match="attempt 1 may not write to .* attempt 2 holds it") as caught:
        commit.write_text(run.path / "state", "zombie", fence=zombie)
    assert caught.value.exit_code == 87
    zombie.release("done")  # must not free what is another's
    commit.write_text(run.path / "state", "2", fence=successor)
    assert (run.path / "state").read_text() == "2"


def test_other_ranks_share_the_token(run: RunFolder) -> None:
    main = Fence.take(run, 1)
    rank = Fence(run, 1, main.token)
    rank.check()
    main.release("preempted")
    for ended in (main, rank):
        with pytest.raises(FencedError, match="has ended"):
            ended.check()
    assert json.loads(run.lock.read_text())["released"]["cause"] == "preempted"
    with pytest.raises(FencedError, match="attempt 1 holds it"):
        Fence(run, 1, "guessed").check()


def test_a_lost_or_torn_lock_refuses_commits(run: RunFolder) -> None:
    held = Fence.take(run, 1)
    run.lock.write_text('{"attempt": 1, "tok')
    with pytest.raises(FencedError, match="its lock is gone"):
        held.check()
    run.lock.unlink()
    with pytest.raises(FencedError, match="its lock is gone"):
        held.check()
    Fence.take(run, 2).check()


def test_a_living_holder_on_this_host_is_waited_for_then_refused(run: RunFolder) -> None:
    child = _sleeping_child()
    try:
        Fence.take(run, 1)
        _change_lock(run, pid=child, pid_start=fence.process_start_ticks(child))
        with clock.use(clock.FakeClock()) as fake:
            begun = fake.monotonic()
            with pytest.raises(UserError, match=f"held by process {child} of attempt 1 on this host"):
                Fence.take(run, 2)
            assert 10.0 <= fake.monotonic() - begun < 11.0
        _change_lock(run, released={"cause": "done", "time": 0.0})
        Fence.take(run, 2)  # alive, but it has let go
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_holder_that_ends_meanwhile_is_succeeded(run: RunFolder) -> None:
    child = _sleeping_child()
    Fence.take(run, 1)
    _change_lock(run, pid=child, pid_start=fence.process_start_ticks(child))
    timer = threading.Timer(0.3, os.kill, (child, signal.SIGKILL))
    timer.start()
    begun = time.monotonic()
    Fence.take(run, 2)  # the child is dead but not waited for: a zombie in the kernel's sense counts as dead
    assert 0.2 < time.monotonic() - begun < 9.0
    os.waitpid(child, 0)


def test_a_reused_process_id_is_not_the_holder(run: RunFolder) -> None:
    child = _sleeping_child()
    try:
        Fence.take(run, 1)
        ticks = fence.process_start_ticks(child)
        assert ticks is not None
        _change_lock(run, pid=child, pid_start=ticks - 1)
        Fence.take(run, 2).check()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_one_process_may_take_it_again_but_an_earlier_attempt_may_not(run: RunFolder) -> None:
    first = Fence.take(run, 3)
    second = Fence.take(run, 4)
    second.check()
    with pytest.raises(FencedError):
        first.check()
    with pytest.raises(FencedError, match="attempt 4 has taken over .* from attempt 3"):
        Fence.take(run, 3)
    second.release("done")
    with pytest.raises(FencedError, match="attempt 4 has taken over"):
        Fence.take(run, 3)
    second.release("done")  # twice: nothing


def test_of_two_takers_at_once_one_wins(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    real = commit.write_json

    def overtaken(path: Path, obj: Any, fence: Any = None) -> None:
        real(path, obj, fence)
        real(path, {**obj, "token": "the other's", "attempt": 2})

    with monkeypatch.context() as patch:
        patch.setattr(commit, "write_json", overtaken)
        with pytest.raises(FencedError, match="attempt 2 holds it"):
            Fence.take(run, 1)


def test_dead_and_living_processes_are_told_apart() -> None:
    assert fence.process_start_ticks(os.getpid())
    child = _sleeping_child()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert fence.process_start_ticks(child) is None


def test_a_number_is_above_that_of_the_lock_when_the_journal_was_removed(run: RunFolder) -> None:
    for _ in range(3):
        number = claim_attempt(run, "train")
    Fence.take(run, number).release("done")
    shutil.rmtree(run.journal)
    assert claim_attempt(run, "train") == 4
    Fence.take(run, 4)
