"""The goodput receipt: what became of every second that a rank was held, from the journal alone.

Categories (rank-seconds: wall seconds times ranks):
  productive   steps of training and units of work that are part of the run as it stands
  start_up     from the start of the process to the first step or unit: imports, process groups, loading
  data_wait    steps waited for data
  save_stall   steps waited for a checkpoint to be copied away
  redone       steps above the point from which a later attempt went on, units begun and never committed
  idle         held without training: other_s of the intervals (validation, previews), a rank that ended early
  unknown      the rest: the tail of a killed attempt after its last report, clean-up, clocks that disagree
Time between attempts is held by nobody; it is told apart (`waiting_s`) and enters only `ettr`.

Read from: attempt_start{world_size, process_start, resumed_from}, interval{images_seen (at its end), images,
productive_s, data_wait_s, save_stall_s, other_s}, rollback{resumed_from}, unit_begin{unit},
unit_committed{unit, seconds}, attempt_end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpc_gen.runtime.journal import Attempt, Event, attempts_of, read
from hpc_gen.runtime.run_folder import RunFolder

CATEGORIES = ("productive", "start_up", "data_wait", "save_stall", "redone", "idle", "unknown")


@dataclass(frozen=True)
class AttemptReceipt:
    """The receipt of one attempt: rank-seconds by category; `wall_s` until its last sign of life."""

    number: int
    stage: str
    world_size: int
    start: float
    wall_s: float
    seconds: dict[str, float]


@dataclass(frozen=True)
class Goodput:
    """The receipt of a run: rank-seconds by category; `elapsed_s` and `waiting_s` are wall seconds."""

    seconds: dict[str, float]
    attempts: list[AttemptReceipt] = field(default_factory=list)
    elapsed_s: float = 0.0
    waiting_s: float = 0.0

    @property
    def total_s(self) -> float:
        """Rank-seconds held."""
        return sum(self.seconds.values())

    @property
    def fractions(self) -> dict[str, float]:
        """Share of each category; they sum to 1, or are all 0 when nothing has run yet."""
        total = self.total_s
        return {name: (self.seconds[name] / total if total > 0 else 0.0) for name in CATEGORIES}

    @property
    def goodput(self) -> float:
        """Share of the time held that was productive."""
        return self.fractions["productive"]

    @property
    def ettr(self) -> float:
        """Effective training time ratio: productive by all wall seconds, waiting for nodes included."""
        productive_s = sum(attempt.seconds["productive"] / attempt.world_size for attempt in self.attempts)
        return productive_s / self.elapsed_s if self.elapsed_s > 0 else 0.0


def receipt(run: RunFolder, *, stage: str | None = None) -> Goodput:
    """Book the time of all attempts of a run, or of those of one stage."""
    return receipt_of(event for event in read(run) if stage in (None, event.stage))


def receipt_of(events: Iterable[Event]) -> Goodput:
    """As `receipt`, from events read already."""
    events = list(events)
    by_attempt: dict[tuple[int, str], dict[int, list[Event]]] = defaultdict(lambda: defaultdict(list))
    for event in events:
        by_attempt[event.attempt, event.stage][event.task].append(event)
    found = attempts_of(events)
    undone_above = _undone_above(found, events)
    receipts = [
        _attempt_receipt(attempt, by_attempt[attempt.number, attempt.stage], above)
        for attempt, above in zip(found, undone_above, strict=True)
    ]
    seconds = {name: sum(item.seconds[name] for item in receipts) for name in CATEGORIES}
    spans = [(item.start, item.start + item.wall_s) for item in receipts]
    elapsed_s = max(end for _, end in spans) - min(start for start, _ in spans) if spans else 0.0
    return Goodput(seconds, receipts, elapsed_s, max(0.0, elapsed_s - _covered(spans)))


def _undone_above(found: Sequence[Attempt], events: Iterable[Event]) -> list[float]:
    """For each attempt, the lowest images_seen from which a later one of its stage went on: above it all was undone."""
    begun = {(event.attempt, event.stage) for event in events if event.kind == "attempt_start"}
    lowest: dict[str, float] = defaultdict(lambda: float("inf"))
    above = []
    for attempt in reversed(found):  # ascending in number, and a number has one attempt per stage
        above.append(lowest[attempt.stage])
        if (attempt.number, attempt.stage) in begun:
            lowest[attempt.stage] = min(lowest[attempt.stage], float(attempt.resumed_from or 0))
    return above[::-1]


def _attempt_receipt(attempt: Attempt, tasks: dict[int, list[Event]], undone_above: float) -> AttemptReceipt:
    """Book one attempt; ranks without a journal are taken to be like the others (they run in lockstep)."""
    world_size = max(attempt.world_size, len(tasks))
    end = max(event.t for task in tasks.values() for event in task)
    seconds = dict.fromkeys(CATEGORIES, 0.0)
    for task in tasks.values():
        for name, value in _task_seconds(task, end, undone_above).items():
            seconds[name] += value * world_size / len(tasks)
    return AttemptReceipt(attempt.number, attempt.stage, world_size, attempt.start, end - attempt.start, seconds)


def _task_seconds(events: Sequence[Event], attempt_end: float, undone_above: float) -> dict[str, float]:
    """Book the seconds of one rank from the start of its process to the end of the attempt."""
    seconds = dict.fromkeys(CATEGORIES, 0.0)
    start, ready = _beginning(events)
    task_end = max(event.t for event in events)
    seconds["start_up"] = max(0.0, ready - start)
    begun: dict[Any, float] = {}
    for event in events:
        if event.kind == "unit_begin":
            begun[event.fields.get("unit")] = event.t
        elif event.kind == "unit_committed":
            begun.pop(event.fields.get("unit"), None)
            seconds["productive"] += _seconds(event, "seconds")
    seconds["redone"] += sum(max(0.0, task_end - t) for t in begun.values())
    for event in reversed(events):  # backwards: what a rollback undid lies before it
        if event.kind == "rollback":
            undone_above = min(undone_above, float(event.fields.get("resumed_from") or 0))
        elif event.kind == "interval":
            last, images = _seconds(event, "images_seen"), _seconds(event, "images")
            undone = min(1.0, max(0.0, last - undone_above) / images) if images > 0 else 0.0
            productive_s = _seconds(event, "productive_s")
            seconds["redone"] += undone * productive_s
            seconds["productive"] += (1.0 - undone) * productive_s
            seconds["data_wait"] += _seconds(event, "data_wait_s")
            seconds["save_stall"] += _seconds(event, "save_stall_s")
            seconds["idle"] += _seconds(event, "other_s")
    seconds["idle"] += max(0.0, attempt_end - task_end)
    seconds["unknown"] = max(0.0, attempt_end - min(start, task_end) - sum(seconds.values()))
    return seconds


def _beginning(events: Sequence[Event]) -> tuple[float, float]:
    """Wall seconds at which the process began, and at which its first step or unit did."""
    began = [event for event in events if event.kind == "attempt_start"]
    told = [event.fields.get("process_start") for event in began]
    start = min([events[0].t, *(float(t) for t in told if isinstance(t, (int, float)))])
    for event in events:
        if event.kind == "unit_begin":
            return start, event.t
        if event.kind == "interval":
            parts = ("productive_s", "data_wait_s", "save_stall_s", "other_s")
            return start, max(start, event.t - sum(_seconds(event, part) for part in parts))
    return start, began[-1].t if began else start


def _seconds(event: Event, name: str) -> float:
    """A field as a number; a missing or non-finite one (written as text) counts as nothing."""
    value = event.fields.get(name)
    return float(value) if isinstance(value, (int, float)) else 0.0


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of time spans, in seconds."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered
