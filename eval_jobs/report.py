"""The report stage: one self-contained HTML page, computed from the run folder, the same for the same run.

Beside it lie the numbers as CSV and JSON.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2

import hpc_gen
from eval_jobs import neighbours, sweep_page, sweep_plan, sweep_table
from eval_jobs.page import gather, read_metrics, read_samples
from hpc_gen.config.loader import Resolved
from hpc_gen.metrics import results
from hpc_gen.metrics.results import MetricFile
from hpc_gen.runtime import commit
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages.units import StageContext, Unit

TEMPLATES = Path(__file__).resolve().parent / "templates"
UNIT = Unit("page", 0)


def render(run: RunFolder, resolved: Resolved) -> str:
    """The page of a run, or of a sweep, as HTML text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sweep = sweep_plan.read_sweep(resolved)
    if sweep is not None:
        found = sweep_page.gather(run, resolved, sweep)
        return environment.get_template("sweep.html.j2").render(version=hpc_gen.__version__, **found)
    return environment.get_template("report.html.j2").render(version=hpc_gen.__version__, **gather(run, resolved))


def beside(run: RunFolder, resolved: Resolved) -> dict[str, str]:
    """What other programs read: name -> text of the files beside the page."""
    sweep = sweep_plan.read_sweep(resolved)
    if sweep is not None:
        table = sweep_table.table_of(run, sweep)
        text = json.dumps(sweep_table.to_json(table), indent=1, sort_keys=True)
        return {"sweep.csv": sweep_table.to_csv(table), "sweep.json": text}
    files = list(read_metrics(run, []).values())
    records = [{"tag": file.tag, **results.to_json(record)} for file in files for record in file.records]
    found = {"metrics.csv": metrics_csv(files), "metrics.json": json.dumps(records, indent=1, sort_keys=True)}
    index = next((each for _, each in read_samples(run, []) if each.has_images), None)
    kept = neighbours.file_of(index, run, resolved) if index is not None else None
    return {**found, kept[0]: kept[1]} if kept is not None else found


COLUMNS = (
    *("measure.num_images", "measure.classes", "measure.extractor.name", "measure.extractor.weights_sha256"),
    *("measure.extractor.resize", "measure.reference.rows", "measure.reference.table", "measure.reference.images"),
    *("measure.reference.statistics_sha256", "subject.checkpoint.images_seen", "subject.checkpoint.ema"),
    *("subject.checkpoint.manifest_sha256", "subject.plan.seed", "subject.plan.hash", "subject.run_identity"),
)


def metrics_csv(files: Sequence[MetricFile]) -> str:
    """A line per number: what it is, its error, and the facts that make it comparable."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["tag", "metric", "value", "std", "spread", "note", *COLUMNS])
    for file in files:
        for record in file.records:
            document = results.to_json(record)
            facts = [_at(document, column) for column in COLUMNS]
            row = [file.tag, record.name, record.value, record.std, record.spread, record.note, *facts]
            writer.writerow(["" if cell is None else cell for cell in row])
    return stream.getvalue()


def _at(document: Any, path: str) -> Any:
    for key in path.split("."):
        document = document.get(key) if isinstance(document, dict) else None
    return document


class ReportWorker:
    """One unit: the page. It is made again whenever the run has more to say."""

    stage = "report"

    def __init__(self, context: StageContext) -> None:
        """Nothing is read before it is asked for."""
        self._run, self._resolved = context.run, context.resolved
        self._page: str | None = None

    def units(self) -> list[Unit]:
        """The page."""
        return [UNIT]

    def fingerprint(self) -> str:
        """Hash of the page's text."""
        return hashlib.sha256(self._text().encode()).hexdigest()

    def do(self, unit: Unit, staging: Path, poll: Callable[[], None]) -> dict[str, Path]:
        """Write the page."""
        poll()
        folder, files = self._run.report.parent, {self._run.report.name: self._text()}
        for name, text in {**files, **beside(self._run, self._resolved)}.items():
            commit.write_text(staging / name, text)
            files[name] = text
        return {str(folder / name): staging / name for name in files}

    def finish(self) -> None:
        """Say where the page is."""
        print(f"report: {self._run.report}", flush=True)

    def _text(self) -> str:
        if self._page is None:
            self._page = render(self._run, self._resolved)
        return self._page


def worker(context: StageContext) -> ReportWorker:
    """The factory that the stage runner names."""
    return ReportWorker(context)
