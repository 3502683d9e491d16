"""Iterations of the feed prepared by processes: worth it where reading or drawing costs more than handing over.

An iteration is a function of the images seen before it, so any process may prepare any of them and nothing has to be
remembered: a resume is as exact as with the thread. Tensors come through shared memory (torch's DataLoader).
"""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any, Protocol, TypeVar

from torch.utils.data import DataLoader, Dataset

from hpc_gen.runtime.errors import HpcGenError, UserError

Item = TypeVar("Item")


class WorkerPlan(Protocol):
    """What of a feed's plan says how many processes work, and how far ahead."""

    @property
    def workers(self) -> int:
        """Processes."""
        ...

    @property
    def prefetch(self) -> int:
        """Iterations held ready."""
        ...


class _Failed:
    """An error of ours on its way out of a worker: DataLoader would wrap its one sentence into a traceback."""

    def __init__(self, error: HpcGenError) -> None:
        self.error = error


class _Prepared(Dataset[Any]):
    def __init__(self, prepare: Callable[[int], Any]) -> None:
        self._prepare = prepare

    def __getitem__(self, images_seen: int) -> Any:
        try:
            return self._prepare(images_seen)
        except HpcGenError as error:
            return _Failed(error)


class _Starts:
    """The iterations to prepare, in order, endless or not."""

    def __init__(self, starts: Iterator[int]) -> None:
        self._starts = starts

    def __iter__(self) -> Iterator[int]:
        return self._starts


def in_workers(prepare: Callable[[int], Item], plan: WorkerPlan, starts: Iterator[int]) -> Generator[Item, None, None]:
    """`prepare(start)` of each start, in order, computed by `plan.workers` forked processes; closing it ends them.

    The processes begin at once, so call it in the main thread, before other threads work on what `prepare` uses.
    Raises what `prepare` raises of our errors, UserError when a process was killed.
    """
    loader: Any = DataLoader(
        _Prepared(prepare),
        sampler=_Starts(starts),  # type: ignore[arg-type]
        batch_size=None,
        num_workers=plan.workers,
        prefetch_factor=max(1, -(-plan.prefetch // plan.workers)),
        collate_fn=_as_it_is,
        multiprocessing_context="fork",  # a method's draws need not be picklable, and mapped shards are shared
    )
    return _handed_over(_started(loader))


def _started(loader: Any) -> Iterator[Any]:
    """The loader's iterator, whose making forks the processes.

    A collection in a child that ended what the parent owns (a DALI pipeline with its threads) would crash it: what is
    alive now is never collected there. torch's handler of SIGCHLD would raise in whatever the main thread computes;
    without it the loader finds a dead process within 5 s, in the feed's thread.
    """
    before = signal.getsignal(signal.SIGCHLD)
    gc.collect()
    gc.freeze()
    try:
        return iter(loader)
    finally:
        gc.unfreeze()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before)


def _handed_over(items: Iterator[Any]) -> Generator[Any, None, None]:
    try:
        for item in items:
            if isinstance(item, _Failed):
                raise item.error
            yield item
    except (RuntimeError, ConnectionError, EOFError) as error:  # the last two: killed while handing a tensor over
        if isinstance(error, RuntimeError) and "exited unexpectedly" not in str(error):
            raise
        raise UserError(
            "a worker process of the feed was killed, perhaps for want of memory or of /dev/shm; lower data.workers or "
            "data.prefetch (0 workers: a thread reads, which is faster for mapped tables)"
        ) from error
    finally:
        del items  # the last reference: DataLoader ends its processes


def _as_it_is(item: Any) -> Any:
    return item
