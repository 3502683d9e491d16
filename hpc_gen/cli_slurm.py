"""Commands that speak with Slurm: submit a run, read its logs, cancel it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hpc_gen.cli_parts import Config, DryRun, Overrides, Stages, Workspace, example, say, workspace_of

Cluster = Annotated[
    str, typer.Option("--cluster", "-c", metavar="NAME", help="Cluster profile: a name, or a YAML file.")
]
Setting = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Key of the profile to replace, as in account=mine."),
]
Nodes = Annotated[int | None, typer.Option("--nodes", min=1, help="Nodes of training; sets train.ranks.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command(
        epilog=example(
            "hpc-gen submit job_configs/demo/mnist16.yaml --cluster lab",
            "hpc-gen submit job_configs/demo/mnist16.yaml --cluster a100 --nodes 2 --set account=mine --dry-run",
        )
    )(submit)


def submit(
    config: Config,
    cluster: Cluster,
    overrides: Overrides = None,
    workspace: Workspace = None,
    stages: Stages = None,
    nodes: Nodes = None,
    settings: Setting = None,
    dry_run: DryRun = False,
) -> None:
    """All stages of an experiment as jobs on a Slurm cluster.

    Training is a job, every other stage an array of the tasks whose units are missing, each after the one before. Jobs
    that are preempted save, requeue themselves and go on. --dry-run prints the scripts and asks Slurm whether it would
    take them.
    """
    from hpc_gen.config import loader
    from slurm import profiles

    root = workspace_of(workspace)
    profile = profiles.load(cluster, root, settings or [])
    wanted = list(overrides or [])
    if nodes is not None:
        wanted.append(f"train.ranks={nodes * profile.tasks_per_node}")
    _submit(loader.load(config, wanted), root, cluster, profile, stages, dry_run)


def _submit(resolved: Any, root: Path, cluster: str, profile: Any, stages: str | None, dry_run: bool) -> None:
    import os

    from hpc_gen.runtime.run_folder import RunFolder
    from hpc_gen.stages import control, run_setup, runner
    from slurm import commands, graph, submission

    os.umask(int(profile.umask, 8))
    if dry_run:
        folder = RunFolder(control.runs_folder(root) / resolved.experiment.name)
        resolved = run_setup.accepted(folder, run_setup.typed(resolved), root)
    else:
        folder = runner.prepare_run(resolved, root)
        resolved = runner.load_run(folder)
    chosen = [name for name in stages.split(",") if name] if stages else resolved.experiment.stage_order()
    for name in chosen:
        runner.check_stage(resolved, name)
    if not dry_run:
        _download(resolved, root, chosen)
    plans = graph.plan_stages(folder, resolved, profile, chosen, dry_run=dry_run)
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
