"""The `metrics` commands: statistics of reference images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hpc_gen.cli_parts import DryRun, Json, Workspace, example, say, workspace_of

metrics_app = typer.Typer(no_args_is_help=True, help="Statistics of reference images for the metrics.")


@metrics_app.command(
    "stats",
    epilog=example(
        "hpc-gen metrics stats tables/mnist16 --extractor inception-trunk -o mnist16_stats.npz",
        "hpc-gen metrics stats VIRTUAL_imagenet64_labeled.npz --spatial -o imagenet64.npz",
    ),
)
def metrics_stats(
    table: Annotated[
        str,
        typer.Argument(metavar="TABLE", help="Table of pixels, folder of images, or .npz with arr_0; in WORKSPACE."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="File .npz to write, relative to WORKSPACE.")],
    extractor: Annotated[
        str,
        typer.Option(
            "--extractor", help="inception, inception-trunk, clip-vit-b-32, dinov2-vit-l-14 ... or random-conv."
        ),
    ] = "inception",
    weights: Annotated[
        str | None, typer.Option("--weights", help="File of its weights [where `weights fetch` puts them].")
    ] = None,
    sha256: Annotated[str | None, typer.Option("--sha256", help="SHA-256 of that file [the one pinned].")] = None,
    rows: Annotated[int | None, typer.Option("--rows", min=2, help="The first rows only [all].")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images per forward pass; changes last bits.")] = 32,
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads.")] = 1,
    spatial: Annotated[bool, typer.Option("--spatial", help="Those of sFID too (mu_s, sigma_s).")] = False,
    workspace: Workspace = None,
    dry_run: DryRun = False,
) -> None:
    """Mean and covariance of the features of a set of images.

    For `evaluate.reference.statistics`: the Frechet distance then needs no images. The file has the keys mu and sigma,
    as published ones have, and says which extractor and images made it.
    """
    folder = workspace_of(workspace)
    target = folder / output
    if dry_run:
        count = "all" if rows is None else f"the first {rows}"
        say(f"would write {target}: statistics of {count} images of {folder / table} by '{extractor}'")
        return
    from eval_jobs.statistics import StatisticsJob, make_statistics

    make_statistics(
        StatisticsJob(table, target, extractor, weights, sha256, rows, batch, threads, spatial), folder, say
    )


@metrics_app.command("show", epilog=example("hpc-gen metrics show mnist16_stats.npz"))
def metrics_show(
    path: Annotated[str, typer.Argument(metavar="FILE", help="File of statistics, relative to WORKSPACE.")],
    workspace: Workspace = None,
    json: Json = False,
) -> None:
    """What a file of statistics holds, and how it was made.

    Files of ADM, EDM, MAR and the seed (.npz), and of torch-fidelity's cache (.pt).
    """
    from eval_jobs.statistics import facts_of

    found = facts_of(workspace_of(workspace) / path)
    if json:
        import json as writer

        say(writer.dumps(found, indent=1))
        return
    for name, value in found.items():
        say(f"{name:<24} {value}")
