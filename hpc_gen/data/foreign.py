"""Tables without an index: folders of latents that other programs wrote, read as they are.

Known by their files: FOLDER/*.pt with `moments` and `labels` (ptshard), FOLDER/CLASS/*.pt or FOLDER/CLASS/*.npz (one
row each; classes are numbered in the sorted order of their folders' names, as the energy reference's readers do),
FOLDER/*.safetensors with `latents` and `labels` (LightningDiT, GMem), FOLDER/*.tar of arrays (WebDataset). Our own
stage encode leaves a folder of facts from its first unit on, so what it has not finished is never taken for one.
"""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hpc_gen.data.archive_ends import bytes_after_zip
from hpc_gen.data.index import FACTS_FOLDER, LABELS, ColumnInfo, Layout, ShardInfo, TableIndex, why_no_index
from hpc_gen.data.ptshard import columns_of, num_rows
from hpc_gen.data.row_files import ROW_LAYOUTS, open_row
from hpc_gen.data.shard_files import SUFFIXES, fingerprint, open_columns
from hpc_gen.runtime.errors import DataError, reason

LABEL_COLUMN = ColumnInfo("int64", ())
NEEDED = {"moments", "latents"}  # without them a folder of shards is one of ours that lost its index
NUMBERED = re.compile(r"(.*?)(\d+)(\D*)")  # what stands before the last number of a name, the number, the rest
READERS = 16  # threads that read headers: on a shared file system each waits for the network


def shard_files(folder: Path, layout: Layout) -> list[str]:
    """Names of the files of a layout below `folder`, sorted, in the form of `ShardInfo.file`."""
    suffix = ".npz" if layout == "npz" else ".pt"
    if layout not in ROW_LAYOUTS:
        return sorted(path.name for path in folder.glob(f"*{SUFFIXES[layout]}"))
    found: list[str] = []
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith(".") and entry.name != FACTS_FOLDER:
            found += [f"{entry.name}/{name}" for name in sorted(os.listdir(entry)) if name.endswith(suffix)]
    return found


def survey(folder: Path) -> TableIndex:
    """An index gathered from the files' headers, not from their bytes: the hashes of files are empty.

    Its identity covers the name and size of every file and, from the directory of its zip archive, name, size and
    CRC-32 of each array in it, so it changes with any of them; damage that leaves the directory as it was is found by
    `Table.verify`. Every file is opened once. Raises DataError for a folder that is not such a table, and for files
    that differ from the first one in columns, dtypes or shapes.
    """
    layouts: tuple[Layout, ...] = (*SUFFIXES, *ROW_LAYOUTS)
    if not folder.is_dir() or (folder / FACTS_FOLDER).is_dir():
        raise DataError(why_no_index(folder))
    found = {layout: files for layout in layouts if (files := shard_files(folder, layout))}
    if not found:
        raise DataError(why_no_index(folder))
    if len(found) > 1:
        names = " and ".join(f"{files[0]} ({layout})" for layout, files in found.items())
        raise DataError(f"{folder} holds shards of several layouts, {names}; put each into a folder of its own")
    layout, files = next(iter(found.items()))
    return _survey_rows(folder, layout, files) if layout in ROW_LAYOUTS else _survey_shards(folder, layout, files)


def _survey_shards(folder: Path, layout: Layout, files: list[str]) -> TableIndex:
    _no_gap(folder, files)
    first = open_columns(layout, folder / files[0])
    columns = columns_of(first)
    if layout != "webdataset" and not NEEDED & set(columns):
        raise DataError(why_no_index(folder))
    unlabelled = layout == "webdataset" and LABELS not in columns
    if not unlabelled and columns.get(LABELS) != LABEL_COLUMN:
        raise DataError(f"shard {folder / files[0]} has no column 'labels' of int64 numbers; encode the table again")
    shards: list[ShardInfo] = []
    largest = -1
    for file in files:
        shard = open_columns(layout, folder / file, columns, says=f"{files[0]} has")
        _same_columns(folder / file, shard, columns, files[0])
        largest = max(largest, int(shard[LABELS].max()) if not unlabelled else -1)
        if layout == "ptshard":
            size, content = _directory(folder / file, file)[:2]
        else:
            size, content = (folder / file).stat().st_size, fingerprint(folder / file)
        shards.append(ShardInfo(file, num_rows(shard, file), size, "", content))
    return TableIndex(columns, tuple(shards), num_classes=largest + 1, layout=layout)


