"""Memory banks of GMem: tables with a column of snippets, from and to the reference's files, grown and searched.

Nothing is edited in place: a grown bank is a new table, with another identity. Nothing here needs a bank in memory:
rows go through in pieces, and files are written as the pieces come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpc_gen.data.index import differences
from hpc_gen.data.row_names import Name
from hpc_gen.data.table import Table
from hpc_gen.methods.gmem import low_rank
from hpc_gen.methods.gmem.bank import LOW_RANK_KEYS, as_condition, mixed
from hpc_gen.methods.gmem.low_rank import LOW_RANK_METHODS, Directions, Randomised
from hpc_gen.runtime import commit, tensor_files
from hpc_gen.runtime.errors import UserError
from hpc_gen.runtime.errors import nearest as nearest_word
from hpc_gen.runtime.progress import Progress
from hpc_gen.runtime.tensor_files import Pieces
from shard_tools.bank_rows import (
    SNIPPETS,
    BankRows,
    Loose,
    content_of,
    made_of,
    open_bank,
    pieces_of,
    refuse_not_finite,
    snippets_of_file,
    width_of,
)
from shard_tools.convert import Wish, convert
from shard_tools.inspect import shown

__all__ = ["append", "export_bank", "import_bank", "nearest", "open_bank", "row_between", "row_of", "snippets_of_file"]

SHARD_ROWS = 65_536  # of imported banks: 192 MiB of 768 float32
Say = Callable[[str], None]


def import_bank(path: Path, target: Path, say: Say, dry_run: bool = False) -> None:
    """A file of the reference as a table. Raises UserError or DataError."""
    rows = BankRows((snippets_of_file(path),), {"file_sha256": commit.sha256_file(path)})
    _write(rows, target, SHARD_ROWS, say, dry_run)


def append(
    bank: Table, more: Loose | Table, target: Path, told: Mapping[str, Any], say: Say, dry_run: bool = False
) -> None:
    """A new table: the rows of `bank` and `more` behind them, with the names of both.

    Raises UserError where they do not fit: another width, or known to be made by another network or of other crops.
    """
    width = width_of(bank)
    if width_of(more) != width or not more.rows:
        raise UserError(f"{more.rows} snippets of width {width_of(more)} cannot be appended to a bank of width {width}")
    made, other = made_of(bank), made_of(more) if isinstance(more, Table) else more.made
    for key, ours, theirs in differences(made, other) if made and other else ():
        raise UserError(
            f"the snippets to append were not made as those of {bank.folder}: {key} is {ours!r} there and {theirs!r} "
            "here; encode them with the network and crop of the bank"
        )
    content = more.identity if isinstance(more, Table) else content_of(more)
    grown: dict[str, Any] = {"grown": bank.identity, "rows": more.rows, "content": content, **told}
    if made or other:
        grown["made"] = made or other
    _write(BankRows((bank, more), grown), target, None, say, dry_run)


def _write(rows: BankRows, target: Path, shard_rows: int | None, say: Say, dry_run: bool) -> None:
    convert(rows, target, Wish(shard_rows=shard_rows, columns=(SNIPPETS,)), say, dry_run)


def export_bank(
    bank: Table,
    path: Path,
    say: Say,
    rank: int | None = None,
    method: str = "exact",
    options: Randomised | None = None,
    dry_run: bool = False,
) -> None:
    """The reference's file: a plain tensor, or with `rank` a low-rank bank; .safetensors or .pth by its name.

    `method` exact or randomised, with `options` (methods/gmem/low_rank.py). Raises UserError for a rank that the bank
    does not have, DataError for rows that are not finite.
    """
    if path.suffix not in (".pth", ".pt", ".safetensors"):
        raise UserError(f"{path.name} is no name of a bank's file; end it in .pth or .safetensors")
    if method not in LOW_RANK_METHODS:
        hint = nearest_word(method, LOW_RANK_METHODS)
        raise UserError(f"unknown method '{method}'{hint}; there are: {', '.join(LOW_RANK_METHODS)}")
    width = width_of(bank)
    if rank is not None and not 1 <= rank <= min(bank.rows, width):
        raise UserError(f"a bank of {bank.rows} rows of {width} has no rank {rank}; give 1 to {min(bank.rows, width)}")
    told = f"{bank.rows:,} rows of {width}" + (f" at rank {rank} ({method})" if rank is not None else "")
    if dry_run:
        say(f"{path}: would write {told}")
        return
    if rank is None:
        _write_file(path, {"memory_bank": Pieces((bank.rows, width), torch.float32, lambda: _pass(bank))}, {})
    else:
        found = _directions(bank, rank, method, options)
        told += f", which hold {100 * found.held:.2f}% of the variance"
        coefficients = Pieces(
            (bank.rows, rank), torch.float32, lambda: (found.coefficients(piece) for piece in _pass(bank))
        )
        whole = (coefficients, found.basis, found.singular_values.float(), found.mean.float())
        sizes = {"latent_dim": rank, "feature_dim": width}
        _write_file(path, dict(zip(LOW_RANK_KEYS, whole, strict=True)), sizes)
    say(f"{path}: {told}")


def _directions(bank: Table, rank: int, method: str, options: Randomised | None) -> Directions:
    if method == "exact":
        return low_rank.exact(lambda: _pass(bank), rank)
    return low_rank.randomised(lambda: _pass(bank), rank, options)


def _write_file(path: Path, tensors: Mapping[str, Tensor | Pieces], numbers: Mapping[str, int]) -> None:
    """A single tensor is the whole of a .pth, as the reference reads it; `numbers` have no place in safetensors."""
    if path.suffix == ".safetensors":
        tensor_files.write_tensors(path, tensors, {})
    elif len(tensors) == 1:
        tensor_files.write_torch(path, next(iter(tensors.values())))
    else:
        tensor_files.write_torch(path, {**tensors, **numbers})


def _pass(bank: Table) -> Iterator[Tensor]:
    """Snippets float32 [n, E] of one pass over the bank. Raises DataError for rows that are not finite."""
    with Progress(bank.rows, "read the bank", unit="rows") as progress:
        for begin, piece in pieces_of(bank):
            refuse_not_finite(piece, begin, str(bank.folder))
            yield piece
            progress.update(begin + len(piece))


def row_of(bank: Table, row: int) -> Tensor:
    """One snippet float32 [E]. Raises UserError for a row that the bank does not have."""
    if not 0 <= row < bank.rows:
        raise UserError(f"the bank has rows 0 to {bank.rows - 1}, not {row}; choose one of them")
    return bank.read(np.array([row]), [SNIPPETS])[SNIPPETS][0].float()


def row_between(bank: Table, i: int, j: int, alpha: float) -> Loose:
    """alpha row_i + (1 - alpha) row_j as one row, named after both."""
    between = mixed(torch.stack([row_of(bank, i), row_of(bank, j)]), 0, 1, alpha)[None]
    ends = [shown(name) for name in bank.names(np.array([i, j])) or (f"row {i}", f"row {j}")]
    name = f"{alpha:g} of {ends[0]}, {1 - alpha:g} of {ends[1]}"
    return Loose(between, lambda _: name, made_of(bank))


def nearest(bank: Table, query: Tensor, count: int) -> list[tuple[int, float, Name]]:
    """The `count` rows that are nearest to one snippet [E] by cosine: (row, cosine, its image), nearest first.

    The bank is streamed. faiss finds them where it is installed, else torch; the same rows.
    """
    wanted = as_condition(query[None])
    best_rows, best = torch.empty(0, dtype=torch.int64), torch.empty(0)
    for begin, piece in pieces_of(bank):
        found, places = _top(as_condition(piece), wanted, min(count, len(piece)))
        best = torch.cat([best, found])
        best_rows = torch.cat([best_rows, places + begin])
        order = torch.argsort(best, descending=True, stable=True)[:count]
        best, best_rows = best[order], best_rows[order]
    names = bank.names(best_rows.numpy()) or [None] * len(best_rows)
    return list(zip(best_rows.tolist(), best.tolist(), names, strict=True))


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
