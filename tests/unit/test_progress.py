"""Progress: rates, time left, plain lines at their pace, a bar on a terminal."""

from __future__ import annotations

import io
import math

import pytest

from hpc_gen.runtime import clock
from hpc_gen.runtime.progress import Progress, count, format_bytes, format_count, format_duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def fake() -> object:
    with clock.use(clock.FakeClock()) as fake:
        yield fake


def test_plain_lines_at_their_pace(fake: clock.FakeClock) -> None:
    out = io.StringIO()
    with Progress(6400, "train", every_s=10.0, stream=out) as progress:
        for step in range(1, 101):
            fake.advance(1.0)
            progress.update(step * 64, loss=1 / step)
    lines = out.getvalue().splitlines()
    assert lines[0] == "train  64/6,400 images  1.0 %  64 images/s  ETA 1m 39s  loss 1"
    assert lines[1].startswith("train  704/6,400 images  11.0 %  64 images/s  ETA 1m 29s")
    assert lines[-1] == "train  6,400/6,400 images  100.0 %  64 images/s  took 1m 40s  loss 0.01"
    assert len(lines) == 11


def test_the_last_state_is_shown_when_the_work_ends_early(fake: clock.FakeClock) -> None:
    out = io.StringIO()
    progress = Progress(1000, "sample", stream=out)
    for done in (10, 20):
        fake.advance(1.0)
        progress.update(done)
    progress.close()
    progress.close()
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["10/1,000", "20/1,000"]


def test_a_resumed_run_has_the_rate_of_its_own_work(fake: clock.FakeClock) -> None:
    progress = Progress(1000, "train", start=900, stream=io.StringIO())
    assert progress.rate == 0.0 and progress.eta_s is None
    fake.advance(10.0)
    progress.update(950)
    assert progress.rate == 5.0 and progress.eta_s == 10.0


def test_a_start_that_is_known_later(fake: clock.FakeClock) -> None:
    out = io.StringIO()
    progress = Progress(1000, "train", stream=out)
    fake.advance(5.0)
    progress.go_on_from(600)
    for done in (700, 1000):
        fake.advance(10.0)
        progress.update(done)
    lines = out.getvalue().splitlines()
    assert "10 images/s  ETA 30s" in lines[0] and "20 images/s  took 20s" in lines[1]


def test_the_rate_is_that_of_the_last_minute(fake: clock.FakeClock) -> None:
    progress = Progress(None, "scan", unit="files", stream=io.StringIO())
    fake.advance(1000.0)  # a slow start
    for done in range(0, 1000, 10):
        progress.update(done)
        fake.advance(1.0)
    assert progress.rate == pytest.approx(10.0) and progress.eta_s is None


def test_unknown_total_and_nothing_to_do(fake: clock.FakeClock) -> None:
    out = io.StringIO()
    Progress(None, "scan", unit="files", stream=out).update(5, bad=0)
    Progress(0, "encode", unit="shards", stream=out).update(0)
    lines = out.getvalue().splitlines()
    assert lines == ["scan  5 files  0 files/s  bad 0", "encode  0/0 shards  100.0 %  0 shards/s  took 0.0s"]


def test_a_closed_pipe_does_not_stop_the_work(fake: clock.FakeClock) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    progress = Progress(10, "train", stream=Closed())
    progress.update(10)
    progress.say("nobody hears this")
    assert progress.done == 10


def test_lines_of_their_own(fake: clock.FakeClock) -> None:
    out = io.StringIO()
    with Progress(10, "train", stream=out) as progress:
        progress.say("saved [1]")
    assert out.getvalue() == "saved [1]\n"


def test_a_bar_on_a_terminal() -> None:
    out = Terminal()
    with Progress(10, "train [x]", stream=out) as progress:
        progress.say("a line [y]")
        progress.update(10, loss=0.125, empty=None)
    assert "a line [y]" in out.getvalue() and "empty" not in out.getvalue()
    assert "train [x]" in out.getvalue() and "10/10" in out.getvalue() and "loss 0.125" in out.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "?"),
        (math.inf, "?"),
        (math.nan, "?"),
        (0.0, "0.0s"),
        (0.44, "0.4s"),
        (9.96, "10s"),
        (59.4, "59s"),
        (59.6, "1m 00s"),
        (185, "3m 05s"),
        (3599.7, "1h 00m"),
        (3725, "1h 02m"),
        (86399, "1d 00h"),
        (183600, "2d 03h"),
        (-5.0, "-5.0s"),
    ],
)
def test_format_duration(seconds: float | None, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (0.251, "0.25"),
        (7, "7"),
        (12.4, "12"),
        (999, "999"),
        (999.6, "1.0k"),
        (12800, "12.8k"),
        (999_960, "1.0M"),
        (1.2e6, "1.2M"),
        (3.4e9, "3.4G"),
        (5e17, "5.00e+17"),
        (-1500, "-1.5k"),
        (math.nan, "?"),
    ],
)
def test_format_count(number: float, text: str) -> None:
    assert format_count(number) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (999, "999 B"), (40_000, "40.0 kB"), (1_234_567, "1.2 MB"), (5.4e9, "5.4 GB")]
)
def test_bytes(number: float, text: str) -> None:
    assert format_bytes(number) == text


@pytest.mark.parametrize(("number", "text"), [(0, "0 tasks"), (1, "1 task"), (2, "2 tasks"), (1200, "1,200 tasks")])
def test_a_count_of_things(number: int, text: str) -> None:
    assert count(number, "task") == text
