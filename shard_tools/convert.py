"""Tables from tables: another format, another cut, a part of the rows. Killed at any time, the same command goes on.

Each shard is committed by itself, its facts first; the index comes last. Rows are copied bit for bit. Where the cut and
the rows stay the same, so does the identity: to a training, a converted table is the same table.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hpc_gen.data.foreign import shard_files
from hpc_gen.data.index import FACTS_FOLDER, INDEX_NAME, LABELS, LAYOUTS, ColumnInfo, Layout, TableIndex, differences
from hpc_gen.data.mapped import Int64Array
from hpc_gen.data.row_files import ROW_LAYOUTS, stored
from hpc_gen.data.row_names import Name
from hpc_gen.data.table import Table
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.runtime.progress import Progress
from hpc_gen.runtime.randomness import permutation
from shard_tools.edm_zip import EdmZip
from shard_tools.features import FeatureFiles, looks_like_features
from shard_tools.output import (
    Output,
    files_of,
    make_facts,
    names_of,
    shards_of,
    statistics,
    whole_unit,
    with_names,
    with_shards,
)

FEATURE_BATCH = 256  # of DiM's and U-ViT's extraction
SHARD_ROWS = 1024  # the default of encode.shard_rows

Say = Callable[[str], None]


class Rows(Protocol):
    """What is converted: a Table, or files of another program that are read like one."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        ...

    @property
    def index(self) -> TableIndex:
        """Columns, classes, tokenizer and recipe."""
        ...

    def read(self, rows: Int64Array, columns: Sequence[str]) -> dict[str, Tensor]:
        """Rows of the named columns."""
        ...

    def names(self, rows: Int64Array) -> list[Name] | None:
        """From which image each row came; None where nobody knows."""
        ...


@dataclass(frozen=True)
class Wish:
    """How the new table shall be. None: as the old one has it. `half`: floats as float16."""

    layout: Layout = "ptshard"
    shard_rows: int | None = None
    columns: tuple[str, ...] | None = None
    half: bool = False


def open_rows(path: Path, feature_batch: int = FEATURE_BATCH) -> Rows:
    """A table, a folder of numbered features, or EDM's zip. Raises as their own readers do."""
    if path.is_file():
        return EdmZip.open(path)
    if path.is_dir() and not (path / INDEX_NAME).exists() and looks_like_features(path):
        return FeatureFiles.open(path, feature_batch)
    return Table.open(path)


def convert(source: Rows, target: Path, wish: Wish, say: Say, dry_run: bool = False) -> TableIndex | None:
    """All rows of `source` as a table in `target`; None in a dry run. Raises UserError where `target` is another's."""
    index = source.index
    if isinstance(source, Table) and source.folder.resolve() == target.resolve():
        raise UserError(f"{target} is the table that is read; name another folder for the new one")
    cut = {shard.rows for shard in index.shards[:-1]} or {index.shards[0].rows}
    even = len(cut) == 1 and index.shards[-1].rows <= max(cut) and isinstance(source, Table)
    own_cut = max(cut) if even and index.layout not in ROW_LAYOUTS else SHARD_ROWS
    same = wish.shard_rows in (None, own_cut) and wish.columns is None
    wish = replace(wish, shard_rows=wish.shard_rows or own_cut)
    recipe = dict(index.recipe) if same else {**index.recipe, **_told(wish, index)}
    return _write(source, np.arange(source.rows), target, wish, recipe, say, dry_run)


def _told(wish: Wish, index: TableIndex) -> dict[str, Any]:
    """What a recipe must say of a conversion that left columns out."""
    if wish.columns is None or set(wish.columns) == set(index.columns):
        return {}
    return {"columns": sorted(wish.columns)}


