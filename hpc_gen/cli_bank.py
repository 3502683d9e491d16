"""The commands of GMem's memory: `bank` for tables of snippets, `knowledge` for pictures from new ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hpc_gen.cli_parts import DryRun, Overrides, Run, TableFolder, Workspace, example, run_of, say, workspace_of
from hpc_gen.runtime.errors import UserError

bank_app = typer.Typer(no_args_is_help=True, help="Memory banks of GMem: import, export, grow and search them.")
knowledge_app = typer.Typer(no_args_is_help=True, help="Pictures from images that no training saw (GMem).")

Target = Annotated[str, typer.Argument(metavar="NEW", help="Folder of the new table, relative to WORKSPACE.")]
BankFile = Annotated[Path, typer.Argument(metavar="FILE", help="File of a bank; nothing of it is executed.")]
Out = Annotated[Path, typer.Option("--to", metavar="PNG", help="The picture to write.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the noise.")]


def add_to(app: typer.Typer) -> None:
    """Register both groups."""
    app.add_typer(bank_app, name="bank")
    app.add_typer(knowledge_app, name="knowledge")


@bank_app.command("import", epilog=example("hpc-gen bank import downloads/memory_bank.pth tables/bank"))
def bank_import(file: BankFile, target: Target, workspace: Workspace = None, dry_run: DryRun = False) -> None:
    """A bank's file of the reference as a table.

    A plain tensor [rows, width], or a low-rank bank (keys C, M, S, mean), which is multiplied out. Samples are
    conditioned on it with sample.conditions=NEW sample.rows=uniform.
    """
    from shard_tools import bank

    bank.import_bank(file, workspace_of(workspace) / target, say, dry_run)


@bank_app.command(
    "export",
    epilog=example(
        "hpc-gen bank export tables/emoji32-gmem bank.pth",
        "hpc-gen bank export tables/emoji32-gmem bank.safetensors --rank 64 --dry-run",
    ),
)
def bank_export(
    table: TableFolder,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File to write: .pth or .safetensors.")],
    rank: Annotated[int | None, typer.Option("--rank", help="Write a low-rank bank of this rank.")] = None,
    workspace: Workspace = None,
    dry_run: DryRun = False,
) -> None:
    """The column cls_tokens of a table as a bank's file of the reference."""
    from shard_tools import bank

    bank.export_bank(bank.open_bank(workspace_of(workspace) / table), file, say, rank, dry_run)


@bank_app.command(
    "append",
    epilog=example(
        "hpc-gen bank append tables/bank tables/bank-grown --file more.pth",
        "hpc-gen bank append tables/bank tables/bank-mixed --between 2 5 --alpha 0.3",
    ),
)
def bank_append(
    table: TableFolder,
    target: Target,
    file: Annotated[Path | None, typer.Option("--file", help="Rows of another bank's file.")] = None,
    between: Annotated[
        tuple[int, int] | None, typer.Option("--between", metavar="I J", help="One row between two of the bank.")
    ] = None,
    alpha: Annotated[float, typer.Option("--alpha", min=0.0, max=1.0, help="Weight of row I.")] = 0.5,
    workspace: Workspace = None,
    dry_run: DryRun = False,
) -> None:
    """A new bank: the rows of TABLE and more behind them.

    More are the rows of a file, or alpha row_I + (1 - alpha) row_J. TABLE stays as it is.
    """
    from shard_tools import bank

    if (file is None) == (between is None):
        raise UserError("say what is appended: either --file, or --between I J")
    opened = bank.open_bank(workspace_of(workspace) / table)
    told: dict[str, Any]
    if file is not None:
        more, told = bank.snippets_of_file(file), {}
    else:
        assert between is not None
        more, told = bank.row_between(opened, *between, alpha), {"between": list(between), "alpha": alpha}
    bank.append(opened, more, workspace_of(workspace) / target, told, say, dry_run)


@bank_app.command("nearest", epilog=example("hpc-gen bank nearest tables/bank --row 7 -k 5"))
def bank_nearest(
    table: TableFolder,
    row: Annotated[int, typer.Option("--row", min=0, help="Row of the bank whose neighbours are wanted.")],
    count: Annotated[int, typer.Option("-k", min=1, help="How many.")] = 10,
    workspace: Workspace = None,
) -> None:
    """Rows whose snippets are nearest to one row's, by cosine."""
    from shard_tools import bank

    opened = bank.open_bank(workspace_of(workspace) / table)
    for place, cosine in bank.nearest(opened, bank.row_of(opened, row), count):
        say(f"{place:>10}  {cosine:.4f}")


@knowledge_app.command(
    "external",
    epilog=example("hpc-gen knowledge external demo-emoji32-gmem --images pictures --to external.png"),
)
def knowledge_external(
    run: Run,
    images: Annotated[Path, typer.Option("--images", help="Folder of images.")],
    out: Out,
    overrides: Overrides = None,
    each: Annotated[int, typer.Option("--each", min=1, help="Pictures per image.")] = 14,
    seed: Seed = 42,
    legacy_range: Annotated[
        bool, typer.Option("--legacy-range", help="Pixels in the wrong range, as the reference feeds novel images.")
    ] = False,
    workspace: Workspace = None,
    dry_run: DryRun = False,
) -> None:
    """Pictures from the snippets of novel images, a row each, the original first.

    Guided with scale 7.75 from t = 0.89 as the reference; KEY=VALUE replaces settings of the sampler, as in
    guidance.scale=4 points=20.
    """
    from eval_jobs import knowledge

    if dry_run:
        found = knowledge.images_below(images)
        say(f"{out}: would draw {each} pictures of each of {len(found)} images")
        return
    studio = knowledge.open_studio(run_of(run, workspace), workspace_of(workspace), _settings(overrides), seed)
    knowledge.external(studio, images, out, say, each, legacy_range)


@knowledge_app.command(
    "internal",
    epilog=example("hpc-gen knowledge internal demo-emoji32-gmem --first a --second b --to between.png"),
)
def knowledge_internal(
    run: Run,
    first: Annotated[Path, typer.Option("--first", help="Folder of images.")],
    second: Annotated[Path, typer.Option("--second", help="Folder of their partners, with the same names.")],
    out: Out,
    overrides: Overrides = None,
    method: Annotated[str, typer.Option("--method", help="linear, spherical, concat or mask.")] = "mask",
    steps: Annotated[int, typer.Option("--steps", min=2, help="Pictures between the two.")] = 6,
    seed: Seed = 42,
    workspace: Workspace = None,
    dry_run: DryRun = False,
) -> None:
    """Pictures between two images, a row per pair: the first, the pictures, the second."""
    from eval_jobs import knowledge

    if dry_run:
        found = knowledge.images_below(first)
        say(f"{out}: would draw {steps} pictures ({method}) between each of {len(found)} pairs")
        return
    studio = knowledge.open_studio(run_of(run, workspace), workspace_of(workspace), _settings(overrides), seed)
    knowledge.internal(studio, first, second, out, say, method, steps)


def _settings(overrides: list[str] | None) -> dict[str, Any]:
    """KEY.PATH=VALUE as nested settings. Raises UserError for words that are none."""
    import yaml

    found: dict[str, Any] = {}
    for word in overrides or []:
        key, sign, value = word.partition("=")
        if not sign or not key:
            raise UserError(f"'{word}' is no KEY=VALUE; write a setting of the sampler, as in points=20")
        part = found
        *path, last = key.split(".")
        for name in path:
            part = part.setdefault(name, {})
        part[last] = yaml.safe_load(value)
    return found
