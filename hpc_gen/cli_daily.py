"""Commands of daily work with several runs: fork one, compare two, clean up."""

from __future__ import annotations

from typing import Annotated

import typer

from hpc_gen.cli_parts import DryRun, Json, Overrides, Run, Workspace, example, run_of, say, workspace_of
from hpc_gen.runtime.errors import UserError

Name = Annotated[str, typer.Option("--name", metavar="NEW", help="Name of the new run.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command(
        epilog=example(
            "hpc-gen fork demo-mnist16 --at latest --name longer train.total_images=192000",
            "hpc-gen fork demo-mnist16 --at 64000 --name hotter train.optimizer.lr=2e-3 --dry-run",
        )
    )(fork)
    app.command(epilog=example("hpc-gen compare demo-mnist16 hotter", "hpc-gen compare a b --json"))(compare)
    app.command(epilog=example("hpc-gen gc demo-mnist16 --dry-run", "hpc-gen gc --all"))(gc)


def fork(
    run: Run,
    name: Name,
    overrides: Overrides = None,
    at: Annotated[str, typer.Option("--at", metavar="IMAGES", help="Which checkpoint, in images seen.")] = "latest",
    workspace: Workspace = None,
    dry_run: DryRun = False,
) -> None:
    """Begin a new run from a checkpoint of another.

    Weights, averages, optimizer, clock and draws go on; the config is that of RUN with the given keys replaced. It is
    told which of them change numbers. Without any, the fork trains bit for bit as RUN would.
    """
    from hpc_gen.stages import fork as forking

    if at != "latest" and not at.isdecimal():
        raise UserError(f"--at is '{at}'; give images seen as a whole number, or latest")
    images = None if at == "latest" else int(at)
    forking.fork(run_of(run, workspace), name, overrides or [], say, at=images, dry_run=dry_run)


def compare(
    first: Annotated[str, typer.Argument(metavar="RUN", help="Path or name of a run, A.")],
    second: Annotated[str, typer.Argument(metavar="RUN", help="Path or name of another, B.")],
    workspace: Workspace = None,
    json: Json = False,
) -> None:
    """Two runs side by side: config, losses, metrics.

    Every key that differs, losses at the images seen that both logged, and metrics of sets of samples that both have;
    numbers that were measured in two ways are refused, naming the first field that differs.
    """
    from hpc_gen.stages import compare as comparing

    found = comparing.compare(run_of(first, workspace), run_of(second, workspace))
    if json:
        say(found.to_json())
        return
    for line in comparing.lines(found):
        say(line)


def gc(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="Path or name of a run; or --all of the workspace.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every run of the workspace.")] = False,
    workspace: Workspace = None,
    dry_run: DryRun = False,
) -> None:
    """Remove what nobody needs any more from run folders.

    Unfinished writes of killed attempts, checkpoints set aside as broken, and those beyond train.keep_last and
    keep_every. Never the newest whole checkpoint, and nothing of a run at which an attempt may be at work.
    """
    from hpc_gen.stages import garbage

    if (run is None) != everything:
        raise UserError("give a run or --all, one of them, as in `hpc-gen gc demo-mnist16`")
    if run is None:
        garbage.clean_all(workspace_of(workspace), say, dry_run=dry_run)
    else:
        garbage.clean(run_of(run, workspace), say, dry_run=dry_run)
