"""The only door to time. Tests put a `FakeClock` in its place with `clock.use(fake)`."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol


class Clock(Protocol):
    """What a clock offers; all values in seconds."""

    def now(self) -> float:
        """Wall time since 1970."""
        ...

    def monotonic(self) -> float:
        """Time that never goes back; differences only."""
        ...

    def sleep(self, seconds: float) -> None:
        """Wait."""
        ...


class _SystemClock:
    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class FakeClock:
    """A clock that stands still until `advance` or `sleep` moves it."""

    def __init__(self, start: float = 1_700_000_000.0) -> None:
        self._wall_s = start
        self._monotonic_s = 0.0

    def now(self) -> float:
        """Wall time since 1970."""
        return self._wall_s

    def monotonic(self) -> float:
        """Seconds since the fake began."""
        return self._monotonic_s

    def sleep(self, seconds: float) -> None:
        """Move on at once."""
        self.advance(seconds)

    def advance(self, seconds: float) -> None:
        """Move both times on."""
        self._wall_s += seconds
        self._monotonic_s += seconds


_IMPORTED_AT = time.time()
_active: Clock = _SystemClock()


def now() -> float:
    """Wall time in seconds since 1970."""
    return _active.now()


def monotonic() -> float:
    """Seconds of a clock that never goes back."""
    return _active.monotonic()


def today() -> str:
    """The local date, as 2026-11-27."""
    return time.strftime("%Y-%m-%d", time.localtime(now()))


def sleep(seconds: float) -> None:
    """Wait for `seconds`."""
    _active.sleep(seconds)


@functools.cache
def process_start() -> float:
    """Wall time at which this process began (Linux: from /proc; elsewhere: when this module was imported).

    A forked child that never called this reports its own start.
    """
    try:
        # field 22: start in clock ticks after boot; the name in field 2 may hold blanks and parentheses
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return _IMPORTED_AT
    started = time.time() - age_s
    return started if 0.0 <= _IMPORTED_AT - started < 86400.0 else _IMPORTED_AT  # /proc of another time namespace


@contextmanager
def use(fake: Clock) -> Iterator[Clock]:
    """Put `fake` in the place of the real clock, for all threads, until the block ends."""
    global _active
    before, _active = _active, fake
    try:
        yield fake
    finally:
        _active = before
