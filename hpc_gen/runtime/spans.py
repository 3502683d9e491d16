"""Where the time of a rank goes: named stretches of work, by interval in JSONL files, and where a rank is right now.

    with spans.span("data_wait"):
        batch = next(feed)

One recorder per process, for the thread that starts it; everywhere else, and before `start`, a span is nothing. Files
lie in `journal/spans/ATTEMPT_train_RANK.jsonl`, apart from the journal that `status` and the report read:
  begin{rank, host, world_size, pid, detail}
  spans{images_seen, steps, elapsed_s, names: {NAME: [count, seconds, own seconds, longest]}}   one per log interval;
        own seconds are those not spent in spans inside it
  span{name, began, seconds, images_seen, depth}   every span of a second or more; with detail "each" all of them
  lost{lines}   lines that were not written because the disk was too slow

Training waits for none of this: lines go through a bounded queue to a thread of their own, which writes by the rules of
the journal (one `write` call per line; a full or vanished disk loses lines, never the run).

On a GPU the host runs ahead, so a span with `device` is timed by events in the device's stream, read once the interval
is over.
"""

from __future__ import annotations

import os
import platform
import threading
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from hpc_gen.runtime import clock
from hpc_gen.runtime.journal import Journal

if TYPE_CHECKING:
    import torch

Detail = Literal["off", "interval", "each"]

COLLECTIVE = "collective"  # waiting for other ranks on the host (runtime/ranks.py)
DATA_WAIT = "data_wait"  # waiting for the feed
OUTSIDE = "between spans"
LONG_S = 1.0  # spans of this length are told one by one
_QUEUE_LINES = 10_000
_CLOSE_WAIT_S = 2.0
_MOST_EVENTS = 10_000

_active: Recorder | None = None
_NOTHING: AbstractContextManager[None] = nullcontext()


def span(name: str, device: torch.device | None = None, *, together: bool = False) -> AbstractContextManager[None]:
    """A stretch of work; nothing where no recorder runs, or in another thread than the recorder's.

    `device`: a GPU, by whose clock the stretch is timed. `together`: ranks wait for one another inside on the device,
    so a rank that stays in it for very long is stuck (rank_watch.py).
    """
    recorder = _active
    if recorder is None or threading.get_ident() != recorder.thread:
        return _NOTHING
    return _Span(recorder, name, device, together)


def step_done(images_seen: int) -> None:
    """The clock has moved on."""
    if _active is not None:
        _active.images_seen = images_seen
        _active.steps += 1


def close_interval() -> None:
    """Write the sums since the last call."""
    if _active is not None:
        _active.close_interval()


def active() -> Recorder | None:
    """The recorder of this process."""
    return _active


@dataclass(frozen=True)
class Position:
    """Where a thread is: innermost span, seconds since it began, spans begun so far, and the clock of training."""

    span: str
    for_s: float
    begun: int
    images_seen: int
    together: bool = False


