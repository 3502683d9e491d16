"""Commands that speak with Slurm: submit a run, read its logs, cancel it; and what others ask of Slurm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from hpc_gen.cli_parts import (
    Config,
    DryRun,
    Overrides,
    Run,
    Stages,
    Workspace,
    example,
    run_of,
    say,
    stage_names,
    workspace_of,
)

_CLUSTER = typer.Option("--cluster", "-c", metavar="NAME", help="Cluster profile: a name, or a YAML file.")
Cluster = Annotated[str, _CLUSTER]
ClusterIfAny = Annotated[str | None, _CLUSTER]
Setting = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Key of the profile to replace, as in account=mine."),
]
Axes = Annotated[
    list[str] | None,
    typer.Option(
        "--array", metavar="KEY.PATH=V,V", help="A run for each value, all in one array; several make a grid."
    ),
]
Nodes = Annotated[int | None, typer.Option("--nodes", min=1, help="Nodes of training; sets train.ranks.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command(
        epilog=example(
            "hpc-gen submit job_configs/demo/mnist16.yaml --cluster lab",
            "hpc-gen submit job_configs/demo/mnist16.yaml --cluster a100 --nodes 2 --set account=mine --dry-run",
            "hpc-gen submit job_configs/demo/mnist16.yaml --cluster lab --array seed=1,2,3",
        )
    )(submit)
    app.command(
        epilog=example("hpc-gen logs demo-mnist16 --follow", "hpc-gen logs demo-mnist16 --stage sample --task 3")
    )(logs)
    app.command(epilog=example("hpc-gen cancel demo-mnist16 --dry-run", "hpc-gen cancel demo-mnist16 --now"))(cancel)


def submit(
    config: Config,
    cluster: Cluster,
    overrides: Overrides = None,
    workspace: Workspace = None,
    stages: Stages = None,
    nodes: Nodes = None,
    settings: Setting = None,
    array: Axes = None,
    dry_run: DryRun = False,
) -> None:
    """All stages of an experiment as jobs on a Slurm cluster.

    Training is a job, every other stage an array of the tasks whose units are missing, each after the one before. Jobs
    that are preempted save, requeue themselves and go on. --array makes a run of each value, NAME-KEY-VALUE, whose
    trainings are one array of jobs. --dry-run prints the scripts and asks Slurm whether it would take them.
    """
    import os

    from hpc_gen.config import loader
    from hpc_gen.runtime.run_folder import RunFolder
    from hpc_gen.stages import control, run_setup, runner
    from slurm import profiles

    root = workspace_of(workspace)
    profile = profiles.load(cluster, root, settings or [])
    wanted = list(overrides or [])
    if nodes is not None:
        wanted.append(f"train.ranks={nodes * profile.tasks_per_node}")
    resolved = loader.load(config, wanted)
    runner.check_stages(resolved, stage_names(stages))
    os.umask(int(profile.umask, 8))
    if array:
        _submit_array(config, wanted, array, resolved.experiment.name, root, cluster, profile, stages, dry_run)
        return
    folder = RunFolder(control.runs_folder(root) / resolved.experiment.name)
    if dry_run:
        resolved = run_setup.accepted(folder, run_setup.typed(resolved), root)
    else:
        refuse_queued(folder)
        run_setup.prepare_run(resolved, root)
        resolved = run_setup.load_run(folder)
    submit_folder(folder, resolved, cluster, profile, stages, dry_run)


def _submit_array(
    config: str,
    overrides: list[str],
    array: list[str],
    name: str,
    root: Path,
    cluster: str,
    profile: Any,
    stages: str | None,
    dry_run: bool,
) -> None:
    """A run for each value of the axes, the trainings of all in one array."""
    from hpc_gen.config import loader
    from hpc_gen.runtime.run_folder import RunFolder
    from hpc_gen.stages import control, run_setup, runner
    from slurm import arrays, axes, commands

    experiments = [loader.load(config, own) for own in axes.expand(name, array, overrides)]
    folders = [RunFolder(control.runs_folder(root) / each.experiment.name) for each in experiments]
    runs = [(run, run_setup.accepted(run, run_setup.typed(each), root)) for run, each in zip(folders, experiments)]
    chosen, slurm = runner.in_order(runs[0][1], stage_names(stages)), commands.Commands()
    if not dry_run:
        arrays.refuse_second(folders, slurm)
        for each in experiments:
            run_setup.prepare_run(each, root)
        runs = [(run, run_setup.load_run(run)) for run in folders]
        for _, resolved in runs:
            _download(resolved, root, chosen)
    members = arrays.plan_members(runs, profile, chosen, say, dry_run=dry_run)
    steps = arrays.plan_steps(name, arrays.new_folder(root, name), members, profile)
    if dry_run:
        arrays.show(steps, members, profile, slurm, say)
        return
    arrays.submit(name, steps, members, cluster, profile, slurm, say)
    say(f"watch them: hpc-gen status; one of them: hpc-gen status {folders[0].name} --watch")


def resume_on(
    cluster: str, folder: Any, overrides: list[str], stages: str | None, settings: list[str], dry_run: bool
) -> None:
    """Submit what is left of a run: `hpc-gen resume RUN --cluster NAME`."""
    import os

    from hpc_gen.stages import run_setup, runner
    from slurm import profiles

    profile = profiles.load(cluster, folder.workspace, settings)
    resolved = run_setup.changed(folder, overrides)
    runner.check_stages(resolved, stage_names(stages))
    os.umask(int(profile.umask, 8))
    if not dry_run:
        refuse_queued(folder)
        run_setup.change_run(folder, overrides)
        resolved = run_setup.load_run(folder)
    submit_folder(folder, resolved, cluster, profile, stages, dry_run)


def submit_folder(folder: Any, resolved: Any, cluster: str, profile: Any, stages: str | None, dry_run: bool) -> None:
    """Submit the stages of a run folder, or show what would be submitted; `stages`: comma-separated, None = all."""
    from hpc_gen.stages import run_setup, runner
    from slurm import commands, graph, submission

    chosen = runner.in_order(resolved, stage_names(stages))
    if dry_run:
        for note in run_setup.notes(folder, resolved):
            say(f"would change  {note}")
    else:
        _download(resolved, folder.workspace, chosen)
    plans = graph.plan_stages(folder, resolved, profile, chosen, say, dry_run=dry_run)
    slurm = commands.Commands()
    if dry_run:
        from slurm import preview

        preview.show(folder, plans, profile, slurm, say)
        return
    submission.submit(folder, plans, cluster, profile, slurm, say)
    say(f"watch it: hpc-gen status {folder.name} --watch")


def _download(resolved: Any, root: Path, stages: list[str]) -> None:
    """Fetch what the stages need here, where there is a network; compute nodes may have none."""
    from shard_tools import fetch

    encode = resolved.experiment.encode
    if "encode" in stages and encode is not None and encode.source_path is None and encode.source in fetch.DOWNLOADS:
        fetch.fetch(encode.source, root, say=say)
    evaluate = resolved.experiment.evaluate
    if "evaluate" in stages and evaluate is not None and evaluate.extractor.weights is None:
        for name in fetch.DOWNLOADS:
            if evaluate.extractor.name.partition("-")[0] == name:
                fetch.fetch(name, root, say=say)


def logs(
    run: Run,
    stage: Annotated[str | None, typer.Option("--stage", help="Only of this stage.")] = None,
    task: Annotated[
        int | None, typer.Option("--task", min=0, help="Only of this process of training, or task of an array.")
    ] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="Lines from the end of each.")] = 20,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is added, until Ctrl-C.")] = False,
    everything: Annotated[bool, typer.Option("--list", help="Only name the files.")] = False,
    workspace: Workspace = None,
) -> None:
    """The end of what a run's processes have printed.

    Of the stage that wrote last: the batch script and the first process of its newest job. Runs of this machine and
    jobs of Slurm alike.
    """
    from slurm import logs as files

    folder = run_of(run, workspace)
    if everything:
        for log in files.find(folder, stage, task):
            say(f"{log.stage:<10} {log.what:<28} {log.path}")
        return
    chosen = files.newest(folder, stage, task)
    for log in chosen:
        say(f"==> {log.stage}, {log.what}: {log.path}")
        for line in files.tail(log.path, lines):
            say(line)
    if follow:
        try:
            files.follow(chosen, say, lambda: False)
        except KeyboardInterrupt:
            say()


def cancel(
    run: Run,
    workspace: Workspace = None,
    now: Annotated[bool, typer.Option("--now", help="Cancel running jobs at once; what is not saved is lost.")] = False,
    dry_run: DryRun = False,
) -> None:
    """End a run; what is at work saves its state first.

    What is queued is cancelled. Nothing starts again by itself; `hpc-gen resume` goes on from what was saved.
    """
    from slurm import commands, steer

    steer.cancel(run_of(run, workspace), commands.Commands(), say, now=now, dry_run=dry_run)


# ---------------------------------------------------------------- for other commands


def jobs_of(folder: Any) -> Callable[[], Any] | None:
    """What `status` asks about the jobs of a run; None for one that was never submitted."""
    if folder is None or not (folder.path / "slurm" / "jobs.json").is_file():
        return None
    from slurm import commands, watch

    return watch.reader(folder, commands.Commands())


def asking_jobs(folder: Any, dry_run: bool) -> Callable[[], bool]:
    """A function that asks the running jobs of a run to save and requeue, and says whether it has any."""

    def ask() -> bool:
        from slurm import commands, steer

        return steer.preempt(folder, commands.Commands(), say, dry_run=dry_run)

    return ask


def refuse_queued(folder: Any) -> None:
    """Raise UserError for a run that is queued or running on Slurm."""
    from slurm import commands, steer, submission

    slurm = commands.Commands()
    if steer.jobs_here(folder, slurm):
        submission.refuse_second(folder, slurm)


def refuse_queued_name(name: str, workspace: Path) -> None:
    """As `refuse_queued`, for the run of that name in a workspace, if there is one."""
    folder = workspace / "runs" / name
    if (folder / "slurm" / "jobs.json").is_file():
        refuse_queued(run_of(str(folder), workspace))


def checks_of(cluster: str, workspace: Path, settings: list[str]) -> Any:
    """What `doctor` finds of a cluster."""
    from slurm import commands, doctor

    return doctor.examine(cluster, workspace, settings, commands.Commands())
