"""The `weights` commands: metric networks are fetched, weights of generators imported, exported and verified."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hpc_gen.cli_parts import Config, DryRun, Overrides, Run, Workspace, end, example, run_of, say, workspace_of
from hpc_gen.runtime.errors import ExitCode, UserError

weights_app = typer.Typer(no_args_is_help=True, help="Weights: fetch, list, verify, import and export them.")

WeightsFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="File of torch.save or safetensors; nothing of it is executed.")
]
Key = Annotated[
    str | None,
    typer.Option("--key", help="Entry of the file with the weights, as in model_ema [model, or the only one]."),
]
Sha256 = Annotated[str | None, typer.Option("--sha256", help="Refuse the file when its SHA-256 is another.")]
Role = Annotated[str | None, typer.Option("--role", help="Network of the method [the only one].")]

EXAMPLE = "job_configs/energy/edm_base_64.yaml"


@weights_app.command("fetch", epilog=example("hpc-gen weights fetch inception"))
def weights_fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="inception.")],
    workspace: Workspace = None,
    dry_run: DryRun = False,
) -> None:
    """Download weights and verify them.

    Into WORKSPACE/downloads; what is there already is left alone.
    """
    from shard_tools import fetch

    fetch.fetch(name, workspace_of(workspace), say=say, dry_run=dry_run)


@weights_app.command("list", epilog=example(f"hpc-gen weights list {EXAMPLE}"))
def weights_list(config: Config, overrides: Overrides = None, workspace: Workspace = None) -> None:
    """Every key of an experiment's networks.

    With shape and kind (parameter, frozen or buffer), then the counts.
    """
    from hpc_gen.config import loader
    from hpc_gen.stages import weights

    for line in weights.list_weights(loader.load(config, overrides or []), workspace_of(workspace)):
        say(line)


@weights_app.command("verify", epilog=example(f"hpc-gen weights verify checkpoint-last.pth {EXAMPLE}"))
def weights_verify(
    file: WeightsFile,
    config: Config,
    overrides: Overrides = None,
    key: Key = None,
    sha256: Sha256 = None,
    role: Role = None,
    workspace: Workspace = None,
) -> None:
    """Compare a file with the networks of an experiment.

    Keys, shapes, types and finite values of every state dict in it; each difference is listed, and any ends with code
    64.
    """
    from hpc_gen.config import loader
    from hpc_gen.stages import weights

    resolved = loader.load(config, overrides or [])
    found = weights.verify_weights(file, resolved, workspace_of(workspace), say, key=key, sha256=sha256, role=role)
    say(f"{file}: {found} differences" if found else f"{file}: fits")
    end(ExitCode.DATA if found else ExitCode.DONE)


@weights_app.command("import", epilog=example(f"hpc-gen weights import {EXAMPLE} checkpoint-last.pth name=theirs"))
def weights_import(
    config: Config,
    file: WeightsFile,
    overrides: Overrides = None,
    key: Key = None,
    sha256: Sha256 = None,
    role: Role = None,
    workspace: Workspace = None,
    dry_run: DryRun = False,
) -> None:
    """Begin a run from the weights of a file.

    The run of CONFIG gets one checkpoint at 0 images, with the averages from the file's entry model_ema where it has
    one; `hpc-gen sample`, `evaluate`, `train` and `resume` go on from there. Its table must be encoded before.
    """
    from hpc_gen.config import loader
    from hpc_gen.stages import weights_transfer

    resolved = loader.load(config, overrides or [])
    root = workspace_of(workspace)
    weights_transfer.import_weights(resolved, file, root, say, key=key, sha256=sha256, role=role, dry_run=dry_run)


@weights_app.command(
    "export",
    epilog=example(
        "hpc-gen weights export demo-mnist16",
        "hpc-gen weights export demo-mnist16 --checkpoint 64000 --raw --to mnist16.safetensors",
    ),
)
def weights_export(
    run: Run,
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", metavar="IMAGES", help="Which checkpoint, in images seen.")
    ] = "latest",
    ema: Annotated[str | None, typer.Option("--ema", help="Which average [the first].")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="The weights themselves, not an average.")] = False,
    role: Role = None,
    to: Annotated[
        Path | None, typer.Option("--to", help="File to write [RUN/exports/ROLE-EMA-IMAGES.safetensors].")
    ] = None,
    workspace: Workspace = None,
    dry_run: DryRun = False,
) -> None:
    """Write the weights of a run as safetensors.

    Under the official keys, with what they are and where they come from in the metadata. The same checkpoint gives the
    same bytes.
    """
    from hpc_gen.stages import weights_transfer

    if checkpoint != "latest" and not checkpoint.isdecimal():
        raise UserError(f"--checkpoint is '{checkpoint}'; give images seen as a whole number, or latest")
    images = None if checkpoint == "latest" else int(checkpoint)
    folder = run_of(run, workspace)
    weights_transfer.export_weights(
        folder, say, checkpoint=images, ema=ema, raw=raw, role=role, target=to, dry_run=dry_run
    )
