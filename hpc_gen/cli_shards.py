"""The `shards` commands: images are fetched; tables are looked into, verified, converted, cut and joined."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hpc_gen.cli_parts import (
    DryRun,
    Json,
    TableFolder,
    Workspace,
    example,
    print_json,
    report_problems,
    say,
    workspace_of,
)
from hpc_gen.runtime.errors import UserError

shards_app = typer.Typer(no_args_is_help=True, help="Tables: fetch images, look, verify, convert, cut and join.")

FORMATS = ("ptshard", "webdataset", "safetensors", "pt", "npz")

Format = Annotated[str, typer.Option("--to", metavar="FORMAT", help=f"One of {', '.join(FORMATS)}.")]
ShardRows = Annotated[
    int | None, typer.Option("--shard-rows", min=1, help="Rows of a shard [as before; 1024 of other programs' files].")
]
Half = Annotated[bool, typer.Option("--half", help="Store floats as float16.")]


@shards_app.command("fetch", epilog=example("hpc-gen shards fetch mnist", "hpc-gen shards fetch emoji --dry-run"))
def shards_fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="mnist, emoji or cifar10.")],
    workspace: Workspace = None,
    dry_run: DryRun = False,
) -> None:
    """Download a data set and verify it.

    Into WORKSPACE/downloads; what is there already is left alone.
    """
    from shard_tools import fetch

    fetch.fetch(name, workspace_of(workspace), say=say, dry_run=dry_run)


@shards_app.command("info", epilog=example("hpc-gen shards info tables/mnist16"))
def shards_info(table: TableFolder, workspace: Workspace = None, json: Json = False) -> None:
    """Columns, rows, classes and identity of a table."""
    from shard_tools import inspect

    found = inspect.info(workspace_of(workspace) / table)
    if json:
        print_json(found)
        return
    for line in inspect.format_info(found):
        say(line)


@shards_app.command(
    "rows",
    epilog=example("hpc-gen shards rows tables/mnist16 5 17", "hpc-gen shards rows tables/mnist16 --find 00017"),
)
def shards_rows(
    table: TableFolder,
    rows: Annotated[list[int] | None, typer.Argument(metavar="ROW...", help="Numbers of rows [all].")] = None,
    find: Annotated[str | None, typer.Option("--find", metavar="TEXT", help="Only names that contain it.")] = None,
    workspace: Workspace = None,
    json: Json = False,
) -> None:
    """From which image each row came.

    The path below a folder of images, the member of a tar or zip, or file, row group and row of a Parquet set.
    """
    from shard_tools import inspect

    found = inspect.rows(workspace_of(workspace) / table, rows or (), find)
    if json:
        print_json([{"row": row, "name": name} for row, name in found])
        return
    for row, name in found:
        say(f"{row:>10}  {inspect.shown(name)}")


@shards_app.command("verify", epilog=example("hpc-gen shards verify tables/mnist16"))
def shards_verify(table: TableFolder, workspace: Workspace = None) -> None:
    """Compare every byte of a table with its index."""
    from shard_tools import inspect

    report_problems(table, inspect.verify(workspace_of(workspace) / table))


@shards_app.command(
    "index",
    epilog=example(
        "hpc-gen shards index tables/cached",
        "hpc-gen shards index tables/cached --config job_configs/energy/edm_base_64.yaml --dry-run",
    ),
)
def shards_index(
    table: TableFolder,
    workspace: Workspace = None,
    config: Annotated[
        str | None, typer.Option("--config", help="Experiment whose tokenizer made the latents; it is recorded.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Write the index of shards that another program made.

    For latents cached by the energy reference (ptshard, pt or npz). They can be read without, but then every start
    reads the header of every file, and nothing vouches for their bytes. Index them before the first training: a table
    with an index is another table to a checkpoint.
    """
    from hpc_gen.config import loader
    from hpc_gen.stages.build import tokenizer_identity
    from shard_tools import indexing

    root = workspace_of(workspace)
    made_by = tokenizer_identity(loader.load(config, []).experiment, root) if config is not None else {}
    indexing.write_index(root / table, made_by, say, dry_run)


