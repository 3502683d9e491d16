"""Who works on which unit just now: so that tasks that share units, or join late, do each unit once.

A claim is a file UNIT.claim, created exclusively, touched while its owner works, removed when the unit is committed. It
saves work and nothing else: two tasks on one unit are harmless (DESIGN section 4), so a claim is not durable, nobody
trusts one that was not touched for STALE_S, and whoever is gone for certain (its process on this host, or an earlier
start of our own job) is not waited for.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from hpc_gen.runtime import clock, commit
from hpc_gen.runtime.fence import Job, process_start_ticks

TOUCH_S = 5.0
FRESH_S = 30.0  # touched so lately: its owner is alive
STALE_S = 300.0  # not touched for so long: its owner is dead, or nobody would miss it
WAIT_S = 1.0

State = Literal["alive", "unsure", "gone"]


class Claims:
    """The claims of one stage, in a folder that its tasks share."""

    def __init__(self, folder: Path, job: Job | None = None) -> None:
        self.folder = folder
        self._job = Job.current() if job is None else job
        self._mine: Path | None = None
        self._touched = 0.0

    def take(self, unit: str) -> bool:
        """Claim a unit; False when somebody else has it. A task holds one claim at a time."""
        assert self._mine is None, "one unit at a time"
        path = self._path(unit)
        for _ in range(2):
            try:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            except FileExistsError:
                if self.state(unit) != "gone":
                    return False
                with suppress(FileNotFoundError):
                    os.unlink(path)
                continue
            except FileNotFoundError:
                commit.make_folder(self.folder)
                continue
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(json.dumps(self._facts()).encode())
            self._mine, self._touched = path, clock.monotonic()
            return True
        return False

    def touch(self) -> None:
        """Say that the claim's owner is alive; call it as often as you like."""
        if self._mine is not None and clock.monotonic() - self._touched >= TOUCH_S:
            self._touched = clock.monotonic()
            with suppress(OSError):  # taken for stale and removed: somebody does the unit, too
                os.utime(self._mine)

    def release(self) -> None:
        """Give the claim up."""
        if self._mine is not None:
            with suppress(OSError):
                os.unlink(self._mine)
            self._mine = None

    def state(self, unit: str) -> State:
        """What became of whoever claimed a unit; `gone` also when nobody did."""
        path = self._path(unit)
        try:
            # abs: where the file server's clock is ahead of ours, work done twice is better than waiting for ever
            age_s = abs(clock.now() - path.stat().st_mtime)
            facts = json.loads(path.read_bytes())
        except FileNotFoundError:
            return "gone"
        except ValueError:  # being written, or torn by a kill
            facts = {}
        if age_s >= STALE_S or self._is_dead(facts if isinstance(facts, dict) else {}):
            return "gone"
        return "alive" if age_s < FRESH_S else "unsure"

    def _is_dead(self, facts: dict[str, Any]) -> bool:
        """Whether the owner is gone for certain."""
        if self._job.job_id and facts.get("job_id") == self._job.job_id:
            return int(facts.get("restart_count") or 0) < self._job.restart_count
        if facts.get("host") == socket.gethostname() and isinstance(facts.get("pid"), int):
            return process_start_ticks(facts["pid"]) != facts.get("pid_start")
        return False

    def _facts(self) -> dict[str, Any]:
        pid = os.getpid()
        who = {"host": socket.gethostname(), "pid": pid, "pid_start": process_start_ticks(pid)}
        return who | {"job_id": self._job.job_id, "restart_count": self._job.restart_count}

    def _path(self, unit: str) -> Path:
        return self.folder / f"{unit}.claim"


def units_in_turn(
    wanted: Sequence[str], claims: Claims, is_done: Callable[[str], bool], poll: Callable[[], None]
) -> Iterator[str]:
    """The units of `wanted` that are not done, each claimed while the caller works on it, in this order.

    Units that others have in hand are passed over and looked at again at the end: one whose owner is alive is left to
    it, one whose owner may be dead is waited for until it is done or its claim is stale.
    """
    waiting = list(wanted)
    while waiting:
        left: list[str] = []
        for unit in waiting:
            poll()
            if is_done(unit):
                continue
            if not claims.take(unit):
                left.append(unit)
                continue
            try:
                if not is_done(unit):  # committed between the two looks
                    yield unit
            finally:
                claims.release()
        waiting = [unit for unit in left if claims.state(unit) != "alive"]
        if len(waiting) == len(left) and waiting:
            clock.sleep(WAIT_S)
