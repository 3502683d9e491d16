"""Memory banks of GMem: tables with a column of snippets, from and to the reference's files, grown and searched.

A bank is any table with the column `cls_tokens`: the one that encoded the training images serves as it is, row for row
(its index says of which image). Nothing is edited in place: a grown bank is a new table, with another identity.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpc_gen.data.index import ColumnInfo, TableIndex
from hpc_gen.data.mapped import Int64Array
from hpc_gen.data.table import Table
from hpc_gen.methods.gmem.bank import LOW_RANK_KEYS, LowRankBank, as_condition, mixed
from hpc_gen.runtime import commit, tensor_files
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.runtime.progress import Progress
from shard_tools.convert import Wish, convert

SNIPPETS = "cls_tokens"
SHARD_ROWS = 65_536  # of imported banks: 192 MiB of 768 float32
ROWS_AT_ONCE = 4096
Say = Callable[[str], None]


@dataclass(frozen=True)
class BankRows:
    """Snippets in memory or in a table, with more of them behind: what `convert` writes as a table."""

    more: Tensor
    first: Table | None = None
    told: dict[str, Any] | None = None

    @property
    def rows(self) -> int:
        """Rows of both parts."""
        return (self.first.rows if self.first is not None else 0) + len(self.more)

    @property
    def index(self) -> TableIndex:
        """One column of snippets, and where they came from."""
        recipe = {"bank": self.told or {}}
        column = ColumnInfo("float32", tuple(self.more.shape[1:]))
        if self.first is None:
            shards: tuple[Any, ...] = (_Shard(len(self.more)),)
            return TableIndex(columns={SNIPPETS: column}, shards=shards, recipe=recipe)
        old = self.first.index
        return replace(old, columns={SNIPPETS: column}, num_classes=0, class_names=(), statistics={}, recipe=recipe)

    def read(self, rows: Int64Array, columns: Sequence[str]) -> dict[str, Tensor]:
        """Snippets float32 of these rows."""
        rows = np.asarray(rows, np.int64)
        border = self.first.rows if self.first is not None else 0
        out = torch.empty(len(rows), *self.more.shape[1:])
        old = rows < border
        if self.first is not None and old.any():
            out[torch.from_numpy(old)] = self.first.read(rows[old], [SNIPPETS])[SNIPPETS].float()
        if not old.all():
            out[torch.from_numpy(~old)] = self.more[torch.from_numpy(rows[~old] - border)]
        return {SNIPPETS: out}


@dataclass(frozen=True)
class _Shard:
    """Of a bank that lies in no file yet."""

    rows: int


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


def snippets_of_file(path: Path) -> Tensor:
    """Rows float32 [N, E] of a file of the reference: a plain tensor, or a low-rank bank, which is multiplied out."""
    found = tensor_files.read_nested(path)
    if isinstance(found, dict) and set(LOW_RANK_KEYS) <= set(found):
        bank = LowRankBank.from_tensors(found, str(path))
        return bank.decode(bank.coefficients)
    if isinstance(found, dict) and len(found) == 1:
        (found,) = found.values()
    if not isinstance(found, Tensor) or found.ndim != 2 or not found.is_floating_point():
        what = f"{list(found.shape)} of {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
        raise DataError(
            f"{path} holds {what}, but a memory bank is floats [rows, width], or the keys "
            f"{', '.join(LOW_RANK_KEYS)} of a low-rank one; name a bank's file"
        )
    if not bool(torch.isfinite(found).all()):
        bad = int((~torch.isfinite(found)).any(dim=1).nonzero()[0])
        raise DataError(f"{path}: row {bad} holds numbers that are not finite; build the bank anew")
    return found.float()


def import_bank(path: Path, target: Path, say: Say, dry_run: bool = False) -> None:
    """A file of the reference as a table. Raises UserError or DataError."""
    rows = snippets_of_file(path)
    told = {"file_sha256": commit.sha256_file(path)}
    _write(BankRows(rows, told=told), target, SHARD_ROWS, say, dry_run)


def append(bank: Table, more: Tensor, target: Path, told: dict[str, Any], say: Say, dry_run: bool = False) -> None:
    """A new table: the rows of `bank` and `more` float32 [n, E] behind them. Raises UserError where they do not fit."""
    width = bank.index.columns[SNIPPETS].shape[0]
    if more.ndim != 2 or more.shape[1] != width or not len(more):
        raise UserError(f"snippets of shape {list(more.shape)} cannot be appended to a bank of width {width}")
    content = hashlib.sha256(more.float().contiguous().numpy().tobytes()).hexdigest()
    rows = BankRows(more.float(), bank, {"grown": bank.identity, "rows": len(more), "content": content, **told})
    _write(rows, target, None, say, dry_run)


def _write(rows: BankRows, target: Path, shard_rows: int | None, say: Say, dry_run: bool) -> None:
    convert(rows, target, Wish(shard_rows=shard_rows, columns=(SNIPPETS,)), say, dry_run)


def rows_of(bank: Table) -> Tensor:
    """All snippets float32 [N, E]."""
    parts = []
    with Progress(bank.rows, "read the bank", unit="rows") as progress:
        for begin in range(0, bank.rows, ROWS_AT_ONCE):
            ids = np.arange(begin, min(begin + ROWS_AT_ONCE, bank.rows))
            parts.append(bank.read(ids, [SNIPPETS])[SNIPPETS].float())
            progress.update(begin + len(ids))
    return torch.cat(parts)


def export_bank(bank: Table, path: Path, say: Say, rank: int | None = None, dry_run: bool = False) -> None:
    """The reference's file: a plain tensor, or with `rank` a low-rank bank; .safetensors or .pth by its name."""
    if path.suffix not in (".pth", ".pt", ".safetensors"):
        raise UserError(f"{path.name} is no name of a bank's file; end it in .pth or .safetensors")
    width = bank.index.columns[SNIPPETS].shape[0]
    if rank is not None and not 1 <= rank <= min(bank.rows, width):
        raise UserError(f"a bank of {bank.rows} rows of {width} has no rank {rank}; give 1 to {min(bank.rows, width)}")
    told = f"{bank.rows:,} rows of {width}" + (f" at rank {rank}" if rank is not None else "")
    if dry_run:
        say(f"{path}: would write {told}")
        return
    rows = rows_of(bank)
    tensors = {"memory_bank": rows} if rank is None else LowRankBank.of(rows, rank).tensors()
    if path.suffix == ".safetensors":
        tensor_files.write_tensors(path, {name: value.contiguous() for name, value in tensors.items()}, {})
    else:
        stream = io.BytesIO()
        whole: Any = rows if rank is None else {**tensors, "latent_dim": rank, "feature_dim": width}
        torch.save(whole, stream)
        commit.write_bytes(path, stream.getvalue())
    say(f"{path}: {told}")


def row_of(bank: Table, row: int) -> Tensor:
    """One snippet float32 [E]. Raises UserError for a row that the bank does not have."""
    if not 0 <= row < bank.rows:
        raise UserError(f"the bank has rows 0 to {bank.rows - 1}, not {row}; choose one of them")
    return bank.read(np.array([row]), [SNIPPETS])[SNIPPETS][0].float()


def row_between(bank: Table, i: int, j: int, alpha: float) -> Tensor:
    """alpha row_i + (1 - alpha) row_j as float32 [1, E]."""
    return mixed(torch.stack([row_of(bank, i), row_of(bank, j)]), 0, 1, alpha)[None]


def nearest(bank: Table, query: Tensor, count: int) -> list[tuple[int, float]]:
    """The `count` rows that are nearest to one snippet [E] by cosine: (row, cosine), nearest first; streamed.

    faiss finds them where it is installed, else torch; the same rows.
    """
    wanted = as_condition(query[None])
    best_rows, best = torch.empty(0, dtype=torch.int64), torch.empty(0)
    for begin in range(0, bank.rows, ROWS_AT_ONCE):
        ids = np.arange(begin, min(begin + ROWS_AT_ONCE, bank.rows))
        found, places = _top(as_condition(bank.read(ids, [SNIPPETS])[SNIPPETS]), wanted, min(count, len(ids)))
        best = torch.cat([best, found])
        best_rows = torch.cat([best_rows, places + begin])
        order = torch.argsort(best, descending=True, stable=True)[:count]
        best, best_rows = best[order], best_rows[order]
    return list(zip(best_rows.tolist(), best.tolist(), strict=True))


def _top(rows: Tensor, query: Tensor, count: int) -> tuple[Tensor, Tensor]:
    try:
        import faiss
    except ImportError:
        found = (rows @ query[0]).topk(count)
        return found.values, found.indices
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows.numpy())
    values, places = index.search(query.numpy(), count)
    return torch.from_numpy(values[0]), torch.from_numpy(places[0])
