"""Stops in the middle of work that all ranks do side by side: all of them leave at the same place, or none.

Previews, validation and evaluation take minutes between two training steps, where the loop cannot look at the stop
token, and collectives follow, so no rank may leave alone. Here every look at the token is a collective over the host
(a maximum of three numbers, some 0.1 ms on one node), and a rank that is done goes on answering until all are: the
ranks need not look equally often. A rank that fails says so in its next turn, so the others fail with it instead of
waiting for the time-out of the process group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from hpc_gen.runtime.errors import DivergedError, ExitCode, HpcGenError, StopRequested
from hpc_gen.runtime.stop import Cause, Stop, StopToken

if TYPE_CHECKING:
    from hpc_gen.runtime.ranks import Ranks

Poll = Callable[[], None]
Shared = Callable[[], AbstractContextManager[Poll]]
"""Opens a stretch of shared work: `with shared() as poll`."""


@contextmanager
def shared_poll(stop: StopToken, ranks: Ranks) -> Iterator[Poll]:
    """A stretch of work that every rank enters; inside, no other collective of the control group may happen.

    `poll()` raises StopRequested on all ranks at once when any of them was asked to stop. Leaving the block waits until
    every rank has left it. When one rank raises something else inside, the others raise DivergedError (if that was
    one) or HpcGenError with its exit code.
    """
    agreement = _Agreement(stop, ranks)
    try:
        yield agreement.poll
        while agreement.exchange(working=False):
            pass  # others are still at work and ask
    except BaseException as error:
        agreement.tell(error)
        raise


class _Agreement:
    """The exchange behind one stretch of shared work; `_over`: nobody answers any more."""

    def __init__(self, stop: StopToken, ranks: Ranks) -> None:
        self._stop = stop
        self._ranks = ranks
        self._over = False

    def poll(self) -> None:
        """Look at the token together."""
        self.exchange(working=True)

    def exchange(self, working: bool) -> bool:
        """One collective; returns whether any rank is still at work. Raises on all ranks or on none."""
        mine = self._stop.poll()
        self._over = True  # should the collective itself fail, there is nobody left to talk to
        cause, others_work, failure = self._reduce(Cause.NONE if mine is None else mine.cause, working, 0)
        if failure:
            raise _failure_elsewhere(failure)
        if cause is not Cause.NONE and others_work:  # what all have finished is not thrown away
            raise StopRequested(mine if mine is not None and mine.cause is cause else Stop(cause, _ELSEWHERE))
        self._over = not others_work
        return others_work

    def tell(self, error: BaseException) -> None:
        """Tell the others of a failure here, unless they know or have all left."""
        if not self._over:
            self._over = True
            code = error.exit_code if isinstance(error, HpcGenError) else ExitCode.BUG
            self._reduce(Cause.NONE, True, int(code))

    def _reduce(self, cause: Cause, working: bool, failure: int) -> tuple[Cause, bool, int]:
        if self._ranks.world_size == 1:
            return cause, working, failure
        import torch

        flags = torch.tensor([int(cause), int(working), failure], dtype=torch.int64)
        self._ranks.all_reduce_max_cpu(flags)
        found = flags.tolist()
        return Cause(found[0]), bool(found[1]), int(found[2])


_ELSEWHERE = "another rank was asked to"


def _failure_elsewhere(code: int) -> HpcGenError:
    """What this rank raises when another one has failed with `code`."""
    text = "another rank failed in work that all of them share; its log says why"
    if code == ExitCode.DIVERGED:
        return DivergedError(text)
    error = HpcGenError(text)
    error.exit_code = ExitCode(code)
    return error
