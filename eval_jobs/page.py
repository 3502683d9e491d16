"""What the report says, gathered from a run folder alone: journal, samples, metrics, config. No HTML here."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval_jobs.charts import Mark, Series, line_chart
from eval_jobs.timeline import receipt_rows, time_line
from hpc_gen.config.loader import Resolved
from hpc_gen.metrics import results
from hpc_gen.metrics.results import MetricRecord
from hpc_gen.runtime import goodput, journal
from hpc_gen.runtime.errors import ExitCode, HpcGenError
from hpc_gen.runtime.journal import Attempt, Event, Row
from hpc_gen.runtime.progress import format_duration
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.sampling.images import grid, png_bytes
from hpc_gen.sampling.index import SampleIndex, read_index

OWN_STAGE = "report"
GRID_IMAGES = 80
GRID_COLUMNS = 10
MAX_PREVIEWS = 8
MAX_CHARTS = 12
ONLINE = "online-"  # metrics/online-IMAGES.json: evaluations during training

METRIC_TITLES = {
    "fid": ("Frechet distance (FID)", "lower is better"),
    "kid": ("Kernel distance (KID)", "lower is better"),
    "precision": ("Precision", "higher is better"),
    "recall": ("Recall", "higher is better"),
    "isc": ("Inception score", "higher is better"),
}
# What samplers measure: (title, unit, horizontal axis); others are shown by their names.
CURVE_TITLES = {
    "inner_energy_change": ("Energy along the inner loop, less its start", "energy", "inner steps"),
    "energy_accept_rate": ("inner steps accepted", "share", ""),
}
CHART_UNITS = {"learning_rate": ("Learning rate", "per step"), "grad_norm": ("Gradient norm", "L2 norm")}


@dataclass(frozen=True)
class Picture:
    """An image for the page: a data URI, its size in pixels, what it shows."""

    uri: str
    width: int
    height: int
    alt: str
    caption: str


def gather(run: RunFolder, resolved: Resolved) -> dict[str, Any]:
    """Everything the template shows. Parts that are not there yet are empty; damaged ones are named in `problems`."""
    problems: list[str] = []
    events, kept = _work(run)
    rows = journal.history_of(event for event in events if event.stage == "train" and event.task == 0)
    samples = _samples(run, problems)
    metrics = _metrics(run, problems)
    torn = journal.read(run).torn
    if torn:
        problems.append(f"{torn} lines of the journal were cut off by kills and are left out")
    receipt = goodput.receipt_of(events)
    return {
        "title": resolved.experiment.report.title or resolved.experiment.name,
        "run": run.name,
        "facts": _facts(resolved, rows, kept, receipt),
        "samples": samples,
        "previews": _previews(run),
        "charts": _charts(rows, kept),
        "num_rows": len(rows),
        "metrics": metrics,
        "attempts": time_line(events, kept),
        "receipt": receipt_rows(receipt),
        "identity": resolved.identity,
        "operation": resolved.operation,
        "versions": _versions(run),
        "config": resolved.to_yaml(),
        "problems": problems,
    }


def _work(run: RunFolder) -> tuple[list[Event], list[Attempt]]:
    """Events and attempts without those of the report itself and those that looked and found nothing to do.

    Else a page would never be up to date: making it is an attempt, too.
    """
    events = journal.read(run)
    worked = {
        (event.attempt, event.stage)
        for event in events
        if event.kind in ("interval", "unit_begin", "save_begin", "row")
    }
    kept = [
        attempt
        for attempt in journal.attempts(run)
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
        loss = next((row.data["loss"] for row in reversed(rows) if math.isfinite(row.data.get("loss", math.nan))), None)
        if loss is not None:
            found.append((f"{loss:.4g}", "training loss at the end"))
    interrupted = [attempt for attempt in attempts if attempt.exit_code != ExitCode.DONE]
    if attempts:
        times = "once" if len(interrupted) == 1 else f"{len(interrupted)} times"
        broken = f", interrupted {times}" if interrupted else ", never interrupted"
        found.append((str(len(attempts)), f"attempt{'s' if len(attempts) > 1 else ''}{broken}"))
    if receipt.total_s > 0:
        found.append((f"{receipt.goodput:.0%}", f"goodput of {format_duration(receipt.total_s)} rank time"))
    return found


def _samples(run: RunFolder, problems: list[str]) -> list[dict[str, Any]]:
    """Grid and plan of each finished set of samples; `main` first."""
    found = []
    folders = sorted((run.path / "samples").glob("*/index.json"), key=lambda path: (path.parent.name != "main", path))
    for path in folders:
        try:
            index = read_index(path.parent)
            charts, single = _curves(index)
            plan = [*_plan(index), *single]
            found.append({"tag": path.parent.name, "picture": _grid(index), "plan": plan, "charts": charts})
        except HpcGenError as error:
            problems.append(str(error))
    return found


def _curves(index: SampleIndex) -> tuple[list[dict[str, str]], list[tuple[str, str]]]:
    """What the sampler measured: charts, and (name, mean) of what was measured as one number."""
    charts, single = [], []
    for name, curve in sorted(index.curves.items()):
        title, unit, over = CURVE_TITLES.get(name, (name, "value", "step"))
        points = [(float(i), value) for i, value in enumerate(curve.means()) if value is not None]
        if len(points) > 1:
            charts.append({"title": title, "svg": line_chart(title, unit, [Series(name, points)], over=over)})
        elif points:
            single.append((title, f"{points[0][1]:.4g} of {curve.counts[int(points[0][0])]:,.0f}"))
    return charts, single


def _grid(index: SampleIndex) -> Picture:
    plan = index.plan
    columns = plan.num_classes if 2 <= plan.num_classes <= 16 and plan.classes == "balanced" else GRID_COLUMNS
    count = min(index.num_images, GRID_IMAGES // columns * columns)
    side = index.image_shape[-1]
    picture = grid(index.read(range(count)), columns, gap=max(1, side // 16), scale=max(1, 64 // side))
    by_class = f"; each column is one of the {columns} classes" if columns == plan.num_classes else ""
    caption = f"Images 0 to {count - 1} of {index.num_images:,}{by_class}"
    uri = _data_uri(png_bytes(picture))
    return Picture(uri, picture.width, picture.height, f"Grid of {count} generated images", caption)


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
            ", ".join(f"{name} {_plain(value)}" for name, value in sorted(plan.settings.items())) or "defaults",
        ),
        ("seed", str(plan.seed)),
        ("blocks", f"{plan.block_images} images in batches of {plan.batch}"),
        ("computed on", f"{plan.device}, threads: {plan.threads}"),
        ("plan hash", plan.hash),
        ("checkpoint manifest", plan.checkpoint_manifest_sha256),
    ]


def _plain(value: Any) -> str:
    return "default" if value is None else str(value)


def _data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _previews(run: RunFolder) -> list[Picture]:
    """Previews during training, evenly chosen from the first to the last."""
    paths = sorted(path for path in run.previews.glob("*.png") if path.stem.isdigit())
    if len(paths) > MAX_PREVIEWS:
        paths = [paths[round(i * (len(paths) - 1) / (MAX_PREVIEWS - 1))] for i in range(MAX_PREVIEWS)]
    found = []
    for path in paths:
        content = path.read_bytes()
        width, height = int.from_bytes(content[16:20]), int.from_bytes(content[20:24])  # of the PNG header
        seen = f"{int(path.stem):,} images"
        found.append(Picture(_data_uri(content), width, height, f"Samples after {seen}", seen))
    return found


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
        title, unit = CHART_UNITS.get(name, ("Loss", "loss") if name == "loss" else (name, "value"))
        groups.append((title, unit, names))
        drawn.update(names)
    return groups


def _metrics(run: RunFolder, problems: list[str]) -> list[dict[str, Any]]:
    """Every number with how it was made, `main` first; of those made in training the last (charts show all)."""
    found = []
    paths = sorted((run.path / "metrics").glob("*.json"), key=lambda path: (path.stem != "main", path))
    online = [path for path in paths if path.stem.startswith(ONLINE)]
    paths = [path for path in paths if path not in online[:-1]]
    for path in paths:
        try:
            found.append({"tag": path.stem, "records": [_record(record) for record in results.read(path).records]})
        except HpcGenError as error:
            problems.append(str(error))
    return found


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


def _versions(run: RunFolder) -> list[tuple[str, str]]:
    """Versions by which the metrics of the run were computed, as recorded in them."""
    for path in sorted((run.path / "metrics").glob("*.json")):
        try:
            records = results.read(path).records
        except HpcGenError:
            continue  # named among the problems already
        for record in records:
            versions = record.subject.get("versions")
            if isinstance(versions, Mapping):
                return [(str(name), str(version)) for name, version in versions.items()]
    return []
