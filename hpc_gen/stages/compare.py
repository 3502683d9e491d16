"""Two runs side by side: what their configs differ in, their losses at the same clock, their metrics where alike."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpc_gen.config import loader
from hpc_gen.config.base import split
from hpc_gen.config.describe import show
from hpc_gen.config.loader import Resolved
from hpc_gen.metrics import results
from hpc_gen.runtime import journal
from hpc_gen.runtime.errors import UserError
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages.parent import fork_line, forked_from
from hpc_gen.stages.run_setup import load_run

CURVE_ROWS = 20  # shown of a curve, evenly spread; the last common one comes on top


@dataclass(frozen=True)
class Difference:
    """A key whose value differs; None: the key is absent or null. `identity`: it changes numbers."""

    key: str
    first: Any
    second: Any
    identity: bool


@dataclass(frozen=True)
class Curve:
    """A value of the journal's rows at the clocks that both runs have: (images_seen, first, second)."""

    name: str
    common: int
    points: list[tuple[int, float, float]]


@dataclass(frozen=True)
class Metric:
    """A metric of a set of samples that both runs have; `difference` (first - second) is None where `refused` says why.

    The rule is that of metrics/results.compare: numbers measured in two ways are not compared.
    """

    tag: str
    name: str
    first: float | None
    second: float | None
    difference: float | None
    refused: str | None


@dataclass(frozen=True)
class Comparison:
    """Two runs; `only`: sets of metrics that one of them has and the other has not."""

    names: tuple[str, str]
    identities: tuple[str, str]
    images_seen: tuple[int, int]
    forked_from: tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]
    differences: list[Difference]
    curves: list[Curve]
    metrics: list[Metric]
    only: tuple[list[str], list[str]]

    def to_json(self) -> str:
        """For other programs; NaN and infinity as text."""
        return json.dumps(_finite(asdict(self)), indent=1)


def differences(first: Resolved, second: Resolved) -> list[Difference]:
    """Every key in which two experiments differ; marked are those that are part of the identity."""
    numbers = {key for each in (first, second) for key in _paths(split(each.experiment)[0])}
    return [Difference(key, a, b, key in numbers) for key, a, b in loader.diff(first, second)]


