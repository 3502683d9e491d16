"""Commands about the checkpoints of a run: look at them, vouch for them, convert them, remove them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from hpc_gen.cli_parts import (
    DryRun,
    Json,
    Run,
    Workspace,
    example,
    print_json,
    report_problems,
    run_of,
    say,
)
from hpc_gen.runtime.errors import UserError, nearest

checkpoints_app = typer.Typer(no_args_is_help=True, help="List, verify, convert and remove the checkpoints of a run.")


@checkpoints_app.command("list", epilog=example("hpc-gen checkpoints list demo-mnist16"))
def checkpoints_list(run: Run, workspace: Workspace = None, json: Json = False) -> None:
    """Committed checkpoints of a run, oldest first."""
    from hpc_gen.runtime.progress import count, format_bytes
    from hpc_gen.training.checkpoint import read

    found = read.list_checkpoints(run_of(run, workspace))
    if json:
        print_json([asdict(each) for each in found])
        return
    for each in found:
        size = f"{format_bytes(each.bytes):>8}  {count(each.world_size, 'rank')}  {each.engine or '-':<9}"
        say(f"{each.images_seen:>14,} images  {size}  {each.path}")
    if not found:
        say("no checkpoint yet")


@checkpoints_app.command("verify", epilog=example("hpc-gen checkpoints verify demo-mnist16"))
def checkpoints_verify(run: Run, workspace: Workspace = None) -> None:
    """Compare every byte of every checkpoint with its manifest."""
    from hpc_gen.training.checkpoint import read

    folder = run_of(run, workspace)
    paths = sorted(folder.checkpoints.glob("[0-9]*")) if folder.checkpoints.is_dir() else []
    problems = [problem for path in paths for problem in read.verify(path)]
    report_problems(f"{len(paths)} checkpoints of {folder.name}", problems)


@checkpoints_app.command(
    "convert",
    epilog=example(
        "hpc-gen checkpoints convert demo-mnist16 --to safetensors",
        "hpc-gen checkpoints convert demo-mnist16 --at 64000 --output /tmp/merged --dry-run",
    ),
)
def checkpoints_convert(
    run: Run,
    workspace: Workspace = None,
    to: Annotated[str, typer.Option("--to", metavar="FORM", help="merged or safetensors.")] = "merged",
    at: Annotated[str, typer.Option("--at", metavar="IMAGES", help="Which checkpoint, in images seen.")] = "latest",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder or file to write [exports/ of the run].")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Write a checkpoint of many ranks as one file.

    merged: a checkpoint folder as one rank would have written it. safetensors: one flat file of weights, averages,
    optimizer and training state. Engines need no conversion: each goes on from what any other wrote, on any number of
    ranks, as in `hpc-gen fork RUN --name NEW train.engine.name=...`.
    """
    from hpc_gen.stages import checkpoint_tools as tools

    form = next((each for each in tools.FORMS if each == to), None)
    if form is None:
        raise UserError(f"--to is '{to}'{nearest(to, tools.FORMS)}; it is one of: {', '.join(tools.FORMS)}")
    images = _position("--at", at)
    tools.convert(run_of(run, workspace), say, to=form, at=images, target=output, dry_run=dry_run)


@checkpoints_app.command(
    "prune",
    epilog=example(
        "hpc-gen checkpoints prune demo-mnist16 --last 1 --dry-run",
        "hpc-gen checkpoints prune demo-mnist16 --last 2 --every 64000 --keep 12800",
    ),
)
def checkpoints_prune(
    run: Run,
    workspace: Workspace = None,
    last: Annotated[int | None, typer.Option("--last", min=1, help="Newest that stay [train.keep_last].")] = None,
    every: Annotated[
        int | None, typer.Option("--every", min=1, help="Those at multiples of it stay, in images [train.keep_every].")
    ] = None,
    keep: Annotated[
        list[int] | None, typer.Option("--keep", metavar="IMAGES", help="One that stays; may be given several times.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Remove checkpoints that are no longer wanted.

    The newest whole one, the best one and the one that the sample stage names always stay. Nothing is removed while an
    attempt may be at work.
    """
    from hpc_gen.stages import checkpoint_tools as tools

    tools.prune(run_of(run, workspace), say, last=last, every=every, keep=keep or (), dry_run=dry_run)


def _position(option: str, text: str) -> int | None:
    if text != "latest" and not text.isdecimal():
        raise UserError(f"{option} is '{text}'; give images seen as a whole number, or latest")
    return None if text == "latest" else int(text)
