"""From a grid file to work: the points it wants, the run that holds them, what is missing, what is to be dropped.

A sweep is a run of its own, runs/NAME, with three stages of units (points, features, scores) and a report, so that
everything that runs, submits, stops and watches runs does so for sweeps. Its config lists the points; units carry the
names of their points, so a changed list leaves the units of the others as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hpc_gen.config import loader
from hpc_gen.config.errors import ConfigError
from hpc_gen.config.loader import Resolved
from hpc_gen.config.sweep import OF_THE_SAMPLE, Point, SweepConfig, each_once, point_name, rounded
from hpc_gen.metrics import results
from hpc_gen.metrics.results import MetricRecord
from hpc_gen.metrics.suite import PARTS
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError, HpcGenError, UserError
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import reference_size, run_setup
from hpc_gen.stages.control import find_run, runs_folder
from hpc_gen.training.checkpoint import read as checkpoints

POINTS, FEATURES, SCORES = "points", "features", "scores"
STAGES = {name: f"eval_jobs.sweep:{name}" for name in (POINTS, FEATURES, SCORES)}
WANTED_NAME = "wanted.json"  # names of the points that are wanted: what a task at work looks at
HIGHER_IS_BETTER = frozenset({"isc", "precision", "recall", "density", "coverage"})


@dataclass(frozen=True)
class Sweep:
    """What a sweep's run folder says of it: `points` by name, `sample` and `evaluate` as in the grid file."""

    name: str
    run: str
    points: dict[str, Point]
    sample: dict[str, Any]
    evaluate: dict[str, Any]
    metric: str

    def to_json(self) -> dict[str, Any]:
        """As the options of its first stage."""
        return {
            "run": self.run,
            "points": [{"name": name, "keys": keys} for name, keys in self.points.items()],
            "sample": self.sample,
            "evaluate": self.evaluate,
            "metric": self.metric,
        }

    def base(self, workspace: Path) -> RunFolder:
        """The run whose checkpoints are sampled."""
        return find_run(self.run, workspace)

    def resolved(self, base: Resolved, name: str) -> Resolved:
        """The experiment of one point: that of the run with the sections sample and evaluate of the point.

        Raises ConfigError for keys that the method's sampler does not have.
        """
        keys = self.points[name]
        experiment = base.experiment
        sample: dict[str, Any] = experiment.sample.model_dump(mode="json") if experiment.sample is not None else {}
        settings = {**sample.get("settings", {}), **self.sample.get("settings", {})}
        settings |= {key: value for key, value in keys.items() if key not in OF_THE_SAMPLE}
        own = {key: value for key, value in keys.items() if key in OF_THE_SAMPLE}
        sample = {**sample, **self.sample, **own, "settings": settings, "tag": name}
        evaluate = experiment.evaluate.model_dump(mode="json") if experiment.evaluate is not None else {}
        evaluate = {**evaluate, **self.evaluate, "tag": name}
        overrides = [f"sample={json.dumps(sample)}", f"evaluate={json.dumps(evaluate)}", "stages=null"]
        if experiment.train is not None:
            overrides.append("train.evaluate=null")
        return run_setup.typed(loader.loads(base.to_yaml(), overrides, f"point {words(keys)}"))


def words(keys: Point) -> str:
    """A point for people."""
    return ", ".join(f"{key} {_short(value)}" for key, value in keys.items()) or "defaults"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value).replace(" ", "")


