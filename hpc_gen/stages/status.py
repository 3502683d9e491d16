"""What a run has done and is doing, from its folder alone: journal, ledger, checkpoints. Starts no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hpc_gen.config import loader
from hpc_gen.config.experiment import Experiment
from hpc_gen.runtime import clock, goodput, journal
from hpc_gen.runtime.errors import CheckpointError, ExitCode
from hpc_gen.runtime.progress import format_count, format_duration
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages.control import Holder, holder
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


@dataclass(frozen=True)
class StageStatus:
    """One stage: `done` of `total` (None: not known before it ends) in `unit`."""

    name: str
    state: str
    done: int
    total: int | None
    unit: str
    attempts: int


@dataclass(frozen=True)
class Checkpoint:
    """One committed checkpoint, `bytes` by its manifest."""

    images_seen: int
    bytes: int


@dataclass(frozen=True)
class RunStatus:
    """Everything `hpc-gen status` tells. Times in seconds; `running` names the process at work."""

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

    def to_json(self) -> dict[str, Any]:
        """For other programs; NaN and infinity as text."""
        found = _finite(asdict(self))
        assert isinstance(found, dict)
        return found


def status(run: RunFolder) -> RunStatus:
    """Read the state of a run. Raises ConfigError when its config cannot be read."""
    resolved = loader.load(run.config_path)
    events = journal.read(run)
    attempts = journal.attempts(run)
    rows = journal.history(run)
    receipt = goodput.receipt_of(events)
    running = holder(run)
    checkpoints, unreadable = _checkpoints(run)
    images_seen = max([*(c.images_seen for c in checkpoints), *(row.images_seen for row in rows[-1:])], default=0)
    stages = [
        _stage(run, resolved.experiment, name, attempts, images_seen, running)
        for name in resolved.experiment.stage_order()
    ]
    return RunStatus(
        name=run.name,
        path=str(run.path),
        state=_state(stages, attempts, running),
        identity=resolved.identity,
        running=running,
        stages=stages,
        attempts=attempts,
        last_row=rows[-1] if rows else None,
        goodput=receipt.fractions,
        held_rank_seconds=receipt.total_s,
        waiting_s=receipt.waiting_s,
        checkpoints=checkpoints,
        unreadable=unreadable,
        torn_lines=events.torn,
    )


def lines(found: RunStatus, now: float | None = None) -> Iterator[str]:
    """The status in plain words, for a terminal without tables and for logs."""
    now = clock.now() if now is None else now
    yield f"{found.name}: {found.state}"
    yield f"  folder       {found.path}"
    yield f"  identity     {found.identity[:16]}"
    for stage in found.stages:
        amount = f"{stage.done:,} of {stage.total:,}" if stage.total is not None else f"{stage.done:,}"
        times = f", {stage.attempts} attempt{'s' if stage.attempts > 1 else ''}" if stage.attempts else ""
        yield f"  {stage.name:<12} {stage.state}: {amount} {stage.unit}{times}"
    if found.last_row is not None:
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in sorted(found.last_row.data.items()))
        yield f"  last row     at {found.last_row.images_seen:,} images: {numbers}"
    if found.held_rank_seconds > 0:
        shares = sorted(found.goodput.items(), key=lambda item: -item[1])
        told = ", ".join(f"{name.replace('_', ' ')} {share:.0%}" for name, share in shares if share >= 0.005)
        held, waited = format_duration(found.held_rank_seconds), format_duration(found.waiting_s)
        yield f"  goodput      {told} of {held} held (ranks x time); {waited} between attempts"
    if found.checkpoints:
        told = ", ".join(f"{c.images_seen:,} ({format_count(c.bytes)}B)" for c in found.checkpoints[-4:])
        more = f"{len(found.checkpoints) - 4} older, " if len(found.checkpoints) > 4 else ""
        yield f"  checkpoints  {more}{told}"
    for problem in found.unreadable:
        yield f"  checkpoint   {problem}"
    for attempt in found.attempts:
        yield f"  {_attempt_line(attempt, found.running, now)}"
    if found.torn_lines:
        yield f"  journal      {found.torn_lines} lines were cut off by kills and are left out"


def _attempt_line(attempt: journal.Attempt, running: Holder | None, now: float) -> str:
    at_work = running is not None and running.attempt == attempt.number and attempt.end is None
    lasted = format_duration((now if at_work else attempt.end or attempt.last_seen) - attempt.start)
    start = f" from {attempt.resumed_from:,} images" if attempt.resumed_from is not None else ""
    width = f", {attempt.world_size} ranks" if attempt.stage == "train" else ""
    ended = "running" if at_work else _ended(attempt)
    return f"attempt {attempt.number:<4} {attempt.stage}{start}{width}, {lasted}: {ended}"


def _ended(attempt: journal.Attempt) -> str:
    if attempt.exit_code is None:
        return "killed without a word (its last sign of life is the end)"
    known = attempt.exit_code in set(ExitCode)
    word = ENDINGS[ExitCode(attempt.exit_code)] if known else f"ended with code {attempt.exit_code}"
    told = attempt.cause if attempt.cause not in (None, "done", word) else None
    return f"{word} ({told})" if told else word


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
    return f"{last.stage} {_ended(last)}{hint}"


def _stage(
    run: RunFolder,
    experiment: Experiment,
    name: str,
    attempts: Sequence[journal.Attempt],
    images_seen: int,
    running: Holder | None,
) -> StageStatus:
    mine = [attempt for attempt in attempts if attempt.stage == name]
    finished = bool(mine) and mine[-1].exit_code == ExitCode.DONE
    if name == "train":
        assert experiment.train is not None
        done, unit = images_seen, "images"
        total: int | None = experiment.train.end_images
        finished = finished and images_seen >= experiment.train.end_images
    else:
        folder = run.ledger(name)
        done, unit = sum(1 for _ in folder.glob("*.json")) if folder.is_dir() else 0, "units"
        total = _units(experiment, name)
    if running is not None and running.stage == name:
        state = "running"
    elif finished:
        state = "done"
    else:
        state = _ended(mine[-1]) if mine else "not begun"
    return StageStatus(name, state, done, total, unit, len(mine))


def _units(experiment: Experiment, name: str) -> int | None:
    if name == "sample" and experiment.sample is not None:
        return -(-experiment.sample.num_images // experiment.sample.block_images)
    return 1 if name == "report" else None


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