def split(
    source: Rows, train: Path, held_out: Path, rows: int, wish: Wish, say: Say, seed: int = 0, dry_run: bool = False
) -> None:
    """Two tables of one: `rows` of its rows, drawn at random by `seed`, for validation, and the others for training.

    Every row goes to exactly one; both keep the order of the old table. Raises UserError when nothing is left of one.
    """
    if not 0 < rows < source.rows:
        raise UserError(f"cannot hold out {rows:,} of {source.rows:,} rows; both tables need at least one")
    drawn = permutation(seed, "shards/split", 0, source.rows)
    parts = {held_out: np.sort(drawn[:rows]), train: np.sort(drawn[rows:])}
    wish = replace(wish, shard_rows=wish.shard_rows or SHARD_ROWS)
    for folder, own in parts.items():
        what = "held out" if folder is held_out else "kept"
        drawn_how = {"of": _identity(source), "seed": seed, "rows": rows, "part": what}
        recipe = {**source.index.recipe, "split_table": drawn_how}
        _write(source, own, folder, wish, recipe, say, dry_run)


def _identity(source: Rows) -> str:
    """What the rows are: a table's identity, else a hash of what was listed."""
    if isinstance(source, Table):
        return source.identity
    listed = {"columns": {name: [c.dtype, *c.shape] for name, c in source.index.columns.items()}, "rows": source.rows}
    return hashlib.sha256(json.dumps([listed, dict(source.index.recipe)], sort_keys=True).encode()).hexdigest()


def _write(
    source: Rows, rows: Int64Array, target: Path, wish: Wish, recipe: dict[str, Any], say: Say, dry_run: bool
) -> TableIndex | None:
    """The rows as a table; what an earlier attempt has committed is kept."""
    names = _columns(source, wish)
    assert wish.shard_rows is not None  # set by the callers
    work = {
        "converted": _identity(source),
        "rows": hashlib.sha256(np.ascontiguousarray(rows, "<i8").tobytes()).hexdigest(),
        "layout": wish.layout,
        "shard_rows": wish.shard_rows,
        "columns": names,
        "half": wish.half,
    }
    _refuse_other(target, work, len(rows))
    output = Output("", target, work, rows, wish.shard_rows, wish.layout, _files(source, wish, rows))
    told = f"{len(rows):,} rows in {output.num_units:,} shards of up to {wish.shard_rows:,} ({wish.layout})"
    if dry_run:
        say(f"{target}: would write {told}, columns {', '.join(names)}")
        return None
    facts: list[dict[str, Any]] = []
    there, written = (target / INDEX_NAME).is_file(), 0
    with Progress(len(rows), f"{'check' if there else 'convert to'} {target.name}", unit="rows") as progress:
        for unit in range(output.num_units):
            whole = whole_unit(output, unit)
            written += whole is None
            facts.append(whole or _write_unit(source, output, unit, names, wish))
            progress.update(min(len(rows), (unit + 1) * wish.shard_rows))
    index = _index(source, facts, wish, recipe)
    index.write(target)
    done = "done already, and whole: " if there and not written else ""
    say(f"{target / INDEX_NAME}: {done}{told}, identity {index.identity}")
    return index


def _columns(source: Rows, wish: Wish) -> list[str]:
    have = list(source.index.columns)
    names = have if wish.columns is None else list(wish.columns)
    absent = [name for name in names if name not in have]
    if absent:
        raise UserError(f"there is no column {absent[0]!r} to convert; the table has {', '.join(have)}")
    if wish.layout in ROW_LAYOUTS and LABELS not in names:
        raise UserError(f"layout {wish.layout} has a folder per class, but there is no column 'labels'; use ptshard")
    return names


def _files(source: Rows, wish: Wish, rows: Int64Array) -> Mapping[int, str] | tuple[()]:
    """File of every row in the layouts of one row per file."""
    if wish.layout not in ROW_LAYOUTS:
        return ()
    labels = source.read(rows, (LABELS,))[LABELS].tolist()
    names = _class_names(source.index, max(labels) + 1)
    return {row: f"{names[label]}/{row:09d}.{wish.layout}" for row, label in zip(rows.tolist(), labels, strict=True)}


def _class_names(index: TableIndex, classes: int) -> tuple[str, ...]:
    """Names of the class folders: the table's own, else numbers."""
    return index.class_names or tuple(f"{number:05d}" for number in range(max(classes, index.num_classes)))


