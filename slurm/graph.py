"""From stages to jobs: one job per training, an array per stage of units, each after the one before it.

A stage of units is cut by its ledger: of its tasks only those are submitted whose share has a unit that is missing.
Task t of n does the units t, t + n, t + 2n, ...; every choice of n is sound, because a task looks at the ledger again
when it starts.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass

from hpc_gen.config.errors import ConfigError
from hpc_gen.config.experiment import Experiment, TrainConfig
from hpc_gen.config.loader import Resolved
from hpc_gen.runtime import journal
from hpc_gen.runtime.errors import ExitCode, HpcGenError, UserError
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import outline, runner
from hpc_gen.stages.units import Ledger, StageContext
from slurm.batch import JobSpec, python_words
from slurm.profiles import TRAIN, ClusterProfile
from slurm.requeue import progress_of
from slurm.task import StageTask

PLANNING = ("sample", "points")  # stages whose workers write the plans of their images: of a run, of a sweep


@dataclass(frozen=True)
class StagePlan:
    """The jobs of one stage: `specs` one job, or the jobs of a chain; `tasks` what each element of an array does.

    `correspond`: element i needs only element i of the stage before it.
    """

    stage: str
    specs: list[JobSpec]
    tasks: list[StageTask]
    words: str
    correspond: bool = False


def plan_stages(
    run: RunFolder,
    resolved: Resolved,
    profile: ClusterProfile,
    stages: list[str],
    say: Callable[[str], None] = lambda line: None,
    *,
    dry_run: bool = False,
) -> list[StagePlan]:
    """The jobs of the named stages in order; `say` is told what needs none. Raises UserError for what cannot be served.

    Stages that are done are left out, unless a stage before them is done again.
    """
    plans: list[StagePlan] = []
    for name in stages:
        if name == TRAIN and not plans and is_trained(run, resolved):
            say(f"train      done already, at {_end(resolved)} images")
        elif name == TRAIN:
            plans.append(_training(run, resolved, profile))
        else:
            plan = _units(run, resolved, profile, name, plans, dry_run)
            if plan is None:
                say(f"{name:<10} done already, all its units are there")
            else:
                plans.append(plan)
    return plans


def is_trained(run: RunFolder, resolved: Resolved) -> bool:
    """Whether training has reached its end and its last attempt ended well."""
    ends = [attempt.exit_code for attempt in journal.attempts(run) if attempt.stage == TRAIN] if run.exists() else []
    return ends[-1:] == [ExitCode.DONE] and progress_of(str(run.path), TRAIN) >= _end(resolved)


def _end(resolved: Resolved) -> int:
    assert resolved.experiment.train is not None  # the stage is configured
    return resolved.experiment.train.end_images


def _most_ranks(train: TrainConfig, profile: ClusterProfile) -> int:
    """`train.ranks`; where `train.width` leaves it open, the largest width that fills whole nodes of the profile.

    A job has one number of nodes, also when it is requeued; another width is another submission, by --nodes.
    """
    if train.width is None or train.ranks != 1:
        return train.ranks
    most = None if profile.max_nodes is None else profile.max_nodes * profile.tasks_per_node
    fitting = [
        ranks
        for ranks in train.width
        if ranks % min(profile.tasks_per_node, ranks) == 0 and (most is None or ranks <= most)
    ]
    return max(fitting, default=max(train.width))


def _training(run: RunFolder, resolved: Resolved, profile: ClusterProfile) -> StagePlan:
    train = resolved.experiment.train
    assert train is not None  # the stage is configured
    ranks = _most_ranks(train, profile)
    per_node = min(profile.tasks_per_node, ranks)
    if ranks % per_node:
        below = ranks // per_node * per_node
        raise UserError(
            f"train.ranks = {ranks} does not fill nodes of {per_node} processes; use {below} or "
            f"{below + per_node}, or --nodes"
        )
    nodes = ranks // per_node
    if profile.max_nodes is not None and nodes > profile.max_nodes:
        raise UserError(
            f"training wants {nodes} nodes of {per_node} processes and the profile allows {profile.max_nodes}; lower "
            "train.ranks or --nodes"
        )
    chain = [None] if profile.requeue else [profile.chain - 1 - place for place in range(profile.chain)]
    name = _job_name(run, TRAIN, unique=not profile.requeue)
    specs = [
        _spec(run, profile, TRAIN, name, nodes=nodes, tasks_per_node=per_node, threads=train.threads, chain_left=left)
        for left in chain
    ]
    words = f"{nodes} node{'s' if nodes > 1 else ''} x {per_node} processes"
    if not profile.requeue:
        words += f", a chain of {len(chain)} jobs: this site allows no requeue"
    return StagePlan(
        TRAIN, specs, [StageTask(str(run.path), TRAIN, gpus=_visible_gpus(profile, TRAIN, per_node))], words
    )


def _units(
    run: RunFolder, resolved: Resolved, profile: ClusterProfile, stage: str, before: list[StagePlan], dry_run: bool
) -> StagePlan | None:
    width = runner.width_of(resolved, stage)
    listed = None if before else _listed(run, resolved, stage, dry_run)
    if listed is not None and listed[2]:
        return None
    total = listed[0] if listed is not None else _known_total(resolved.experiment, stage)
    num_tasks = _number_of_tasks(total, profile.for_stage(stage).units_per_task, width.processes)
    num_tasks = min(num_tasks, profile.max_array)
    wanted = list(range(num_tasks))
    words = f"{total} units" if total is not None else "units not known yet"
    if listed is not None:
        missing = listed[1]
        wanted = sorted({place % num_tasks for place in missing}) or [0]
        words = (
            f"{len(missing)} of {total} units missing" if missing else f"all {total} units there: checks and finishes"
        )
    gpus = _visible_gpus(profile, stage, 1)
    tasks = [StageTask(str(run.path), stage, task, num_tasks, gpus) for task in wanted]
    array = len(tasks) if len(tasks) > 1 else None
    spec = _spec(run, profile, stage, _job_name(run, stage), threads=width.threads, array=array)
    parallel = spec.wants.parallel
    if array is not None:
        at_once = f", {parallel} at a time" if parallel is not None and parallel < array else ""
        words += f", an array of {array} tasks{at_once}"
    return StagePlan(stage, [spec], tasks, words, _corresponds(resolved.experiment, stage, before, num_tasks))


def _visible_gpus(profile: ClusterProfile, stage: str, tasks_per_node: int) -> int:
    """GPUs that each process must see: those of the job on its node, or its own one where they are bound to tasks."""
    if not profile.for_stage(stage).gpus:
        return 0
    return 1 if profile.gpus.style == "gpus-per-task" else tasks_per_node


def _corresponds(experiment: Experiment, stage: str, before: list[StagePlan], num_tasks: int) -> bool:
    """Whether a stage of the user's own needs, unit by unit, only the same unit of the stage before it."""
    own = experiment.extra_stages.get(stage)
    if own is None or not own.unit_by_unit or not before:
        return False
    last = before[-1]
    whole = [task.num_tasks for task in last.tasks] == [num_tasks] * len(last.tasks) and len(last.tasks) == num_tasks
    return whole and num_tasks > 1 and last.stage in own.after


