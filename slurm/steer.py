"""Asking the jobs of a run to stop, to save and come back, or to go away."""

from __future__ import annotations

from collections.abc import Callable

from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import UserError
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import control
from slurm import records
from slurm.commands import Commands, LiveJob
from slurm.submission import live_jobs

Say = Callable[[str], None]


def has_jobs(run: RunFolder) -> bool:
    """Whether the run was ever submitted."""
    return records.path_of(run).is_file()


def jobs_here(run: RunFolder, commands: Commands) -> list[LiveJob]:
    """Live jobs of a run, where there is a Slurm to ask; [] elsewhere."""
    return live_jobs(run, commands) if has_jobs(run) and commands.available() else []


def cancel(run: RunFolder, commands: Commands, say: Say, *, now: bool = False, dry_run: bool = False) -> None:
    """End a run for good: pending jobs are cancelled, running ones save and end with 87, or are cancelled at once.

    A process of the local runner finds the same STOP file. Raises UserError when nothing is queued or at work.
    """
    live = jobs_here(run, commands)
    running = [job for job in live if job.state != "PENDING"]
    pending = [job for job in live if job.state == "PENDING"]
    if not live and control.holder(run) is None:
        raise UserError(
            f"nothing of run '{run.name}' is queued or at work, so there is nothing to cancel; see `hpc-gen status "
            f"{run.name}`"
        )
    would = "would cancel" if dry_run else "cancelling"
    for job in [*pending, *(running if now else [])]:
        say(f"{would} {job.name} ({job.job_id}, {job.state.lower()})")
    if not now:
        verb = "would write" if dry_run else "writing"
        say(f"{verb} {run.stop_file}: what runs saves its state and ends; `hpc-gen resume {run.name}` would go on")
    if dry_run:
        return
    if not now:
        commit.write_text(run.stop_file, "hpc-gen cancel\n")
    commands.cancel([job.job_id for job in [*pending, *(running if now else [])]])


def preempt(run: RunFolder, commands: Commands, say: Say, *, dry_run: bool = False) -> bool:
    """Send SIGTERM to the tasks of the run's running jobs, as a preemption does; False: it has none.

    They save and end, and their batch scripts requeue them. Where the controller does not answer, an attempt at work
    finds a PREEMPT file instead; raises UserError where none is.
    """
    try:
        running = [job for job in jobs_here(run, commands) if job.state == "RUNNING"]
    except UserError as error:
        if control.holder(run) is None:
            raise
        say(f"Slurm cannot be asked ({error})")
        would = "would write" if dry_run else "writing"
        say(f"{would} {run.preempt_file}: the attempt at work looks at it once a second")
        if not dry_run:
            commit.write_text(run.preempt_file, "hpc-gen preempt\n")
        return True
    for job in running:
        would = "would send" if dry_run else "sending"
        say(f"{would} SIGTERM to the tasks of {job.name} ({job.job_id}, on {job.nodes}); it saves and requeues itself")
    if running and not dry_run:
        commands.signal([job.job_id for job in running], "TERM")
    return bool(running)
