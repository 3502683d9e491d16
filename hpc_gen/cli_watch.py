"""Commands that look at a training from outside: where the time of its ranks goes, and its history for wandb."""

from __future__ import annotations

from typing import Annotated

import typer

from hpc_gen.cli_parts import DryRun, Json, Run, Workspace, example, run_of, say

track_app = typer.Typer(no_args_is_help=True, help="Publish the history of a run.")


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command(epilog=example("hpc-gen spans demo-mnist16", "hpc-gen spans demo-mnist16 --attempt 2 --json"))(spans)
    track_app.command(
        epilog=example("hpc-gen track sync demo-mnist16 --dry-run", "hpc-gen track sync demo-mnist16"),
    )(sync)
    app.add_typer(track_app, name="track")


def spans(
    run: Run,
    attempt: Annotated[
        int | None, typer.Option("--attempt", min=1, help="Which attempt of training [the newest with spans].")
    ] = None,
    workspace: Workspace = None,
    json: Json = False,
) -> None:
    """Where the time of each rank goes, and who is slow.

    Own work, waiting for data and waiting for the others, per rank and step; stragglers are marked. Then the seconds of
    each kind of work. From the files of `train.spans` in the run folder alone.
    """
    from hpc_gen.stages import stragglers

    folder = run_of(run, workspace)
    if json:
        say(stragglers.to_json(folder, attempt))
        return
    for line in stragglers.lines(folder, attempt):
        say(line)


def sync(
    run: Run,
    workspace: Workspace = None,
    wait_s: Annotated[float, typer.Option("--timeout", help="Longest wait for the server, in seconds.")] = 600.0,
    dry_run: DryRun = False,
) -> None:
    """Publish the history of a run to wandb, from its journal alone.

    For runs on nodes without a network (tracking.wandb=disabled or offline), and for what an attempt could not send.
    Each row goes out once, however often this is repeated or killed: the server is asked what it has. Rows above the
    newest checkpoint stay here.
    """
    from hpc_gen.stages import track
    from hpc_gen.stages.run_setup import load_run

    folder = run_of(run, workspace)
    track.sync(folder, load_run(folder), say, dry_run=dry_run, wait_s=wait_s)
