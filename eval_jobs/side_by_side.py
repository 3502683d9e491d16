"""Sets of samples next to one another: the same ids in two grids, and metrics with differences where they are alike."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval_jobs.charts import Series, line_chart
from eval_jobs.pictures import ClassRow, Picture, by_class, picture_of
from eval_jobs.words import METRIC_TITLES, plain
from hpc_gen.metrics import results
from hpc_gen.metrics.results import MetricFile, MetricRecord
from hpc_gen.runtime.errors import UserError
from hpc_gen.sampling.index import SampleIndex
from hpc_gen.sampling.plan import describe

MAX_PAIRS = 4
MAX_SETS = 8
PAIR_IMAGES = 40
_NOT_TOLD = ("hash", "checkpoint_manifest_sha256", "run_identity")  # they differ whenever anything does


@dataclass(frozen=True)
class Pair:
    """Two sets of samples: who they are, the same ids of both, what differs in the plans, and the metrics of both."""

    left: str
    right: str
    pictures: tuple[Picture, Picture]
    differences: list[tuple[str, str, str]]
    metrics: list[dict[str, str]]


def pairs(samples: Sequence[tuple[str, SampleIndex]], metrics: Mapping[str, MetricFile]) -> list[Pair]:
    """The first set beside each of the others, at most MAX_PAIRS of them. Raises DataError for damaged images."""
    if len(samples) < 2:
        return []
    first_tag, first = samples[0]
    found = []
    for tag, index in samples[1 : 1 + MAX_PAIRS]:
        count = min(PAIR_IMAGES, first.num_images, index.num_images)
        differing = results.differing_fields(describe(first.plan), describe(index.plan))
        told = [(_words(name), _short(one), _short(other)) for name, one, other in differing if name not in _NOT_TOLD]
        grids = (picture_of(first, count, f"'{first_tag}'"), picture_of(index, count, f"'{tag}'"))
        rows = _metric_rows(metrics.get(first_tag), metrics.get(tag))
        found.append(Pair(_name(first_tag, first), _name(tag, index), grids, told, rows))
    return found


def _name(tag: str, index: SampleIndex) -> str:
    return f"{tag}, at {index.plan.checkpoint_images_seen:,} images"


def _words(field: str) -> str:
    return field.replace("_", " ").replace(".", ": ")


def _short(value: object) -> str:
    """A field of a plan; of a hash its beginning (the whole of it stands in the plan)."""
    text = plain(value)
    return f"{text[:12]}..." if re.fullmatch("[0-9a-f]{64}", text) else text


def _metric_rows(left: MetricFile | None, right: MetricFile | None) -> list[dict[str, str]]:
    """A row per metric that either has: both values, and their difference or why there is none."""
    one = {record.name: record for record in left.records} if left is not None else {}
    other = {record.name: record for record in right.records} if right is not None else {}
    rows = []
    for name in [*one, *(name for name in other if name not in one)]:
        title, direction = METRIC_TITLES.get(name, (name, ""))
        row = {"title": title, "direction": direction, "left": _value(one.get(name)), "right": _value(other.get(name))}
        rows.append({**row, **_difference(one.get(name), other.get(name))})
    return rows


def _value(record: MetricRecord | None) -> str:
    if record is None:
        return "not measured"
    if record.value is None:
        return "not available"
    return f"{record.value:.4g}" + ("" if record.std is None else f" ± {record.std:.2g}")


def _difference(left: MetricRecord | None, right: MetricRecord | None) -> dict[str, str]:
    if left is None or right is None:
        return {"difference": "", "refused": "measured for one of them only"}
    try:
        difference = results.compare(right, left)
        return {"difference": f"{difference:+.4g}" if difference else "0", "refused": ""}
    except UserError as error:
        return {"difference": "", "refused": str(error)}


@dataclass(frozen=True)
class OneSet:
    """A set of samples for the choice of any two: its name, images by class and number, metrics."""

    name: str
    rows: list[ClassRow]
    metrics: list[tuple[str, str]]


def any_two(
    samples: Sequence[tuple[str, SampleIndex]], metrics: Mapping[str, MetricFile], names: Sequence[str]
) -> list[OneSet]:
    """Every set of samples with images, at most MAX_SETS, where there are two or more. Raises DataError."""
    shown = [(tag, index) for tag, index in samples if index.has_images][:MAX_SETS]
    if len(shown) < 2:
        return []
    found = []
    for tag, index in shown:
        records = metrics[tag].records if tag in metrics else ()
        numbers = [(METRIC_TITLES.get(record.name, (record.name, ""))[0], _value(record)) for record in records]
        found.append(OneSet(_name(tag, index), by_class(index, f"'{tag}'", names), numbers))
    return found


def metric_curves(files: Sequence[MetricFile]) -> list[dict[str, Any]]:
    """Charts of metrics over checkpoints, of numbers measured alike on samples planned alike, from two points on."""
    series: dict[tuple[str, str], dict[float, float]] = {}
    for file in files:
        for record in file.records:
            place = record.subject.get("checkpoint", {}).get("images_seen")
            if record.value is not None and place is not None:
                series.setdefault((record.name, _alike(record)), {})[float(place)] = record.value
    charts = []
    for (name, _), points in sorted(series.items()):
        if len(points) > 1:
            title, direction = METRIC_TITLES.get(name, (name, ""))
            svg = line_chart(title, direction or name, [Series(name, sorted(points.items()))])
            charts.append({"title": f"{title} by checkpoint", "svg": svg})
    return charts


def _alike(record: MetricRecord) -> str:
    """What must agree for numbers to lie on one line: how they were measured, and the plan but for its checkpoint."""
    plan = dict(record.subject.get("plan") or {})
    for name in ("checkpoint_images_seen", *_NOT_TOLD):
        plan.pop(name, None)
    return json.dumps([record.measure, plan], sort_keys=True, default=str)
