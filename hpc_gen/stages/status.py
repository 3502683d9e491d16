"""What a run has done and is doing, from its folder alone: journal, ledger, checkpoints. Starts no torch."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpc_gen.config.errors import ConfigError
from hpc_gen.runtime import clock, file_operations, goodput, journal
from hpc_gen.runtime.errors import CheckpointError, ExitCode
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import forecast, outline
from hpc_gen.stages.control import Holder, holder, lost_holder, runs_folder
from hpc_gen.stages.parent import TABLE_WAS_THERE, origins
from hpc_gen.training.checkpoint import manifest

ENDINGS = {
    ExitCode.DONE: "done",
    ExitCode.USER: "ended by a mistake in the command or config",
    ExitCode.DATA: "ended: data or checkpoint refused",
    ExitCode.BUG: "failed",
    ExitCode.DIVERGED: "diverged",
    ExitCode.REQUEUE: "preempted, state saved",
    ExitCode.REQUEUE_ELSEWHERE: "ended: wants other nodes",
    ExitCode.STOPPED: "stopped by the user, state saved",
}
# One word per ending; a kill that nobody lived to tell of is `killed`, any other code `failed`.
_WORDS = {
    ExitCode.DONE: "done",
    ExitCode.REQUEUE: "requeued",
    ExitCode.REQUEUE_ELSEWHERE: "requeued",
    ExitCode.STOPPED: "stopped",
}
_NO_ROOM = (*file_operations.NO_ROOM, forecast.NO_ROOM)  # told apart from mistakes: nothing is wrong with the config
RATE_WINDOW_S = 600.0  # the rate is that of the last ten minutes of the attempt: what an estimate may go by
DISK_LIMIT_S = 0.2  # a run folder may hold a million small files on a slow file system; nobody waits for their sum


@dataclass(frozen=True)
class StageStatus:
    """One stage: `done` of `total` (None: not known before it ends) in `unit`.

    `state`: waiting, running, done, stopped, requeued, killed or failed; `cause`: why, in words, where there is more to
    say. `rate`: units per second of late, `eta_s`: seconds left at it; None unless the stage is running.
    """

    name: str
    state: str
    cause: str
    done: int
    total: int | None
    unit: str
    attempts: int
    rate: float | None = None
    eta_s: float | None = None


@dataclass(frozen=True)
class Checkpoint:
    """One committed checkpoint, `bytes` by its manifest."""

    images_seen: int
    bytes: int


@dataclass(frozen=True)
class DiskUse:
    """Bytes that a run folder takes on the disk; `whole`: all files were counted in the time there was."""

    bytes: int
    whole: bool


@dataclass(frozen=True)
class RunStatus:
    """Everything `hpc-gen status` tells. Times in seconds; `running` names the process at work.

    `lost_holder`: who held the lock and is gone; `last_seen`: wall time of the newest line of the journal. In the list
    of all runs `goodput` is empty and `disk` None: they would need every line and every file. `forecast`: what the
    stages will still write, in words; `origins`: what the weights began from, (what, words).
    """

    name: str
    path: str
    state: str
    identity: str
    running: Holder | None
    stages: list[StageStatus]
    attempts: list[journal.Attempt]
    last_row: journal.Row | None
    goodput: dict[str, float]
    held_rank_seconds: float
    waiting_s: float
    checkpoints: list[Checkpoint]
    unreadable: list[str]
    torn_lines: int
    lost_holder: str | None = None
    last_seen: float | None = None
    disk: DiskUse | None = None
    forecast: tuple[str, ...] = ()
    origins: tuple[tuple[str, str], ...] = ()

    @property
    def over(self) -> bool:
        """Whether nothing more is to be expected: all is done, or a stage failed for good and nobody is at work."""
        states = {stage.state for stage in self.stages}
        return self.running is None and (states == {"done"} or "failed" in states)

    def to_json(self) -> dict[str, Any]:
        """For other programs; NaN and infinity as text."""
        found = _finite(asdict(self))
        assert isinstance(found, dict)
        return found


class StatusReader:
    """Reads the status of a run again and again, of the journal only what is new."""

    def __init__(self, run: RunFolder) -> None:
        """Nothing is read yet."""
        self._run = run
        self._journal = journal.Reader(run)

    def read(self) -> RunStatus:
        """The status now. Raises ConfigError when the run's config cannot be read."""
        collecting = gc.isenabled()
        gc.disable()  # a long journal is many small objects, which would be looked through again and again
        try:
            return _status(self._run, self._journal.events(), whole=True)
        finally:
            if collecting:
                gc.enable()


