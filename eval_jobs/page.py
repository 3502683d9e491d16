"""What the report says, gathered from a run folder alone: journal, samples, metrics, config. No HTML here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from eval_jobs.charts import Mark, Series, line_chart
from eval_jobs.neighbours import Neighbours, neighbours_of
from eval_jobs.pictures import picture_of, preview_pictures
from eval_jobs.side_by_side import MAX_PAIRS, MAX_SETS, OneSet, any_two, metric_curves, pairs
from eval_jobs.timeline import receipt_rows, time_line
from eval_jobs.words import METRIC_TITLES, plain
from hpc_gen.config.loader import Resolved
from hpc_gen.metrics import results
from hpc_gen.metrics.results import MetricFile, MetricRecord
from hpc_gen.runtime import goodput, journal
from hpc_gen.runtime.errors import ExitCode, HpcGenError
from hpc_gen.runtime.journal import Attempt, Event, Row
from hpc_gen.runtime.progress import format_duration
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.sampling.index import SampleIndex, read_index
from hpc_gen.stages.build import open_table
from hpc_gen.stages.class_names import class_names
from hpc_gen.stages.parent import origins

OWN_STAGE = "report"
MAX_CHARTS = 12
ONLINE = "online-"  # metrics/online-IMAGES.json: evaluations during training

# What samplers measure: (title, unit, horizontal axis); others are shown by their names.
CURVE_TITLES = {
    "inner_energy_change": ("Energy along the inner loop, less its start", "energy", "inner steps"),
    "network_evaluations": ("network evaluations per image (NFE)", "evaluations", ""),
    "energy_accept_rate": ("inner steps accepted", "share", ""),
}
CHART_UNITS = {"learning_rate": ("Learning rate", "per step"), "grad_norm": ("Gradient norm", "L2 norm")}


def gather(run: RunFolder, resolved: Resolved) -> dict[str, Any]:
    """Everything the template shows. Parts that are not there yet are empty; damaged ones are named in `problems`."""
    problems: list[str] = []
    everything = journal.read(run)
    events, kept = _work(everything, journal.attempts_of(everything, journal.claims(run)))
    rows = journal.history_of(event for event in events if event.stage == "train" and event.task == 0)
    samples = read_samples(run, problems)
    metrics = read_metrics(run, problems)
    if everything.torn:
        problems.append(f"{everything.torn} lines of the journal were cut off by kills and are left out")
    receipt = goodput.receipt_of(events)
    online = [tag for tag in metrics if tag.startswith(ONLINE)]
    shown = [file for tag, file in metrics.items() if tag not in online[:-1]]  # charts show those of training all
    return {
        "title": resolved.experiment.report.title or resolved.experiment.name,
        "run": run.name,
        "facts": _facts(resolved, rows, kept, receipt),
        "samples": [part for tag, index in samples for part in _shown(tag, index, problems)],
        "pairs": _pairs(samples, metrics, problems),
        "sets": _sets(run, resolved, samples, metrics, problems),
        "sets_hidden": max(0, sum(index.has_images for _, index in samples) - MAX_SETS),
        "near": _near(run, resolved, samples, problems),
        "previews": preview_pictures(run),
        "charts": _charts(rows, kept),
        "num_rows": len(rows),
        "metrics": [{"tag": _tag(file.tag), "records": [_record(record) for record in file.records]} for file in shown],
        "metric_curves": metric_curves([file for tag, file in metrics.items() if tag not in online]),
        "attempts": time_line(events, kept),
        "receipt": receipt_rows(receipt),
        "origins": origins(run),
        "identity": resolved.identity,
        "operation": resolved.operation,
        "versions": _versions(list(metrics.values())),
        "config": resolved.to_yaml(),
        "problems": list(dict.fromkeys(problems)),
    }


def _work(events: Sequence[Event], attempts: Sequence[Attempt]) -> tuple[list[Event], list[Attempt]]:
    """Events and attempts without those of the report itself and those that looked and found nothing to do.

    Else a page would never be up to date: making it is an attempt, too.
    """
    worked = {
        (event.attempt, event.stage)
        for event in events
        if event.kind in ("interval", "unit_begin", "save_begin", "row")
    }
    kept = [
        attempt
        for attempt in attempts
        if attempt.stage != OWN_STAGE
        and ((attempt.number, attempt.stage) in worked or attempt.exit_code != ExitCode.DONE)
    ]
    names = {(attempt.number, attempt.stage) for attempt in kept}
    return [event for event in events if (event.attempt, event.stage) in names], kept


def _facts(
    resolved: Resolved, rows: Sequence[Row], attempts: Sequence[Attempt], receipt: goodput.Goodput
) -> list[tuple[str, str]]:
    """The few numbers at the top: (value, what it is)."""
    found: list[tuple[str, str]] = []
    train = resolved.experiment.train
    if train is not None and rows:
        found.append((f"{rows[-1].images_seen:,}", f"of {train.total_images:,} images seen in training"))
        last = next((row for row in reversed(rows) if math.isfinite(row.data.get("loss", math.nan))), None)
        if last is not None:
            told = f"training loss, row at {last.images_seen:,} images of attempt {last.attempt}"
            found.append((f"{last.data['loss']:.4g}", told))
    interrupted = [attempt for attempt in attempts if attempt.exit_code != ExitCode.DONE]
    if attempts:
        times = "once" if len(interrupted) == 1 else f"{len(interrupted)} times"
        broken = f", interrupted {times}" if interrupted else ", never interrupted"
        found.append((str(len(attempts)), f"attempt{'s' if len(attempts) > 1 else ''}{broken}"))
    if receipt.total_s > 0:
        found.append(
            (f"{receipt.goodput:.0%}", f"goodput of {format_duration(receipt.total_s)} rank time, by the receipt")
        )
    return found


def read_samples(run: RunFolder, problems: list[str]) -> list[tuple[str, SampleIndex]]:
    """Tag and index of each finished set of samples: `main` first, then by checkpoint."""
    found = []
    for path in sorted((run.path / "samples").glob("*/index.json")):
        try:
            found.append((path.parent.name, read_index(path.parent)))
        except HpcGenError as error:
            problems.append(str(error))
    return sorted(found, key=lambda each: (each[0] != "main", each[1].plan.checkpoint_images_seen, each[0]))


def _shown(tag: str, index: SampleIndex, problems: list[str]) -> list[dict[str, Any]]:
    """Grid, plan and curves of one set of samples; nothing for one whose images are damaged."""
    try:
        charts, single = _curves(index)
        picture = picture_of(index) if index.has_images else None
        return [{"tag": tag, "picture": picture, "plan": [*_plan(index), *single], "charts": charts}]
    except HpcGenError as error:
        problems.append(str(error))
        return []


def _pairs(
    samples: Sequence[tuple[str, SampleIndex]], metrics: Mapping[str, MetricFile], problems: list[str]
) -> dict[str, Any]:
    """Sets of samples side by side, and how many are not shown."""
    try:
        found = pairs([each for each in samples if each[1].has_images], metrics)
    except HpcGenError as error:
        problems.append(str(error))
        found = []
    return {"shown": found, "hidden": max(0, len(samples) - 1 - MAX_PAIRS)}


def _sets(
    run: RunFolder,
    resolved: Resolved,
    samples: Sequence[tuple[str, SampleIndex]],
    metrics: Mapping[str, MetricFile],
    problems: list[str],
) -> list[OneSet]:
    """Any two of these are put side by side by whoever looks at the page."""
    try:
        return any_two(samples, metrics, class_names_of(run, resolved))
    except HpcGenError as error:
        problems.append(str(error))
        return []


def class_names_of(run: RunFolder, resolved: Resolved) -> Sequence[str]:
    """Names of the classes of a run's table; none where it cannot be opened."""
    try:
        table = open_table(run.workspace, resolved.experiment.data.table)
        return class_names(resolved.experiment, table, run.workspace)
    except HpcGenError:
        return ()  # the tables are elsewhere; numbers do