def _listed(run: RunFolder, resolved: Resolved, stage: str, dry_run: bool) -> tuple[int, list[int], bool] | None:
    """(units, places of the missing ones, whether nothing is left) by the worker; None: it cannot say yet."""
    if dry_run and stage in PLANNING:
        return None  # its worker writes the plan of the samples
    context = StageContext(run, resolved, stage, run.workspace)
    try:
        worker = runner.make_worker(context)
        units, fingerprint = worker.units(), worker.fingerprint()
    except (HpcGenError, ConfigError, OSError):
        return (
            None  # its inputs are not there: the task itself says so, with the fix, should they still be missing then
        )
    ledger = Ledger(run.ledger(stage), run.path)
    missing = {unit.name for unit in ledger.missing(units, fingerprint)}
    places = [place for place, unit in enumerate(units) if unit.name in missing]
    return len(units), places, not places and ledger.is_finished(fingerprint)


def _known_total(experiment: Experiment, stage: str) -> int | None:
    return next((each.total for each in outline.stages_of(experiment) if each.name == stage), None)


def _number_of_tasks(total: int | None, units_per_task: int | None, asked: int) -> int:
    if total is None:
        return asked
    if units_per_task is not None:
        return max(1, -(-total // units_per_task))
    return max(1, min(asked, total))


def _spec(
    run: RunFolder,
    profile: ClusterProfile,
    stage: str,
    name: str,
    *,
    nodes: int = 1,
    tasks_per_node: int = 1,
    threads: int = 1,
    array: int | None = None,
    chain_left: int | None = None,
) -> JobSpec:
    return JobSpec(
        name=name,
        run=run.path,
        workspace=run.workspace,
        stage=stage,
        profile=profile,
        python=python_words(profile, run.path, run.workspace, sys.executable),
        nodes=nodes,
        tasks_per_node=tasks_per_node,
        threads=threads,
        array=array,
        chain_left=chain_left,
    )


def _job_name(run: RunFolder, stage: str, unique: bool = False) -> str:
    """RUN.STAGE; `unique`: also not that of a run of the same name elsewhere, for Slurm runs a chain by its name."""
    mark = f".{hashlib.sha256(str(run.path).encode()).hexdigest()[:8]}" if unique else ""
    return f"{run.name}.{stage}{mark}"