@shards_app.command(
    "convert",
    epilog=example(
        "hpc-gen shards convert tables/mnist16 tables/mnist16-tar --to webdataset",
        "hpc-gen shards convert imagenet256_features tables/imagenet256 --half --dry-run",
    ),
)
def shards_convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Table, folder of features, or EDM zip.")],
    target: Annotated[str, typer.Argument(metavar="TABLE", help="Folder of the new table.")],
    to: Format = "ptshard",
    shard_rows: ShardRows = None,
    columns: Annotated[str | None, typer.Option("--columns", help="Only these, as in moments,labels [all].")] = None,
    half: Half = False,
    feature_batch: Annotated[
        int, typer.Option("--feature-batch", min=1, help="Images per batch of the extraction of U-ViT or DiM.")
    ] = 256,
    workspace: Workspace = None,
    dry_run: DryRun = False,
) -> None:
    """Write a table in another format or cut.

    Reads tables of every format, LightningDiT's and GMem's safetensors, WebDataset tars of arrays, numbered features
    of U-ViT and DiM, and EDM's zip. The rows are the same bit for bit, and with the same cut so is the identity. Killed
    at any time, the same command goes on.
    """
    from shard_tools import convert

    root = workspace_of(workspace)
    chosen = tuple(name for name in columns.split(",") if name) if columns else None
    wish = convert.Wish(_format(to), shard_rows, chosen, half)  # type: ignore[arg-type]
    convert.convert(convert.open_rows(root / source, feature_batch), root / target, wish, say, dry_run)


@shards_app.command(
    "split", epilog=example("hpc-gen shards split tables/all tables/train tables/validation --rows 5000 --dry-run")
)
def shards_split(
    table: TableFolder,
    train: Annotated[str, typer.Argument(metavar="TRAIN", help="Folder of the table that keeps most rows.")],
    held_out: Annotated[str, typer.Argument(metavar="VALIDATION", help="Folder of the table of held-out rows.")],
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows to hold out, drawn at random.")],
    seed: Annotated[int, typer.Option("--seed", min=0, help="Another one draws other rows.")] = 0,
    to: Format = "ptshard",
    shard_rows: ShardRows = None,
    workspace: Workspace = None,
    dry_run: DryRun = False,
) -> None:
    """Cut a table into two, for training and validation.

    Each row goes to exactly one of them. Killed at any time, the same command goes on.
    """
    from shard_tools import convert

    root = workspace_of(workspace)
    wish = convert.Wish(_format(to), shard_rows)  # type: ignore[arg-type]
    source = convert.open_rows(root / table)
    convert.split(source, root / train, root / held_out, rows, wish, say, seed, dry_run)


@shards_app.command(
    "join",
    epilog=example("hpc-gen shards join tables/with-snippets tables/latents tables/snippets --dry-run"),
)
def shards_join(
    joined: Annotated[str, typer.Argument(metavar="JOINED", help="Folder of the joined table.")],
    tables: Annotated[list[str], typer.Argument(metavar="TABLE...", help="Tables; the first gives the order.")],
    trust_order: Annotated[
        bool, typer.Option("--trust-order", help="The rows are the same, though nothing shows it.")
    ] = False,
    workspace: Workspace = None,
    dry_run: DryRun = False,
) -> None:
    """Open several tables of the same rows as one.

    Columns are added without rewriting anything: the joined folder holds one small file. Rows meet by the column
    row_id where all have it (encode.row_ids), else by their number, if recipes and labels agree.
    """
    from hpc_gen.data import joined as joining

    root = workspace_of(workspace)
    made = joining.join(root / joined, [root / table for table in tables], trust_order, dry_run)
    done = "would join" if dry_run else "joined"
    say(f"{joined}: {done} {made.rows:,} rows, columns {', '.join(made.index.columns)}, identity {made.identity}")


@shards_app.command(
    "stats",
    epilog=example(
        "hpc-gen shards stats tables/mnist16",
        "hpc-gen shards stats tables/latents --column latents --rows 10000 --write latents_stats.pt",
    ),
)
def shards_stats(
    table: TableFolder,
    column: Annotated[str | None, typer.Option("--column", help="Which [the first that has channels].")] = None,
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="So many rows, drawn at random [all].")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Another one draws other rows.")] = 0,
    write: Annotated[
        Path | None, typer.Option("--write", help="File to write: .pt as LightningDiT has it, or .json.")
    ] = None,
    workspace: Workspace = None,
    json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Mean and deviation of a column by channel."""
    from hpc_gen.data.table import Table
    from shard_tools import stats

    root = workspace_of(workspace)
    opened = Table.open(root / table)
    having = [name for name, info in sorted(opened.index.columns.items()) if len(info.shape) > 0]
    if not having:
        raise UserError(f"no column of {table} has channels; it has {', '.join(opened.index.columns)}")
    name = column or having[0]
    if dry_run:
        say(f"{table}: would read column {name} of {min(rows or opened.rows, opened.rows):,} rows")
        return
    found = stats.channel_statistics(opened, name, rows, seed)
    if write is not None:
        stats.write_statistics(root / write, found, tuple(opened.index.columns[name].shape), say)
    if json:
        print_json(found)
    else:
        for line in stats.lines(found, opened):
            say(line)


def _format(text: str) -> str:
    from hpc_gen.runtime.errors import nearest

    if text not in FORMATS:
        raise UserError(f"unknown format '{text}'{nearest(text, FORMATS)}; known: {', '.join(FORMATS)}")
    return text
