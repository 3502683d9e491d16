"""Writing a whole table from columns in memory: small tables, derived columns, tests. Large ones are made by stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from hpc_gen.data import ptshard
from hpc_gen.data.index import Layout, NamesInfo, ShardInfo, TableIndex
from hpc_gen.data.row_names import Name, write_names
from hpc_gen.data.shard_files import shard_name, write_columns
from hpc_gen.runtime import commit


def write_table(
    folder: Path,
    columns: Mapping[str, Tensor],
    *,
    shard_rows: int,
    num_classes: int = 0,
    recipe: Mapping[str, Any] | None = None,
    layout: Layout = "ptshard",
    names: Sequence[Name] | None = None,
) -> TableIndex:
    """Cut `columns` {name: [N, ...]} into shards of `shard_rows` rows below `folder`, index last; returns the index.

    `layout`: one of many rows per shard; `names`: from which image each row came, where that is known.

    Raises DataError when the columns have different numbers of rows, UserError when the disk is full.
    """
    rows = ptshard.num_rows(columns, str(folder))
    commit.make_folder(folder)
    shards: list[ShardInfo] = []
    named: list[NamesInfo] = []
    for number, start in enumerate(range(0, rows, shard_rows)):
        part = {name: column[start : start + shard_rows].contiguous() for name, column in columns.items()}
        name = shard_name(layout, number)
        staged = commit.staging_path(folder / name)
        with commit.CommitStream(staged) as stream:
            write_columns(layout, stream, part, start)
        size, digest = stream.bytes, stream.sha256
        commit.commit_file(staged, folder / name)
        taken = min(shard_rows, rows - start)
        shards.append(ShardInfo(name, taken, size, digest, ptshard.content_sha256(part)))
        if names is not None:
            named.append(write_names(folder, number, names[start : start + shard_rows]))
    index = TableIndex(
        ptshard.columns_of(columns),
        tuple(shards),
        num_classes=num_classes,
        recipe=dict(recipe or {}),
        layout=layout,
        names=tuple(named),
    )
    index.write(folder)
    return index
