"""Look at a table: what it holds (`info`), from which image each row came (`rows`), whether it is whole (`verify`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpc_gen.data.row_names import Name
from hpc_gen.data.table import Table
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.runtime.progress import format_bytes

SHOWN_CLASSES = 12
SHOWN_BAD_IMAGES = 5
ROWS_AT_ONCE = 4096


def info(folder: Path | str) -> dict[str, Any]:
    """What the index of a table says, JSON-ready, with totals; without one, what the files' headers say.

    Raises DataError when the index is not sound, or the folder is no table.
    """
    table = Table.open(folder)
    index = table.index
    document = index.to_json()
    document.pop("names", None)
    shards = document.pop("shards")
    sizes = [shard["rows"] for shard in shards]
    return document | {
        "folder": str(folder),
        "indexed": index.indexed,
        "has_names": table.has_names,
        "num_shards": len(shards),
        "rows_per_shard": [min(sizes), max(sizes)],
        "bytes": sum(shard["bytes"] for shard in shards),
    }


def format_info(facts: dict[str, Any]) -> list[str]:
    """`info` as lines for people."""
    low, high = facts["rows_per_shard"]
    lines = [
        f"table     {facts['folder']}",
        f"identity  {facts['identity']}",
        f"layout    {facts['layout']}"
        + ("" if facts["indexed"] else ", without an index: write one with hpc-gen shards index"),
        f"rows      {facts['rows']:,} in {facts['num_shards']:,} shards of {low if low == high else f'{low} to {high}'}"
        f" rows, {format_bytes(facts['bytes'])}",
    ]
    lines.append(
        "names     "
        + ("image of each row: hpc-gen shards rows" if facts["has_names"] else "none: nobody knows the images")
    )
    for name, column in sorted(facts["columns"].items()):
        line = f"column    {name}: {column['dtype']} {column['shape']}"
        statistics = facts["statistics"].get("columns", {}).get(name)
        if statistics and len(statistics["mean"]) <= 4:
            mean, std = (", ".join(f"{value:.2f}" for value in statistics[key]) for key in ("mean", "std"))
            line += f", mean {mean}, std {std}"
        lines.append(line)
    lines.append(f"classes   {facts['num_classes']}")
    histogram = facts["statistics"].get("label_histogram", {})
    for label, name in list(enumerate(facts["class_names"]))[:SHOWN_CLASSES]:
        count = f": {histogram.get(str(label), 0):,}" if histogram else ""
        lines.append(f"  {label:4d}  {name}{count}")
    if len(facts["class_names"]) > SHOWN_CLASSES:
        lines.append(f"  ... and {len(facts['class_names']) - SHOWN_CLASSES} more")
    for reason, count in sorted(facts["statistics"].get("skipped", {}).items()):
        lines.append(f"left out  {count:,}: {reason}")
    lines += [f"bad       {line}" for line in facts["bad_images"][:SHOWN_BAD_IMAGES]]
    if len(facts["bad_images"]) > SHOWN_BAD_IMAGES:
        lines.append(f"bad       ... and {len(facts['bad_images']) - SHOWN_BAD_IMAGES} more (index.json lists all)")
    recipe = ", ".join(
        f"{key}={value}" for key, value in facts["recipe"].items() if key not in ("classes", "tokenizer")
    )
    return [*lines, f"recipe    {recipe}"] if recipe else lines


def rows(folder: Path | str, chosen: Sequence[int] = (), containing: str | None = None) -> Iterator[tuple[int, Name]]:
    """(row, from which image it came) of the chosen rows, of all where none is; `containing`: only such names.

    Raises UserError for a row that the table does not have, and where nobody knows the images.
    """
    table = Table.open(folder)
    outside = [row for row in chosen if not 0 <= row < table.rows]
    if outside:
        raise UserError(f"table {folder} has rows 0 to {table.rows - 1}, not {outside[0]}; choose one of them")
    if not table.has_names:
        raise UserError(
            f"table {folder} does not say from which images its rows came; encode it again under another name of run, "
            "which takes over its shards and adds the names"
        )
    wanted = np.array(chosen, np.int64) if chosen else np.arange(table.rows)
    for begin in range(0, len(wanted), ROWS_AT_ONCE):
        part = wanted[begin : begin + ROWS_AT_ONCE]
        for row, name in zip(part.tolist(), table.names(part) or (), strict=True):
            if containing is None or (name is not None and containing in name):
                yield row, name


def shown(name: Name) -> str:
    """A name on one line."""
    if name is None:
        return "-"
    return name if name.isprintable() else repr(name)


def verify(folder: Path | str, full: bool = True) -> list[str]:
    """Problems of a table as sentences, an empty list when it is whole; `full` reads every byte."""
    try:
        return Table.open(folder).verify(full=full)
    except DataError as error:
        return [str(error)]
