"""`hpc-gen submit --dry-run`: the exact scripts, and what Slurm would say to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from hpc_gen.runtime.run_folder import RunFolder
from slurm import grace, submission
from slurm.batch import JobSpec
from slurm.commands import Commands
from slurm.executor import Executor
from slurm.graph import StagePlan
from slurm.profiles import TRAIN, ClusterProfile


def show(
    run: RunFolder, plans: Sequence[StagePlan], profile: ClusterProfile, commands: Commands, say: Callable[[str], None]
) -> None:
    """Print each script; on a machine with Slurm, raise UserError for what would be refused. Changes nothing."""
    for text in scripts(plans, commands):
        say(text)
    for plan in plans:
        say(f"would submit  {plan.stage}: {plan.words}")
        if plan.stage == TRAIN and run.exists():
            say(f"grace         {grace.sentence(run, profile.grace_s)}")
    if can_ask(commands, say):
        submission.refuse_second(run, commands)
        ask(plans, profile, commands, say)


def can_ask(commands: Commands, say: Callable[[str], None]) -> bool:
    """Whether Slurm is here; says so where it is not."""
    if not commands.available():
        say("not asked     Slurm is not on this machine, so nobody has checked whether it would take these jobs")
    return commands.available()


def ask(plans: Sequence[StagePlan], profile: ClusterProfile, commands: Commands, say: Callable[[str], None]) -> None:
    """Say what Slurm would say to these jobs. Raises UserError for one that it would refuse."""
    for line in submission.refuse_impossible(plans, profile, commands):
        say(f"Slurm says    {line}")


def text_of(spec: JobSpec, commands: Commands) -> str:
    """The script of a job as sbatch would be given it."""
    executor = Executor(spec, commands)
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def scripts(plans: Sequence[StagePlan], commands: Commands) -> list[str]:
    """The scripts in order; JOBn stands for the number that Slurm will give to the n-th job."""
    texts, number, before = [], 0, None
    for plan in plans:
        for place, spec in enumerate(plan.specs):
            number += 1
            kind = "aftercorr" if plan.correspond else "afterok"
            dependency = f"{kind}:JOB{before}" if before is not None and place == 0 else None
            if place > 0:
                dependency = "singleton"
            texts.append(text_of(replace(spec, dependency=dependency), commands))
        before = number
    return texts
