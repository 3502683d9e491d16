"""What the page of a sweep says: the table, the metric against each setting and cost, the images of its points."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from eval_jobs.charts import Series, Spot, line_chart, scatter_chart
from eval_jobs.page import class_names_of
from eval_jobs.pictures import Picture, strip
from eval_jobs.side_by_side import MAX_SETS, OneSet, any_two
from eval_jobs.sweep_plan import Sweep, best_of, words
from eval_jobs.sweep_table import Row, Table, table_of
from eval_jobs.timeline import receipt_rows, time_line
from eval_jobs.words import METRIC_TITLES
from hpc_gen.config.loader import Resolved
from hpc_gen.metrics.results import MetricFile, MetricRecord
from hpc_gen.runtime import goodput, journal
from hpc_gen.runtime.errors import HpcGenError
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.sampling.index import read_some

MAX_LINES = 3  # of a chart: one per combination of the other settings; the style has three colours
MAX_STRIPS = 60
STRIP_IMAGES = 10
OWN_STAGE = "report"


def gather(run: RunFolder, resolved: Resolved, sweep: Sweep) -> dict[str, Any]:
    """Everything the template shows, from the sweep's folder alone."""
    table = table_of(run, sweep)
    everything = journal.read(run)
    attempts = [each for each in journal.attempts_of(everything, journal.claims(run)) if each.stage != OWN_STAGE]
    names = {(attempt.number, attempt.stage) for attempt in attempts}
    events = [event for event in everything if (event.attempt, event.stage) in names]
    title, direction = METRIC_TITLES.get(sweep.metric, (sweep.metric, ""))
    sets = _sets(table, class_names_of(run, resolved))
    return {
        "title": resolved.experiment.report.title or sweep.name,
        "sweep": sweep,
        "metric_title": title,
        "direction": direction,
        "facts": _facts(table),
        "keys": table.keys,
        "columns": [(name, METRIC_TITLES.get(name, (name, ""))[0]) for name in table.metrics],
        "rows": [_row(row, table) for row in table.rows],
        "curves": _curves(table, title, direction),
        "costs": _costs(table, title, direction),
        "strips": _strips(table),
        "hidden": max(0, len(table.rows) - MAX_STRIPS),
        "sets": sets,
        "sets_hidden": len([row for row in table.rows if _has_images(row)]) - len(sets) if sets else 0,
        "measured": _measured(table),
        "attempts": time_line(events, attempts),
        "receipt": receipt_rows(goodput.receipt_of(events)),
        "identity": resolved.identity,
        "problems": list(dict.fromkeys(table.problems)),
    }


def _facts(table: Table) -> list[tuple[str, str]]:
    scored = [row for row in table.rows if row.value(table.metric) is not None]
    found = [(f"{len(scored)} of {len(table.rows)}", "points scored")]
    best = next((row for row in table.rows if row.name == table.best), None)
    if best is not None:
        found.append((_number(best.records.get(table.metric)), f"best {table.metric}: {_name(best, table)}"))
    fronts = [row for row in table.rows if row.front]
    if fronts:
        found.append((str(len(fronts)), "points that no other beats in both quality and cost"))
    return found


def _row(row: Row, table: Table) -> dict[str, Any]:
    return {
        "name": row.name,
        "keys": [_plain(row.keys.get(key)) for key in table.keys],
        "numbers": [_number(row.records.get(name)) for name in table.metrics],
        "notes": list(dict.fromkeys(record.note for record in row.records.values() if record.note)),
        "nfe": "" if row.nfe is None else f"{row.nfe:g}",
        "seconds": "" if row.seconds is None else f"{row.seconds:.3g}",
        "front": row.front,
        "best": row.name == table.best,
    }


def _name(row: Row, table: Table) -> str:
    """A point by the keys that tell it from the others."""
    return words({key: row.keys[key] for key in table.keys if key in row.keys})


def _number(record: MetricRecord | None) -> str:
    if record is None:
        return ""
    if record.value is None:
        return "not available"
    return f"{record.value:.4g}" + ("" if record.std is None else f" ± {record.std:.2g}")


