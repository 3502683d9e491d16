"""Several runs in one array: `hpc-gen submit CONFIG --array seed=1,2,3`, for seeds and ablations.

Each run is whole: its own folder, name, journal, records and jobs of stages of units. Only the trainings are one job
of Slurm, an array whose element K, on as many nodes as a training wants, is the training of run K. An element is
preempted, requeued and cancelled alone, by its number ARRAY_K. A table that several of the runs train on is encoded
once, by the first of them.

The array has a folder WORKSPACE/arrays/NAME/NNNN: scripts and tasks of submitit, and a link K to the run of element K,
by which Slurm writes the log of an element into its run, and by which it is known whose a live job is (records.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from submitit.core.utils import FailedJobError, FailedSubmissionError

from hpc_gen.config.loader import Resolved
from hpc_gen.runtime import clock, commit
from hpc_gen.runtime.errors import UserError
from hpc_gen.runtime.run_folder import RunFolder, check_name
from slurm import grace, preview, profiles, records, submission
from slurm.batch import RUN_OF_ELEMENT, JobSpec, python_words
from slurm.commands import Commands
from slurm.executor import Executor
from slurm.graph import StagePlan, plan_stages
from slurm.profiles import TRAIN, ClusterProfile
from slurm.records import JobRecord, Submission

Say = Callable[[str], None]
FOLDER = "arrays"  # of the workspace
ENCODE = "encode"


@dataclass(frozen=True)
class Member:
    """One run of the array and the jobs of its stages. `encoded_by`: place of the member that makes its table."""

    run: RunFolder
    plans: list[StagePlan]
    encoded_by: int | None = None


@dataclass(frozen=True)
class Step:
    """One call of sbatch (or a chain of them): `runs` it belongs to, those of the elements where it is the array of
    trainings; `after`: places of the steps before it, with the element that is waited for, None for all."""

    plan: StagePlan
    runs: list[RunFolder]
    after: list[tuple[int, int | None]]

    @property
    def is_array_of_runs(self) -> bool:
        """Whether each element is a run of its own."""
        return bool(self.plan.specs[0].runs)


def plan_members(
    runs: Sequence[tuple[RunFolder, Resolved]],
    profile: ClusterProfile,
    stages: Sequence[str],
    say: Say,
    *,
    dry_run: bool = False,
) -> list[Member]:
    """The jobs of each run, as those of a run alone. A table that a run before it makes is not made again."""
    members: list[Member] = []
    made_by: dict[object, int] = {}
    for place, (run, resolved) in enumerate(runs):
        chosen, maker = list(stages), None
        if ENCODE in chosen:
            data = resolved.experiment.data
            same = (resolved.identity_of(ENCODE, "data"), data.table, data.validation_table)
            maker = made_by.setdefault(same, place)
            if maker != place:
                chosen.remove(ENCODE)
                say(f"{run.name}: its table is that of {runs[maker][0].name}")

        def told(line: str, name: str = run.name) -> None:
            say(f"{name}: {line}")

        plans = plan_stages(run, resolved, profile, chosen, told, dry_run=dry_run)
        members.append(Member(run, plans, None if maker == place else maker))
    return members


def plan_steps(name: str, folder: Path, members: Sequence[Member], profile: ClusterProfile) -> list[Step]:
    """All calls of sbatch in order: what is before the trainings, the array of trainings, what is after them.

    The array waits for all that its elements need; what follows a training waits for that element alone. Raises
    UserError where the trainings do not fit into one array.
    """
    steps: list[Step] = []
    last: list[tuple[int, int | None] | None] = [None] * len(members)
    tables: dict[int, tuple[int, int | None]] = {}

    def add(place: int, plan: StagePlan) -> None:
        before = last[place]
        steps.append(Step(plan, [members[place].run], [] if before is None else [before]))
        last[place] = (len(steps) - 1, None)
        if plan.stage == ENCODE:
            tables[place] = (len(steps) - 1, None)

    rest: list[list[StagePlan]] = []
    for place, member in enumerate(members):
        if member.encoded_by is not None:
            last[place] = tables.get(member.encoded_by)
        names = [plan.stage for plan in member.plans]
        cut = names.index(TRAIN) if TRAIN in names else len(names)
        for plan in member.plans[:cut]:
            add(place, plan)
        rest.append(member.plans[cut:])
    elements = [place for place, plans in enumerate(rest) if plans]
    if elements:
        trainings = [rest[place][0] for place in elements]
        plan = _one_array(name, folder, [members[place].run for place in elements], trainings, profile)
        waits = list(dict.fromkeys(each for each in (last[place] for place in elements) if each is not None))
        steps.append(Step(plan, [members[place].run for place in elements], waits))
        array = len(steps) - 1
        for element, place in enumerate(elements):
            last[place] = (array, element)
            for plan in rest[place][1:]:
                add(place, plan)
    return steps


def _one_array(
    name: str, folder: Path, runs: list[RunFolder], plans: list[StagePlan], profile: ClusterProfile
) -> StagePlan:
    if len(runs) > profile.max_array:
        raise UserError(
            f"{len(runs)} runs do not fit into one array of this cluster (max_array = {profile.max_array}); submit "
            "fewer at a time"
        )
    shapes = [(plan.specs[0].nodes, plan.specs[0].tasks_per_node, plan.specs[0].threads) for plan in plans]
    other = next((place for place, shape in enumerate(shapes) if shape != shapes[0]), None)
    if other is not None:
        raise UserError(
            f"the trainings of '{runs[0].name}' ({_shape(shapes[0])}) and '{runs[other].name}' "
            f"({_shape(shapes[other])}) are not of one size, as elements of an array must be; submit them separately"
        )
    paths = tuple(run.path for run in runs)
    python = python_words(profile, RUN_OF_ELEMENT, runs[0].workspace, sys.executable)
    specs = [
        replace(spec, name=f"{name}.{TRAIN}", run=folder, runs=paths, array=len(runs), python=python)
        for spec in plans[0].specs
    ]
    parallel = specs[0].wants.parallel
    at_once = f", {parallel} at a time" if parallel is not None and parallel < len(runs) else ""
    words = f"an array of {len(runs)} runs{at_once}, each {plans[0].words}"
    return StagePlan(TRAIN, specs, [plan.tasks[0] for plan in plans], words)


def _shape(shape: tuple[int, int, int]) -> str:
    nodes, tasks, threads = shape
    return f"{nodes} nodes x {tasks} processes of {threads} threads"


# ---------------------------------------------------------------- submitting them


def dependency(step: Step, place: int, ids: Sequence[str], before_in_chain: str | None) -> str | None:
    """Slurm's text for job `place` of a step; `ids`: numbers of the last jobs of all steps before it.

    An element of a chain waits for its own element of the job before it, not for those of other runs.
    """
    if place > 0:
        return f"aftercorr:{before_in_chain}" if step.is_array_of_runs else "singleton"
    waited = [ids[number] if element is None else f"{ids[number]}_{element}" for number, element in step.after]
    kind = "aftercorr" if step.plan.correspond else "afterok"
    return f"{kind}:{':'.join(waited)}" if waited else None


def new_folder(workspace: Path, name: str) -> Path:
    """The folder that the next array of this name will have; nothing is made."""
    parent = workspace / FOLDER / check_name(name, "experiment")
    taken = [int(path.name) for path in parent.iterdir() if path.name.isdigit()] if parent.is_dir() else []
    return parent / f"{max(taken, default=0) + 1:04d}"


def submit(
    name: str,
    steps: Sequence[Step],
    members: Sequence[Member],
    cluster: str,
    profile: ClusterProfile,
    commands: Commands,
    say: Say,
) -> None:
    """Submit all steps and record each in its runs. Raises UserError as `submission.submit` does, for any of the runs,
    before anything is queued; where sbatch refuses a job, what was queued before it is cancelled."""
    runs = [member.run for member in members]
    with ExitStack() as locks:
        for run in sorted(runs, key=lambda each: each.name):
            locks.enter_context(records.lock(run))
        refuse_second(runs, commands)
        for run in runs:
            submission.refuse_old_code(run)
        submission.refuse_impossible([step.plan for step in _kinds(steps)], profile, commands)
        for run in runs:
            submission.prepare_folder(run, profile)
        for step in steps:
            if step.is_array_of_runs:
                _make_folder(step, profile)
                say(f"grace      {grace.sentence(step.runs[0], profile.grace_s)}")
        _submit_steps(name, steps, runs, cluster, profile, commands, say)


def refuse_second(runs: Sequence[RunFolder], commands: Commands) -> None:
    """`submission.refuse_second` for each run that exists, with one look at the queue."""
    queue = commands.live()
    for run in runs:
        if run.exists():
            submission.refuse_second(run, commands, queue)


def _kinds(steps: Sequence[Step]) -> list[Step]:
    """One step of each kind: jobs that differ only in their run are asked about once."""
    found: dict[object, Step] = {}
    for step in steps:
        spec = step.plan.specs[0]
        found.setdefault((step.plan.stage, spec.array, spec.nodes, spec.tasks_per_node, spec.threads), step)
    return list(found.values())


def _make_folder(step: Step, profile: ClusterProfile) -> None:
    """The folder of the array, with the links to its runs."""
    folder = step.plan.specs[0].run
    commit.make_folder(folder.parent)
    try:
        folder.mkdir()
    except FileExistsError:
        raise UserError(f"another submission has just made {folder}; submit again") from None
    for element, run in enumerate(step.runs):
        (folder / str(element)).symlink_to(run.path)
    commit.make_folder(folder / "slurm" / "submitted")
    if profile.group is not None:
        submission.give_to_group(folder, profile.group)


def _submit_steps(
    name: str,
    steps: Sequence[Step],
    runs: Sequence[RunFolder],
    cluster: str,
    profile: ClusterProfile,
    commands: Commands,
    say: Say,
) -> None:
    earlier = {run: records.read(run) for run in runs}
    now, shown = clock.now(), profiles.to_json(profile)
    written = {run: Submission(len(earlier[run]) + 1, now, cluster, shown, []) for run in runs}
    ids: list[str] = []
    queued: list[str] = []
    try:
        for step in steps:
            job_id = ""
            for place, planned in enumerate(step.plan.specs):
                spec = replace(planned, dependency=dependency(step, place, ids, job_id))
                handles = Executor(spec, commands).submit_tasks(step.plan.tasks)
                job_id = str(handles[0].job_id).partition("_")[0]
                queued.append(job_id)
                for element, run in enumerate(step.runs):
                    job = _record(step, spec, job_id, element)
                    written[run] = replace(written[run], jobs=[*written[run].jobs, job])
                    records.write(run, [*earlier[run], written[run]])
                whose = name if step.is_array_of_runs else step.runs[0].name
                after = f", {spec.dependency}" if spec.dependency else ""
                say(f"submitted  {whose} {step.plan.stage}: job {job_id}{after}, {step.plan.words}")
            ids.append(job_id)
    except (FailedJobError, FailedSubmissionError, OSError) as error:
        commands.cancel(queued)
        raise UserError(f"sbatch refused a job of the array '{name}': {' '.join(str(error).split())}") from error


def _record(step: Step, spec: JobSpec, job_id: str, element: int) -> JobRecord:
    if step.is_array_of_runs:
        return JobRecord(f"{job_id}_{element}", step.plan.stage, spec.name, [], spec.dependency)
    return submission.record_of(step.plan, spec, job_id)


def show(
    steps: Sequence[Step], members: Sequence[Member], profile: ClusterProfile, commands: Commands, say: Say
) -> None:
    """Print each script; on a machine with Slurm, raise UserError for what would be refused. Changes nothing.

    JOBn stands for the number that Slurm will give to the n-th job.
    """
    ids: list[str] = []
    number = 0
    for step in steps:
        job_id = ""
        for place, planned in enumerate(step.plan.specs):
            number += 1
            spec = replace(planned, dependency=dependency(step, place, ids, job_id))
            job_id = f"JOB{number}"
            say(preview.text_of(spec, commands))
        ids.append(job_id)
    for step in steps:
        whose = ", ".join(run.name for run in step.runs)
        say(f"would submit  {step.plan.stage} of {whose}: {step.plan.words}")
    if preview.can_ask(commands, say):
        refuse_second([member.run for member in members], commands)
        preview.ask([step.plan for step in _kinds(steps)], profile, commands, say)
