"""The stop token: signals, STOP and PREEMPT files and the time limit set a flag; loops look at it at safe points.

A handler does nothing but set the flag, and a second signal means no more than the first: Slurm and containers
multiply signals (specs/slurm_lab.md section 4). SIGTERM to the tasks of a step is the only notice of preemption.
"""

from __future__ import annotations

import signal
import threading
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from hpc_gen.runtime import clock, commit
from hpc_gen.runtime.errors import ExitCode, StopRequested

if TYPE_CHECKING:
    from hpc_gen.runtime.ranks import Ranks
    from hpc_gen.runtime.run_folder import RunFolder

_FILE_INTERVAL_S = 1.0  # shared file systems are asked no more often than this


class Cause(IntEnum):
    """Why to stop; the larger one wins when several hold."""

    NONE = 0
    PREEMPTED = 1  # SIGTERM, SIGUSR1, SIGUSR2, PREEMPT file: save and ask for a requeue
    TIME_LIMIT = 2  # the time limit of the job is near: save and ask for a requeue
    STOPPED = 3  # STOP file, SIGINT: save and do not start again


_SIGNALS = {
    signal.SIGTERM: Cause.PREEMPTED,
    signal.SIGUSR1: Cause.PREEMPTED,
    signal.SIGUSR2: Cause.PREEMPTED,
    signal.SIGINT: Cause.STOPPED,
}


@dataclass(frozen=True)
class Stop:
    """A request to stop; `detail` is for people ("SIGTERM", "file STOP", ...)."""

    cause: Cause
    detail: str

    @property
    def exit_code(self) -> ExitCode:
        """What the process ends with once it has saved."""
        return ExitCode.STOPPED if self.cause is Cause.STOPPED else ExitCode.REQUEUE


class StopToken:
    """The one flag of a process.

    `deadline` (wall seconds, None: no limit) may be set at any time; from then on it is counted on the clock that
    never goes back, so a wall clock that is set back does not make the job outlive its limit.
    """

    def __init__(self, run_folder: RunFolder | None = None, deadline: float | None = None) -> None:
        """`run_folder`: where STOP and PREEMPT files are looked for; None: nowhere."""
        self.deadline = deadline
        self._run = run_folder
        self._stop: Stop | None = None
        self._looked_at: float | None = None

    @property
    def deadline(self) -> float | None:
        """Wall seconds at which the time limit is reached, as the clock stands now; None: no limit."""
        return None if self._due is None else clock.now() + self._due - clock.monotonic()

    @deadline.setter
    def deadline(self, wall_s: float | None) -> None:
        self._due = None if wall_s is None else clock.monotonic() + wall_s - clock.now()

    def install(self) -> None:
        """Take over SIGTERM, SIGUSR1, SIGUSR2 and SIGINT, then unblock them: one that was held back while the
        process started is delivered now. Idempotent; only in the main thread (Python allows no other)."""
        assert threading.current_thread() is threading.main_thread(), "signal handlers belong to the main thread"
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, set(_SIGNALS))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Between any two bytecodes of the main thread: no locks, no output, no allocation worth mentioning.
        self.request(_SIGNALS[signal.Signals(number)], signal.Signals(number).name)

    def request(self, cause: Cause, detail: str) -> None:
        """Ask for a stop. The first request of the largest cause is kept; a request cannot be taken back."""
        if cause is not Cause.NONE and (self._stop is None or cause > self._stop.cause):
            self._stop = Stop(cause, detail)

    def poll(self) -> Stop | None:
        """What this process knows of, without asking other ranks. Cheap: files at most once a second."""
        if self._due is not None and clock.monotonic() >= self._due:
            self.request(Cause.TIME_LIMIT, "time limit")
        if self._run is not None:
            moment = clock.monotonic()
            if self._looked_at is None or moment - self._looked_at >= _FILE_INTERVAL_S:
                self._looked_at = moment
                self._look(self._run.stop_file, Cause.STOPPED)
                self._look(self._run.preempt_file, Cause.PREEMPTED)
        return self._stop

    def _look(self, path: Path, cause: Cause) -> None:
        if path.exists():
            self.request(cause, f"file {path.name}")

    def check(self) -> None:
        """Raise StopRequested when `poll` finds a request; to be handed to long loops as their `poll`."""
        found = self.poll()
        if found is not None:
            raise StopRequested(found)

    def agree(self, ranks: Ranks) -> Stop | None:
        """Collective: the largest cause over all ranks, so that all of them stop at the same iteration."""
        mine = self.poll()
        if ranks.world_size == 1:
            return mine
        import torch

        flag = torch.tensor([Cause.NONE if mine is None else mine.cause], dtype=torch.int64)
        ranks.all_reduce_max_cpu(flag)
        cause = Cause(int(flag.item()))
        if mine is not None and mine.cause is cause:
            return mine  # not self._stop: a signal that came during the reduction is for the next iteration
        return None if cause is Cause.NONE else Stop(cause, "another rank was asked to")

    def clear_files(self, stop: bool = False) -> None:
        """Remove PREEMPT at the start of an attempt (rank 0): it has had its effect. `stop`: STOP too, when the
        user resumes the run."""
        if self._run is not None:
            for path in [self._run.preempt_file, *([self._run.stop_file] if stop else [])]:
                if path.exists():
                    commit.ops.unlink(path)
