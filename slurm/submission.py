"""`hpc-gen submit`: the stages of a run as jobs, checked before they reach the queue, recorded in the run folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from submitit.core.utils import FailedJobError, FailedSubmissionError

from hpc_gen.runtime import clock, commit
from hpc_gen.runtime.errors import UserError, nearest
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import control
from slurm import grace, profiles, records
from slurm.batch import JobSpec, script
from slurm.commands import Commands, LiveJob, Partition
from slurm.executor import Executor
from slurm.graph import StagePlan
from slurm.records import JobRecord, Submission

Say = Callable[[str], None]
NEEDED_CODE = ("slurm/task.py", "slurm/hold_signals.py", "slurm/requeue.py")  # of the copy in the run folder


def live_jobs(run: RunFolder, commands: Commands) -> list[LiveJob]:
    """Jobs of this run that Slurm still has to do with, recorded or not (records.is_of)."""
    return [job for job in commands.live() if records.is_of(job, run)]


def submit(
    run: RunFolder,
    plans: Sequence[StagePlan],
    cluster: str,
    profile: profiles.ClusterProfile,
    commands: Commands,
    say: Say,
) -> Submission:
    """Submit the jobs of `plans`, each stage after the one before it.

    Raises UserError, before anything is queued, when the run has live jobs or a local process, when its copy of the
    code is too old, or when the cluster cannot serve a job; and when sbatch refuses one: what was queued before it is
    then cancelled.
    """
    with records.lock(run):
        refuse_second(run, commands)
        refuse_old_code(run)
        refuse_impossible(plans, profile, commands)
        prepare_folder(run, profile)
        if any(plan.stage == profiles.TRAIN for plan in plans):
            say(f"grace      {grace.sentence(run, profile.grace_s)}")
        earlier = records.read(run)
        submission = Submission(len(earlier) + 1, clock.now(), cluster, profiles.to_json(profile), [])
        try:
            for plan in plans:
                submission = _submit_stage(run, plan, submission, earlier, commands, say)
        except (FailedJobError, FailedSubmissionError, OSError) as error:
            commands.cancel([job.job_id for job in submission.jobs])
            raise UserError(f"sbatch refused a job of run '{run.name}': {' '.join(str(error).split())}") from error
    return submission


def _submit_stage(
    run: RunFolder, plan: StagePlan, so_far: Submission, earlier: list[Submission], commands: Commands, say: Say
) -> Submission:
    before = so_far.jobs[-1] if so_far.jobs else None
    for place, spec in enumerate(plan.specs):
        kinds = []
        if before is not None:
            kind = "aftercorr" if plan.correspond and before.tasks else "afterok"
            kinds.append(f"{kind}:{before.job_id}")
        if spec.chain_left is not None and place > 0:
            kinds = ["singleton"]  # the first of the chain has waited for the stage before
        spec = replace(spec, dependency=",".join(kinds) or None)
        handles = Executor(spec, commands).submit_tasks(plan.tasks)
        job_id = str(handles[0].job_id).partition("_")[0]
        job = record_of(plan, spec, job_id)
        so_far = replace(so_far, jobs=[*so_far.jobs, job])
        records.write(run, [*earlier, so_far])
        after = f", after {before.job_id}" if before is not None and place == 0 else ""
        say(f"submitted  {plan.stage}: job {job_id}{after}, {plan.words}")
        if spec.chain_left is None:
            before = job
    return so_far


def record_of(plan: StagePlan, spec: JobSpec, job_id: str) -> JobRecord:
    """What is remembered of a submitted job."""
    tasks = [[task.task, task.num_tasks] for task in plan.tasks] if spec.array is not None else []
    return JobRecord(job_id, plan.stage, spec.name, tasks, spec.dependency)


def refuse_second(run: RunFolder, commands: Commands, queue: Sequence[LiveJob] | None = None) -> None:
    """Raise UserError when the run is queued or running already, on Slurm or on this machine.

    `queue`: all live jobs of the user, where they were asked for already.
    """
    live = live_jobs(run, commands) if queue is None else [job for job in queue if records.is_of(job, run)]
    if live:
        ids = {job: job.base_id if job.comment == str(run.path) else job.job_id for job in live}
        told = ", ".join(sorted({f"{ids[job]} ({job.name.rpartition('.')[2]})" for job in live})[:4])
        raise UserError(
            f"run '{run.name}' is submitted already: job {told}; see `hpc-gen status {run.name}`, or `hpc-gen cancel "
            f"{run.name}` first"
        )
    at_work = control.holder(run)
    if at_work is not None and at_work.here:
        raise UserError(
            f"run '{run.name}' is at work on this machine (process {at_work.pid}); wait for it, or `hpc-gen preempt "
            f"{run.name}` first"
        )


def refuse_old_code(run: RunFolder) -> None:
    """Raise UserError where the run's copy of the code cannot be a job's."""
    missing = [name for name in NEEDED_CODE if not (run.code / name).is_file()]
    if missing:
        raise UserError(
            f"run '{run.name}' was begun by a version without Slurm: {run.code} lacks {missing[0]}; go on with "
            f"`hpc-gen fork {run.name} --at latest --name NEW`"
        )


def prepare_folder(run: RunFolder, profile: profiles.ClusterProfile) -> None:
    """Folders, group and mode of a run that jobs will write to; a STOP or PREEMPT of before has had its effect."""
    for path in (
        run.logs,
        records.folder(run) / "ends",
        records.folder(run) / "ill",
        records.folder(run) / "submitted",
    ):
        commit.make_folder(path)
    for path in (run.stop_file, run.preempt_file):
        if path.exists():
            commit.ops.unlink(path)
    if profile.group is not None:
        give_to_group(run.path, profile.group)
        tables = run.workspace / "tables"
        if tables.is_dir():
            give_to_group(tables, profile.group)


def give_to_group(folder: Path, group: str) -> None:
    """Give a tree to a group; what is made in its folders later belongs to that group, too."""
    try:
        for here, _, files in os.walk(folder):
            shutil.chown(here, group=group)
            os.chmod(here, os.stat(here).st_mode | 0o2000)
            for name in files:
                shutil.chown(os.path.join(here, name), group=group)
    except (LookupError, PermissionError) as error:
        raise UserError(
            f"{folder} cannot be given to group '{group}' ({error}); name one of yours with --set group=NAME"
        ) from error


# ---------------------------------------------------------------- what the cluster cannot serve


def refuse_impossible(plans: Sequence[StagePlan], profile: profiles.ClusterProfile, commands: Commands) -> list[str]:
    """Raise UserError for a request that would wait for ever or be refused; returns what sbatch's test said.

    Slurm accepts a time limit above the partition's, and the job then waits for ever: sinfo tells it before.
    """
    if profile.runtime.kind == "apptainer":
        _refuse_missing_image(profile)
    partitions = {each.name: each for each in commands.partitions()}
    told = []
    for plan in plans:
        spec = plan.specs[0]
        wanted = spec.wants.partition
        partition = partitions.get(wanted) if wanted else next((p for p in partitions.values() if p.default), None)
        if wanted is not None and partition is None:
            raise UserError(
                f"the cluster has no partition '{wanted}'{nearest(wanted, partitions)}; it has {', '.join(partitions)}"
                "; choose with --set partition=NAME"
            )
        if partition is not None:
            _refuse_by(plan.stage, spec, partition)
        told.append(f"{plan.stage}: {_test(spec, commands)}")
    return told


def _refuse_missing_image(profile: profiles.ClusterProfile) -> None:
    image = str(profile.runtime.image)
    if "://" not in image and "${" not in image and not Path(image).exists():
        raise UserError(
            f"the image {image} of the profile is not there; build it with `hpc-gen containers build`, or choose "
            "another with --set runtime.image=PATH"
        )


def _refuse_by(stage: str, spec: JobSpec, partition: Partition) -> None:
    """The sentences that Slurm would not say, or not before the job is queued."""
    wants, name = spec.wants, partition.name
    start = f"{stage} cannot run in partition '{name}':"
    if not partition.up:
        raise UserError(f"{start} it is down; choose another with --set partition=NAME, or wait")
    if partition.limit_min is not None and (wants.time_limit_min or 0) > partition.limit_min:
        raise UserError(
            f"{start} a job may last {partition.limit_min} minutes there and the profile asks for "
            f"{wants.time_limit_min}; --set time_limit_min={partition.limit_min}"
        )
    if spec.nodes > partition.nodes:
        raise UserError(f"{start} it has {partition.nodes} nodes and {spec.nodes} are wanted; lower --nodes")
    cpus = spec.tasks_per_node * (wants.cpus_per_task or 1)
    if cpus > partition.cpus:
        raise UserError(
            f"{start} {spec.tasks_per_node} processes of {wants.cpus_per_task} CPUs do not fit into its nodes of "
            f"{partition.cpus} CPUs; lower tasks_per_node or cpus_per_task with --set"
        )
    memory = spec.tasks_per_node * (wants.mem_per_task_gb or 0) * 1024
    if memory > partition.mem_mb > 1:
        raise UserError(
            f"{start} {spec.tasks_per_node} processes of {wants.mem_per_task_gb:g} GB do not fit into its nodes of "
            f"{partition.mem_mb / 1024:.0f} GB; lower mem_per_task_gb with --set"
        )
    if wants.gpus and spec.profile.gpus.style != "none" and spec.tasks_per_node > partition.gpus:
        raise UserError(
            f"{start} {spec.tasks_per_node} GPUs per node are wanted and its nodes have {partition.gpus}; lower "
            "tasks_per_node with --set, or choose another partition"
        )
    kind = spec.profile.gpus.type
    if wants.gpus and kind is not None and partition.gpu_types and kind not in partition.gpu_types:
        raise UserError(
            f"{start} it has no GPUs of type '{kind}'{nearest(kind, partition.gpu_types)}, but "
            f"{', '.join(partition.gpu_types)}; --set gpus.type=NAME"
        )


def _test(spec: JobSpec, commands: Commands) -> str:
    """What `sbatch --test-only` says; raises UserError when Slurm would refuse."""
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as stream:
        # the run folder may not exist yet, and a job that waits for another cannot be tested
        plain = replace(spec, dependency=None)
        stream.write(script(plain, "true").replace(f"#SBATCH --chdir={spec.run}\n", ""))
        stream.flush()
        fine, said = commands.test_only(Path(stream.name))
    if not fine:
        raise UserError(f"Slurm would refuse the job of {spec.stage}: {said}")
    return said
