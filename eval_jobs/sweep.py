"""The workers of a sweep: samples of all points, features of all of them, a metrics file per point.

Units of a stage are those of every point, one after the other, so that an array shares all of the sweep and no point
waits for another. A point that is no longer wanted is left: the unit in hand is dropped at its next poll, the others
are marked as cancelled in their turn; where the point is wanted again the marks go, and the work is missing again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from eval_jobs import sweep_plan
from eval_jobs.evaluate import REFERENCE, EvaluateWorker
from eval_jobs.sample import Methods, SampleWorker
from eval_jobs.sweep_plan import FEATURES, POINTS, SCORES, WANTED_NAME, Sweep
from hpc_gen.config.loader import Resolved
from hpc_gen.runtime import clock, commit
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.sampling.index import BLOCK_NAME, block_folder
from hpc_gen.stages import run_setup
from hpc_gen.stages.units import StageContext, Unit

REFERENCE_TAG = "reference"
LOOK_S = 1.0  # how often a task at work reads the wish: a file on a disk that all tasks share


class _Cancelled(Exception):
    """The point in hand is no longer wanted."""


@dataclass(frozen=True)
class _Part:
    """A unit of the sweep: one of `point`, which its own worker knows as `unit`."""

    name: str
    point: str
    unit: Unit


class _SweepWorker:
    """What the three stages share: the points, and how one that is no longer wanted is left."""

    stage = ""

    def __init__(self, context: StageContext) -> None:
        found = sweep_plan.read_sweep(context.resolved)
        if found is None:
            raise UserError(f"run '{context.run.name}' is no sweep; make one with: hpc-gen sweep GRID.yaml")
        self.sweep: Sweep = found
        self.context = context
        self.base: RunFolder = found.base(context.workspace)
        self._base_resolved = run_setup.load_run(self.base)
        self._resolved: dict[str, Resolved] = {}
        self.parts: list[_Part] = []

    def of(self, point: str, stage: str) -> StageContext:
        """The context of one point: the sweep's folder, the point's experiment."""
        if point not in self._resolved:
            self._resolved[point] = self.sweep.resolved(self._base_resolved, point)
        mine = self.context
        return StageContext(
            mine.run, self._resolved[point], stage, mine.workspace, mine.task, mine.num_tasks, mine.journal
        )

    def units(self) -> list[Unit]:
        """Those of all points."""
        return [Unit(part.name, i) for i, part in enumerate(self.parts)]

    def fingerprint(self) -> str:
        """The same for all: what determines a unit is in its name, so that other points change nothing of it."""
        return f"sweep-{self.stage}-1"

    def do(self, unit: Unit, staging: Path, poll: Callable[[], None]) -> dict[str, Path]:
        """One unit of one point, or the mark that it is not wanted."""
        part = self.parts[unit.index]
        looked = -LOOK_S

        def look() -> None:
            nonlocal looked
            poll()
            if clock.monotonic() - looked >= LOOK_S:
                looked = clock.monotonic()
                if not self.is_wanted(part.point):
                    raise _Cancelled

        try:
            look()
            return self.work(part, staging, look)
        except _Cancelled:
            staged = staging / "cancelled"
            commit.write_text(staged, part.point)
            return {str(self.context.run.path / "cancelled" / f"{part.point}-{self.stage}-{part.name}"): staged}

    def is_wanted(self, point: str) -> bool:
        """Whether the grid, as it is now, has the point."""
        path = self.context.run.path / WANTED_NAME
        try:
            return point in json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({error}); run `hpc-gen sweep` again") from error

    def work(self, part: _Part, staging: Path, poll: Callable[[], None]) -> dict[str, Path]:
        """Do the unit."""
        raise NotImplementedError

    def finish(self) -> None:
        """Nothing is left to do."""


class PointsWorker(_SweepWorker):
    """Blocks of samples of all points; the weights of a checkpoint are read once for all points that share them."""

    stage = POINTS

    def __init__(self, context: StageContext) -> None:
        """Fix and write the plans of all points. Raises UserError, DataError or CheckpointError."""
        super().__init__(context)
        methods = Methods()
        self._workers = {
            point: SampleWorker(self.of(point, "sample"), source=self.base, methods=methods)
            for point in self.sweep.points
        }
        for point, worker in self._workers.items():
            prefix = f"{point}-{worker.fingerprint()[:8]}"
            self.parts += [_Part(f"{prefix}-{unit.name}", point, unit) for unit in worker.units()]

    def work(self, part: _Part, staging: Path, poll: Callable[[], None]) -> dict[str, Path]:
        """Make a block of images."""
        return self._workers[part.point].do(part.unit, staging, poll)

    def finish(self) -> None:
        """Write the index of every point whose blocks are all there."""
        for worker in self._workers.values():
            blocks = worker.plan.blocks()
            if all((block_folder(worker.folder, block.name) / BLOCK_NAME).is_file() for block in blocks):
                worker.finish()


class _EvaluatingWorker(_SweepWorker):
    """Stages that look at the samples: networks and reference are opened once for all points."""

    def __init__(self, context: StageContext) -> None:
        super().__init__(context)
        self.workers: dict[str, EvaluateWorker] = {}
        first: EvaluateWorker | None = None
        for point in self.sweep.points:
            if not (self.context.run.samples(point) / "index.json").is_file():
                if self.is_wanted(point):
                    raise UserError(
                        f"point '{sweep_plan.words(self.sweep.points[point])}' has no samples yet; run the stage "
                        f"'{POINTS}' to its end"
                    )
                continue
            worker = EvaluateWorker(self.of(point, "evaluate"), reference_tag=REFERENCE_TAG, of=self.base, like=first)
            first = first or worker
            self.workers[point] = worker


class FeaturesWorker(_EvaluatingWorker):
    """Blocks of features of all points, those of the reference once."""

    stage = FEATURES

    def __init__(self, context: StageContext) -> None:
        """Open everything. Raises UserError or DataError before any feature is computed."""
        super().__init__(context)
        for number, (point, worker) in enumerate(self.workers.items()):
            for block in worker.blocks:
                if block.kind == REFERENCE and number:
                    continue
                owner = f"{REFERENCE_TAG}-{worker.fingerprint_of(block)[:8]}" if block.kind == REFERENCE else point
                name = f"{owner}-{worker.fingerprint()[:8]}" if block.kind != REFERENCE else owner
                self.parts.append(_Part(f"{name}-{block.name}", point, worker.unit_of(block)))

    def is_wanted(self, point: str) -> bool:
        """The reference, which the first point computes, is wanted by all."""
        return super().is_wanted(point) or point == next(iter(self.workers), None)

    def work(self, part: _Part, staging: Path, poll: Callable[[], None]) -> dict[str, Path]:
        """Look at a block of images."""
        return self.workers[part.point].do(part.unit, staging, poll)


class ScoresWorker(_EvaluatingWorker):
    """A unit per point: its metrics, from the features."""

    stage = SCORES

    def __init__(self, context: StageContext) -> None:
        """Open everything. Raises UserError or DataError."""
        super().__init__(context)
        for point, worker in self.workers.items():
            name = f"{point}-{worker.metrics_fingerprint()[:8]}"
            self.parts.append(_Part(name, point, Unit(name, 0)))

    def work(self, part: _Part, staging: Path, poll: Callable[[], None]) -> dict[str, Path]:
        """Compute the metrics of a point."""
        poll()
        staged = staging / "metrics.json"
        self.workers[part.point].measure().write(staged)
        return {str(self.context.run.metrics(part.point)): staged}


def points(context: StageContext) -> PointsWorker:
    """The factory that the stage runner names."""
    return PointsWorker(context)


def features(context: StageContext) -> FeaturesWorker:
    """The factory that the stage runner names."""
    return FeaturesWorker(context)


def scores(context: StageContext) -> ScoresWorker:
    """The factory that the stage runner names."""
    return ScoresWorker(context)