def _plain(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _curves(table: Table, title: str, direction: str) -> list[dict[str, Any]]:
    """The metric over each setting that takes several numbers; a line per combination of the others."""
    charts = []
    for key in table.keys:
        lines: dict[str, dict[float, float]] = {}
        for row in table.rows:
            at, value = row.keys.get(key), row.value(table.metric)
            if isinstance(at, bool) or not isinstance(at, int | float) or value is None:
                continue
            others = {other: row.keys[other] for other in table.keys if other != key and other in row.keys}
            lines.setdefault(json.dumps(others), {})[float(at)] = value
        whole = {name: points for name, points in lines.items() if len(points) > 1}
        chosen = sorted(whole, key=lambda name: min(whole[name].values()))[:MAX_LINES]
        if not chosen:
            continue
        series = [Series(_line_name(name), sorted(whole[name].items())) for name in chosen]
        over = "images seen" if key == "checkpoint" else key
        charts.append(
            {
                "title": f"{title} over {over}",
                "svg": line_chart(f"{title} over {over}", direction or table.metric, series, over=over),
                "names": [line.name for line in series],
                "hidden": len(whole) - len(chosen),
            }
        )
    return charts


def _line_name(others: str) -> str:
    return ", ".join(f"{key} {_plain(value)}" for key, value in json.loads(others).items()) or "all points"


def _costs(table: Table, title: str, direction: str) -> list[dict[str, Any]]:
    """The metric over what it costs."""
    costs: list[tuple[str, str, Callable[[Row], float | None]]] = [
        ("NFE", "network evaluations per image", lambda row: row.nfe),
        ("time", "device seconds per image", lambda row: row.seconds),
    ]
    charts = []
    for front, over, cost in costs:
        spots = []
        for row in table.rows:
            value, price = row.value(table.metric), cost(row)
            if value is not None and price is not None:
                error = row.records[table.metric].std
                spots.append(Spot(price, value, _name(row, table), error, front in row.front))
        svg = scatter_chart(title, direction or table.metric, over, spots)
        if svg:
            charts.append({"title": f"{title} against {over}", "svg": svg})
    return charts


def _strips(table: Table) -> list[tuple[str, Picture]]:
    """The same image numbers of each point."""
    found = []
    for row in table.rows[:MAX_STRIPS]:
        if row.index is None or not row.index.has_images:
            continue
        count = min(STRIP_IMAGES, row.index.num_images)
        try:
            images = read_some(row.index, range(count))
        except HpcGenError as error:
            table.problems.append(str(error))
            continue
        name = _name(row, table)
        found.append((name, strip(images, f"Images 0 to {count - 1} of the point {name}")))
    return found


def _has_images(row: Row) -> bool:
    return row.index is not None and row.index.has_images


def _sets(table: Table, names: Sequence[str]) -> list[OneSet]:
    """Points of which any two are put side by side: the best one of each checkpoint, then the best of all others."""
    scored = {row.name: row.records[table.metric] for row in table.rows if row.value(table.metric) is not None}
    left = [row for row in table.rows if _has_images(row)]
    order: list[Row] = []
    while left:
        known = {row.name: scored[row.name] for row in left if row.name in scored}
        best = best_of(known, table.metric) if known else left[0].name
        order.append(next(row for row in left if row.name == best))
        left.remove(order[-1])
    first: dict[Any, Row] = {}
    for row in order:
        first.setdefault(row.keys.get("checkpoint"), row)
    chosen = [*first.values(), *(row for row in order if row not in first.values())][:MAX_SETS]
    shown = [row for row in table.rows if row in chosen]
    samples = [(_name(row, table), row.index) for row in shown if row.index is not None]
    metrics = {_name(row, table): MetricFile(row.name, "", tuple(row.records.values())) for row in shown}
    try:
        return any_two(samples, metrics, names)
    except HpcGenError as error:
        table.problems.append(str(error))
        return []


def _measured(table: Table) -> list[tuple[str, str]]:
    """How the sweep's metric was measured: the first point's record, which all others were held against."""
    records: Sequence[MetricRecord] = [row.records[table.metric] for row in table.rows if table.metric in row.records]
    found: list[tuple[str, str]] = []

    def walk(facts: Any, prefix: str) -> None:
        for name, value in facts.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{name}.")
            else:
                found.append((f"{prefix}{name}", "none" if value is None else str(value)))

    if records:
        walk(records[0].measure, "")
        if records[0].spread:
            found.append(("± is", records[0].spread))
    return found
