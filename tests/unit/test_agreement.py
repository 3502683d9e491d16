"""Shared work: all ranks stop together or none does, however unequally they look, and a failure is told to all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hpc_gen.runtime.agreement import Poll, shared_poll
from hpc_gen.runtime.errors import DataError, DivergedError, ExitCode, HpcGenError, StopRequested
from hpc_gen.runtime.stop import Cause, StopToken


class Group:
    """Ranks as threads; `reductions` counts the collectives they all took part in."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.reductions = 0
        self._values: list[torch.Tensor | None] = [None] * size
        self._enter = threading.Barrier(size, timeout=20)
        self._leave = threading.Barrier(size, timeout=20)

    def reduce(self, rank: int, tensor: torch.Tensor) -> None:
        self._values[rank] = tensor.clone()
        if self._enter.wait() == 0:
            self.reductions += 1
        tensor.copy_(torch.stack([value for value in self._values if value is not None]).amax(0))
        self._leave.wait()


class OneOf:
    def __init__(self, group: Group, rank: int) -> None:
        self.world_size, self.rank, self._group = group.size, rank, group

    def all_reduce_max_cpu(self, tensor: torch.Tensor) -> torch.Tensor:
        self._group.reduce(self.rank, tensor)
        return tensor


def together(size: int, work: Callable[[int, Poll, StopToken], Any]) -> tuple[list[Any], Group]:
    """What `work(rank, poll, token)` returns or raises on each rank."""
    group, ends = Group(size), [None] * size

    def run(rank: int) -> None:
        token = StopToken()
        try:
            with shared_poll(token, OneOf(group, rank)) as poll:  # type: ignore[arg-type]
                ends[rank] = work(rank, poll, token)
        except BaseException as error:
            ends[rank] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a rank is waiting for ever"
    return ends, group


@pytest.mark.parametrize("size", [1, 2, 3])
def test_work_without_a_stop_ends_on_all_ranks(size: int) -> None:
    """Rank r looks 3 * r times."""

    def work(rank: int, poll: Poll, token: StopToken) -> int:
        for _ in range(3 * rank):
            poll()
        return rank

    ends, group = together(size, work)
    assert ends == list(range(size))
    assert group.reductions == (0 if size == 1 else 3 * (size - 1) + 1)  # as often as the busiest, once to part


@pytest.mark.parametrize("asked", [0, 1, 2])
def test_all_stop_at_the_same_look(asked: int) -> None:
    looks = [0, 0, 0]

    def work(rank: int, poll: Poll, token: StopToken) -> None:
        for _ in range(10):
            if rank == asked and looks[rank] == 4:
                token.request(Cause.PREEMPTED, "SIGTERM")
            looks[rank] += 1
            poll()

    ends, _ = together(3, work)
    assert looks == [5, 5, 5]
    for rank, end in enumerate(ends):
        assert isinstance(end, StopRequested) and end.stop.cause is Cause.PREEMPTED
        assert end.stop.detail == ("SIGTERM" if rank == asked else "another rank was asked to")
        assert end.exit_code == ExitCode.REQUEUE


def test_a_rank_that_is_done_stops_with_those_that_are_not() -> None:
    def work(rank: int, poll: Poll, token: StopToken) -> str:
        if rank == 0:
            return "done"
        for look in range(5):
            if look == 3:
                token.request(Cause.STOPPED, "SIGINT")
            poll()
        raise AssertionError("the stop was not seen")

    ends, _ = together(2, work)
    assert [type(end) for end in ends] == [StopRequested, StopRequested]


def test_what_all_have_finished_is_not_thrown_away() -> None:
    """A stop between the last look and the end of the work is for whoever comes next."""

    def work(rank: int, poll: Poll, token: StopToken) -> str:
        poll()
        token.request(Cause.PREEMPTED, "SIGTERM")
        return "done"

    for size in (1, 2):
        assert together(size, work)[0] == ["done"] * size


@pytest.mark.parametrize(
    ("error", "told", "code"),
    [
        (DivergedError("not finite"), DivergedError, ExitCode.DIVERGED),
        (DataError("torn"), HpcGenError, ExitCode.DATA),
        (ZeroDivisionError("a bug"), HpcGenError, ExitCode.BUG),
    ],
)
def test_a_failure_of_one_rank_ends_the_work_of_all(error: Exception, told: type[HpcGenError], code: ExitCode) -> None:
    def work(rank: int, poll: Poll, token: StopToken) -> None:
        if rank == 0:
            return  # waits for the others at the end
        poll()
        if rank == 1:
            raise error
        for _ in range(100):
            poll()

    ends, _ = together(3, work)
    assert ends[1] is error
    for end in (ends[0], ends[2]):
        assert isinstance(end, told) and end.exit_code == code and "another rank failed" in str(end)


def test_a_collective_that_breaks_is_not_tried_again() -> None:
    class Broken(OneOf):
        calls = 0

        def all_reduce_max_cpu(self, tensor: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            raise RuntimeError("connection closed by peer")

    ranks = Broken(Group(2), 0)
    with pytest.raises(RuntimeError, match="closed by peer"), shared_poll(StopToken(), ranks) as poll:  # type: ignore[arg-type]
        poll()
    assert ranks.calls == 1
