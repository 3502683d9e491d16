"""Whole attempts of the train stage in this process: stops, faults, roll-backs, zombies; each against an undisturbed run."""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import experiments
import pytest
import torch
from experiments import LINEAR, TINY, Workspace
from tiny_method import is_unlucky

from hpc_gen.runtime import clock, commit
from hpc_gen.runtime.errors import CheckpointError, DivergedError, ExitCode, FencedError, UserError
from hpc_gen.runtime.fence import Fence, claim_attempt
from hpc_gen.runtime.journal import Event, attempts, read
from hpc_gen.runtime.randomness import Draw, Stream, Uniform
from hpc_gen.runtime.ranks import Ranks
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.runtime.stop import Cause, Stop, StopToken
from hpc_gen.training import loop
from hpc_gen.training.checkpoint import manifest, storage
from hpc_gen.training.checkpoint.read import list_checkpoints

END = 96


def folder(run: RunFolder, position: int) -> Path:
    return run.checkpoints / f"{position:012d}"


def positions(run: RunFolder) -> list[int]:
    return [info.images_seen for info in list_checkpoints(run)]


def events(run: RunFolder, kind: str) -> list[Event]:
    return [event for event in read(run) if event.kind == kind]


def cause(run: RunFolder, attempt: int) -> dict[str, Any]:
    return json.loads((run.journal / f"{attempt:04d}.cause.json").read_text())


def assert_same_end(run: RunFolder, other: RunFolder, position: int = END) -> None:
    """Checkpoint bytes and history are equal."""
    assert experiments.contents(folder(run, position)) == experiments.contents(folder(other, position))
    assert experiments.rows(run) == experiments.rows(other)
    assert experiments.leftovers(run) == []


class AtStep(StopToken):
    """A stop token with which something happens before step `step` (from 1) of the attempt."""

    def __init__(self, run: RunFolder, step: int, action: Callable[[StopToken], object]) -> None:
        super().__init__(run)
        self._left, self._action = step, action

    def agree(self, ranks: Ranks) -> Stop | None:
        self._left -= 1
        if self._left == 0:
            self._action(self)
            self._looked_at = None  # files are looked for once a second only
        return super().agree(ranks)


@pytest.fixture
def undisturbed(workspace: Workspace) -> RunFolder:
    run = workspace.run("undisturbed", text=LINEAR)
    assert workspace.train(run) == ExitCode.DONE
    return run


# -- stops -------------------------------------------------------------------------------------------------------------

STOPS: dict[str, tuple[Callable[[RunFolder], Callable[[StopToken], object]], ExitCode, str]] = {
    "SIGTERM": (lambda run: lambda token: os.kill(os.getpid(), signal.SIGTERM), ExitCode.REQUEUE, "PREEMPTED"),
    "SIGUSR1": (lambda run: lambda token: os.kill(os.getpid(), signal.SIGUSR1), ExitCode.REQUEUE, "PREEMPTED"),
    "SIGINT": (lambda run: lambda token: os.kill(os.getpid(), signal.SIGINT), ExitCode.STOPPED, "STOPPED"),
    "file PREEMPT": (lambda run: lambda token: run.preempt_file.touch(), ExitCode.REQUEUE, "PREEMPTED"),
    "file STOP": (lambda run: lambda token: run.stop_file.touch(), ExitCode.STOPPED, "STOPPED"),
    "time limit": (lambda run: lambda token: setattr(token, "deadline", clock.now()), ExitCode.REQUEUE, "TIME_LIMIT"),
}


@pytest.mark.parametrize("step", [1, 4, 5])
@pytest.mark.parametrize("name", STOPS)
def test_a_stop_saves_where_it_stands_and_the_resume_is_exact(
    workspace: Workspace, undisturbed: RunFolder, name: str, step: int
) -> None:
    """Before the first step, between two checkpoints, and exactly at one."""
    action, code, stop_name = STOPS[name]
    run = workspace.run("stopped", text=LINEAR)
    token = AtStep(run, step, action(run))
    kept = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
    }
    token.install()
    try:
        assert workspace.train(run, stop=token) == code
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    seen = (step - 1) * 8
    assert positions(run)[-1] == seen
    told = cause(run, 1)
    assert (told["exit_code"], told["stop"], told["images_seen"], told["cause"]) == (code, stop_name, seen, name)
    assert [(a.exit_code, a.cause) for a in attempts(run)] == [(code, name)]
    run.stop_file.unlink(missing_ok=True)  # as `resume` does; PREEMPT has had its effect
    assert workspace.train(run) == ExitCode.DONE
    assert attempts(run)[-1].resumed_from == seen
    assert_same_end(run, undisturbed)


