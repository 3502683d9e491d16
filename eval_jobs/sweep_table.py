"""What a sweep has found: a row per point with its metrics, its cost, and whether another point beats it in both."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eval_jobs.sweep_plan import HIGHER_IS_BETTER, POINTS, Sweep, best_of, words
from hpc_gen.config.sweep import Point
from hpc_gen.metrics import results
from hpc_gen.metrics.results import MetricRecord
from hpc_gen.runtime import journal
from hpc_gen.runtime.errors import HpcGenError, UserError
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.sampling import effort
from hpc_gen.sampling.index import SampleIndex, read_index


@dataclass(frozen=True)
class Row:
    """One point. `nfe`: network evaluations per image; `seconds`: of a device, per image, the middle one of its blocks.

    `front`: costs in which no other point is both cheaper and better ("NFE", "time").
    """

    name: str
    keys: Point
    records: Mapping[str, MetricRecord] = field(default_factory=dict)
    index: SampleIndex | None = None
    nfe: float | None = None
    seconds: float | None = None
    front: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """The point for people."""
        return words(self.keys)

    def value(self, metric: str) -> float | None:
        """Value of a metric, None where there is none yet."""
        record = self.records.get(metric)
        return record.value if record is not None else None


@dataclass(frozen=True)
class Table:
    """All points in the order of the grid; `best`: name of the best by the sweep's metric; `problems` in sentences."""

    metric: str
    rows: list[Row]
    best: str | None
    problems: list[str]

    @property
    def metrics(self) -> list[str]:
        """Names of all metrics that any row has, in their order."""
        return list(dict.fromkeys(name for row in self.rows for name in row.records))

    @property
    def keys(self) -> list[str]:
        """Keys by which the points differ, in their order."""
        names = dict.fromkeys(key for row in self.rows for key in row.keys)
        return [name for name in names if len({json.dumps(row.keys.get(name)) for row in self.rows}) > 1] or list(names)


def table_of(folder: RunFolder, sweep: Sweep) -> Table:
    """The table of a sweep, from its folder alone."""
    seconds = _seconds(folder)
    problems: list[str] = []
    rows = []
    for name, keys in sweep.points.items():
        index, records = None, {}
        try:
            if (folder.samples(name) / "index.json").is_file():
                index = read_index(folder.samples(name))
            if folder.metrics(name).is_file():
                records = {record.name: record for record in results.read(folder.metrics(name)).records}
        except HpcGenError as error:
            problems.append(str(error))
        nfe = index.curves[effort.NAME].means()[0] if index is not None and effort.NAME in index.curves else None
        count = index.plan.block_images if index is not None else 0
        times = seconds.get(name, [])
        per_image = statistics.median(times) / min(count, index.num_images) if times and index is not None else None
        rows.append(Row(name, keys, records, index, nfe, per_image))
    problems += _unlike(rows, sweep.metric)
    rows = [_with_front(row, rows, sweep.metric) for row in rows]
    scored = {row.name: row.records[sweep.metric] for row in rows if row.value(sweep.metric) is not None}
    return Table(sweep.metric, rows, best_of(scored, sweep.metric) if scored else None, problems)


def _seconds(folder: RunFolder) -> dict[str, list[float]]:
    """Seconds of every whole block of samples that was made, by point; the last one of a point may be shorter."""
    found: dict[str, list[float]] = {}
    for event in journal.read(folder):
        if event.kind == "unit_committed" and event.stage == POINTS:
            name = str(event.fields.get("unit", "")).partition("-")[0]
            found.setdefault(name, []).append(float(event.fields.get("seconds", 0.0)))
    return found


def _unlike(rows: Sequence[Row], metric: str) -> list[str]:
    """Points that were not measured as the first one was: they share no table, and it is said why."""
    scored = [row for row in rows if row.value(metric) is not None]
    found = []
    for row in scored[1:]:
        try:
            results.compare(scored[0].records[metric], row.records[metric])
        except UserError as error:
            found.append(f"{row.words}: {error}")
    return found


def _with_front(row: Row, rows: Sequence[Row], metric: str) -> Row:
    costs: dict[str, Callable[[Row], float | None]] = {"NFE": lambda each: each.nfe, "time": lambda each: each.seconds}
    front = tuple(name for name, cost in costs.items() if _undominated(row, rows, metric, cost))
    return Row(row.name, row.keys, row.records, row.index, row.nfe, row.seconds, front)


def _undominated(row: Row, rows: Sequence[Row], metric: str, cost: Callable[[Row], float | None]) -> bool:
    """Whether no other point costs no more and scores no worse, one of them truly."""
    mine = _place(row, metric, cost)
    if mine is None:
        return False
    others = (_place(other, metric, cost) for other in rows if other.name != row.name)
    return not any(
        other is not None and other != mine and other[0] <= mine[0] and other[1] <= mine[1] for other in others
    )


def _place(row: Row, metric: str, cost: Callable[[Row], float | None]) -> tuple[float, float] | None:
    """(cost, badness) of a point."""
    value, price = row.value(metric), cost(row)
    if value is None or price is None:
        return None
    return price, -value if metric in HIGHER_IS_BETTER else value


# ---------------------------------------------------------------- for people and programs


def lines(table: Table) -> list[str]:
    """The table as aligned text."""
    head = ["point", table.metric, "NFE", "s/image", "front"]
    cells = [
        [row.words + ("  <- best" if row.name == table.best else ""), _number(row.records.get(table.metric))]
        + [f"{row.nfe:g}" if row.nfe is not None else "", f"{row.seconds:.3g}" if row.seconds is not None else ""]
        + [", ".join(row.front)]
        for row in table.rows
    ]
    widths = [max(len(line[i]) for line in [head, *cells]) for i in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in [head, *cells]]


def _number(record: MetricRecord | None) -> str:
    if record is None:
        return "not scored yet"
    if record.value is None:
        return "not available"
    return f"{record.value:.4g}" + (f" ± {record.std:.2g}" if record.std is not None else "")


def to_csv(table: Table) -> str:
    """A line per point: keys, value and error of every metric, cost, front."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    columns = [column for name in table.metrics for column in (name, f"{name}_std")]
    writer.writerow(["point", *table.keys, *columns, "nfe", "seconds_per_image", "front"])
    for row in table.rows:
        numbers: list[Any] = []
        for name in table.metrics:
            record = row.records.get(name)
            numbers += [record.value, record.std] if record is not None else [None, None]
        keys = [json.dumps(row.keys[key]) if key in row.keys else "" for key in table.keys]
        writer.writerow([row.name, *keys, *numbers, row.nfe, row.seconds, " ".join(row.front)])
    return stream.getvalue()


def to_json(table: Table) -> dict[str, Any]:
    """Everything of the table with how each number was made."""
    return {
        "metric": table.metric,
        "best": table.best,
        "problems": table.problems,
        "points": [
            {
                "name": row.name,
                "keys": row.keys,
                "metrics": {name: results.to_json(record) for name, record in row.records.items()},
                "nfe": row.nfe,
                "seconds_per_image": row.seconds,
                "front": list(row.front),
            }
            for row in table.rows
        ],
    }
