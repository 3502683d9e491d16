"""`hpc-gen sweep`: a grid of checkpoints and sampler settings, as a desired state."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hpc_gen.cli_parts import DryRun, Workspace, end, example, say, workspace_of

Grid = Annotated[Path, typer.Argument(metavar="GRID", help="Grid file (YAML).")]
GridKeys = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY.PATH=VALUE", help="Keys that replace those of the file.", show_default=False),
]
Cluster = Annotated[
    str | None,
    typer.Option("--cluster", "-c", metavar="NAME", help="Submit to Slurm by this profile; without it: here and now."),
]
Setting = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Key of the profile to replace.")]

CANCEL_S = 120.0  # until cancelled jobs are out of the queue


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(
        epilog=example(
            "hpc-gen sweep job_configs/demo/sweeps/mnist16_guidance.yaml --dry-run",
            "hpc-gen sweep job_configs/demo/sweeps/mnist16_guidance.yaml --cluster lab",
            "hpc-gen sweep job_configs/demo/sweeps/mnist16_guidance.yaml 'axes.guidance=[1, 2]'",
        )
    )(sweep)


def sweep(
    grid: Grid,
    overrides: GridKeys = None,
    cluster: Cluster = None,
    workspace: Workspace = None,
    settings: Setting = None,
    table: Annotated[bool, typer.Option("--table", help="Only print what has been found so far.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Sample and score the points of a grid of settings.

    The file is the desired state: a line more is sampled and scored, a line less is cancelled (what was found of it
    stays on disk, and out of the table). A search goes on round by round. The sweep is a run of its own, runs/NAME: the
    commands status, preempt, resume and logs know it, and its report shows the metric against each setting and cost.
    """
    from eval_jobs import sweep_plan

    root = workspace_of(workspace)
    wanted = sweep_plan.read_grid(grid, overrides or [])
    if table:
        _tell(wanted, root)
    elif cluster is not None:
        _submit(wanted, root, cluster, settings or [], dry_run)
    else:
        _run(wanted, root, dry_run)


def _run(wanted: Any, root: Path, dry_run: bool) -> None:
    """Here and now, round by round of a search."""
    from eval_jobs import sweep_plan
    from hpc_gen.stages import runner

    while True:
        found, resolved = sweep_plan.plan(wanted, root, say)
        outlook = _say_plan(found, root)
        if dry_run:
            return
        folder = sweep_plan.apply(found, resolved, root)
        if outlook.missing or not folder.report.exists():
            code = runner.run_stages(folder, None, say)
            if code:
                end(code)
        else:
            code = runner.run_stages(folder, ["report"], say)
        again, _ = sweep_plan.plan(wanted, root)
        if again.points == found.points:
            break
    _tell(wanted, root)
    say(f"report: {folder.report}")
    end(code)


def _submit(wanted: Any, root: Path, cluster: str, settings: list[str], dry_run: bool) -> None:
    """As arrays on Slurm. Jobs of a state that is no longer wanted are cancelled; what they committed stays."""
    import os

    from eval_jobs import sweep_plan
    from hpc_gen import cli_slurm
    from hpc_gen.stages import run_setup
    from slurm import commands, profiles, submission

    found, resolved = sweep_plan.plan(wanted, root, say)
    outlook = _say_plan(found, root)
    profile = profiles.load(cluster, root, settings)
    folder = sweep_plan.folder_of(found, root)
    if dry_run:
        accepted = run_setup.accepted(folder, resolved, root)
        cli_slurm.submit_folder(folder, accepted, cluster, profile, None, dry_run=True)
        return
    os.umask(int(profile.umask, 8))
    slurm = commands.Commands()
    live = submission.live_jobs(folder, slurm) if folder.exists() else []
    folder = sweep_plan.apply(found, resolved, root)
    if live and not outlook.added:
        say(f"{len(live)} jobs are at it already; they leave the points that are not wanted any more")
        return
    if live:
        say(f"{len(live)} jobs do not know the {outlook.added} new points: cancelled, and submitted with them")
        slurm.cancel(sorted({job.base_id for job in live}))
        _await_end(folder, slurm)
    if not outlook.missing and not outlook.added and folder.report.exists():
        say("nothing is missing")
        _tell(wanted, root)
        return
    cli_slurm.submit_folder(folder, run_setup.load_run(folder), cluster, profile, None, dry_run=False)
    if wanted.search is not None:
        say("a search goes on round by round: run the same command again when the jobs are over")


def _await_end(folder: Any, slurm: Any) -> None:
    """Wait until cancelled jobs have left the queue. Raises UserError when they do not."""
    from hpc_gen.runtime import clock
    from hpc_gen.runtime.errors import UserError
    from slurm import submission

    begun = clock.monotonic()
    while submission.live_jobs(folder, slurm):
        if clock.monotonic() - begun > CANCEL_S:
            raise UserError(f"the cancelled jobs of '{folder.name}' are still there; run the same command again later")
        clock.sleep(1.0)


def _say_plan(found: Any, root: Path) -> Any:
    from eval_jobs import sweep_plan

    outlook = sweep_plan.outlook_of(found, root)
    for line in outlook.lines:
        say(line)
    return outlook


def _tell(wanted: Any, root: Path) -> None:
    from eval_jobs import sweep_plan, sweep_table

    found, _ = sweep_plan.plan(wanted, root)
    table = sweep_table.table_of(sweep_plan.folder_of(found, root), found)
    for line in sweep_table.lines(table):
        say(line)
    for problem in table.problems:
        say(f"not comparable: {problem}")
