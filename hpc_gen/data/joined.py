"""Several tables of the same rows, opened as one: columns can be added to a table without rewriting it.

A joined table is a folder with `join.json` alone: which tables (by relative path), which columns of each, and how rows
meet: by their number, where all tables were made in the same order, or by the column `row_id`. The first table gives
the order and the cut into shards, so training goes through a joined table as it would through the first one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from hpc_gen.data.index import LABELS, ROW_ID, TableIndex
from hpc_gen.data.mapped import Int64Array
from hpc_gen.data.row_names import Name
from hpc_gen.data.table import RowReads, Table
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError, UserError

JOIN_NAME = "join.json"
FORMAT = "hpc-gen-join-1"
SAME_ROWS = ("source", "source_content", "split", "classes", "limit", "row_order")  # keys of recipes that say the rows

By = Literal["row", "row_id"]


@dataclass(frozen=True)
class _Part:
    """One table of a join: its columns that are used, and its row for each of the first table's (None: the same)."""

    table: Table
    columns: tuple[str, ...]
    rows: Int64Array | None


class JoinedTable(Table):
    """See the module; made by `open_joined`."""

    def __init__(self, folder: Path, parts: Sequence[_Part], index: TableIndex) -> None:
        """`index`: what the joined table says of itself."""
        super().__init__(folder, index)
        self._parts = tuple(parts)
        self._part_of = {name: number for number, part in enumerate(parts) for name in part.columns}

    @property
    def parts(self) -> tuple[Table, ...]:
        """The tables, the one that gives the order first."""
        return tuple(part.table for part in self._parts)

    def with_tokenizer(self, identity: Mapping[str, Any]) -> Table:
        """The same, said to be made by a tokenizer."""
        return JoinedTable(self.folder, self._parts, replace(self.index, tokenizer=dict(identity)))

    def plan(self, rows: Int64Array, columns: Sequence[str]) -> RowReads:
        """As `Table.plan`, of every table that has one of the columns."""
        self._check_columns(columns)
        self._check_rows(rows)
        plans: list[RowReads] = []
        for number, part in enumerate(self._parts):
            wanted = [name for name in columns if self._part_of[name] == number]
            if wanted:
                plans.append(part.table.plan(rows if part.rows is None else part.rows[rows], wanted))
        return _JoinedReads(tuple(plans), tuple(columns))

    @property
    def has_names(self) -> bool:
        """Whether one of the tables has names."""
        return any(part.table.has_names for part in self._parts)

    def names(self, rows: Int64Array) -> list[Name] | None:
        """As `Table.names`, of the first table that has any."""
        self._check_rows(rows)
        for part in self._parts:
            if part.table.has_names:
                return part.table.names(rows if part.rows is None else part.rows[rows])
        return None

    def keep_open(self, shards: int) -> None:
        """As `Table.keep_open`; the other tables may be cut otherwise."""
        largest = max(self.shard_rows)
        for part in self._parts:
            own = largest / (sum(part.table.shard_rows) / len(part.table.shard_rows))
            part.table.keep_open(shards if part is self._parts[0] else int(shards * (own + 1)) + 1)

    def announce(self, rows: Int64Array) -> None:
        """As `Table.announce`, to every table."""
        for part in self._parts:
            part.table.announce(rows if part.rows is None else part.rows[rows])

    @property
    def num_open(self) -> int:
        """Shards of all tables that are mapped now."""
        return sum(part.table.num_open for part in self._parts)

    def verify(self, full: bool = True) -> list[str]:
        """Problems of all tables."""
        return [problem for part in self._parts for problem in part.table.verify(full)]


@dataclass(frozen=True)
class _JoinedReads:
    plans: tuple[RowReads, ...]
    columns: tuple[str, ...]

    def read(self, begin: int, end: int) -> dict[str, Tensor]:
        """Rows of all plans, columns in the order asked."""
        found: dict[str, Tensor] = {}
        for plan in self.plans:
            found |= plan.read(begin, end)
        return {name: found[name] for name in self.columns}


def open_joined(folder: Path) -> JoinedTable:
    """Open the tables that `folder/join.json` names. Raises DataError when one is gone or another by now."""
    path = folder / JOIN_NAME
    try:
        document = json.loads(path.read_text())
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']!r}")
        by: By = document["by"]
        entries = [
            (str(entry["folder"]), str(entry["identity"]), tuple(str(name) for name in entry["columns"]))
            for entry in document["tables"]
        ]
        if by not in ("row", "row_id") or not entries:
            raise ValueError(f"by {by!r} of {len(entries)} tables")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} does not say a join of tables ({error!r}); join them again") from error
    tables: list[Table] = []
    for relative, identity, _ in entries:
        table = Table.open(folder / relative)
        if table.identity != identity:
            raise DataError(
                f"{path}: table {folder / relative} is not the one that was joined (identity {table.identity[:12]}, "
                f"not {identity[:12]}); restore it, or join them again"
            )
        tables.append(table)
    return _joined(folder, tables, [columns for _, _, columns in entries], by)


