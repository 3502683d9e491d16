"""A table = a folder of shards and its index; rows are gathered in batches straight from the mapped files.

Folders that another program wrote without an index are read as they are (data/foreign.py).

Rows are copied in one numpy call per column (data/mapped.py): measured faster than any worker process
(specs/dependencies.md section 7), so the feed reads in one thread of the training process.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpc_gen.data.foreign import damaged_member, shard_files, survey
from hpc_gen.data.index import INDEX_NAME, LABELS, TableIndex
from hpc_gen.data.mapped import Int64Array, MappedShards, Shard
from hpc_gen.data.packed import ShardOpener
from hpc_gen.data.ptshard import content_sha256
from hpc_gen.data.row_files import ROW_LAYOUTS, RowReader
from hpc_gen.data.row_names import Name, RowNames, read_names
from hpc_gen.data.shard_files import open_columns
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError, nearest

OPEN_SHARDS = 256  # kept mapped at once where no feed says how many its order needs
KEPT_ROWS = 256  # of layouts of one row per file


class RowReads(Protocol):
    """Rows that will be read; see `Table.plan`."""

    def read(self, begin: int, end: int) -> dict[str, Tensor]:
        """Rows number `begin` to `end` of the plan, at least one: {column: Tensor [n, ...]}, the caller's own."""
        ...


