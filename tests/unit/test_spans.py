"""Spans: sums per interval, nesting, single long ones, device times; slow or full disks cost lines and nothing else."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc_gen.runtime import clock, spans
from hpc_gen.runtime.clock import FakeClock
from hpc_gen.runtime.journal import Journal, Reader, read
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.runtime.spans import Detail, Recorder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


@pytest.fixture
def fake() -> Iterator[FakeClock]:
    with clock.use(FakeClock()) as found:
        assert isinstance(found, FakeClock)
        yield found


def recorder(run: RunFolder, detail: Detail = "interval") -> Recorder:
    return Recorder(Journal(run, 1, "train", 3, below="spans"), detail).start(rank=3, world_size=4)


def lines(run: RunFolder, kind: str) -> list[dict[str, Any]]:
    return [event.fields for event in Reader(run, below="spans").events() if event.kind == kind]


def test_without_a_recorder_a_span_is_nothing() -> None:
    assert spans.active() is None
    with spans.span("a"), spans.span("a", torch.device("cpu"), together=True):
        spans.step_done(8)
        spans.close_interval()


def test_sums_of_an_interval(run: RunFolder, fake: FakeClock) -> None:
    book = recorder(run)
    try:
        for step in (1, 2):
            with spans.span("step", together=True):
                fake.advance(0.25)
                with spans.span("collective"):
                    fake.advance(0.5 * step)
                    at = book.position()
                    assert (at.span, at.for_s, at.together) == ("collective", 0.5 * step, True)
            spans.step_done(8 * step)
        assert book.position().span == spans.OUTSIDE and book.position().images_seen == 16
        spans.close_interval()
        spans.close_interval()  # nothing happened since: no line
        with spans.span("save"):
            fake.advance(1.5)
    finally:
        book.stop()
        book.stop()
    first, second = lines(run, "spans")
    assert first["names"] == {"collective": [2, 1.5, 1.5, 1.0], "step": [2, 2.0, 0.5, 1.25]}
    assert (first["images_seen"], first["steps"], first["elapsed_s"]) == (16, 2, 2.0)
    assert second["names"] == {"save": [1, 1.5, 1.5, 1.5]} and second["steps"] == 0
    assert [(each["name"], each["seconds"], each["depth"]) for each in lines(run, "span")] == [
        ("collective", 1.0, 1),
        ("step", 1.25, 0),
        ("save", 1.5, 0),
    ]
    (begin,) = lines(run, "begin")
    assert begin["rank"] == 3 and begin["world_size"] == 4 and begin["host"]
    assert read(run) == []  # they are not part of the journal that status and report read
    assert spans.active() is None


def test_each_span_on_request_and_none_when_off(run: RunFolder, tmp_path: Path) -> None:
    book = recorder(run, "each")
    with spans.span("a"):
        pass
    book.stop()
    assert [each["name"] for each in lines(run, "span")] == ["a"]
    other = RunFolder(tmp_path / "other")
    book = recorder(other, "off")
    with spans.span("a"):
        assert book.position().span == "a"  # whoever waits for this rank is told all the same
    book.stop()
    assert not other.path.exists()


def test_an_error_ends_a_span_and_other_threads_have_none(run: RunFolder) -> None:
    book = recorder(run)
    with pytest.raises(ValueError, match="inside"), spans.span("a"), spans.span("b"):
        raise ValueError("inside")
    assert book.stack == []
    seen: list[str] = []

    def elsewhere() -> None:
        with spans.span("c"):
            seen.append(book.position().span)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    book.stop()
    assert seen == [spans.OUTSIDE]
    assert set(lines(run, "spans")[0]["names"]) == {"a", "b"}


def test_a_disk_that_hangs_stops_nobody(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer stands still in the middle of a line; training goes on, lines beyond the queue are counted."""
    gate = threading.Event()
    written: list[tuple[str, dict[str, Any]]] = []

    def slow(self: Journal, kind: str, /, **fields: Any) -> None:
        gate.wait(60)
        written.append((kind, fields))

    monkeypatch.setattr(Journal, "event", slow)
    monkeypatch.setattr(spans, "_QUEUE_LINES", 50)
    monkeypatch.setattr(spans, "_CLOSE_WAIT_S", 0.2)
    book = recorder(run, "each")
    begun = time.monotonic()
    for _ in range(500):
        with spans.span("a"):
            pass
    book.stop()
    assert time.monotonic() - begun < 30
    assert 440 <= book.lost <= 452
    gate.set()
    limit = time.monotonic() + 30
    while not any(kind == "lost" for kind, _ in written) and time.monotonic() < limit:
        time.sleep(0.01)
    assert sum(fields.get("lines", 0) for kind, fields in written if kind == "lost") + len(written) - 1 == 502


def test_a_full_disk_costs_lines_only(run: RunFolder, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run.path.mkdir()
    (run.path / "journal").write_text("a file where the folder should be")
    book = recorder(run)
    with spans.span("a"):
        pass
    book.stop()
    assert "the work itself is not touched" in capfd.readouterr().err


class FakeEvent:
    """A mark in a stream; `passed` False: the device has not come to it yet."""

    def __init__(self, at_ms: float, passed: bool = True) -> None:
        self.at_ms, self.passed = at_ms, passed

    def elapsed_time(self, later: FakeEvent) -> float:
        if not later.passed:
            raise RuntimeError("device not ready")
        return later.at_ms - self.at_ms


def test_the_device_tells_the_time_of_what_runs_there(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    marks = iter([FakeEvent(0), FakeEvent(500), FakeEvent(500), FakeEvent(900), FakeEvent(900), FakeEvent(0, False)])
    monkeypatch.setattr(spans, "_event", lambda device: next(marks))
    book = recorder(run)
    for _ in range(3):
        with spans.span("forward_backward", torch.device("cuda", 0)):
            pass
    book.stop()
    names = lines(run, "spans")[0]["names"]
    assert names["forward_backward"] == [2, 0.9, 0.9, 0.5]  # the third had not been passed


def test_lines_are_json_and_small(run: RunFolder) -> None:
    book = recorder(run)
    for _ in range(1000):
        with spans.span("step"):
            pass
    book.stop()
    (path,) = (run.journal / "spans").iterdir()
    assert path.name == "0001_train_3.jsonl" and path.stat().st_size < 1000
    for line in path.read_text().splitlines():
        json.loads(line)
