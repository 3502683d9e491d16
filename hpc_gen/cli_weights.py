"""The `weights` commands: metric networks are fetched, weights of generators imported, exported and verified."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hpc_gen.cli_parts import DryRun, Overrides, Run, Workspace, end, example, run_of, say, workspace_of
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

Target = Annotated[
    str, typer.Argument(metavar="CONFIG", help="Experiment file, or name of a published tokenizer, as va_vae.")
]

EXAMPLE = "job_configs/energy/edm_base_64.yaml"


def _is_tokenizer(config: str) -> bool:
    """Whether an argument names a published tokenizer and not an experiment's file."""
    from hpc_gen.config.tokenizer import PRESETS_OF

    return any(config in names for names in PRESETS_OF.values())


def _no_experiment(config: str, **given: object) -> None:
    """Raise UserError for what only an experiment takes."""
    for name, value in given.items():
        if value:
            word = "KEY.PATH=VALUE" if name == "overrides" else f"--{name}"
            raise UserError(f"{word} belongs to an experiment, '{config}' is a tokenizer; leave it out")


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


@weights_app.command(
    "list", epilog=example("hpc-gen weights list", "hpc-gen weights list va_vae", f"hpc-gen weights list {EXAMPLE}")
)
def weights_list(
    config: Annotated[
        str | None, typer.Argument(metavar="[CONFIG]", help="Experiment file, or name of a published tokenizer.")
    ] = None,
    overrides: Overrides = None,
    workspace: Workspace = None,
) -> None:
    """Every key of an experiment's networks, or of a published tokenizer.

    With shape and kind (parameter, frozen or buffer), then the counts. Without CONFIG: the tokenizers that are imported
    in the workspace, and the names of those that can be.
    """
    if config is None or _is_tokenizer(config):
        from hpc_gen.stages import tokenizer_weights

        _no_experiment(config or "list", overrides=overrides)
        root = workspace_of(workspace)
        lines = tokenizer_weights.list_tokenizer(config) if config else tokenizer_weights.list_imported(root)
        for line in lines:
            say(line)
        return
    from hpc_gen.config import loader
    from hpc_gen.stages import weights

    for line in weights.list_weights(loader.load(config, overrides or []), workspace_of(workspace)):
        say(line)


@weights_app.command(
    "verify",
    epilog=example(
        f"hpc-gen weights verify checkpoint-last.pth {EXAMPLE}",
        "hpc-gen weights verify vavae-imagenet256-f16d32-dinov2.pt va_vae",
    ),
)
def weights_verify(
    file: WeightsFile,
    config: Target,
    overrides: Overrides = None,
    key: Key = None,
    sha256: Sha256 = None,
    role: Role = None,
    workspace: Workspace = None,
) -> None:
    """Compare a file with the networks of an experiment, or with a published tokenizer.

    Keys, shapes, types and finite values of every state dict in it; each difference is listed, and any ends with code
    64.
    """
    if _is_tokenizer(config):
        from hpc_gen.stages import tokenizer_weights

        _no_experiment(config, overrides=overrides, key=key, role=role)
        found = tokenizer_weights.verify_tokenizer(config, file, say, sha256)
    else:
        from hpc_gen.config import loader
        from hpc_gen.stages import weights

        resolved = loader.load(config, overrides or [])
        root = workspace_of(workspace)
        found = weights.verify_weights(file, resolved, root, say, key=key, sha256=sha256, role=role)
    say(f"{file}: {found} differences" if found else f"{file}: fits")
    end(ExitCode.DATA if found else ExitCode.DONE)


@weights_app.command(
    "import",
    epilog=example(
        f"hpc-gen weights import {EXAMPLE} checkpoint-last.pth name=theirs",
        "hpc-gen weights import va_vae vavae-imagenet256-f16d32-dinov2.pt --statistics latents_stats.pt",
        "hpc-gen weights import vitb14_reg4 dinov2_vitb14_reg4_pretrain.pth",
    ),
)
def weights_import(
    config: Target,
    file: WeightsFile,
    overrides: Overrides = None,
    key: Key = None,
    sha256: Sha256 = None,
    role: Role = None,
    statistics: Annotated[
        Path | None,
        typer.Option("--statistics", help="Of a tokenizer: file with mean and std of its latents (VA-VAE's)."),
    ] = None,
    workspace: Workspace = None,
    dry_run: DryRun = False,
) -> None:
    """Begin a run from the weights of a file, or import a published tokenizer into the workspace.

    The run of CONFIG gets one checkpoint at 0 images, with the averages from the file's entry model_ema where it has
    one; `hpc-gen sample`, `evaluate`, `train` and `resume` go on from there. Its table must be encoded before. A
    tokenizer (`hpc-gen weights list` has the names) becomes WORKSPACE/downloads/tokenizers/NAME.safetensors.
    """
    if _is_tokenizer(config):
        from hpc_gen.stages import tokenizer_weights

        _no_experiment(config, overrides=overrides, key=key, role=role)
        tokenizer_weights.import_tokenizer(
            config, file, workspace_of(workspace), say, sha256=sha256, statistics=statistics, dry_run=dry_run
        )
        return
    if statistics is not None:
        raise UserError(f"--statistics belongs to a tokenizer, '{config}' is an experiment; leave it out")
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
