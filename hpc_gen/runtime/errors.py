"""Errors of hpc-gen and the exit codes they end a process with (DESIGN section 4, "One stop token").

A message is one sentence that says what is wrong, where, and what to do about it. Mistakes of the user and of
the data are `ValueError`s, so that callers of the Python API may catch them without knowing this module.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpc_gen.runtime.stop import Stop


LONGEST_REASON = 300  # characters of a library's text within a sentence of ours


class ExitCode(IntEnum):
    """Exit codes of every hpc-gen process; batch scripts decide by them."""

    DONE = 0
    USER = 2  # the user's mistake: a fix of the command or the config is needed
    DATA = 64  # data, checkpoint or weights refused
    BUG = 70  # our own mistake
    DIVERGED = 75  # the loss stayed non-finite through all allowed rollbacks
    REQUEUE = 85  # saved; start again
    REQUEUE_ELSEWHERE = 86  # start again on other nodes
    STOPPED = 87  # stopped by the user, or another attempt has taken over: do not start again


class HpcGenError(Exception):
    """Base of all errors of hpc-gen; `exit_code` is what the process ends with when nobody catches it."""

    exit_code: ExitCode = ExitCode.BUG


class UserError(HpcGenError, ValueError):
    """The user asked for something impossible: a wrong name, value, path, environment or a full disk."""

    exit_code = ExitCode.USER


class DataError(HpcGenError, ValueError):
    """Data on disk is not what it claims to be: truncated, flipped, of another shape or label count."""

    exit_code = ExitCode.DATA


class CheckpointError(DataError):
    """A checkpoint is not whole, or belongs to another experiment or layout."""


class DivergedError(HpcGenError):
    """Training produced non-finite numbers for longer than the experiment allows."""

    exit_code = ExitCode.DIVERGED


class FencedError(HpcGenError):
    """Another attempt holds the run folder: this process must not write to it any more."""

    exit_code = ExitCode.STOPPED


class RendezvousError(HpcGenError):
    """The ranks did not find each other in time; most often one node is ill, so another set of nodes may
    work.
    """

    exit_code = ExitCode.REQUEUE_ELSEWHERE


class CollectiveError(HpcGenError):
    """Ranks waited for one that did not come: it hangs, or is gone. `blamed`: rank and host of whoever it was.

    Ends with "requeue elsewhere", or with the code of the rank that said why it failed.
    """

    exit_code = ExitCode.REQUEUE_ELSEWHERE

    def __init__(self, text: str, blamed: Iterable[tuple[int, str]] = ()) -> None:
        """`blamed`: may be empty, when nobody can be told from the others."""
        super().__init__(text)
        self.blamed = tuple(blamed)


class StopRequested(HpcGenError):
    """Raised by `poll()` in long loops: leave them at once, commit nothing half done, end with
    `stop.exit_code`.
    """

    def __init__(self, stop: Stop) -> None:
        """`stop` says why; its exit code becomes that of this error."""
        super().__init__(f"stop requested: {stop.detail}")
        self.stop = stop
        self.exit_code = ExitCode(stop.exit_code)


def reason(error: BaseException) -> str:
    """What a library says of a failure as a part of a sentence: its first line, cut to 300 characters, or its kind."""
    lines = str(error).strip().splitlines()
    text = lines[0].rstrip(".: ") if lines else ""
    return (text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]} ...") or type(error).__name__


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the valid name nearest to `name`, or "" when none is near."""
    matches = difflib.get_close_matches(name, sorted(valid), n=1, cutoff=0.6)
    return f" (did you mean '{matches[0]}'?)" if matches else ""
