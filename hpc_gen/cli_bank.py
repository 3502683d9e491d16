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
        "hpc-gen bank export tables/emoji32-gmem bank.pth --rank 64 --method randomised --seed 1 --dry-run",
    ),
)
def bank_export(
    table: TableFolder,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File to write: .pth or .safetensors.")],
    rank: Annotated[int | None, typer.Option("--rank", help="Write a low-rank bank of this rank.")] = None,
    method: Annotated[str, typer.Option("--method", help="Of the low-rank bank: exact or randomised.")] = "exact",
    oversampling: Annotated[
        int, typer.Option("--oversampling", min=0, help="randomised: directions beyond the rank.")
    ] = 10,
    power_iterations: Annotated[
        int, typer.Option("--power-iterations", min=0, help="randomised: passes that sharpen the directions.")
    ] = 2,
    seed: Annotated[int, typer.Option("--seed", min=0, help="randomised: seed of the start.")] = 0,
    workspace: Workspace = None,
    dry_run: DryRun = False,
) -> None:
    """The column cls_tokens of a table as a bank's file of the reference.

    The bank is read in passes and the file written as the rows come: memory does not grow with the number of rows.
    """
    from hpc_gen.methods.gmem.low_rank import Randomised
    from shard_tools import bank

    if method != "exact" and rank is None:
        raise UserError(f"--method {method} is of a low-rank bank; add --rank, as in --rank 64")
    options = Randomised(oversampling, power_iterations, seed)
    bank.export_bank(bank.open_bank(workspace_of(workspace) / table), file, say, rank, method, options, dry_run)


@bank_app.command(
    "append",
    epilog=example(
        "hpc-gen bank append tables/bank tables/bank-grown --file more.pth",
        "hpc-gen bank append tables/bank tables/bank-mixed --between 2 5 --alpha 0.3",
        "hpc-gen bank append tables/bank tables/bank-novel --images pictures --config job_configs/gmem/bank.yaml",
        "hpc-gen bank append tables/bank tables/bank-both --table tables/other-bank",
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
    other: Annotated[str | None, typer.Option("--table", help="Rows of another table with snippets.")] = None,
    images: Annotated[Path | None, typer.Option("--images", help="Folder of images; they are encoded.")] = None,
    config: Annotated[
        str | None, typer.Option("--config", help="Experiment whose encode section says how images are encoded.")
    ] = None,
    workspace: Workspace = None,
    dry_run: DryRun = False,
) -> None:
    """A new bank: the rows of TABLE and more behind them.

    More are the rows of a file or of another table, snippets of images, or alpha row_I + (1 - alpha) row_J. TABLE stays
    as it is. Rows keep the names of their images.
    """
    from shard_tools import bank, bank_images

    if sum(each is not None for each in (file, between, other, images)) != 1:
        raise UserError("say what is appended: one of --file, --table, --images and --between I J")
    if (images is None) != (config is None):
        raise UserError("--images and --config go together: the experiment says which network encodes the images")
    root = workspace_of(workspace)
    opened = bank.open_bank(root / table)
    told: dict[str, Any] = {}
    more: Any
    if file is not None:
        more = bank.snippets_of_file(file)
    elif other is not None:
        more = bank.open_bank(root / other)
    elif images is not None and config is not None:
        if dry_run:
            from hpc_gen.data.images import images_below

            found = len(images_below(images, deep=True))
            say(f"{root / target}: would write {opened.rows:,} rows and those of {found:,} images")
            return
        more = bank_images.snippets_of_images(config, root, images)
    else:
        assert between is not None
        more, told = bank.row_between(opened, *between, alpha), {"between": list(between), "alpha": alpha}
    bank.append(opened, more, root / target, told, say, dry_run)


@bank_app.command("nearest", epilog=example("hpc-gen bank nearest tables/bank --row 7 -k 5"))
def bank_nearest(
    table: TableFolder,
    row: Annotated[int, typer.Option("--row", min=0, help="Row of the bank whose neighbours are wanted.")],
    count: Annotated[int, typer.Option("-k", min=1, help="How many.")] = 10,
    workspace: Workspace = None,
) -> None:
    """Rows whose snippets are nearest to one row's, by cosine: row, cosine, and the image that it came from."""
    from shard_tools import bank
    from shard_tools.inspect import shown

    opened = bank.open_bank(workspace_of(workspace) / table)
    for place, cosine, name in bank.nearest(opened, bank.row_of(opened, row), count):
        say(f"{place:>10}  {cosine:.4f}  {shown(name)}")


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
    from hpc_gen.data.images import images_below

    if dry_run:
        found = images_below(images)
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
    from hpc_gen.data.images import images_below

    if dry_run:
        found = images_below(first)
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
