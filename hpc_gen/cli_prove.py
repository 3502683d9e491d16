"""The proof that a user runs before spending GPU hours: killed and resumed, the training is the same."""

from __future__ import annotations

from typing import Annotated

import typer

from hpc_gen.cli_parts import Config, DryRun, Overrides, Workspace, end, example, say, workspace_of
from hpc_gen.runtime.errors import UserError


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(
        "prove-resume",
        epilog=example(
            "hpc-gen prove-resume job_configs/demo/mnist16.yaml",
            "hpc-gen prove-resume job_configs/demo/mnist16.yaml --kills 12 --world-sizes 2,1 method.depth=1 --dry-run",
        ),
    )(prove_resume)


def prove_resume(
    config: Config,
    overrides: Overrides = None,
    workspace: Workspace = None,
    kills: Annotated[int, typer.Option("--kills", help="Kills of each disturbed run.")] = 6,
    images: Annotated[
        int | None, typer.Option("--images", help="Length of each run, in images [a few batches between two kills].")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Who is killed, how and when.")] = 0,
    world_sizes: Annotated[
        str | None,
        typer.Option("--world-sizes", metavar="N,N", help="Numbers of ranks; the undisturbed run has the first."),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Prove that an experiment resumes exactly.

    A killed run is the one that was never killed: the experiment is trained for a few hundred images, undisturbed;
    killed at random (SIGKILL and SIGTERM; one rank, half of them as with a lost node, all, the launcher) and resumed;
    and resumed on other numbers of ranks. Method, data and engine stay as they are; batch, length and intervals are
    made small unless a key is given.
    """
    from hpc_gen.stages import prove_plan

    proof = prove_plan.make(
        config, overrides or [], kills=kills, seed=seed, images=images, world_sizes=_sizes(world_sizes)
    )
    if dry_run:
        for line in prove_plan.lines(proof):
            say(line)
        return
    from hpc_gen.stages.prove_resume import prove

    end(prove(proof, workspace_of(workspace), say))


def _sizes(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts):
        raise UserError(f"--world-sizes is '{text}'; give whole numbers of ranks, as in 2,1")
    return [int(part) for part in parts]
