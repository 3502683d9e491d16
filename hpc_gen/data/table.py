"""A table = a folder of shards and its index; rows are gathered in batches straight from the mapped files.

Folders that another program wrote without an index are read as they are (data/foreign.py).

Rows of a batch are grouped by shard and each group is copied in one numpy call per column: measured faster than any
worker process (specs/dependencies.md section 7), so the feed reads in one thread of the training process.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpc_gen.data.foreign import damaged_member, shard_files, survey
from hpc_gen.data.index import INDEX_NAME, LABELS, TableIndex
from hpc_gen.data.ptshard import as_bytes, content_sha256, open_shard
from hpc_gen.data.row_files import ROW_LAYOUTS, RowReader
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError, nearest

OPEN_SHARDS = 256  # kept mapped at once; must exceed two blocks of the order (data.shuffle_shards)

RowArray = npt.NDArray[Any]  # 1-D; one element = all bytes of one row, so a gather is one memory copy per row


class Table:
    """Random access to rows. Safe to share between threads."""

    def __init__(self, folder: Path, index: TableIndex, open_shards: int = OPEN_SHARDS) -> None:
        """Use `Table.open`; `open_shards` bounds how many shards stay mapped."""
        self.folder = Path(folder)
        self.index = index
        self.shard_rows: list[int] = [shard.rows for shard in index.shards]
        self._starts = np.concatenate([[0], np.cumsum(self.shard_rows)]).astype(np.int64)
        self._dtypes = {name: getattr(torch, column.dtype) for name, column in index.columns.items()}
        self._open_shards = open_shards
        self._class_numbers = {name: number for number, name in enumerate(index.class_names)}
        inside = {name: column for name, column in index.columns.items() if name != LABELS}
        self._row_reader = RowReader(index.layout, inside) if index.layout in ROW_LAYOUTS else None
        self._mapped: dict[int, dict[str, RowArray]] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, folder: Path | str, verify: bool = False) -> Self:
        """Read the index; with `verify` also check every shard's bytes. Raises DataError with the first problems.

        Without an index, every file's header is read instead, 0.1 to 0.2 ms each on a local disk: minutes for a million
        files of one row, so write one with `hpc-gen shards index` first.
        """
        folder = Path(folder)
        indexed = (folder / INDEX_NAME).exists()
        index = TableIndex.read(folder) if indexed else survey(folder)
        for name, column in index.columns.items():
            if not isinstance(getattr(torch, column.dtype, None), torch.dtype):
                raise DataError(
                    f"{folder / INDEX_NAME}: column {name!r} has the unknown dtype {column.dtype!r}"
                )
        table = cls(folder, index)
        if verify and (problems := table.verify()):
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise DataError(f"table {folder} failed verification: {problems[0]}{more}")
        return table

    @property
    def rows(self) -> int:
        """Rows of the table."""
        return int(self._starts[-1])

    @property
    def identity(self) -> str:
        """The index's identity hash."""
        return self.index.identity

    def read(
        self, rows: npt.NDArray[np.int64] | Tensor | Sequence[int], columns: Sequence[str]
    ) -> dict[str, Tensor]:
        """Rows [n] of the named columns: {column: Tensor [n, ...]} in the order asked; rows may repeat.

        Raises DataError for an unknown column, a row outside the table, or a shard that is not what the index says.
        """
        wanted = np.ascontiguousarray(rows, dtype=np.int64).reshape(-1)
        for name in columns:
            if name not in self.index.columns:
                valid = sorted(self.index.columns)
                raise DataError(
                    f"table {self.folder} has no column {name!r}{nearest(name, valid)}; it has {valid}"
                )
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.rows):
            raise DataError(
                f"table {self.folder} has {self.rows} rows; asked for {wanted.min()} to {wanted.max()}"
            )
        batch: dict[str, Tensor] = {}
        targets: dict[str, RowArray] = {}
        for name in columns:
            batch[name] = torch.empty(
                (wanted.size, *self.index.columns[name].shape), dtype=self._dtypes[name]
            )
            targets[name] = _row_array(batch[name])
        if wanted.size:
            self._gather(wanted, targets)
        return batch

    def _gather(self, wanted: npt.NDArray[np.int64], targets: dict[str, RowArray]) -> None:
        shard_of = np.searchsorted(self._starts, wanted, side="right") - 1
        by_shard = np.argsort(shard_of, kind="stable")
        shard_sorted = shard_of[by_shard]
        local = wanted[by_shard] - self._starts[shard_sorted]
        cuts = (np.flatnonzero(np.diff(shard_sorted)) + 1).tolist()
        for begin, end in zip([0, *cuts], [*cuts, wanted.size], strict=True):
            source = self._shard(int(shard_sorted[begin]))
            places, picks = by_shard[begin:end], local[begin:end]
            for name, target in targets.items():
                target[places] = source[name][picks]

    def _shard(self, number: int) -> dict[str, RowArray]:
        arrays = self._mapped.get(number)
        if arrays is None:
            arrays = {name: _row_array(tensor) for name, tensor in self._open(number).items()}
            with self._lock:
                self._mapped[number] = arrays
                while len(self._mapped) > self._open_shards:
                    del self._mapped[
                        next(iter(self._mapped))
                    ]  # the one mapped first; batches in use keep theirs
        return arrays

    def _open(self, number: int) -> dict[str, Tensor]:
        info = self.index.shards[number]
        path = self.folder / info.file
        says = "the index says" if self.index.indexed else "the table was opened with"
        if self._row_reader is not None:
            shard = self._row_reader.open(path, info.bytes, says)
            shard[LABELS] = torch.tensor([self._class_number(info.file)])
        else:
            shard = open_shard(path, self.index.columns, info.rows, info.bytes, says)
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

        Always: missing, truncated, misshapen and unlisted shards. `full` also reads every byte and compares SHA-256, or
        without an index the CRC-32 that each file carries of its arrays.
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


def _row_array(tensor: Tensor) -> RowArray:
    """A contiguous tensor [N, ...] as a 1-D array whose elements are whole rows, sharing its memory."""
    if tensor.shape[0] == 0:
        return np.empty(0, dtype=np.void)
    as_2d = as_bytes(tensor).numpy()
    size = as_2d.shape[1]
    return as_2d.view(f"u{size}" if size in (1, 2, 4, 8) else f"V{size}").reshape(-1)
