"""What wandb is shown of a journal: its rows, with pace and memory of their interval, and previews at their place.

The rows (number, place, time, values) are the history of the run; everything else here is derived from lines of the
same attempt and only added when a row is sent, so it cannot make a history differ from what was released before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hpc_gen.runtime.journal import Event, Row, history_of

PREVIEW_KEY = "preview"
TOTALS = ("loss", "validation/loss")  # what `tracking.loss_term` stands in for


@dataclass(frozen=True)
class Picture:
    """A picture of a preview: its file, relative to the run folder, and what stands below it."""

    file: str
    caption: str


def rows_of(events: Sequence[Event], upto: int) -> list[Row]:
    """The history up to images_seen `upto`, with a row (perhaps without values) wherever a preview was made."""
    return history_of((_as_row(event) for event in events), upto)


def _as_row(event: Event) -> Event:
    if event.kind != "preview" or "images_seen" not in event.fields:
        return event
    return replace(event, kind="row", fields={"images_seen": event.fields["images_seen"], "data": {}})


class Companions:
    """What belongs to rows beside their values, by attempt and place."""

    def __init__(self, events: Iterable[Event]) -> None:
        """`events`: those of rank 0, in order; of several at one place the last counts."""
        self._intervals: dict[tuple[int, int], Mapping[str, Any]] = {}
        self._previews: dict[tuple[int, int], Mapping[str, Any]] = {}
        for event in events:
            kept = {"interval": self._intervals, "preview": self._previews}.get(event.kind)
            place = event.fields.get("images_seen")
            # an interval that saw nothing is the tail of an attempt, after the row of its place
            if kept is not None and isinstance(place, int) and (event.kind != "interval" or event.fields.get("images")):
                kept[event.attempt, place] = event.fields

    def pace(self, row: Row) -> dict[str, float]:
        """`time/images_per_s` (validation and previews not counted), `time/data_wait` (share of the interval, 0 to 1),
        `time/mfu` where it is known, and `memory/peak_bytes` of the log interval that ends at a row; nothing where none
        does."""
        fields = self._intervals.get((row.attempt, row.images_seen))
        if fields is None:
            return {}
        names = ("productive_s", "data_wait_s", "save_stall_s")
        parts = {name: _number(fields.get(name)) or 0.0 for name in names}
        elapsed, found = sum(parts.values()), {}
        if elapsed > 0:
            found["time/images_per_s"] = (_number(fields.get("images")) or 0.0) / elapsed
            found["time/data_wait"] = parts["data_wait_s"] / elapsed
        if (mfu := _number(fields.get("mfu"))) is not None:
            found["time/mfu"] = mfu
        peak = _number(fields.get("peak_bytes"))
        return found if peak is None else {**found, "memory/peak_bytes": peak}

    def pictures(self, row: Row) -> list[Picture]:
        """Pictures of the preview at a row's place, by the attempt that wrote the row."""
        fields = self._previews.get((row.attempt, row.images_seen), {})
        files, captions = fields.get("files"), fields.get("captions")
        if not isinstance(files, list) or not isinstance(captions, list) or len(files) != len(captions):
            return []
        return [Picture(str(file), str(caption)) for file, caption in zip(files, captions, strict=True)]


def with_term(data: Mapping[str, float], term: str | None) -> dict[str, float]:
    """The values of a row, with the loss term in the place of the totals, where the row has that term."""
    found = dict(data)
    for total in TOTALS if term is not None else ():
        name = f"{total.removesuffix('loss')}{term}"
        if total in found and name in found:
            found[total] = found[name]
    return found


def lacks_term(data: Mapping[str, float], term: str | None) -> bool:
    """Whether a row has a total but not the term that is to stand in for it."""
    return term is not None and TOTALS[0] in data and term not in data


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None