class Table:
    """Random access to rows. Safe to share between threads."""

    def __init__(self, folder: Path, index: TableIndex, open_shards: int = OPEN_SHARDS) -> None:
        """Use `Table.open`; `open_shards` bounds how many shards stay mapped."""
        self.folder = Path(folder)
        self.index = index
        self.shard_rows: list[int] = [shard.rows for shard in index.shards]
        self._starts = np.concatenate([[0], np.cumsum(self.shard_rows)]).astype(np.int64)
        self._class_numbers = {name: number for number, name in enumerate(index.class_names)}
        inside = {name: column for name, column in index.columns.items() if name != LABELS}
        self._row_reader = RowReader(index.layout, inside) if index.layout in ROW_LAYOUTS else None
        self._opener = ShardOpener(index.columns) if index.layout == "ptshard" else None
        self._mapped = MappedShards(self._starts, index.columns, self._open, open_shards)
        self._names = RowNames(self.folder, index.names)
        self._rows: dict[int, Shard] = {}
        self._lock = threading.Lock()

    @staticmethod
    def open(folder: Path | str, verify: bool = False) -> Table:
        """Read the index; with `verify` also check every shard's bytes. Raises DataError with the first problems.

        Without an index, every file's header is read instead, 0.1 to 0.2 ms each on a local disk: minutes for a million
        files of one row, so write one with `hpc-gen shards index` first.
        """
        from hpc_gen.data import joined  # which is made of tables

        folder = Path(folder)
        table = joined.open_joined(folder) if (folder / joined.JOIN_NAME).exists() else _open_one(folder)
        if verify and (problems := table.verify()):
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise DataError(f"table {folder} failed verification: {problems[0]}{more}")
        return table

    def with_tokenizer(self, identity: Mapping[str, Any]) -> Table:
        """The same table, said to be made by a tokenizer."""
        return Table(self.folder, replace(self.index, tokenizer=dict(identity)))

    @property
    def rows(self) -> int:
        """Rows of the table."""
        return int(self._starts[-1])

    @property
    def identity(self) -> str:
        """The index's identity hash."""
        return self.index.identity

    @property
    def has_names(self) -> bool:
        """Whether it is known from which image each row came."""
        return bool(self.index.names)

    def names(self, rows: Int64Array) -> list[Name] | None:
        """From which image each of these rows came (data/row_names.py); None where nobody has said it of this table.

        Raises DataError for a row outside the table, or names that are not those that the index tells of.
        """
        self._check_rows(rows)
        return self._names(rows) if self.has_names else None

    def _check_rows(self, rows: Int64Array) -> None:
        if rows.size and (rows.min() < 0 or rows.max() >= self.rows):
            raise DataError(f"table {self.folder} has {self.rows} rows; asked for {rows.min()} to {rows.max()}")

    def read(self, rows: npt.NDArray[np.int64] | Tensor | Sequence[int], columns: Sequence[str]) -> dict[str, Tensor]:
        """Rows [n] of the named columns: {column: Tensor [n, ...]} in the order asked; rows may repeat.

        Raises DataError for an unknown column, a row outside the table, or a shard that is not what the index says.
        """
        wanted = np.ascontiguousarray(rows, dtype=np.int64).reshape(-1)
        if not wanted.size:
            self._check_columns(columns)
            return {name: self._empty(name, 0) for name in columns}
        return self.plan(wanted, columns).read(0, wanted.size)

    def plan(self, rows: Int64Array, columns: Sequence[str]) -> RowReads:
        """Rows [n], n >= 1, to be read piece by piece; what can be done for all of them at once is done now.

        Raises DataError as `read`.
        """
        self._check_columns(columns)
        if self._row_reader is None:
            planned = self._mapped.plan(rows, columns)
            if planned is not None:
                return planned
        self._check_rows(rows)
        return _PlannedFiles(self, rows, tuple(columns))

    def _check_columns(self, columns: Sequence[str]) -> None:
        for name in columns:
            if name not in self.index.columns:
                valid = sorted(self.index.columns)
                raise DataError(f"table {self.folder} has no column {name!r}{nearest(name, valid)}; it has {valid}")

    def read_files(self, wanted: Int64Array, columns: Sequence[str]) -> dict[str, Tensor]:
        """As `read`, where each row is a file of its own."""
        batch = {name: self._empty(name, wanted.size) for name in columns}
        for place, number in enumerate(wanted.tolist()):
            row = self._row(number)
            for name, target in batch.items():
                target[place] = row[name][0]
        return batch

    def keep_open(self, shards: int) -> None:
        """Hold at most so many shards mapped: as many as the order reads from at a time, or each is opened anew."""
        self._mapped.limit = max(1, shards)

    def announce(self, rows: Int64Array) -> None:
        """Rows that will be read soon: the system is asked to fetch their shards meanwhile. Nothing is waited for.

        Rows in random order would be fetched page by page, each waited for; a shard as a whole comes at the speed of
        the disk.
        """
        if self._row_reader is not None:
            return
        will_need([self.folder / self.index.shards[n].file for n in self._mapped.missing(rows)])

    @property
    def num_open(self) -> int:
        """Shards that are mapped now."""
        return self._mapped.num_open

    def _empty(self, name: str, rows: int) -> Tensor:
        column = self.index.columns[name]
        return torch.empty((rows, *column.shape), dtype=getattr(torch, column.dtype))

    def _row(self, number: int) -> Shard:
        """A file of one row, from memory when it was read of late."""
        row = self._rows.get(number)
        if row is None:
            row = self._open(number)
            with self._lock:
                self._rows[number] = row
                while len(self._rows) > KEPT_ROWS:
                    del self._rows[next(iter(self._rows))]  # the one read first
        return row

    def _open(self, number: int) -> dict[str, Tensor]:
        info = self.index.shards[number]
        path = self.folder / info.file
        says = "the index says" if self.index.indexed else "the table was opened with"
        if self._row_reader is not None:
            shard = self._row_reader.open(path, info.bytes, says)
            shard[LABELS] = torch.tensor([self._class_number(info.file)])
        elif self._opener is not None:
            shard = self._opener.open(path, info.rows, info.bytes, says)
        else:
            shard = open_columns(self.index.layout, path, self.index.columns, info.rows, info.bytes, says)
        labels = shard.get(LABELS)
        if labels is not None and self.index.num_classes:
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.index.num_classes:
                raise DataError(
                    f"shard {path}, column {LABELS!r}: labels run from {low} to {high}, the index has "
                    f"{self.index.num_classes} classes; encode the table again"
                )
        return {name: shard[name] for name in self.index.columns}

    def _class_number(self, file: str) -> int:
        """The label of a file CLASS/NAME of one row: it is not in the file itself."""
        name = file.partition("/")[0]
        if name not in self._class_numbers:
            raise DataError(f"shard {self.folder / file} lies in a folder that is no class of the index; index it anew")
        return self._class_numbers[name]

    def verify(self, full: bool = True) -> list[str]:
        """Compare the folder with the index; returns the problems as sentences, an empty list when it is whole.

        Always: missing, truncated, misshapen and unlisted shards, and names of rows that are not whole. `full` also
        reads every byte and compares SHA-256, or without an index the CRC-32 that each file carries of its arrays.
        """
        problems: list[str] = []
        for number in range(len(self.index.shards)):
            try:
                shard = self._open(number)
            except DataError as error:
                problems.append(str(error))
                continue
            if full:
                problems += self._damage(number, shard)
        listed = {info.file for info in self.index.shards}
        for file in shard_files(self.folder, self.index.layout):
            if file not in listed:
                problems.append(f"shard {self.folder / file} is not in the index; move it away")
        for names in self.index.names:
            try:
                read_names(self.folder, names)
            except DataError as error:
                problems.append(str(error))
        return problems

    def _damage(self, number: int, shard: dict[str, Tensor]) -> list[str]:
        """The problem with the bytes of a shard that could be opened, if there is one."""
        info = self.index.shards[number]
        path = self.folder / info.file
        if not self.index.indexed:
            member = damaged_member(path)
            return [f"shard {path} is damaged in {member}; restore it"] if member is not None else []
        if commit.sha256_file(path) == info.sha256:
            return []
        rows = "its rows differ" if content_sha256(shard) != info.content else "its rows are unharmed"
        return [f"shard {path} has another SHA-256 than the index says ({rows}); restore it"]


def will_need(paths: Sequence[Path]) -> None:
    """Ask the system, from a thread, to read files into its cache: an advice about a large file takes milliseconds."""
    if paths:
        threading.Thread(target=lambda: [_advise(path) for path in paths], name="will-need", daemon=True).start()


def _advise(path: Path) -> None:
    """A file that cannot be opened is left to whoever reads it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
    except OSError:
        pass  # a file system without it: an advice is no more than that
    finally:
        os.close(descriptor)


def _open_one(folder: Path) -> Table:
    """A table that is no join."""
    index = TableIndex.read(folder) if (folder / INDEX_NAME).exists() else survey(folder)
    for name, column in index.columns.items():
        if not isinstance(getattr(torch, column.dtype, None), torch.dtype):
            raise DataError(f"{folder / INDEX_NAME}: column {name!r} has the unknown dtype {column.dtype!r}")
    return Table(folder, index)


@dataclass(frozen=True)
class _PlannedFiles:
    """Rows that are a file each: nothing can be done ahead."""

    table: Table
    rows: Int64Array
    columns: tuple[str, ...]

    def read(self, begin: int, end: int) -> dict[str, Tensor]:
        return self.table.read_files(self.rows[begin:end], self.columns)