def status(run: RunFolder) -> RunStatus:
    """Read the state of a run. Raises ConfigError when its config cannot be read."""
    return StatusReader(run).read()


def all_runs(workspace: Path) -> tuple[list[RunStatus], list[str]]:
    """Status of each run of a workspace by name, in brief, and sentences on those that cannot be read.

    Of each journal only the ends are read, so that many long runs cost little.
    """
    found, problems = [], []
    for path in sorted(runs_folder(workspace).glob("*/config.yaml")):
        run = RunFolder(path.parent)
        try:
            found.append(_status(run, journal.ends(run), whole=False))
        except ConfigError as error:
            problems.append(f"{run.name}: {error}")
    return found, problems


def _status(run: RunFolder, events: journal.Events, *, whole: bool) -> RunStatus:
    """`whole`: `events` are all there are, else only the ends of the files."""
    planned = outline.read(run)
    attempts = journal.attempts_of(events, journal.claims(run))
    rows = journal.history_of(event for event in events if event.stage == "train" and event.task == 0)
    receipt = goodput.receipt_of(events) if whole else None
    running = holder(run)
    checkpoints, unreadable = _checkpoints(run)
    images_seen = max([*(c.images_seen for c in checkpoints), *(row.images_seen for row in rows[-1:])], default=0)
    began, stages = origins(run), list[StageStatus]()
    with_table = [what for what, _ in began if what in TABLE_WAS_THERE]
    for name, total, unit in ((stage.name, stage.total, stage.unit) for stage in planned.stages):
        mine = [attempt for attempt in attempts if attempt.stage == name]
        done = images_seen if name == "train" else _committed_units(run, name)
        if running is not None and running.stage == name:
            rate = _recent_rate(_progress(name, running.attempt, rows, events))
            left = None if total is None or not rate else max(0.0, (total - done) / rate)
            stages.append(StageStatus(name, "running", "", done, total, unit, len(mine), rate, left))
        elif name == "encode" and not mine and with_table:
            stages.append(StageStatus(name, "done", f"{with_table[0]} where the table was there", done, total, unit, 0))
        else:
            state, cause = _rest(mine[-1] if mine else None, name != "train" or total is None or done >= total)
            stages.append(StageStatus(name, state, cause, done, total, unit, len(mine)))
    return RunStatus(
        name=run.name,
        path=str(run.path),
        state=_state(stages, attempts, running),
        identity=planned.identity,
        running=running,
        stages=stages,
        attempts=attempts,
        last_row=rows[-1] if rows else None,
        goodput=receipt.fractions if receipt is not None else {},
        held_rank_seconds=receipt.total_s if receipt is not None else 0.0,
        waiting_s=receipt.waiting_s if receipt is not None else 0.0,
        checkpoints=checkpoints,
        unreadable=unreadable,
        torn_lines=events.torn,
        lost_holder=lost_holder(run) if running is None else None,
        last_seen=max((attempt.last_seen for attempt in attempts), default=None),
        disk=disk_use(run.path) if whole else None,
        forecast=tuple(forecast.of_run(run)) if whole else (),
        origins=tuple(began),
    )


def disk_use(folder: Path, limit_s: float = DISK_LIMIT_S) -> DiskUse:
    """What a folder takes on the disk, counted for at most about `limit_s` seconds. Links are not followed."""
    begun, total, folders = clock.monotonic(), 0, [str(folder)]
    while folders:
        if clock.monotonic() - begun > limit_s:
            return DiskUse(total, False)
        try:
            entries = list(os.scandir(folders.pop()))
        except OSError:
            continue  # removed meanwhile, or not ours to read: it is not counted
        for entry in entries:
            try:
                total += entry.stat(follow_symlinks=False).st_blocks * 512
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
            except OSError:
                continue
    return DiskUse(total, True)


