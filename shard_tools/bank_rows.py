"""Rows of memory banks, wherever they lie: in tables, in files of the reference, in memory; and several as one.

A bank is any table with the column `cls_tokens`: the one that encoded the training images serves as it is, row for row.
Its names (data/row_names.py) say of which image each row is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hpc_gen.data.index import ColumnInfo, TableIndex
from hpc_gen.data.joined import JoinedTable
from hpc_gen.data.mapped import Int64Array
from hpc_gen.data.row_names import Name
from hpc_gen.data.table import Table
from hpc_gen.methods.gmem.bank import LOW_RANK_KEYS, LowRankBank
from hpc_gen.runtime import tensor_files
from hpc_gen.runtime.errors import DataError, UserError

SNIPPETS = "cls_tokens"
ROWS_AT_ONCE = 4096
ENCODER_KEYS = ("architecture", "weights_sha256", "grid", "positions")  # of dinov2's identity: what moves a class token
PIXEL_KEYS = ("image_size", "crop", "crop_size", "short_side", "background")  # of a recipe: what the network saw


class Part(Protocol):
    """Some of the rows of a bank: a table, or `Loose`."""

    @property
    def rows(self) -> int:
        """How many."""
        ...

    def read(self, rows: Int64Array, columns: Sequence[str]) -> dict[str, Tensor]:
        """Snippets of these rows."""
        ...

    def names(self, rows: Int64Array) -> list[Name] | None:
        """From which image each of them came."""
        ...


@dataclass(frozen=True)
class Loose:
    """Snippets [n, E] that lie in no table; those of a low-rank bank are multiplied out as they are read.

    `made`: what made them, as `made_of` has it; {} where nobody says.
    """

    held: Tensor | LowRankBank
    name_of: Callable[[int], Name]
    made: Mapping[str, Any]

    @property
    def rows(self) -> int:
        """How many."""
        return len(self.held if isinstance(self.held, Tensor) else self.held.coefficients)

    @property
    def width(self) -> int:
        """Elements of a row."""
        return int(self.held.shape[1]) if isinstance(self.held, Tensor) else len(self.held.mean)

    def read(self, rows: Int64Array, columns: Sequence[str]) -> dict[str, Tensor]:
        """Snippets float32 of these rows."""
        index = torch.from_numpy(np.ascontiguousarray(rows))
        return {SNIPPETS: (self.held[index] if isinstance(self.held, Tensor) else self.held.rows(index)).float()}

    def names(self, rows: Int64Array) -> list[Name] | None:
        """What each row is."""
        return [self.name_of(row) for row in np.asarray(rows).tolist()]


@dataclass(frozen=True)
class BankRows:
    """Parts one behind the other, all of one width: what `convert` writes as a table. `told`: how it came about."""

    parts: tuple[Part, ...]
    told: Mapping[str, Any]

    @property
    def rows(self) -> int:
        """Rows of all parts."""
        return sum(part.rows for part in self.parts)

    @property
    def index(self) -> TableIndex:
        """One column of snippets, and where they came from."""
        first = self.parts[0]
        columns = {SNIPPETS: ColumnInfo("float32", (width_of(first),))}
        recipe = {"bank": dict(self.told)}
        if not isinstance(first, Table):
            shards: tuple[Any, ...] = (_Shard(self.rows),)
            return TableIndex(columns=columns, shards=shards, recipe=recipe)
        return replace(first.index, columns=columns, num_classes=0, class_names=(), statistics={}, recipe=recipe)

    def read(self, rows: Int64Array, columns: Sequence[str]) -> dict[str, Tensor]:
        """Snippets float32 of these rows."""
        out = torch.empty(len(rows), width_of(self.parts[0]))
        for part, chosen, inside in self._shares(np.asarray(rows, np.int64)):
            out[torch.from_numpy(chosen)] = part.read(inside, [SNIPPETS])[SNIPPETS].float()
        return {SNIPPETS: out}

    def names(self, rows: Int64Array) -> list[Name] | None:
        """From which image each row came; null for those of a part that does not know, None where none knows."""
        found: list[Name] = [None] * len(rows)
        known = False
        for part, chosen, inside in self._shares(np.asarray(rows, np.int64)):
            names = part.names(inside)
            known = known or names is not None
            for place, name in zip(np.flatnonzero(chosen).tolist(), names or (), strict=names is not None):
                found[place] = name
        return found if known or any(_knows(part) for part in self.parts) else None

    def _shares(self, rows: Int64Array) -> Iterator[tuple[Part, Any, Int64Array]]:
        """(part, which of `rows` are its own, their numbers in it) for each part that has some of them."""
        begin = 0
        for part in self.parts:
            chosen = (rows >= begin) & (rows < begin + part.rows)
            if chosen.any():
                yield part, chosen, rows[chosen] - begin
            begin += part.rows


@dataclass(frozen=True)
class _Shard:
    """Of a bank that lies in no file yet."""

    rows: int


def _knows(part: Part) -> bool:
    return part.has_names if isinstance(part, Table) else True


def width_of(part: Part) -> int:
    """Elements of a snippet."""
    if isinstance(part, Table):
        return int(part.index.columns[SNIPPETS].shape[0])
    assert isinstance(part, Loose), part
    return part.width


def open_bank(folder: Path) -> Table:
    """A table with snippets. Raises UserError where it has none."""
    table = Table.open(folder)
    column = table.index.columns.get(SNIPPETS)
    if column is None or len(column.shape) != 1:
        raise UserError(
            f"{folder} has no column '{SNIPPETS}' of vectors (it has {', '.join(sorted(table.index.columns))}); "
            "encode it with the tokenizer dinov2"
        )
    return table


def pieces_of(part: Part) -> Iterator[tuple[int, Tensor]]:
    """(first row, snippets float32 [n, E]) of one pass over all rows, so that never all are in memory."""
    for begin in range(0, part.rows, ROWS_AT_ONCE):
        ids = np.arange(begin, min(begin + ROWS_AT_ONCE, part.rows))
        yield begin, part.read(ids, [SNIPPETS])[SNIPPETS].float()


def content_of(part: Part) -> str:
    """SHA-256 of the snippets as float32, one behind the other."""
    digest = hashlib.sha256()
    for _, piece in pieces_of(part):
        digest.update(piece.contiguous().numpy().data)
    return digest.hexdigest()


def refuse_not_finite(rows: Tensor, first: int, where: str) -> None:
    """Raise DataError naming the first row that holds numbers which are not finite; `first`: number of row 0."""
    bad = (~torch.isfinite(rows)).any(dim=1).nonzero()
    if len(bad):
        raise DataError(f"{where}: row {first + int(bad[0])} holds numbers that are not finite; build the bank anew")


def snippets_of_file(path: Path) -> Loose:
    """Rows of a file of the reference: a plain tensor, or a low-rank bank. They are views of a map of the file.

    Raises DataError for a file that is no bank, or holds numbers that are not finite.
    """
    found = tensor_files.read_nested(path)

    def name_of(row: int) -> Name:
        return f"{path.name}/{row}"

    if isinstance(found, dict) and set(LOW_RANK_KEYS) <= set(found):
        loose = Loose(LowRankBank.from_tensors(found, str(path)), name_of, {})
    else:
        if isinstance(found, dict) and len(found) == 1:
            (found,) = found.values()
        if not isinstance(found, Tensor) or found.ndim != 2 or not found.is_floating_point() or not len(found):
            what = f"{list(found.shape)} of {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
            raise DataError(
                f"{path} holds {what}, but a memory bank is floats [rows, width], or the keys "
                f"{', '.join(LOW_RANK_KEYS)} of a low-rank one; name a bank's file"
            )
        loose = Loose(found, name_of, {})
    for begin, piece in pieces_of(loose):
        refuse_not_finite(piece, begin, str(path))
    return loose


def made_of(bank: Table) -> dict[str, Any]:
    """What made a bank's snippets, as far as the table tells: {"dinov2": ..., "pixels": ...}, {} where it does not."""
    if isinstance(bank, JoinedTable):
        return next((made_of(part) for part in bank.parts if SNIPPETS in part.index.columns), {})
    recipe = bank.index.recipe
    told = recipe.get("bank", {}).get("made")
    if isinstance(told, dict):
        return told
    listed = [bank.index.tokenizer, *dict(recipe.get("also") or {}).values()]
    network = next((each for each in listed if each.get("name") == "dinov2"), None)
    return made_with(network, recipe) if network is not None else {}


def made_with(network: Mapping[str, Any], pixels: Mapping[str, Any]) -> dict[str, Any]:
    """As `made_of`, of the identity of a network and a recipe."""
    return {
        "dinov2": {key: network.get(key) for key in ENCODER_KEYS},
        "pixels": {key: pixels.get(key) for key in PIXEL_KEYS},
    }
