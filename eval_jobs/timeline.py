"""The attempts of a run as bars on one time axis, and the goodput receipt as rows, for the report."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

from hpc_gen.runtime import goodput
from hpc_gen.runtime.errors import ExitCode
from hpc_gen.runtime.journal import Attempt, Event
from hpc_gen.runtime.progress import format_duration
from hpc_gen.stages.status import ending

MAX_ATTEMPTS_DRAWN = 40
MAX_FAULTS_TOLD = 5
FAULTS = ("fault", "save_failed", "rollback")  # marked on the line, and told in the table

BOOKED = {
    "productive": "steps and units that are part of the run as it stands",
    "start_up": "from the start of a process to its first step or unit",
    "data_wait": "steps that waited for data",
    "save_stall": "steps that waited for a checkpoint to be copied",
    "redone": "work above the point from which a later attempt went on",
    "idle": "held without training: validation, previews, waiting for others",
    "unknown": "the rest, such as the last moments of a killed attempt",
}


def time_line(events: Sequence[Event], attempts: Sequence[Attempt]) -> dict[str, Any]:
    """Attempts as bars on one time axis (places in percent), with their saves and signals, and as table rows."""
    if not attempts:
        return {"rows": [], "drawn": [], "ticks": [], "hidden": 0}
    own: dict[tuple[int, str], list[Event]] = {}
    for event in events:
        if event.task == 0:
            own.setdefault((event.attempt, event.stage), []).append(event)
    drawn = attempts[-MAX_ATTEMPTS_DRAWN:]
    begin = min(attempt.start for attempt in drawn)
    span = max(1.0, max(attempt.last_seen for attempt in drawn) - begin)

    def percent(t: float) -> float:
        return round(min(100.0, max(0.0, 100 * (t - begin) / span)), 3)

    bars = []
    for attempt in drawn:
        mine = own.get((attempt.number, attempt.stage), [])
        bars.append(
            {
                "label": f"{attempt.number} {attempt.stage}",
                "stage": attempt.stage if attempt.stage in ("encode", "train", "sample", "evaluate") else "other",
                "left": percent(attempt.start),
                "width": max(0.4, percent(attempt.last_seen) - percent(attempt.start)),
                "text": f"{attempt.stage}, {format_duration(_lasted(attempt))}: {ending(attempt)}",
                "broken": attempt.exit_code != ExitCode.DONE,
                "saves": [
                    {"left": percent(e.t), "text": f"checkpoint at {int(e.fields.get('images_seen') or 0):,} images"}
                    for e in mine
                    if e.kind == "save_committed"
                ],
                "signals": [{"left": percent(e.t), "text": fault(e)} for e in mine if e.kind in FAULTS],
            }
        )
    rows = [
        {
            "number": attempt.number,
            "stage": attempt.stage,
            "start": _utc(attempt.start),
            "lasted": format_duration(_lasted(attempt)),
            "width": attempt.world_size,
            "from": "" if attempt.resumed_from is None else f"{attempt.resumed_from:,}",
            "ended": ending(attempt),
            "saves": sum(1 for event in own.get((attempt.number, attempt.stage), []) if event.kind == "save_committed"),
            "faults": _troubles(own.get((attempt.number, attempt.stage), [])),
            "broken": attempt.exit_code != ExitCode.DONE,
        }
        for attempt in attempts
    ]
    axis = [{"left": 25.0 * i, "text": format_duration(span * i / 4) if i else "0"} for i in range(5)]
    return {"rows": rows, "drawn": bars, "ticks": axis, "hidden": len(attempts) - len(drawn)}


def _lasted(attempt: Attempt) -> float:
    return max(0.0, (attempt.end or attempt.last_seen) - attempt.start)


def _utc(t: float) -> str:
    return datetime.datetime.fromtimestamp(t, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")


def _troubles(events: Sequence[Event]) -> list[str]:
    """What went wrong in an attempt without ending it, in words; the first few, and how many more."""
    told = [fault(event) for event in events if event.kind in FAULTS]
    if len(told) > MAX_FAULTS_TOLD:
        told[MAX_FAULTS_TOLD:] = [f"and {len(told) - MAX_FAULTS_TOLD} more faults"]
    skipped = sum(event.kind == "non_finite" for event in events)
    return [*told, *([f"{skipped} steps were not finite and left out"] if skipped else [])]


def fault(event: Event) -> str:
    """A fault in words."""
    told = [str(event.fields[name]) for name in ("what", "detail", "error") if event.fields.get(name)]
    if event.kind == "rollback":
        told = [f"from {event.fields.get('images_seen', '?')} to {event.fields.get('resumed_from', '?')} images"]
    return ": ".join([event.kind.replace("_", " "), *told])


def receipt_rows(receipt: goodput.Goodput) -> dict[str, Any]:
    """Rank time by what became of it; shares sum to 100 %."""
    rows = [
        {
            "name": name,
            "title": name.replace("_", " "),
            "meaning": BOOKED[name],
            "seconds": format_duration(receipt.seconds[name]),
            "share": receipt.fractions[name],
        }
        for name in goodput.CATEGORIES
    ]
    return {
        "rows": rows,
        "total": format_duration(receipt.total_s),
        "elapsed": format_duration(receipt.elapsed_s),
        "waiting": format_duration(receipt.waiting_s),
        "known": receipt.total_s > 0,
    }