def _near(
    run: RunFolder, resolved: Resolved, samples: Sequence[tuple[str, SampleIndex]], problems: list[str]
) -> Neighbours | None:
    """Nearest training images of the first set that has images."""
    index = next((index for _, index in samples if index.has_images), None)
    try:
        return neighbours_of(index, run, resolved) if index is not None else None
    except HpcGenError as error:
        problems.append(str(error))
        return None


def _curves(index: SampleIndex) -> tuple[list[dict[str, str]], list[tuple[str, str]]]:
    """What the sampler measured: charts, and (name, mean) of what was measured as one number."""
    charts, single = [], []
    for name, curve in sorted(index.curves.items()):
        title, unit, over = CURVE_TITLES.get(name, (name, "value", "step"))
        points = [(float(i), value) for i, value in enumerate(curve.means()) if value is not None]
        if len(points) > 1:
            charts.append({"title": title, "svg": line_chart(title, unit, [Series(name, points)], over=over)})
        elif points:
            single.append((title, f"{points[0][1]:.4g}, mean of {curve.counts[int(points[0][0])]:,.0f}"))
    return charts, single


def _plan(index: SampleIndex) -> list[tuple[str, str]]:
    """The plan in words: (field, value)."""
    plan = index.plan
    weights = f"average '{plan.ema}'" if plan.ema else "raw weights"
    classes = f"{plan.classes}, {plan.num_classes} classes" if plan.num_classes else "no classes"
    return [
        ("images", f"{plan.num_images:,} of {index.image_shape[-1]} x {index.image_shape[-2]} pixels"),
        ("checkpoint", f"at {plan.checkpoint_images_seen:,} images, {weights}"),
        ("classes", classes),
        (
            "sampler",
            ", ".join(f"{name} {plain(value)}" for name, value in sorted(plan.settings.items())) or "defaults",
        ),
        ("seed", str(plan.seed)),
        ("blocks", f"{plan.block_images} images in batches of {plan.batch}"),
        ("computed on", f"{plan.device}, threads: {plan.threads}"),
        ("plan hash", plan.hash),
        ("checkpoint manifest", plan.checkpoint_manifest_sha256),
    ]


