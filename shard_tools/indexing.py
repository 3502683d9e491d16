"""`shards index`: an index with hashes and statistics for shards that another program wrote without one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hpc_gen.data.foreign import damaged_member
from hpc_gen.data.index import INDEX_NAME, LABELS, ShardInfo, TableIndex
from hpc_gen.data.ptshard import content_sha256
from hpc_gen.data.statistics import ChannelSums, has_channels
from hpc_gen.data.table import Table
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.runtime.progress import Progress
from shard_tools.output import statistics

Say = Callable[[str], None]


def write_index(folder: Path, tokenizer: Mapping[str, Any], say: Say, dry_run: bool = False) -> TableIndex:
    """Hash every shard of `folder` and write its index.json, whole or not at all; the shards stay as they are.

    `tokenizer`: identity of what made the latents, {} when nobody knows. A folder with an index keeps it when every
    byte agrees with it. Raises UserError when it does not or names another tokenizer, DataError for shards that are
    not a table.
    """
    if tokenizer.get("name") == "identity":
        raise UserError("the experiment's tokenizer is 'identity', which stores pixels; name the one of the latents")
    table = Table.open(folder)
    if (folder / INDEX_NAME).exists():
        return _checked(table, tokenizer, say)
    found = f"{table.rows:,} rows in {len(table.index.shards):,} files ({table.index.layout})"
    if dry_run:
        say(f"{folder}: would read {found} and write {folder / INDEX_NAME}")
        return table.index
    with Progress(table.rows, f"index {folder.name}", unit="rows") as progress:
        index = _hashed(table, tokenizer, progress)
    index.write(folder)
    say(f"{folder / INDEX_NAME}: {found}, identity {index.identity}")
    return index


def _checked(table: Table, tokenizer: Mapping[str, Any], say: Say) -> TableIndex:
    """The index that is there already. Raises UserError unless it holds."""
    if problems := table.verify():
        raise UserError(
            f"{table.folder} has an index already that does not agree with its shards: {problems[0]}; restore them, "
            f"or move {INDEX_NAME} away to index what is there now"
        )
    if tokenizer and dict(tokenizer) != dict(table.index.tokenizer):
        raise UserError(
            f"{table.folder} has an index already, of the tokenizer {dict(table.index.tokenizer)}, not "
            f"{dict(tokenizer)}; move {INDEX_NAME} away to index it anew"
        )
    say(f"{table.folder / INDEX_NAME}: there already, and every byte agrees with it")
    return table.index


def _hashed(table: Table, tokenizer: Mapping[str, Any], progress: Progress) -> TableIndex:
    """The surveyed index with hashes and statistics; a shard at a time, so memory holds one."""
    shards: list[ShardInfo] = []
    sums: dict[str, ChannelSums] = {}
    labels: Counter[int] = Counter()
    names = tuple(table.index.columns)
    row = 0
    for info in table.index.shards:
        path = table.folder / info.file
        columns = table.read(np.arange(row, row + info.rows), names)
        row += info.rows
        digest = commit.sha256_file(path)
        if (member := damaged_member(path)) is not None:
            raise DataError(f"shard {path} is damaged in {member}; restore it (no index is written)")
        shards.append(replace(info, sha256=digest, content=content_sha256(columns)))
        for name, column in columns.items():
            if column.is_floating_point() and not bool(column.isfinite().all()):
                raise DataError(
                    f"shard {path}: column '{name}' holds values that are not finite; make it again without them "
                    "(no index is written)"
                )
            if has_channels(column):
                part = ChannelSums.of(column)
                sums[name] = ChannelSums.merge([sums[name], part]) if name in sums else part
        labels.update(columns[LABELS].tolist())
        progress.update(row)
    facts = {
        "sums": {name: total.to_json() for name, total in sums.items()},
        "histogram": {str(label): count for label, count in labels.items()},
    }
    found = statistics([facts], table.index.num_classes, {})
    recipe = {"indexed": "shards of another program"}
    return replace(table.index, shards=tuple(shards), tokenizer=dict(tokenizer), statistics=found, recipe=recipe)