def _survey_rows(folder: Path, layout: Layout, files: list[str]) -> TableIndex:
    first = open_row(folder / files[0], layout)
    columns = columns_of(first)
    if not NEEDED & set(columns) or LABELS in columns:  # a folder of whole tables, for instance
        raise DataError(why_no_index(folder))
    with ThreadPoolExecutor(READERS) as pool:
        headers = list(pool.map(lambda file: _directory(folder / file, file), files))
    for file, (_, _, members) in zip(files, headers, strict=True):
        if members != headers[0][2]:  # another packing, or other columns: look inside
            shard = open_row(folder / file, layout, columns, says=f"{files[0]} has")
            _same_columns(folder / file, shard, columns, files[0])
    names = tuple(sorted({file.partition("/")[0] for file in files}))
    shards = tuple(
        ShardInfo(file, 1, size, "", content) for file, (size, content, _) in zip(files, headers, strict=True)
    )
    return TableIndex({**columns, LABELS: LABEL_COLUMN}, shards, len(names), names, layout=layout)


def _no_gap(folder: Path, files: Iterable[str]) -> None:
    """Raise DataError when one of many numbered shards is not there: nothing else would tell that its rows are missing.

    Each name up to its last number counts by itself: LightningDiT's ranks write latents_rankRR_shardNNN. Numbers that
    begin with 0 or 1 and are there for the most part are those of shards; others (years, synsets) are names. What is
    behind the last shard that is there cannot be known.
    """
    groups: dict[tuple[str, str], dict[int, str]] = {}
    for file in files:
        found = NUMBERED.fullmatch(file)
        if found is not None:
            groups.setdefault((found[1], found[3]), {})[int(found[2])] = file
    for present in groups.values():
        first, last = min(present), max(present)
        if first > 1 or 2 * len(present) <= last - first + 1:
            continue
        gap = next((number for number in range(first, last) if number not in present), None)
        if gap is not None:
            raise DataError(
                f"{folder} has shards from {present[first]} to {present[last]}, but none with the number {gap}; "
                "restore it, or if it was left out on purpose, number the others anew"
            )


def _same_columns(path: Path, found: Iterable[str], columns: Iterable[str], first: str) -> None:
    if sorted(found) != sorted(columns):
        raise DataError(
            f"shard {path} has the columns {sorted(found)}, {first} has {sorted(columns)}; encode the table again"
        )


def _directory(path: Path, name: str) -> tuple[int, str, list[tuple[str, int]]]:
    """(bytes, hash of name and zip directory, members as (name, bytes) without the archive's own name) of a file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream, zipfile.ZipFile(stream) as archive:
            members = archive.infolist()
            more = bytes_after_zip(stream)
    except Exception as error:  # zipfile raises a dozen kinds for damaged files
        raise DataError(
            f"shard {path} is not a whole archive ({reason(error)}); restore it or encode the table again"
        ) from error
    if more:
        raise DataError(
            f"shard {path} has {more:,} bytes after the end of its archive; restore it or encode the table again"
        )
    lines = [f"{member.filename} {member.file_size} {member.CRC:08x}" for member in members]
    digest = hashlib.sha256("\n".join([f"{name} {size}", *lines]).encode()).hexdigest()
    # torch puts all members below the file's first name ("NAME/data/0"), numpy below nothing ("moments.npy")
    inner = [(member.filename.partition("/")[2] or member.filename, member.file_size) for member in members]
    return size, digest, inner


def damaged_member(path: Path) -> str | None:
    """The first array of a shard's archive whose bytes do not have the CRC-32 of its directory, or None.

    safetensors and tar carry no checksums of their arrays: what could be opened passes.
    """
    if path.suffix in (SUFFIXES["safetensors"], SUFFIXES["webdataset"]):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip()
    except Exception as error:  # zipfile and zlib raise a dozen kinds for damaged files, EOFError among them
        return reason(error)