def _paths(tree: Any, path: str = "") -> Iterator[str]:
    """Key paths of the leaves, as config.loader.diff spells them."""
    if isinstance(tree, dict) and tree:
        for key, inner in tree.items():
            yield from _paths(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path


def compare(first: RunFolder, second: RunFolder) -> Comparison:
    """Compare two runs. Raises UserError for a run with itself, DataError for a damaged metrics file or config."""
    if first.path.resolve() == second.path.resolve():
        raise UserError(f"'{first.name}' and '{second.name}' are the same run; give two")
    configs = load_run(first), load_run(second)
    rows = journal.history(first), journal.history(second)
    tags = _tags(first), _tags(second)
    metrics = [metric for tag in tags[0] if tag in tags[1] for metric in _metrics(tag, tags[0][tag], tags[1][tag])]
    return Comparison(
        names=(first.name, second.name),
        identities=(configs[0].identity, configs[1].identity),
        images_seen=(rows[0][-1].images_seen if rows[0] else 0, rows[1][-1].images_seen if rows[1] else 0),
        forked_from=(forked_from(first), forked_from(second)),
        differences=[each for each in differences(*configs) if each.key != "name"],
        curves=list(_curves(*rows)),
        metrics=metrics,
        only=([tag for tag in tags[0] if tag not in tags[1]], [tag for tag in tags[1] if tag not in tags[0]]),
    )


def _curves(first: Sequence[journal.Row], second: Sequence[journal.Row]) -> Iterator[Curve]:
    """Every loss that both runs logged (loss, validation/loss, those of several turns), `loss` first."""
    names = {name for row in first for name in row.data} & {name for row in second for name in row.data}
    for name in sorted(names, key=lambda name: (name != "loss", name)):
        if name.rpartition("/")[2] != "loss":
            continue
        one, other = ({row.images_seen: row.data[name] for row in rows if name in row.data} for rows in (first, second))
        common = sorted(one.keys() & other.keys())
        shown = _spread(common)
        yield Curve(name, len(common), [(images, one[images], other[images]) for images in shown])


def _spread(places: Sequence[int]) -> list[int]:
    """At most CURVE_ROWS of the places, evenly spread from the first, and the last."""
    if len(places) <= CURVE_ROWS + 1:
        return list(places)
    step = (len(places) - 1) / CURVE_ROWS
    return [places[round(i * step)] for i in range(CURVE_ROWS)] + [places[-1]]


def _tags(run: RunFolder) -> dict[str, Path]:
    """The metrics files of a run by tag."""
    return {path.stem: path for path in sorted((run.path / "metrics").glob("*.json"))}


def _metrics(tag: str, first: Path, second: Path) -> Iterator[Metric]:
    one, other = results.read(first), results.read(second)
    there = {record.name: record for record in other.records}
    for record in one.records:
        if record.name not in there:
            continue
        counterpart = there[record.name]
        difference: float | None = None
        refused: str | None = None
        try:
            difference = results.compare(record, counterpart)
        except UserError as error:
            refused = str(error)
        yield Metric(tag, record.name, record.value, counterpart.value, difference, refused)


# ---------------------------------------------------------------- words


def lines(found: Comparison) -> Iterator[str]:
    """The comparison in plain words and aligned tables."""
    for place, name in enumerate(found.names):
        yield f"{'AB'[place]}  {name}: {found.images_seen[place]:,} images, identity {found.identities[place][:16]}"
        origin = found.forked_from[place]
        if origin is not None:
            yield f"   forked from {fork_line(origin)}"
    yield ""
    yield from _config_lines(found)
    for curve in found.curves:
        yield ""
        yield from _curve_lines(curve)
    if not found.curves:
        yield "\nlosses: the runs have none in common"
    yield ""
    yield from _metric_lines(found)


def _config_lines(found: Comparison) -> Iterator[str]:
    if not found.differences:
        yield "config: no difference"
        return
    numbers = sum(each.identity for each in found.differences)
    number = len(found.differences)
    yield f"config: {number} difference{'s' if number > 1 else ''}, {numbers} in keys that change numbers"
    rows = [
        (each.key, show(each.first), show(each.second), "changes numbers" if each.identity else "operation")
        for each in found.differences
    ]
    yield from _table(("key", "A", "B", ""), rows)


def _curve_lines(curve: Curve) -> Iterator[str]:
    if not curve.points:
        yield f"{curve.name}: logged by both, but never at the same images seen"
        return
    shown = f", {len(curve.points)} of them shown" if len(curve.points) < curve.common else ""
    yield f"{curve.name} at the images seen that both logged ({curve.common}{shown})"
    rows = [(f"{images:,}", _number(a), _number(b), _signed(a - b)) for images, a, b in curve.points]
    yield from _table(("images", "A", "B", "A - B"), rows)


def _metric_lines(found: Comparison) -> Iterator[str]:
    if found.metrics:
        yield "metrics"
        rows = [
            (f"{each.tag}/{each.name}", _number(each.first), _number(each.second), _signed(each.difference))
            for each in found.metrics
        ]
        yield from _table(("metric", "A", "B", "A - B"), rows)
        for each in found.metrics:
            if each.refused is not None:
                yield f"  not compared: {each.tag}/{each.name}: {each.refused}"
    else:
        yield "metrics: no set of samples was evaluated in both"
    for name, tags in zip(found.names, found.only, strict=True):
        if tags:
            yield f"  only {name} has metrics of: {', '.join(tags)}"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, *rows]:
        yield ("  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True))).rstrip()


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"


def _signed(value: float | None) -> str:
    return "refused" if value is None else f"{value:+.3g}"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value
