"""Telling somebody that a stage has ended: one command, without a shell, with a time limit, harmless when it fails."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hpc_gen.runtime import env
from hpc_gen.runtime.errors import ExitCode

LIMIT_S = 10.0
_SHOWN_BYTES = 300  # of what a failing command wrote

_OUTCOMES = {
    ExitCode.DONE: "done",
    ExitCode.DIVERGED: "diverged",
    ExitCode.REQUEUE: "requeued",
    ExitCode.REQUEUE_ELSEWHERE: "requeued",
    ExitCode.STOPPED: "stopped",
}


def outcome(code: int) -> str:
    """One word for an exit code: done, diverged, requeued, stopped, else failed (a kill by a signal included)."""
    return next((word for known, word in _OUTCOMES.items() if known == code), "failed")


def notify(
    command: Sequence[str], run: Path, stage: str, code: int, message: str, limit_s: float = LIMIT_S
) -> str | None:
    """Run `command`, which learns what happened from its environment; returns what went wrong, None when it worked.

    HPC_GEN_RUN (path of the run folder), HPC_GEN_STAGE, HPC_GEN_OUTCOME, HPC_GEN_EXIT_CODE, HPC_GEN_MESSAGE. After
    `limit_s` seconds it is killed with all that it started.
    """
    facts = {
        "HPC_GEN_RUN": run,
        "HPC_GEN_STAGE": stage,
        "HPC_GEN_OUTCOME": outcome(code),
        "HPC_GEN_EXIT_CODE": code,
        "HPC_GEN_MESSAGE": message.replace("\0", " "),
    }
    # a file and not a pipe: what the command leaves running may hold a pipe open for ever
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env.child_environment(**facts),
                start_new_session=True,  # a group of its own: a Ctrl-C is not for it, and it can be killed as a whole
            )
        except (OSError, ValueError) as error:
            return f"'{command[0]}' cannot be started: {error}"
        try:
            ended = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            _kill(process)
            return f"'{command[0]}' was killed after {limit_s:g} s"
        if ended == 0:
            return None
        output.seek(0)
        said = " ".join(output.read(_SHOWN_BYTES).decode(errors="replace").split())
        return f"'{command[0]}' ended with code {ended}{f': {said}' if said else ''}"


def _kill(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it ended at this very moment
    process.wait()