def read_grid(path: Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """A grid file. Raises ConfigError with file:line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"grid file '{path}' cannot be read ({error}); give the path of a YAML file") from error
    return loader.load_section(SweepConfig, text, list(overrides), str(path))


def read_sweep(resolved: Resolved) -> Sweep | None:
    """The sweep that a run folder's experiment describes; None where it is an ordinary run."""
    stage = resolved.experiment.extra_stages.get(POINTS)
    if stage is None or stage.worker != STAGES[POINTS]:
        return None
    try:
        options = stage.options
        points = {str(each["name"]): dict(each["keys"]) for each in options["points"]}
        return Sweep(
            resolved.experiment.name,
            str(options["run"]),
            points,
            dict(options["sample"]),
            dict(options["evaluate"]),
            str(options["metric"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        name = resolved.experiment.name
        raise DataError(f"sweep '{name}' has no proper list of points ({error}); run `hpc-gen sweep` again") from error


def plan(grid: SweepConfig, workspace: Path, say: Callable[[str], None] | None = None) -> tuple[Sweep, Resolved]:
    """The sweep of a grid file as things stand, and the experiment of its run folder.

    `latest` becomes the newest checkpoint there is. Points of a search follow from the scores so far. Raises UserError
    or ConfigError for an unknown run, checkpoint or setting, before anything is written.
    """
    run = find_run(grid.run, workspace)
    base = run_setup.load_run(run)
    folder = RunFolder(runs_folder(workspace) / grid.name)
    if grid.name == run.name:
        raise UserError(f"the sweep '{grid.name}' has the name of its run; give it another")
    scored = scores_of(folder, grid.metric)
    points = grid.wanted()
    if grid.search is not None:
        known = {name: record for name, record in scored.items() if record.value is not None}
        points = each_once([*points, *search_points(grid, run, known, say)])
    named = {point_name(each, grid.sample): each for each in (_with_checkpoint(point, run) for point in points)}
    sweep = Sweep(grid.name, grid.run, named, grid.sample, grid.evaluate, grid.metric)
    for name in list(named)[:1] + list(named)[-1:]:
        found = sweep.resolved(base, name)  # a mistyped setting is refused here
        _check_metric(grid, found)
        reference_size.check(found.experiment, workspace)
    return sweep, _experiment(sweep, base, grid.tasks)


def _check_metric(grid: SweepConfig, resolved: Resolved) -> None:
    """Raise UserError when the points are to be compared by a number that nobody computes."""
    evaluate = resolved.experiment.evaluate
    if evaluate is None:
        raise UserError(
            f"run '{grid.run}' has no section 'evaluate', which says how points are scored; give the sweep "
            f"'{grid.name}' one"
        )
    needed = next((metric for metric, parts in PARTS.items() if grid.metric in parts), grid.metric)
    if needed not in evaluate.metrics:
        asked = "" if needed == grid.metric else f" (of the metric '{needed}')"
        raise UserError(
            f"the sweep '{grid.name}' goes by 'metric' = '{grid.metric}'{asked}, which is not among 'evaluate.metrics' "
            f"= [{', '.join(evaluate.metrics)}]; name it in both, or go by another"
        )


def _with_checkpoint(point: Point, run: RunFolder) -> Point:
    wanted = point.get("checkpoint", "latest")
    if wanted == "latest":
        return {**point, "checkpoint": checkpoints.newest(run).images_seen}
    if not isinstance(wanted, int):
        raise UserError(f"checkpoint {wanted!r} of a point is neither a number of images seen nor 'latest'")
    checkpoints.at(run, wanted)  # refused here, where it is not there
    return point


def _experiment(sweep: Sweep, base: Resolved, tasks: int) -> Resolved:
    """The experiment of the sweep's own run folder."""
    tree = yaml.safe_load(base.to_yaml())
    data = dict(tree["data"])
    if tree.get("encode") is not None and data.get("tokenizer") is None:
        named = tree["encode"].get("tokenizer")
        data["tokenizer"] = named if named and named.get("name") != "identity" else None
    options = [sweep.to_json(), {}, {}]
    afters = [[], [POINTS], [FEATURES]]
    stages = {
        name: {"worker": worker, "after": after, "options": given, "tasks": tasks}
        for (name, worker), after, given in zip(STAGES.items(), afters, options, strict=True)
    }
    document = {
        "name": sweep.name,
        "seed": tree["seed"],
        "method": tree["method"],
        "data": data,
        "report": {"title": f"Sweep {sweep.name} of {sweep.run}"},
        "extra_stages": stages,
        "stages": [*STAGES, "report"],
    }
    return run_setup.typed(loader.loads(yaml.safe_dump(document, sort_keys=False), [], f"sweep {sweep.name}"))


@dataclass(frozen=True)
class Outlook:
    """What the grid changes: points that are `missing` (not scored as wanted), `added` to those the folder knew before,
    `dropped` from them; `lines` say it."""

    missing: int
    added: int
    dropped: int
    lines: list[str]


def folder_of(sweep: Sweep, workspace: Path) -> RunFolder:
    """The run folder of a sweep, there or not."""
    return RunFolder(runs_folder(workspace) / sweep.name)


def outlook_of(sweep: Sweep, workspace: Path) -> Outlook:
    """Compare the wanted points with what the folder has."""
    folder = folder_of(sweep, workspace)
    before = read_sweep(run_setup.load_run(folder)) if folder.exists() else None
    known = before.points if before is not None else {}
    added = [name for name in sweep.points if name not in known]
    dropped = [name for name in known if name not in sweep.points]
    scored = {path.stem for path in (folder.path / "metrics").glob("p*.json")}
    changed = before is not None and before.evaluate != sweep.evaluate
    missing = [name for name in sweep.points if name not in scored or changed]
    told = [f"sweep {sweep.name} of {sweep.run}: {len(sweep.points)} points, {len(missing)} to be done"]
    told += [f"  to do      {words(sweep.points[name])}" for name in missing]
    told += [f"  cancelled  {words(known[name])}" for name in dropped]
    return Outlook(len(missing), len(added), len(dropped), told)


def apply(sweep: Sweep, resolved: Resolved, workspace: Path) -> RunFolder:
    """Make the run folder say what is wanted; tasks at work leave points that are not, within a unit."""
    folder = run_setup.prepare_run(resolved, workspace)
    commit.write_json(folder.path / WANTED_NAME, sorted(sweep.points))
    marks = folder.path / "cancelled"
    for mark in marks.glob("*") if marks.is_dir() else ():
        if mark.name.partition("-")[0] in sweep.points:
            commit.remove_tree(mark)  # wanted again
    return folder


def scores_of(folder: RunFolder, metric: str) -> dict[str, MetricRecord]:
    """The record of the metric of every point that has been scored, by the point's name."""
    found: dict[str, MetricRecord] = {}
    for path in sorted((folder.path / "metrics").glob("p*.json")):
        try:
            found[path.stem] = results.read(path).get(metric)
        except HpcGenError:
            continue  # a point of other metrics, or a file that the report will name
    return found


# ---------------------------------------------------------------- best-of search


def search_points(
    grid: SweepConfig, run: RunFolder, scored: dict[str, MetricRecord], say: Callable[[str], None] | None = None
) -> list[Point]:
    """Points of the search so far and of its next round: the first values, then halves of the steps beside the best.

    It ends after `rounds`, and before where the values beside the best one are not told from it by their errors.
    """
    search = grid.search
    assert search is not None
    points = search.first()
    for _ in range(search.rounds - 1):
        values = {float(point[search.key]): _score(grid, run, point, scored) for point in points}
        if any(record is None for record in values.values()):
            break  # this round is not scored yet
        known = {value: record for value, record in values.items() if record is not None}
        more = _next_values(known, grid.metric)
        if not more:
            if say is not None:
                say(f"search of {search.key}: the values beside the best are not told from it by their errors; it ends")
            break
        points = each_once([*points, *(search.point(value) for value in more)])
    return points


def _score(grid: SweepConfig, run: RunFolder, point: Point, scored: dict[str, MetricRecord]) -> MetricRecord | None:
    return scored.get(point_name(_with_checkpoint(point, run), grid.sample))


def _next_values(known: dict[float, MetricRecord], metric: str) -> list[float]:
    """Middles between the best value and those beside it; none where these are as good, by the errors of both."""
    order = sorted(known)
    best = best_of(known, metric)
    place = order.index(best)
    sides = [order[i] for i in (place - 1, place + 1) if 0 <= i < len(order)]
    if all(_alike(known[best], known[side]) for side in sides):
        return []
    return [rounded((best + side) / 2) for side in sides]


def best_of(known: dict[Any, MetricRecord], metric: str) -> Any:
    """The key of the best record; the first of equals."""
    sign = -1.0 if metric in HIGHER_IS_BETTER else 1.0
    return min(known, key=lambda key: sign * (known[key].value or 0.0))


def _alike(one: MetricRecord, other: MetricRecord) -> bool:
    """Whether two numbers differ by less than their errors together; without errors they never do."""
    if one.std is None or other.std is None or one.value is None or other.value is None:
        return False
    return abs(one.value - other.value) < (one.std**2 + other.std**2) ** 0.5
