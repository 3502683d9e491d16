"""Finding runs, and asking a running one to save and leave: `hpc-gen preempt`, as Slurm would do it."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_gen.runtime import clock, commit, journal
from hpc_gen.runtime.errors import UserError, nearest
from hpc_gen.runtime.fence import process_start_ticks, read_attempt
from hpc_gen.runtime.run_folder import RunFolder

WAIT_POLL_S = 0.2


@dataclass(frozen=True)
class Holder:
    """The process that answers for the attempt in progress; `here`: alive on this host, else perhaps on `host`."""

    attempt: int
    stage: str
    pid: int
    host: str
    here: bool


def runs_folder(workspace: Path) -> Path:
    """Where the runs of a workspace lie."""
    return workspace / "runs"


def find_run(text: str, workspace: Path) -> RunFolder:
    """The run of a path, or of a name below WORKSPACE/runs. Raises UserError naming the nearest one."""
    for path in (Path(text), runs_folder(workspace) / text):
        run = RunFolder(path)
        if run.exists():
            return run
    folder = runs_folder(workspace)
    names = sorted(path.parent.name for path in folder.glob("*/config.yaml")) if folder.is_dir() else []
    known = f"runs there: {', '.join(names)}" if names else "there are none yet; `hpc-gen run CONFIG` makes one"
    raise UserError(f"no run '{text}'{nearest(text, names)} as a folder or below {folder}; {known}")


def holder(run: RunFolder) -> Holder | None:
    """Who is at work on a run, or None: the train stage by its lock, other stages by their claim and journal."""
    lock = _read_json(run.lock)
    found = [_as_holder(run, lock, int(lock["attempt"]))] if "attempt" in lock and not lock.get("released") else []
    last = journal.last_attempt(run)
    if last is not None and last.end is None and lock.get("attempt") != last.number:
        claim = read_attempt(run, last.number)
        if claim:
            found.insert(0, _as_holder(run, claim, last.number))
    alive_or_elsewhere = [each for each in found if each.here or each.host != socket.gethostname()]
    return min(alive_or_elsewhere, key=lambda each: not each.here, default=None)


def lost_holder(run: RunFolder) -> str | None:
    """Who holds the lock of this host and is gone without a word, in words; None when nobody is missing."""
    lock = _read_json(run.lock)
    if "attempt" not in lock or lock.get("released"):
        return None
    found = _as_holder(run, lock, int(lock["attempt"]))
    if found.here or found.host != socket.gethostname():
        return None
    return f"process {found.pid} of attempt {found.attempt}, which holds the lock, is gone; the next attempt takes over"


def preempt(
    run: RunFolder,
    say: Callable[[str], None],
    *,
    dry_run: bool = False,
    wait_s: float | None = None,
    jobs: Callable[[], bool] = lambda: False,
) -> bool:
    """Ask the attempt in progress to save and end with code 85: SIGTERM on this host, a PREEMPT file for others.

    `wait_s`: wait so long for its end (None: do not wait). `jobs` asks the run's jobs on a cluster and says whether it
    has any; then nobody else is asked. Returns whether it has ended, or was not waited for. Raises UserError when
    nothing is running.
    """
    found = holder(run)
    if jobs():
        return dry_run or wait_s is None or found is None or _wait(run, found, say, wait_s)
    if found is None:
        raise UserError(
            f"nothing is running in {run.path}, so there is nothing to preempt; see `hpc-gen status {run.name}`"
        )
    who = f"attempt {found.attempt} ({found.stage})"
    would = "would send" if dry_run else "sending"
    if found.here:
        say(f"{would} SIGTERM to process {found.pid}, {who} on this host")
    else:
        would = "would write" if dry_run else "writing"
        say(f"{would} {run.preempt_file}: {who} runs on {found.host} and looks at it once a second")
    if dry_run:
        return True
    if found.here:
        os.kill(found.pid, signal.SIGTERM)
    else:
        commit.write_text(run.preempt_file, "hpc-gen preempt\n")
    return wait_s is None or _wait(run, found, say, wait_s)


def lift_stop(run: RunFolder, say: Callable[[str], None]) -> None:
    """Remove the STOP file of a run that the user wants to go on: it has had its effect."""
    if run.stop_file.exists():
        say(f"removing {run.stop_file}: the run goes on")
        commit.ops.unlink(run.stop_file)


def _wait(run: RunFolder, found: Holder, say: Callable[[str], None], wait_s: float) -> bool:
    begun = clock.monotonic()
    while clock.monotonic() - begun < wait_s:
        now = holder(run)
        if now is None or now.attempt != found.attempt:
            ended = next((each for each in journal.attempts(run) if each.number == found.attempt), None)
            code = "without a word" if ended is None or ended.exit_code is None else f"with code {ended.exit_code}"
            cause = f" ({ended.cause})" if ended is not None and ended.cause else ""
            say(f"attempt {found.attempt} ended {code}{cause} after {clock.monotonic() - begun:.1f} s")
            return True
        clock.sleep(WAIT_POLL_S)
    say(f"attempt {found.attempt} has not ended within {wait_s:g} s; it may be saving: see `hpc-gen status {run.name}`")
    return False


def _as_holder(run: RunFolder, facts: dict[str, Any], attempt: int) -> Holder:
    pid, host = int(facts.get("pid", -1)), str(facts.get("host", ""))
    started = process_start_ticks(pid) if host == socket.gethostname() and pid > 0 else None
    here = started is not None and started == facts.get("pid_start")
    stage = str(facts.get("stage") or read_attempt(run, attempt).get("stage") or "train")  # which alone has a lock
    return Holder(attempt, stage, pid, host, here)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
