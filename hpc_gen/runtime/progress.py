"""Progress of long work with rate and time left: a bar on a terminal, plain lines in a log.

Under Slurm, in a pipe or in a file a moving bar would fill the log with control characters; there one line is
written at most every `every_s` seconds, and always one when the work is done. Only one process should report.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from hpc_gen.runtime import clock

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

# The rate is that of the last minute, so that a slow start or a stall does not spoil the estimate for hours.
_WINDOW_S = 60.0


class Progress:
    """Counts work from `start` to `total`; use as a context manager, or call `close` at the end."""

    def __init__(
        self,
        total: int | None,
        label: str,
        unit: str = "images",
        *,
        start: int = 0,
        every_s: float = 10.0,
        stream: TextIO | None = None,
    ) -> None:
        """`total`: None when unknown; `start`: done before (a resumed run), it does not enter the rate."""
        self.total, self.label, self.unit, self.done = total, label, unit, start
        self._every_s = every_s
        self._stream = sys.stdout if stream is None else stream
        self._samples: deque[tuple[float, int]] = deque([(clock.monotonic(), start)])
        self._begin = self._samples[0]
        self._last_line = -math.inf
        self._line_due = False  # something was reported that no line shows yet
        self._fields: dict[str, object] = {}
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        if self._stream.isatty():
            self._open_bar()

    def update(self, done: int, **fields: object) -> None:
        """Report that `done` of total is done; `fields` (loss=0.12, ...) are shown behind, None is not."""
        now = clock.monotonic()
        self.done, self._fields = done, fields or self._fields
        self._samples.append((now, done))
        while len(self._samples) > 2 and self._samples[1][0] < now - _WINDOW_S:
            self._samples.popleft()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, tail=self._tail())
            return
        self._line_due = True
        if now - self._last_line >= self._every_s or (self.total is not None and done >= self.total):
            self._print_line(now)

    def go_on_from(self, done: int) -> None:
        """Work begins at `done`, which was done before (a resumed run): it enters no rate."""
        self.done = done
        self._begin = (clock.monotonic(), done)
        self._samples.clear()
        self._samples.append(self._begin)

    @property
    def rate(self) -> float:
        """Units per second over the last minute; 0.0 before anything is known."""
        (t0, done0), (t1, done1) = self._samples[0], self._samples[-1]
        return (done1 - done0) / (t1 - t0) if t1 > t0 else 0.0

    @property
    def eta_s(self) -> float | None:
        """Seconds left at the present rate; None when it cannot be told."""
        if self.total is None or self.rate <= 0:
            return None
        return max(0.0, (self.total - self.done) / self.rate)

    def say(self, line: str) -> None:
        """Write a line of its own: above the bar on a terminal, else as it is."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            self._print(line)

    def close(self) -> None:
        """Show the last state; safe to call twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None
        elif self._line_due:
            self._print_line(clock.monotonic())

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tail(self) -> str:
        parts = [f"{format_count(self.rate)} {self.unit}/s"]
        if self.total is not None and self.done >= self.total:
            now, (began, start) = clock.monotonic(), self._begin
            overall = (self.done - start) / (now - began) if now > began else 0.0
            parts = [f"{format_count(overall)} {self.unit}/s", f"took {format_duration(now - began)}"]
        elif self.total is not None:
            parts.append(f"ETA {format_duration(self.eta_s)}")
        known = {name: value for name, value in self._fields.items() if value is not None}
        parts += [f"{name} {_format_field(value)}" for name, value in known.items()]
        return "  ".join(parts)

    def _print_line(self, now: float) -> None:
        self._last_line, self._line_due = now, False
        if self.total is None:
            head = f"{self.label}  {self.done:,} {self.unit}"
        else:
            percent = 100.0 * self.done / self.total if self.total else 100.0
            head = f"{self.label}  {self.done:,}/{self.total:,} {self.unit}  {percent:.1f} %"
        self._print(f"{head}  {self._tail()}")

    def _print(self, line: str) -> None:
        try:
            print(line, file=self._stream, flush=True)
        except OSError:
            pass  # a closed pipe (`| head`) is no reason to stop the work; there is nobody left to tell

    def _open_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}", markup=False),
            TextColumn("{task.fields[tail]}", markup=False),
        )
        self._bar = RichProgress(*columns, console=Console(file=self._stream), transient=False)
        self._bar.start()
        self._task = self._bar.add_task(self.label, total=self.total, completed=self.done, unit=self.unit, tail="")


def _format_field(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_duration(seconds: float | None) -> str:
    """Seconds as people say them: "0.4s", "12s", "3m 05s", "1h 02m", "2d 03h"; "?" for None, nan and inf."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    if seconds < 0:
        return "-" + format_duration(-seconds)
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}h {minutes % 60:02d}m"
    hours = round(seconds / 3600)
    return f"{hours // 24}d {hours % 24:02d}h"


def count(number: int, noun: str) -> str:
    """A number of things: "1 task", "2 tasks"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_bytes(number: float) -> str:
    """Bytes in three or so digits: "0 B", "999 B", "40.0 kB", "1.2 MB"."""
    text = format_count(number)
    return f"{text[:-1]} {text[-1]}B" if text[-1].isalpha() else f"{text} B"


def format_count(number: float) -> str:
    """A number in three or so digits: "0.25", "7", "999", "12.8k", "1.2M", "3.4G"; "?" for nan and inf."""
    if not math.isfinite(number):
        return "?"
    if number < 0:
        return "-" + format_count(-number)
    if number < 9.995:
        return f"{number:.2f}".rstrip("0").rstrip(".")
    if number < 999.5:
        return f"{number:.0f}"
    for size, suffix in ((1e3, "k"), (1e6, "M"), (1e9, "G"), (1e12, "T")):
        if number / size < 999.95:
            return f"{number / size:.1f}{suffix}"
    return f"{number:.2e}"