def _charts(rows: Sequence[Row], attempts: Sequence[Attempt]) -> list[dict[str, Any]]:
    """Loss with validation first, then learning rate, gradient norm and whatever else the rows hold."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.data.items():
            series.setdefault(name, []).append((float(row.images_seen), value))
    marks = [
        Mark(float(attempt.resumed_from), f"attempt {attempt.number} went on from {attempt.resumed_from:,} images")
        for attempt in attempts
        if attempt.stage == "train" and attempt.resumed_from
    ]
    charts = []
    for title, unit, names in _chart_groups(series)[:MAX_CHARTS]:
        svg = line_chart(title, unit, [Series(name, series[name]) for name in names], marks)
        if svg:
            charts.append({"title": title, "svg": svg, "names": names if len(names) > 1 else [], "marks": len(marks)})
    return charts


def _chart_groups(series: Mapping[str, Sequence[tuple[float, float]]]) -> list[tuple[str, str, list[str]]]:
    """Which series share a chart: (title, unit, names); a training value goes with its validation."""
    groups: list[tuple[str, str, list[str]]] = []
    drawn: set[str] = set()
    for name in ["loss", *CHART_UNITS, *sorted(series)]:
        # a method with one term logs it under two names
        twins = [] if name in CHART_UNITS else [twin for twin in ("loss", "validation/loss") if twin != name]
        if name not in series or name in drawn or any(series[name] == series.get(twin) for twin in twins):
            continue
        names = [each for each in (name, f"validation/{name}") if each in series]
        title, unit = CHART_UNITS.get(name, ("Loss", "loss") if name == "loss" else _measured_title(name))
        groups.append((title, unit, names))
        drawn.update(names)
    return groups


def _measured_title(name: str) -> tuple[str, str]:
    """Title and unit of a series without a title of its own; `evaluate/fid` is a metric."""
    title, direction = METRIC_TITLES.get(name.removeprefix("evaluate/"), (name, "value"))
    return (
        (f"{title} during training", direction) if name.startswith("evaluate/") and title != name else (name, "value")
    )


def read_metrics(run: RunFolder, problems: list[str]) -> dict[str, MetricFile]:
    """Every file of numbers by tag: `main` first, those of training last."""
    found = {}
    paths = (run.path / "metrics").glob("*.json")
    for path in sorted(paths, key=lambda path: (path.stem.startswith(ONLINE), path.stem != "main", path)):
        try:
            found[path.stem] = results.read(path)
        except HpcGenError as error:
            problems.append(str(error))
    return found


def _tag(tag: str) -> str:
    """A tag as a title: `online-000000000640` is the newest evaluation during training."""
    place = tag.removeprefix(ONLINE)
    return f"during training, at {int(place):,} images" if tag.startswith(ONLINE) and place.isdigit() else tag


def _record(record: MetricRecord) -> dict[str, Any]:
    title, direction = METRIC_TITLES.get(record.name, (record.name, ""))
    value = "not available" if record.value is None else f"{record.value:.4g}"
    spread = "" if record.std is None else f"± {record.std:.2g}"
    note = (record.note or "").removeprefix("not available: ")
    extractor = record.measure.get("extractor", {}).get("name", "")
    reference = record.measure.get("reference")
    against = _against(reference) if reference else "no reference"
    how = f"{record.measure.get('num_images', 0):,} samples, {against}, {extractor}"
    groups = [("How it was measured", _lines(record.measure)), ("What was measured", _lines(record.subject))]
    return {
        "name": record.name,
        "title": title,
        "direction": direction,
        "value": value,
        "spread": spread,
        "note": note,
        "error": record.spread or "",
        "how": how,
        "groups": groups,
    }


def _against(reference: Mapping[str, Any]) -> str:
    """The reference in words; statistics of others do not say how many images they were made from."""
    rows = reference.get("rows")
    kind = "reference images" if "statistics_sha256" not in reference else "reference images as statistics"
    return f"{rows:,} {kind}" if rows is not None else "stored statistics"


def _lines(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested facts as (dotted name, text)."""
    found: list[tuple[str, str]] = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            found += _lines(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", "none" if value is None else str(value)))
    return found


def _versions(files: Sequence[MetricFile]) -> list[tuple[str, str]]:
    """Versions by which the metrics of the run were computed, as recorded in them."""
    for record in (record for file in files for record in file.records):
        versions = record.subject.get("versions")
        if isinstance(versions, Mapping):
            return [(str(name), str(version)) for name, version in versions.items()]
    return []
