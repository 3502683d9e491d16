"""`hpc-gen submit --dry-run`: the exact scripts, and what Slurm would say to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from hpc_gen.runtime.run_folder import RunFolder
from slurm import grace, submission
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
    if not commands.available():
        say("not asked     Slurm is not on this machine, so nobody has checked whether it would take these jobs")
        return
    submission.refuse_second(run, commands)
    for line in submission.refuse_impossible(plans, profile, commands):
        say(f"Slurm says    {line}")


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
            executor = Executor(replace(spec, dependency=dependency), commands)
            texts.append(executor._make_submission_file_text(executor._submitit_command_str, ""))
        before = number
    return texts