def _write_unit(source: Rows, output: Output, unit: int, names: list[str], wish: Wish) -> dict[str, Any]:
    """Commit one shard: its facts, then its files."""
    items = output.items(unit)
    columns = {name: _as_wished(column, wish) for name, column in source.read(np.array(items), names).items()}
    _refuse_not_finite(columns, items)
    with _staging(output.folder) as staging:
        infos = output.write(staging, unit, columns, items)
        facts = with_shards(make_facts(output.recipe, columns, []), infos)
        facts = with_names(facts, staging, unit, source.names(np.array(items)))
        commit.write_json(output.facts_path(unit), facts)
        for file in files_of(facts):
            commit.make_folder((output.folder / file).parent)
            commit.commit_file(staging / file, output.folder / file)
    return facts


def _refuse_not_finite(columns: Mapping[str, Tensor], items: Sequence[int]) -> None:
    """Raise DataError for the first row that holds NaN or infinity, which no training would survive."""
    for name, column in columns.items():
        if column.is_floating_point() and not bool(torch.isfinite(column).all()):
            finite = torch.isfinite(column.reshape(len(column), -1)).all(dim=1)
            row = items[int(finite.logical_not().nonzero()[0])]
            raise DataError(
                f"row {row:,} has values in column {name!r} that are not finite; "
                "repair the source, or if float16 is too narrow for them leave out --half"
            )


def _as_wished(column: Tensor, wish: Wish) -> Tensor:
    half = wish.half and column.dtype.is_floating_point
    return stored(wish.layout, column.to(torch.float16) if half else column)


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A folder for files in the making, beside the shards so that they can be renamed into place."""
    commit.make_folder(folder / FACTS_FOLDER)
    path = commit.make_folder(commit.staging_path(folder / FACTS_FOLDER / "shard"))
    try:
        yield path
    finally:
        commit.remove_tree(path)


def _index(source: Rows, facts: list[dict[str, Any]], wish: Wish, recipe: dict[str, Any]) -> TableIndex:
    old = source.index
    classes = old.num_classes or max((int(label) for fact in facts for label in fact["histogram"]), default=-1) + 1
    skipped = dict(old.statistics.get("skipped", {}))
    columns = {
        name: ColumnInfo(str(column["dtype"]), tuple(column["shape"])) for name, column in facts[0]["columns"].items()
    }
    return TableIndex(
        columns=columns,
        shards=tuple(info for fact in facts for info in shards_of(fact)),
        num_classes=classes if LABELS in columns else 0,
        class_names=_class_names(old, classes) if wish.layout in ROW_LAYOUTS else old.class_names,
        tokenizer=old.tokenizer,
        statistics=statistics(facts, classes, skipped),
        recipe=recipe,
        bad_images=old.bad_images,
        layout=wish.layout,
        names=names_of(facts),
    )


def _refuse_other(target: Path, work: dict[str, Any], num_rows: int) -> None:
    """Raise UserError when `target` holds what this conversion (of `num_rows`) did not write; sweep what it left
    unfinished."""
    if not target.is_dir():
        return
    listed = sorted((target / FACTS_FOLDER).glob("*.json"))
    for path in listed[:1]:
        try:
            found = json.loads(path.read_text())["recipe"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} holds no facts of a shard ({error!r}); delete the folder {target}") from error
        for key, old, new in differences(found, work):
            raise UserError(
                f"{target} holds a table that was written otherwise ({_other(target, key, old, new, num_rows)}); name "
                "another folder, or delete it"
            )
    strangers = [file for layout in LAYOUTS for file in shard_files(target, layout)] if not listed else []
    if not listed and (strangers or (target / INDEX_NAME).exists()):
        raise UserError(f"{target} holds another table already; name another folder, or delete it")
    commit.sweep(target / FACTS_FOLDER)


def _other(target: Path, key: str, old: Any, new: Any, num_rows: int) -> str:
    """How what lies in `target` differs, in words; hashes of rows and tables tell nobody anything."""
    if key == "converted":
        return "of another table, or of one that has changed since"
    if key != "rows":
        return f"{key} = {old!r}, asked is {new!r}"
    held = TableIndex.read(target).rows if (target / INDEX_NAME).is_file() else None
    if held in (None, num_rows):
        return "other rows of the table"  # an unfinished one, or another --seed
    return f"it has {held:,} rows, asked are {num_rows:,}"
