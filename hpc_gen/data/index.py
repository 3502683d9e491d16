"""`index.json`: what a table holds, written last, so a folder without one is not a table yet.

The index is checked against itself when it is read: `identity` is recomputed, so an index edited by hand or cut short
is refused instead of trusted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Self, get_args

from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError

INDEX_NAME = "index.json"
FACTS_FOLDER = "facts"  # beside the shards of the stage encode: what each unit made, merged into the index at the end
FORMAT = "hpc-gen-table-1"
LABELS = "labels"  # the column of class numbers, int64 []
ROW_ID = "row_id"  # a column by which tables are joined, int64 []: the number of the image in its source
Layout = Literal["ptshard", "pt", "npz", "safetensors", "webdataset"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


@dataclass(frozen=True)
class ColumnInfo:
    """One column: torch dtype name (`uint8`, `float16`, `int64`) and the shape of one row."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One shard: file name below the table's folder, rows, size, SHA-256 of the file and of its columns' bytes.

    In a table without an index (data/foreign.py) `sha256` is empty and `content` the hash of the file's directory.
    """

    file: str
    rows: int
    bytes: int
    sha256: str
    content: str


@dataclass(frozen=True, slots=True)
class NamesInfo:
    """Names of the images of consecutive rows (data/row_names.py): file below the folder, rows, size, SHA-256."""

    file: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class TableIndex:
    """The whole of `index.json`; see the field comments for units."""

    columns: Mapping[str, ColumnInfo]
    shards: tuple[ShardInfo, ...]
    num_classes: int = 0  # 0 = a table without labels
    class_names: tuple[str, ...] = ()
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    statistics: Mapping[str, Any] = field(default_factory=dict)  # per-channel mean and std, label histogram
    recipe: Mapping[str, Any] = field(default_factory=dict)  # what was asked for; no path of any machine
    bad_images: tuple[str, ...] = ()  # source ids left out because they could not be read
    layout: Layout = "ptshard"  # pt, npz: one row per file, data/row_files.py; the others: data/shard_files.py
    names: tuple[NamesInfo, ...] = ()  # from which image each row came, in row order; () where nobody knows

    @property
    def indexed(self) -> bool:
        """False: nobody has written this index, it was gathered from the files' headers."""
        return bool(self.shards[0].sha256)

    @property
    def rows(self) -> int:
        """Rows in all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def identity(self) -> str:
        """SHA-256 of what changes numbers: columns, the content and cut of the shards, classes, tokenizer, recipe.

        Left out: names and sizes of files and their raw hash (another torch may pack the same rows otherwise), their
        layout, the statistics and list of bad images (both follow from the rest), and the names of the images, which
        change no number: tables of before there were names keep their identity when they get them.
        """
        facts = {
            "format": FORMAT,
            "columns": {name: asdict(column) for name, column in self.columns.items()},
            "shards": [[shard.rows, shard.content] for shard in self.shards],
            "num_classes": self.num_classes,
            "class_names": list(self.class_names),
            "tokenizer": dict(self.tokenizer),
            "recipe": dict(self.recipe),
        }
        text = json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The JSON object of the file."""
        return {
            "format": FORMAT,
            "identity": self.identity,
            "rows": self.rows,
            "columns": {
                name: {"dtype": column.dtype, "shape": list(column.shape)} for name, column in self.columns.items()
            },
            "shards": [asdict(shard) for shard in self.shards],
            "num_classes": self.num_classes,
            "class_names": list(self.class_names),
            "tokenizer": dict(self.tokenizer),
            "statistics": dict(self.statistics),
            "recipe": dict(self.recipe),
            "bad_images": list(self.bad_images),
            "layout": self.layout,
            **({"names": [asdict(each) for each in self.names]} if self.names else {}),
        }

    def write(self, folder: Path) -> None:
        """Write `folder/index.json` whole or not at all; call it when every shard is in place."""
        commit.write_json(folder / INDEX_NAME, self.to_json())

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read and check `folder/index.json`; raises DataError with what is wrong, where, and the fix."""
        folder = Path(folder)
        path = folder / INDEX_NAME
        try:
            document = json.loads(path.read_text())
        except FileNotFoundError:
            raise DataError(why_no_index(folder)) from None
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read as an index ({error}); write the table again") from error
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            found = document.get("format") if isinstance(document, dict) else type(document).__name__
            raise DataError(f"{path} is not an index of format {FORMAT!r} (found {found!r}); write the table again")
        try:
            index = cls._from_json(document)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path} lacks or misstates a field ({error!r}); write the table again") from error
        for claim in ("rows", "identity"):
            if document.get(claim) != getattr(index, claim):
                raise DataError(
                    f"{path} says {claim} {document.get(claim)!r} but its own fields give {getattr(index, claim)!r}; "
                    "it was edited or damaged: write the table again"
                )
        return index

    @classmethod
    def _from_json(cls, document: Mapping[str, Any]) -> Self:
        shards = tuple(
            ShardInfo(str(s["file"]), int(s["rows"]), int(s["bytes"]), str(s["sha256"]), str(s["content"]))
            for s in document["shards"]
        )
        if not shards:
            raise ValueError("no shards")
        names = tuple(
            NamesInfo(str(n["file"]), int(n["rows"]), int(n["bytes"]), str(n["sha256"]))
            for n in document.get("names", ())  # indices of before there were any
        )
        if names and (min(n.rows for n in names) < 1 or sum(n.rows for n in names) != sum(s.rows for s in shards)):
            raise ValueError("the names are of another number of rows than the shards")
        for file in (*(shard.file for shard in shards), *(each.file for each in names)):
            name = PurePosixPath(file)
            if name.is_absolute() or ".." in name.parts:
                raise ValueError(f"file {file!r} lies outside the table")
        for shard in shards:
            if shard.rows < 1 or shard.bytes < 1:
                raise ValueError(f"shard {shard.file} has {shard.rows} rows in {shard.bytes} bytes")
        layout = document.get("layout", "ptshard")  # indices of before there were others
        if layout not in LAYOUTS:
            raise ValueError(f"unknown layout {layout!r}")
        return cls(
            layout=layout,
            names=names,
            columns={
                str(name): ColumnInfo(str(column["dtype"]), tuple(int(size) for size in column["shape"]))
                for name, column in document["columns"].items()
            },
            shards=shards,
            num_classes=int(document["num_classes"]),
            class_names=tuple(str(name) for name in document["class_names"]),
            tokenizer=dict(document["tokenizer"]),
            statistics=dict(document["statistics"]),
            recipe=dict(document["recipe"]),
            bad_images=tuple(str(name) for name in document["bad_images"]),
        )


def differences(found: Any, asked: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, found, asked) of every leaf in which two JSON objects (recipes, identities) differ."""
    if isinstance(found, dict) and isinstance(asked, dict):
        for name in sorted({*found, *asked}):
            yield from differences(found.get(name), asked.get(name), f"{key}.{name}" if key else name)
    elif found != asked:
        yield key, found, asked


def why_no_index(folder: Path) -> str:
    """A sentence on a folder without an index: what it is instead, and the fix."""
    if not folder.is_dir():
        return (
            f"{folder} is not a folder; name an encoded table in data.table (paths are relative to the workspace), or "
            "run the stage encode first"
        )
    shards = (path for ending in (".pt", ".safetensors", ".tar") for path in folder.glob(f"*{ending}"))
    if any(shards) or (folder / FACTS_FOLDER).is_dir():
        return (
            f"{folder} holds shards but no {INDEX_NAME}, so it is not whole: run the stage encode to its end, "
            "or encode it again if another program wrote it"
        )
    return f"{folder} has no {INDEX_NAME}; name an encoded table in data.table, or run the stage encode first"
