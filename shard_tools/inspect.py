"""Look at a table: what it holds (`info`) and whether it is whole (`verify`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpc_gen.data.table import Table
from hpc_gen.runtime.errors import DataError

SHOWN_CLASSES = 12
SHOWN_BAD_IMAGES = 5


def info(folder: Path | str) -> dict[str, Any]:
    """What the index of a table says, JSON-ready, with totals; without one, what the files' headers say.

    Raises DataError when the index is not sound, or the folder is no table.
    """
    index = Table.open(folder).index
    document = index.to_json()
    shards = document.pop("shards")
    sizes = [shard["rows"] for shard in shards]
    return document | {
        "folder": str(folder),
        "indexed": index.indexed,
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
        f" rows, {facts['bytes'] / 1e6:,.1f} MB",
    ]
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


def verify(folder: Path | str, full: bool = True) -> list[str]:
    """Problems of a table as sentences, an empty list when it is whole; `full` reads every byte."""
    try:
        return Table.open(folder).verify(full=full)
    except DataError as error:
        return [str(error)]