def ending(attempt: journal.Attempt) -> str:
    """How an attempt that is not at work any more ended, in words."""
    if attempt.exit_code is None:
        return "killed without a word (its last sign of life is the end)"
    known = attempt.exit_code in set(ExitCode)
    word = ENDINGS[ExitCode(attempt.exit_code)] if known else f"ended with code {attempt.exit_code}"
    if attempt.exit_code == ExitCode.USER and any(words in (attempt.cause or "") for words in _NO_ROOM):
        word = "ended for want of room on the disk"
    told = attempt.cause if attempt.cause not in (None, "done", word) else None
    return f"{word} ({told})" if told else word


def _rest(last: journal.Attempt | None, complete: bool) -> tuple[str, str]:
    """State and cause of a stage that is not running; `complete`: there is nothing left to train."""
    if last is None:
        return "waiting", ""
    if last.exit_code == ExitCode.DONE:
        return ("done", "") if complete else ("waiting", "ended well, but more images are asked for now")
    if last.exit_code is None:
        return "killed", ending(last)
    return next((word for code, word in _WORDS.items() if code == last.exit_code), "failed"), ending(last)


def _state(stages: Sequence[StageStatus], attempts: Sequence[journal.Attempt], running: Holder | None) -> str:
    if running is not None:
        where = "here" if running.here else f"on {running.host}, as far as can be told from here"
        return f"running {where}: attempt {running.attempt} ({running.stage}), process {running.pid}"
    if stages and all(stage.state == "done" for stage in stages):
        return "done"
    if not attempts:
        return "not begun"
    last = attempts[-1]
    if last.exit_code == ExitCode.DONE:
        return "some stages are left; `hpc-gen resume` goes on"
    hint = "; `hpc-gen resume` goes on" if last.exit_code in (None, ExitCode.REQUEUE, ExitCode.STOPPED) else ""
    return f"{last.stage} {ending(last)}{hint}"


def _committed_units(run: RunFolder, stage: str) -> int:
    folder = run.ledger(stage)
    return sum(1 for _ in folder.glob("*.json")) if folder.is_dir() else 0


def _progress(
    stage: str, attempt: int, rows: Sequence[journal.Row], events: Sequence[journal.Event]
) -> list[tuple[float, float]]:
    """(wall seconds, amount done) of an attempt, ascending: rows of training, committed units else."""
    if stage == "train":
        return [(row.t, float(row.images_seen)) for row in rows if row.attempt == attempt]
    committed = [
        event.t
        for event in events
        if event.kind == "unit_committed" and event.attempt == attempt and event.stage == stage
    ]
    return [(t, float(number)) for number, t in enumerate(sorted(committed), 1)]


def _recent_rate(points: Sequence[tuple[float, float]]) -> float | None:
    """Amount per second over the last RATE_WINDOW_S of the points; None when two of them do not tell."""
    recent = [point for point in points if point[0] >= points[-1][0] - RATE_WINDOW_S]
    if len(recent) < 2 or recent[-1][0] <= recent[0][0]:
        return None
    return max(0.0, (recent[-1][1] - recent[0][1]) / (recent[-1][0] - recent[0][0]))


def _checkpoints(run: RunFolder) -> tuple[list[Checkpoint], list[str]]:
    found: list[Checkpoint] = []
    unreadable: list[str] = []
    for path in sorted(run.checkpoints.glob("[0-9]*")) if run.checkpoints.is_dir() else []:
        try:
            facts = manifest.read(path)
        except CheckpointError as error:
            unreadable.append(str(error))
            continue
        found.append(Checkpoint(facts.images_seen, sum(int(file["bytes"]) for file in facts.files.values())))
    return sorted(found, key=lambda each: each.images_seen), unreadable


def _finite(value: Any) -> Any:
    """The value with NaN and infinity as text, which JSON cannot hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return value
