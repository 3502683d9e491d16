"""Numbers that say how they were made: the records of `metrics/TAG.json`, and which of them may be compared.

A record has two kinds of facts. `measure` says how the number was measured (metric settings, extractor and its weights,
reference images, count, class plan): two numbers are comparable only when all of it agrees. `subject` says what was
measured (run, checkpoint, average, sampler, seeds, versions): that is what a comparison is about.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError, UserError

FORMAT = "hpc-gen-metrics-1"


@dataclass(frozen=True)
class MetricRecord:
    """One number. `value` is None when it could not be had, and `note` says why; `std` None = no spread known.

    `spread` says what `std` is (a jackknife error, a deviation over subsets); it is no part of the comparison.
    """

    name: str
    value: float | None
    std: float | None = None
    note: str | None = None
    measure: Mapping[str, Any] = field(default_factory=dict)
    subject: Mapping[str, Any] = field(default_factory=dict)
    spread: str | None = None

    def __post_init__(self) -> None:
        for number in (self.value, self.std):
            if number is not None and not math.isfinite(number):
                raise DataError(f"metric '{self.name}' came out as {number}; its features are degenerate")


@dataclass(frozen=True)
class MetricFile:
    """All records of one tag; `fingerprint` identifies the inputs and settings they were computed from."""

    tag: str
    fingerprint: str
    records: tuple[MetricRecord, ...]

    def get(self, name: str) -> MetricRecord:
        """The record of that name. Raises UserError naming those there are."""
        for record in self.records:
            if record.name == name:
                return record
        have = ", ".join(record.name for record in self.records)
        raise UserError(f"metrics of tag '{self.tag}' have no '{name}'; they have: {have}")

    def write(self, path: Path, fence: commit.FenceLike | None = None) -> None:
        """Write the file, whole or not at all; `fence`: only while the attempt holds the run folder."""
        records = [asdict(record) for record in self.records]
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {"format": FORMAT, "tag": self.tag, "fingerprint": self.fingerprint, "metrics": records}
        commit.write_json(path, document, fence)


def read(path: Path) -> MetricFile:
    """Read a metrics file. Raises UserError when there is none, DataError when it is not one."""
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; run the evaluate stage first") from None
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is not a metrics file ({error}); delete it and run the evaluate stage again"
        ) from error
    try:
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']!r}")
        records = tuple(MetricRecord(**record) for record in document["metrics"])
        return MetricFile(str(document["tag"]), str(document["fingerprint"]), records)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is not a metrics file ({error}); delete it and run the evaluate stage again"
        ) from error


def to_json(record: MetricRecord) -> dict[str, Any]:
    """A record as JSON types."""
    return asdict(record)


def _leaves(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key in sorted(facts):
        value = facts[key]
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differing_fields(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Every field by dotted name whose value differs, with both values; an absent field is None."""
    one, other = dict(_leaves(first)), dict(_leaves(second))
    names = sorted(set(one) | set(other))
    return [(name, one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)]


def compare(first: MetricRecord, second: MetricRecord) -> float:
    """`first` minus `second`. Raises UserError naming the first field in which they were measured otherwise."""
    if first.name != second.name:
        raise UserError(f"'{first.name}' and '{second.name}' are not the same metric; compare like with like")
    differing = differing_fields(first.measure, second.measure)
    if differing:
        name, one, other = differing[0]
        more = f" (and {len(differing) - 1} more fields)" if len(differing) > 1 else ""
        raise UserError(
            f"'{first.name}' was measured in two ways: {name} is {one!r} in one and {other!r} in the other{more}; "
            "evaluate both in the same way before comparing"
        )
    for record in (first, second):
        if record.value is None:
            raise UserError(f"'{record.name}' has no value ({record.note}); there is nothing to compare")
    assert first.value is not None and second.value is not None
    return first.value - second.value
