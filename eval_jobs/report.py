"""The report stage: one self-contained HTML page, computed from the run folder, the same for the same run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import jinja2

import hpc_gen
from eval_jobs.page import gather
from hpc_gen.config.loader import Resolved
from hpc_gen.runtime import commit
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages.units import StageContext, Unit

TEMPLATES = Path(__file__).resolve().parent / "templates"
UNIT = Unit("page", 0)


def render(run: RunFolder, resolved: Resolved) -> str:
    """The page as HTML text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(version=hpc_gen.__version__, **gather(run, resolved))


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
        staged = staging / self._run.report.name
        commit.write_text(staged, self._text())
        return {str(self._run.report): staged}

    def finish(self) -> None:
        """Nothing is left to do."""

    def _text(self) -> str:
        if self._page is None:
            self._page = render(self._run, self._resolved)
        return self._page


def worker(context: StageContext) -> ReportWorker:
    """The factory that the stage runner names."""
    return ReportWorker(context)