def test_a_run_in_many_small_attempts_is_one_run(workspace: Workspace, undisturbed: RunFolder) -> None:
    run = workspace.run("pieces", text=LINEAR)
    for end in (8, 24, 32, 56, 96):
        assert workspace.train(run, f"train.stop_at_images={end}") == ExitCode.DONE
    assert [attempt.resumed_from for attempt in attempts(run)] == [None, 8, 24, 32, 56]
    assert_same_end(run, undisturbed)


def test_a_log_interval_that_was_cut_goes_on_in_the_next_attempt(workspace: Workspace) -> None:
    whole, cut = (workspace.run(name, "train.log_every=48", text=LINEAR) for name in ("whole", "cut"))
    assert workspace.train(whole) == ExitCode.DONE
    for end in (24, 64, 96):
        workspace.train(cut, f"train.stop_at_images={end}")
    assert [row[0] for row in experiments.rows(whole)] == [48, 96]
    assert_same_end(cut, whole)


def test_a_finished_run_does_nothing_more(workspace: Workspace, undisturbed: RunFolder) -> None:
    before = experiments.contents(undisturbed.checkpoints)
    assert workspace.train(undisturbed) == ExitCode.DONE
    assert experiments.contents(undisturbed.checkpoints) == before
    assert len(experiments.rows(undisturbed)) == 6


@pytest.mark.parametrize(
    ("override", "word"),
    [("train.optimizer.lr=0.002", "seed, method, data or train"), ("seed=8", "seed, method, data")],
)
def test_a_checkpoint_of_other_settings_is_refused(
    workspace: Workspace, undisturbed: RunFolder, override: str, word: str
) -> None:
    with pytest.raises(CheckpointError, match=f"was written with another {word}"):
        workspace.train(undisturbed, override)
    assert cause(undisturbed, 2)["exit_code"] == ExitCode.DATA


def test_a_checkpoint_of_another_table_is_refused(workspace: Workspace, undisturbed: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="was written with another training table"):
        workspace.train(undisturbed, f"data.table={experiments.HELD_OUT}", "data.validation_table=null")


# -- the best checkpoint -------------------------------------------------------------------------------------------------