class Recorder:
    """Spans of one thread. `start` makes it the recorder of the process, `stop` ends it."""

    def __init__(self, journal: Journal | None, detail: Detail = "interval") -> None:
        """`journal`: where lines go, None: nowhere, only the position is kept. `detail` "off": as None."""
        self.thread = threading.get_ident()
        self.images_seen = 0
        self.steps = 0
        self.stack: list[_Span] = []
        self.begun = 0
        self.lost = 0
        self._journal = journal if detail != "off" else None
        self._each = detail == "each"
        self._detail = detail
        self._totals: dict[str, list[float]] = {}
        self._on_device: list[tuple[str, Any, Any]] = []
        self._interval_began = clock.monotonic()
        self._left_at = clock.monotonic()
        self._lines: deque[tuple[str, dict[str, Any]]] = deque()
        self._wake = threading.Event()
        self._ending = False
        self._writer: threading.Thread | None = None

    def start(self, *, rank: int = 0, world_size: int = 1) -> Recorder:
        """Record from now on; the process has no other recorder."""
        global _active
        assert _active is None, "a process has one recorder of spans"
        if self._journal is not None:
            self._writer = threading.Thread(target=self._write, name="spans", daemon=True)
            self._writer.start()
        host, pid = platform.node(), os.getpid()
        self._tell("begin", rank=rank, host=host, world_size=world_size, pid=pid, detail=self._detail)
        _active = self
        return self

    def stop(self) -> None:
        """Write what is left, for two seconds at most. May be called twice."""
        global _active
        if _active is self:
            _active = None
        self.close_interval()
        self._ending = True
        self._wake.set()
        if self._writer is not None:
            self._writer.join(_CLOSE_WAIT_S)  # a disk that hangs must not keep the process
            self._writer = None

    def position(self) -> Position:
        """Where the recorder's thread is now; may be asked from any thread."""
        try:
            innermost = self.stack[-1]
        except IndexError:
            return Position(OUTSIDE, clock.monotonic() - self._left_at, self.begun, self.images_seen)
        together = any(each.together for each in tuple(self.stack))
        return Position(innermost.name, clock.monotonic() - innermost.began, self.begun, self.images_seen, together)

    def close_interval(self) -> None:
        """One line with the sums since the last one; nothing when there were no spans."""
        self._read_device()
        totals, self._totals = self._totals, {}
        elapsed = clock.monotonic() - self._interval_began
        steps, self.steps, self._interval_began = self.steps, 0, clock.monotonic()
        if totals:
            names = {name: [int(count), *(round(s, 6) for s in rest)] for name, (count, *rest) in totals.items()}
            self._tell("spans", images_seen=self.images_seen, steps=steps, elapsed_s=round(elapsed, 6), names=names)

    # ---- called by spans

    def left(self, ended: _Span, seconds: float) -> None:
        """A span is over."""
        self._left_at = clock.monotonic()
        if ended.events is None:
            self._add(ended.name, seconds, max(0.0, seconds - ended.inside_s))
        elif len(self._on_device) < _MOST_EVENTS:
            self._on_device.append((ended.name, *ended.events))
        if self.stack:
            self.stack[-1].inside_s += seconds
        if self._each or seconds >= LONG_S:
            began = clock.now() - seconds
            depth = len(self.stack)
            self._tell("span", name=ended.name, began=began, seconds=seconds, images_seen=self.images_seen, depth=depth)

    def _add(self, name: str, seconds: float, own_s: float) -> None:
        total = self._totals.setdefault(name, [0.0, 0.0, 0.0, 0.0])
        total[0] += 1
        total[1] += seconds
        total[2] += own_s
        total[3] = max(total[3], seconds)

    def _read_device(self) -> None:
        """Times of spans on the GPU; the stream has passed them, for the losses of their steps were read."""
        pending, self._on_device = self._on_device, []
        for name, before, after in pending:
            try:
                seconds = before.elapsed_time(after) / 1000.0
            except RuntimeError:  # not passed yet: the span of a step that failed
                continue
            self._add(name, seconds, seconds)

    # ---- writing

    def _tell(self, kind: str, **fields: Any) -> None:
        if self._journal is None:
            return
        if len(self._lines) >= _QUEUE_LINES:
            self.lost += 1
            return
        self._lines.append((kind, fields))
        self._wake.set()

    def _write(self) -> None:
        assert self._journal is not None
        while True:
            self._wake.wait()
            self._wake.clear()
            ending = self._ending
            while self._lines:
                kind, fields = self._lines.popleft()
                self._journal.event(kind, **fields)
            if self.lost:
                lost, self.lost = self.lost, 0
                self._journal.event("lost", lines=lost)
            if ending:
                self._journal.close()
                return


class _Span:
    """One stretch, as a context manager; written as a class because it is entered several times per step."""

    __slots__ = ("began", "device", "events", "inside_s", "name", "recorder", "together")

    def __init__(self, recorder: Recorder, name: str, device: torch.device | None, together: bool) -> None:
        self.recorder, self.name, self.together = recorder, name, together
        self.device = device if device is not None and device.type == "cuda" else None
        self.events: tuple[Any, Any] | None = None
        self.inside_s = 0.0
        self.began = 0.0

    def __enter__(self) -> None:
        if self.device is not None:
            self.events = _event(self.device), None
        self.began = clock.monotonic()
        self.recorder.begun += 1
        self.recorder.stack.append(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        recorder = self.recorder
        while recorder.stack and recorder.stack.pop() is not self:
            pass  # a generator that was dropped in the middle has left its span open
        if self.events is not None:
            assert self.device is not None
            self.events = self.events[0], _event(self.device)
        recorder.left(self, clock.monotonic() - self.began)


def _event(device: torch.device) -> Any:
    """A mark in the device's stream that knows its time."""
    import torch

    event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event
