"""Images inside Parquet files, as data sets are published: a column of encoded bytes and one of class numbers.

Parquet has no access to single rows: a row group is read whole. Those used last stay in memory (2 GiB), so a set up to
that size is read once; a larger one is read again and again by an encode that asks in shuffled order: make a tar of it.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_gen.runtime.errors import DataError, UserError, reason
from shard_tools.split import SPLIT_NAMES, TRAIN, VALIDATION, Source, Split

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp", "bytes")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "cls")
KEPT_BYTES = 2 * 2**30  # of encoded images


def _pyarrow() -> Any:
    """The package, imported when a Parquet file is opened. Raises UserError without it."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("Parquet files need the package pyarrow; run: pip install 'hpc-gen[parquet]'") from error
    return pyarrow.parquet


@dataclass(frozen=True)
class _Group:
    """A row group: its file, its number there, and how many rows it has."""

    path: Path
    number: int
    rows: int


class _RowGroups:
    """Encoded images of row groups; those used last stay in memory. Safe to share between threads."""

    def __init__(self, groups: list[_Group], column: str) -> None:
        self._column = column
        self._rows = [(group, row) for group in groups for row in range(group.rows)]
        self._kept: OrderedDict[_Group, list[Any]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def read(self, i: int) -> bytes:
        """The encoded bytes of image `i`."""
        group, row = self._rows[i]
        with self._lock:
            images = self._kept.get(group)
            if images is None:
                images = self._kept[group] = self._load(group)
                self._bytes += sum(map(_size, images))
                while self._bytes > KEPT_BYTES and len(self._kept) > 1:
                    self._bytes -= sum(map(_size, self._kept.popitem(last=False)[1]))
            self._kept.move_to_end(group)
        value = images[row]
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes) or not data:
            raise DataError(f"{group.path}, row group {group.number}, row {row} has no image bytes")
        return data

    def _load(self, group: _Group) -> list[Any]:
        try:
            with _pyarrow().ParquetFile(group.path) as file:
                table = file.read_row_group(group.number, columns=[self._column])
        except Exception as error:  # pyarrow raises OSError, ValueError, NotImplementedError and KeyError kinds
            where = f"{group.path}, row group {group.number}"
            raise DataError(f"{where} cannot be read ({reason(error)}); fetch it again") from error
        found: list[Any] = table.column(0).to_pylist()
        return found


def _size(value: Any) -> int:
    data = value.get("bytes") if isinstance(value, dict) else value
    return len(data) if isinstance(data, bytes) else 0


def open_parquet(path: Path, background: Sequence[int]) -> Source:
    """A Parquet file, or a folder of them; names that begin with train, validation or val say the split.

    The image column holds bytes, or {bytes, path}; labels are whole numbers, with names where the file's metadata has
    them (as data sets on the hub do), or there is one class, "all".
    """
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if not files:
        raise UserError(f"{path} has no .parquet files; check encode.source_path")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file), []).append(file)
    content = hashlib.sha256()
    splits: dict[str, Split] = {}
    class_names: tuple[str, ...] = ()
    largest = 0
    for split, members in sorted(by_split.items()):
        groups: list[_Group] = []
        labels: list[int] = []
        columns: tuple[str, str | None] | None = None
        for file in members:
            found, names, numbers, own = _open_file(file)
            if columns not in (None, found):
                raise DataError(f"{file} has the columns {found}, {members[0].name} has {columns}; fetch it again")
            columns, class_names = found, class_names or names
            groups += own
            labels += numbers
            content.update(f"{split}/{file.name} {file.stat().st_size} {len(numbers)} {found}\n".encode())
        content.update(json.dumps(labels).encode())
        largest = max(largest, *labels) if labels else largest
        ids = [f"{split}/{g.path.stem}/{g.number}/{row}" for g in groups for row in range(g.rows)]
        assert columns is not None  # a split has at least one file
        splits[split] = Split.of_files(ids, labels, _RowGroups(groups, columns[0]).read, background)
    if not class_names:
        labelled = any(split.labels.any() for split in splits.values())
        class_names = tuple(str(number) for number in range(largest + 1)) if labelled else ("all",)
    return Source("parquet", class_names, splits, content.hexdigest())


def _split_of(file: Path) -> str:
    head = file.stem.partition("-")[0].partition("_")[0]
    return SPLIT_NAMES.get(head, VALIDATION if head == "test" else TRAIN)


def _open_file(file: Path) -> tuple[tuple[str, str | None], tuple[str, ...], list[int], list[_Group]]:
    """(columns of image and label, class names, labels, row groups) of one file."""
    try:
        with _pyarrow().ParquetFile(file) as opened:
            names = list(opened.schema_arrow.names)
            image = _pick(file, names, IMAGE_COLUMNS)
            label = next((name for name in LABEL_COLUMNS if name in names), None)
            rows = [opened.metadata.row_group(n).num_rows for n in range(opened.num_row_groups)]
            numbers = opened.read(columns=[label]).column(0).to_pylist() if label is not None else [0] * sum(rows)
            told = (opened.schema_arrow.metadata or {}).get(b"huggingface")
    except (DataError, UserError):
        raise
    except Exception as error:  # pyarrow raises OSError, ValueError, NotImplementedError and KeyError kinds
        raise DataError(f"{file} cannot be read as Parquet ({reason(error)}); fetch it again") from error
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise DataError(f"{file}, column {label!r} holds values that are no class numbers; fetch it again")
    groups = [_Group(file, number, count) for number, count in enumerate(rows)]
    return (image, label), _class_names(told, label), numbers, groups


def _pick(file: Path, names: list[str], known: Sequence[str]) -> str:
    for name in known:
        if name in names:
            return name
    raise DataError(f"{file} has no column of images (it has {names}; looked for {', '.join(known)})")


def _class_names(told: bytes | None, label: str | None) -> tuple[str, ...]:
    """Names of the classes that the metadata of a published data set gives; () without."""
    try:
        names = json.loads(told or b"{}")["info"]["features"][label]["names"]
    except (ValueError, KeyError, TypeError):
        return ()
    return tuple(str(name) for name in names) if isinstance(names, list) else ()