def test_the_best_checkpoint_stays_and_restarts_do_not_forget_it(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation says that 32 is the best; every later one is worse."""
    monkeypatch.setattr("hpc_gen.stages.periodic.validate", lambda *args, **kwargs: {"loss": next(values)})
    losses = {16: 3.0, 32: 1.0, 48: 2.0, 64: 2.5, 80: 2.0, 96: 1.5}
    found = {}
    for name, ends in (("whole", (96,)), ("pieces", (40, 56, 64, 96))):
        values = iter(losses.values())
        run = workspace.run(name, "train.validate={every_images: 16, num_images: 8}", text=LINEAR)
        for end in ends:
            assert workspace.train(run, f"train.stop_at_images={end}") == ExitCode.DONE
        found[name] = positions(run)
        state = storage.load(folder(run, 96), "train/best")
        assert (float(state["train/best_loss"]), int(state["train/best_images"])) == (1.0, 32)
    assert found == {"whole": [32, 80, 96], "pieces": [32, 80, 96]}


# -- steps that are not finite -----------------------------------------------------------------------------------------


def test_a_step_that_is_not_finite_is_skipped_and_counted(workspace: Workspace) -> None:
    overrides = ("method.bad_at=[40]", "train.save_every=8", "train.keep_last=99")
    run = workspace.run("bad", *overrides, text=LINEAR)
    assert workspace.train(run) == ExitCode.DONE
    before, after = storage.load(folder(run, 40)), storage.load(folder(run, 48))
    for name, tensor in before.items():
        if not name.startswith("train/"):
            assert torch.equal(after[name], tensor), f"{name} changed in a step that was skipped"
    assert (int(after["train/non_finite_total"]), int(after["train/non_finite_run"])) == (1, 1)
    end = storage.load(folder(run, END), "train/")
    assert (int(end["train/non_finite_total"]), int(end["train/non_finite_run"])) == (1, 0)
    assert [event.fields["images_seen"] for event in events(run, "non_finite")] == [48]
    assert all(value == value for _, data in experiments.rows(run) for value in data.values())

    other = workspace.run("bad-cut", *overrides, text=LINEAR)
    for end_images in (40, 48, 96):
        workspace.train(other, f"train.stop_at_images={end_images}")
    assert_same_end(other, run)


def unlucky_seed(first: int, second: int) -> int:
    """A seed with which the draws at both places are unlucky, and other draws at the second are not."""
    for seed in itertools.count():
        fate = Stream(seed, "train/unlucky/fate")
        drawn = [float(fate.draw(Draw((), Uniform()), n, k)) for n, k in ((first, 0), (second, 0), (second, 1))]
        if [is_unlucky(value) for value in drawn] == [True, True, False]:
            return seed
    raise AssertionError


def test_bad_draws_that_persist_are_left_by_a_roll_back(workspace: Workspace) -> None:
    """Steps at 40 and 48 are not finite: back to the checkpoint at 48, on with other draws, and no row twice."""
    overrides = ("method.unlucky=[40, 48]", f"seed={unlucky_seed(40, 48)}", "train.non_finite.max_consecutive=2")
    run = workspace.run("unlucky", *overrides, text=LINEAR)
    assert workspace.train(run) == ExitCode.DONE
    (told,) = events(run, "rollback")
    assert (told.fields["images_seen"], told.fields["resumed_from"], told.fields["draw_counter"]) == (56, 48, 1)
    end = storage.load(folder(run, END), "train/")
    assert (int(end["train/draw_counter"]), int(end["train/non_finite_total"])) == (1, 2)
    assert [row[0] for row in experiments.rows(run)] == [16, 32, 48, 64, 80, 96]

    for ends in ((48, 96), (64, 96)):  # interrupted in the bad stretch, and after it
        other = workspace.run(f"unlucky-{ends[0]}", *overrides, text=LINEAR)
        for end_images in ends:
            assert workspace.train(other, f"train.stop_at_images={end_images}") == ExitCode.DONE
        assert_same_end(other, run)


def test_what_does_not_help_ends_as_diverged(workspace: Workspace) -> None:
    overrides = ("method.bad_from=40", "train.non_finite={max_consecutive: 3, max_rollbacks: 2}")
    run = workspace.run("diverged", *overrides, text=LINEAR)
    with pytest.raises(
        DivergedError, match="3 steps in a row .* after 2 roll-backs; lower train.optimizer.lr"
    ) as caught:
        workspace.train(run)
    assert caught.value.exit_code == ExitCode.DIVERGED == 75
    assert cause(run, 1)["exit_code"] == 75
    assert [attempt.exit_code for attempt in attempts(run)] == [75]
    assert len(events(run, "rollback")) == 2
    assert "released" in json.loads(run.lock.read_text())
    assert experiments.leftovers(run) == []
    newest = storage.load(folder(run, positions(run)[-1]))
    assert all(bool(torch.isfinite(tensor).all()) for name, tensor in newest.items() if not name.startswith("train/"))


def test_diverging_before_the_first_checkpoint_says_so(workspace: Workspace) -> None:
    run = workspace.run("early", "method.bad_from=0", "train.non_finite.max_consecutive=1", text=LINEAR)
    with pytest.raises(CheckpointError, match="before its first checkpoint; lower train.optimizer.lr"):
        workspace.train(run)


# -- disks, zombies, bugs ------------------------------------------------------------------------------------------------


def full_disk(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """Writes to files whose path holds `part` find the disk full, as the kernel would say it."""
    write = commit.ops.write

    def full(descriptor: int, data: memoryview, path: Path) -> None:
        with commit.ops._explained(path, data.nbytes):
            if part in str(path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(descriptor, data, path)

    monkeypatch.setattr(commit.ops, "write", full)


def test_a_disk_full_for_a_while_costs_one_checkpoint(
    workspace: Workspace, undisturbed: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = workspace.run("full", "train.keep_last=99", text=LINEAR)
    full_disk(monkeypatch, "/.tmp-000000000048")
    assert workspace.train(run) == ExitCode.DONE
    assert positions(run) == [16, 32, 64, 80, 96]
    (told,) = events(run, "save_failed")
    assert told.fields["images_seen"] == 48 and "the disk is full" in told.fields["error"]
    assert "the save before this one failed and was given up: cannot write" in capsys.readouterr().out
    assert_same_end(run, undisturbed)


def test_a_last_save_that_fails_is_the_failure_of_the_attempt(
    workspace: Workspace, undisturbed: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = workspace.run("full", text=LINEAR)
    with monkeypatch.context() as patch:
        full_disk(patch, "/.tmp-000000000096")
        with pytest.raises(UserError, match="the disk is full .* nothing committed was lost"):
            workspace.train(run)
    assert positions(run) == [64, 80]
    assert cause(run, 1)["exit_code"] == ExitCode.USER
    assert workspace.train(run) == ExitCode.DONE
    assert_same_end(run, undisturbed)


def test_a_disk_that_is_full_for_everything_ends_the_attempt_with_its_own_sentence(
    workspace: Workspace, undisturbed: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the cause file and the lock can be written; the next attempt goes on all the same."""
    run = workspace.run("full", text=LINEAR)
    with monkeypatch.context() as patch:
        token = AtStep(run, 6, lambda _: full_disk(patch, ""))
        with pytest.raises(UserError, match=r"cannot write .*\.tmp-000000000096.*: the disk is full"):
            workspace.train(run, stop=token)
    assert not (run.journal / "0001.cause.json").exists()
    assert "released" not in json.loads(run.lock.read_text())
    assert workspace.train(run) == ExitCode.DONE
    assert_same_end(run, undisturbed)


def test_a_preview_that_cannot_be_written_does_not_end_the_training(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = workspace.run("preview", "train.preview={every_images: 16, labels: [0, 1], settings: {steps: 2}}", text=TINY)
    full_disk(monkeypatch, "/previews/")
    assert workspace.train(run, "train.stop_at_images=32") == ExitCode.DONE
    assert [event.fields["what"] for event in events(run, "fault")] == ["preview was not written"] * 2
    assert experiments.leftovers(run) == []
    monkeypatch.undo()
    assert workspace.train(run, "train.stop_at_images=48") == ExitCode.DONE
    assert sorted(path.name for path in run.previews.iterdir()) == ["000000000048", "000000000048.png"]


def test_a_zombie_ends_without_a_commit(workspace: Workspace, undisturbed: RunFolder) -> None:
    """Another attempt takes the run over before step 5: nothing after the checkpoint at 32 comes from the old one."""
    run = workspace.run("zombie", text=LINEAR)
    successor: list[Fence] = []
    token = AtStep(run, 5, lambda _: successor.append(Fence.take(run, claim_attempt(run, "train"))))
    with pytest.raises(FencedError, match="attempt 2 holds it; this process ends") as caught:
        workspace.train(run, stop=token)
    assert caught.value.exit_code == ExitCode.STOPPED
    assert set(positions(run)) <= {16, 32}
    successor[0].check()  # the lock is still the successor's
    assert cause(run, 1)["exit_code"] == ExitCode.STOPPED
    successor[0].release("test")
    assert workspace.train(run) == ExitCode.DONE
    assert_same_end(run, undisturbed)


def test_a_bug_is_in_the_journal_and_the_run_can_go_on(
    workspace: Workspace, undisturbed: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = workspace.run("bug", text=LINEAR)

    def broken(*unused: object) -> None:
        raise ZeroDivisionError("a bug")

    with monkeypatch.context() as patch:
        token = AtStep(run, 4, lambda _: patch.setattr(loop, "_step_all_turns", broken))
        with pytest.raises(ZeroDivisionError):
            workspace.train(run, stop=token)
    assert [(a.exit_code, a.end is not None) for a in attempts(run)] == [(ExitCode.BUG, True)]
    assert "released" in json.loads(run.lock.read_text())
    assert positions(run) == [16]
    assert workspace.train(run) == ExitCode.DONE
    assert_same_end(run, undisturbed)


def test_what_killed_attempts_were_writing_is_swept(workspace: Workspace, undisturbed: RunFolder) -> None:
    old = [
        undisturbed.path / ".tmp-attempt.lock-1-aa",
        undisturbed.journal / ".tmp-0001.cause.json-1-aa",
        undisturbed.checkpoints / ".tmp-000000000096-0001",
    ]
    for path in old:
        path.touch()
        os.utime(path, (1.0, 1.0))
    mine = undisturbed.path / ".tmp-of-somebody-else"
    mine.touch()
    os.utime(mine, (clock.now() + 60, clock.now() + 60))
    workspace.train(undisturbed)
    assert not any(path.exists() for path in old)
    assert mine.exists()


def test_the_manifest_says_what_the_numbers_depend_on(workspace: Workspace, undisturbed: RunFolder) -> None:
    facts = manifest.read(folder(undisturbed, END)).facts
    assert set(facts) == {"identity", "table", "method", "engine", "threads", "torch", "digest"}
    assert facts["method"] == "tiny_method:ENTRY" and facts["engine"] == "ddp"
    again = workspace.run("again", "train.save_every=48", "train.log_every=48", text=LINEAR)
    assert workspace.train(again) == ExitCode.DONE
    assert manifest.read(folder(again, END)).facts == facts, "operation keys are not part of the facts"


def test_the_cause_larger_wins(workspace: Workspace) -> None:
    run = workspace.run("both", text=LINEAR)

    def both(token: StopToken) -> None:
        token.request(Cause.STOPPED, "first")
        token.request(Cause.PREEMPTED, "second")

    assert workspace.train(run, stop=AtStep(run, 3, both)) == ExitCode.STOPPED