def join(folder: Path, tables: Sequence[Path], trust_order: bool = False, dry_run: bool = False) -> JoinedTable:
    """Write `folder/join.json` for these tables, the first one giving the order; returns the joined table.

    Rows meet by `row_id` where all have that column, else by number: then labels, and what the recipes say of the
    source, must agree; `trust_order`: nothing but the number of rows need agree. Raises UserError when they do not fit.
    """
    if len(tables) < 2:
        raise UserError("a join needs at least two tables")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; name a new folder for the joined table")
    opened = [Table.open(table) for table in tables]
    by: By = "row_id" if all(ROW_ID in table.index.columns for table in opened) else "row"
    taken: set[str] = set()
    columns: list[tuple[str, ...]] = []
    for table in opened:
        twice = sorted(taken & set(table.index.columns) - {LABELS, ROW_ID})
        if twice:
            raise UserError(f"table {table.folder} has the column {twice[0]!r}, which another of these has too")
        columns.append(tuple(name for name in table.index.columns if name not in taken))
        taken |= set(table.index.columns)
    if by == "row":
        for other in opened[1:]:
            _check_same_rows(opened[0], other, trust_order)
    found = _joined(folder, opened, columns, by)
    entries = [
        {"folder": _relative(table.folder, folder), "identity": table.identity, "columns": list(names)}
        for table, names in zip(opened, columns, strict=True)
    ]
    if dry_run:
        return found
    commit.make_folder(folder)
    commit.write_json(folder / JOIN_NAME, {"format": FORMAT, "by": by, "tables": entries})
    return found


def _relative(path: Path, folder: Path) -> str:
    return os.path.relpath(path.absolute(), folder.absolute())


def _joined(folder: Path, tables: Sequence[Table], columns: Sequence[tuple[str, ...]], by: By) -> JoinedTable:
    first = tables[0].index
    parts: list[_Part] = []
    known: dict[str, Any] = {}
    statistics: dict[str, Any] = {}
    for table, names in zip(tables, columns, strict=True):
        rows = None if by == "row" or table is tables[0] else _rows_by_id(tables[0], table)
        if rows is None and table.rows != tables[0].rows:
            raise UserError(
                f"table {table.folder} has {table.rows:,} rows, {tables[0].folder} {tables[0].rows:,}; encode both of "
                "the same images, or both with encode.row_ids=true"
            )
        parts.append(_Part(table, names, rows))
        known |= {name: table.index.columns[name] for name in names}
        told = table.index.statistics.get("columns", {})
        statistics |= {name: told[name] for name in names if name in told}
    made_of = [
        {"identity": t.identity, "columns": list(n), "tokenizer": dict(t.index.tokenizer)}
        for t, n in zip(tables, columns, strict=True)
    ]
    index = replace(
        first,
        columns=known,
        names=(),  # files of the tables, not of the join
        statistics=dict(first.statistics) | {"columns": statistics},
        recipe={"joined": made_of, "by": by},
    )
    return JoinedTable(folder, parts, index)


def _rows_by_id(first: Table, other: Table) -> Int64Array:
    """The row of `other` for each row of `first`. Raises UserError when an id is missing or stands twice."""
    wanted, have = (t.read(np.arange(t.rows), (ROW_ID,))[ROW_ID].numpy() for t in (first, other))
    order = np.argsort(have, kind="stable")
    ordered = have[order]
    twice = np.flatnonzero(np.diff(ordered) == 0)
    if twice.size:
        raise UserError(f"table {other.folder} has the row_id {int(ordered[twice[0]])} twice; encode it again")
    places = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
    absent = np.flatnonzero(ordered[places] != wanted)
    if absent.size:
        raise UserError(
            f"table {other.folder} lacks {absent.size:,} of the {first.rows:,} rows of {first.folder}, the first with "
            f"row_id {int(wanted[absent[0]])}; encode it of the same images"
        )
    rows: Int64Array = order[places].astype(np.int64)
    return rows


def _check_same_rows(first: Table, other: Table, trust_order: bool) -> None:
    if first.rows != other.rows or trust_order:
        return  # another number of rows is refused by _joined
    told = False
    one, two = first.index.recipe, other.index.recipe
    if all("source_content" in recipe for recipe in (one, two)):
        told = True
        for key in SAME_ROWS:
            if one.get(key) != two.get(key):
                raise UserError(
                    f"tables {first.folder} and {other.folder} are not of the same rows: {key} = {one.get(key)!r} and "
                    f"{two.get(key)!r}; encode both of the same images, or both with encode.row_ids=true"
                )
        bad = [{line.partition(": ")[0] for line in table.index.bad_images} for table in (first, other)]
        if bad[0] != bad[1]:
            raise UserError(
                f"tables {first.folder} and {other.folder} left out different images, so their rows do not meet by "
                "number; encode both with encode.row_ids=true"
            )
    if all(LABELS in table.index.columns for table in (first, other)):
        told = True
        labels = [table.read(np.arange(table.rows), (LABELS,))[LABELS] for table in (first, other)]
        differ = (labels[0] != labels[1]).nonzero()
        if len(differ):
            row = int(differ[0])
            raise UserError(
                f"row {row:,} has the label {int(labels[0][row])} in {first.folder} and {int(labels[1][row])} in "
                f"{other.folder}: they are not of the same rows; encode both with encode.row_ids=true"
            )
    if not told:
        raise UserError(
            f"nothing shows that the rows of {first.folder} and {other.folder} are of the same images in the same "
            "order; say --trust-order if you know"
        )
