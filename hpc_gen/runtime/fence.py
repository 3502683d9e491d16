"""Attempts and the fence that keeps a zombie from committing (DESIGN section 4, "Units and a ledger").

An attempt is a number, claimed by creating journal/NNNN.attempt exclusively. The attempt that may commit is the
one whose token stands in attempt.lock; every commit re-reads it. A rank of a lost node that comes back to life
after a requeue finds another token there and ends. flock is not used: on shared file systems it may be local to
a node or missing.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_gen.runtime import clock, commit, env
from hpc_gen.runtime.errors import FencedError, UserError
from hpc_gen.runtime.run_folder import RunFolder

_HOLDER_WAIT_S = 10.0
_POLL_S = 0.2


@dataclass(frozen=True)
class Job:
    """The Slurm job an attempt runs in; empty id outside Slurm."""

    job_id: str = ""
    restart_count: int = 0

    @classmethod
    def current(cls) -> Job:
        """From SLURM_JOB_ID (ARRAY_TASK for an array element) and SLURM_RESTART_COUNT (unset in the first run)."""
        array, task = env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID")
        job_id = f"{array}_{task}" if array and task else env.get("SLURM_JOB_ID", "")
        return cls(job_id or "", int(env.get("SLURM_RESTART_COUNT", "0") or 0))


def _process_facts() -> dict[str, Any]:
    """Who we are: enough to tell later whether this very process is alive."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "pid_start": process_start_ticks(pid)}


def process_start_ticks(pid: int) -> int | None:
    """Start of a living process in clock ticks after boot (field 22 of /proc/PID/stat); None when there is no
    such process, or it is dead and only not yet waited for. Where /proc is missing: 0 for any living process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in ("Z", "X", "x") else int(fields[19])
    except (OSError, IndexError, ValueError):
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # alive, and another user's
    return 0


def claim_attempt(run_folder: RunFolder, stage: str, job: Job | None = None, world_size: int = 1) -> int:
    """Claim the next attempt number of a run (from 1). Two claimers at once get two numbers.

    Writes journal/NNNN.attempt with who, where and when. A claimer that is killed in between leaves an empty file:
    the number is used up, its facts are unknown (`read_attempt` gives {}).
    """
    job = Job.current() if job is None else job
    facts = {
        "stage": stage,
        "job_id": job.job_id,
        "restart_count": job.restart_count,
        "world_size": world_size,
    }
    text = json.dumps({**facts, **_process_facts(), "time": clock.now()}, sort_keys=True, indent=1)
    folder = commit.make_folder(run_folder.journal)
    claimed = (int(p.stem) for p in folder.glob("*.attempt") if re.fullmatch(r"\d+", p.stem))
    # the lock too: where somebody removed the journal, a number below its holder's would be fenced off
    number = 1 + max(claimed, default=0)
    number = max(number, 1 + int(_read(run_folder.lock).get("attempt", 0)))
    while True:
        try:
            stream = commit.CommitStream(attempt_path(run_folder, number))
        except FileExistsError:
            number += 1
            continue
        with stream:
            stream.write(text.encode() + b"\n")
        commit.ops.fsync_dir(folder)
        return number


def attempt_path(run_folder: RunFolder, attempt: int) -> Path:
    """The file that claims an attempt number."""
    return run_folder.journal / f"{attempt:04d}.attempt"


def read_attempt(run_folder: RunFolder, attempt: int) -> dict[str, Any]:
    """What an attempt wrote when it was claimed; {} when it was killed before it could."""
    return _read(attempt_path(run_folder, attempt))


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, or {} for a file that is missing, empty or torn."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_alive(lock: dict[str, Any]) -> bool:
    """Whether the holder of a lock is a living process of this host. Of other hosts nobody can tell."""
    if not lock or lock.get("released") or lock.get("host") != socket.gethostname():
        return False
    if lock.get("pid") == os.getpid():
        return False  # ourselves: an earlier stage of this very process
    started = process_start_ticks(int(lock.get("pid", -1)))
    return started is not None and started == lock.get("pid_start")


class Fence:
    """The right of one attempt to commit. Rank 0 takes it and broadcasts `token`; the others build a Fence of it."""

    def __init__(self, run_folder: RunFolder, attempt: int, token: str) -> None:
        """A fence on a token taken elsewhere (by rank 0 of the same attempt)."""
        self.attempt = attempt
        self.token = token
        self._path = run_folder.lock

    @classmethod
    def take(cls, run_folder: RunFolder, attempt: int) -> Fence:
        """Take the run folder for this attempt; from now on the earlier holder cannot commit.

        When the holder lives on this host, waits up to 10 s for it to end (a requeue may overlap its farewell),
        then raises UserError. Raises FencedError when a later attempt was here already: we are the zombie.
        """
        give_up_at = clock.monotonic() + _HOLDER_WAIT_S
        while _is_alive(lock := _read(run_folder.lock)):
            if clock.monotonic() >= give_up_at:
                raise UserError(
                    f"run {run_folder.path} is held by process {lock['pid']} of attempt {lock.get('attempt')} on this "
                    f"host, which is alive; wait for it or stop it with 'hpc-gen preempt {run_folder.path}'"
                )
            clock.sleep(_POLL_S)
        if int(lock.get("attempt", 0)) > attempt:
            raise FencedError(
                f"attempt {lock['attempt']} has taken over {run_folder.path} from attempt {attempt}; this process ends"
            )
        fence = cls(run_folder, attempt, secrets.token_hex(16))
        content = {"attempt": attempt, "token": fence.token, **_process_facts(), "time": clock.now()}
        commit.write_json(run_folder.lock, content)
        fence.check()  # of two that took it at once, the later rename wins
        return fence

    def _holder(self) -> dict[str, Any]:
        """The lock, read anew; retried once, as NFS may answer ESTALE for a file that was just replaced."""
        try:
            return _read(self._path)
        except OSError:
            return _read(self._path)

    def check(self) -> None:
        """Raise FencedError unless this attempt still holds the run folder."""
        lock = self._holder()
        if lock.get("token") != self.token:
            holder = f"attempt {lock['attempt']} holds it" if "attempt" in lock else "its lock is gone"
            raise FencedError(
                f"attempt {self.attempt} may not write to {self._path.parent} any more: {holder}; this process ends"
            )
        if lock.get("released"):
            raise FencedError(f"attempt {self.attempt} has ended and may not write to {self._path.parent} any more")

    def release(self, cause: str) -> None:
        """Mark the run folder as free (rank 0, last thing of an attempt). Nothing happens when it is not ours."""
        lock = self._holder()
        if lock.get("token") == self.token and not lock.get("released"):
            released = {"cause": cause, "time": clock.now()}
            commit.write_json(self._path, {**lock, "released": released}, fence=self)
