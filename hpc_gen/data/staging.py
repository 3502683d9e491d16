"""Staging: a table is copied to a disk of the node before training, verified on the way, safe to interrupt.

Each file is copied under a name of its own, hashed as it is read, made durable and renamed; `staged.json` comes last
and says that all are there. Whatever was cut off is gone on with: a file that has its name is whole. The processes of a
node take turns by a lock on that disk (a local one, where such locks hold), so one copies and the others wait for it;
two that copy at once would do no harm. A node without room trains from where the table is, and says so.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from hpc_gen.data.index import INDEX_NAME
from hpc_gen.data.joined import JOIN_NAME, JoinedTable
from hpc_gen.data.table import Table
from hpc_gen.runtime import clock, commit
from hpc_gen.runtime.errors import DataError, UserError

DONE_NAME = "staged.json"
FORMAT = "hpc-gen-staged-1"
PIECE_BYTES = 8 * 2**20
POLL_S = 0.2
KEPT_FREE = 0.02  # share of the disk that stays free

Say = Callable[[str], None]


class Interrupted(Exception):
    """A stop was asked for while a table was being copied."""


def stage(folder: Path, root: Path, say: Say, stopping: Callable[[], bool] = lambda: False) -> Path:
    """The folder of the copy of a table below `root`, made or completed if need be.

    `folder` itself is returned, with a line to `say`, when the disk has no room, and when `stopping()` turns true.
    Raises DataError when a file of the table is not what its index says, UserError when `root` cannot be written.
    """
    table = Table.open(folder)
    target = _target(table, root)
    try:
        commit.make_folder(root)
        with _turn(root, target.name, say, stopping):
            if isinstance(table, JoinedTable):
                places = [_stage_one(part, _target(part, root), say, stopping) for part in table.parts]
                if None in places:
                    return folder
                _write_join(folder, target, [place for place in places if place is not None])
                return target
            return _stage_one(table, target, say, stopping) or folder
    except Interrupted:
        return folder


def _target(table: Table, root: Path) -> Path:
    """Where the copy of a table lies: its own name and identity, so that no two share a folder."""
    return root / f"{table.folder.name}-{table.identity[:16]}"


@contextmanager
def _turn(root: Path, name: str, say: Say, stopping: Callable[[], bool]) -> Iterator[None]:
    """Hold the lock of a table's copy; the system lets it go when the holder dies."""
    descriptor = os.open(root / f".{name}.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        told = False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    say(f"staging: another process of this node copies {name}; waiting for it")
                    told = True
            if stopping():
                raise Interrupted
            clock.sleep(POLL_S)
        yield
    finally:
        os.close(descriptor)


def _stage_one(table: Table, target: Path, say: Say, stopping: Callable[[], bool]) -> Path | None:
    """The copy of one table; None when there is no room."""
    parts = (*table.index.shards, *table.index.names)
    files = {part.file: part.bytes for part in parts}
    if _is_whole(table, target, files):
        return target
    commit.make_folder(target)
    for here in (target, *{(target / file).parent for file in files} - {target}):
        if here.is_dir():
            commit.sweep(here, older_than=clock.now())  # nobody else copies into it: this process has the lock
    missing = {file: size for file, size in files.items() if not _has(target / file, size)}
    needed = sum(missing.values())
    disk = shutil.disk_usage(target)
    if needed > disk.free - KEPT_FREE * disk.total:
        say(
            f"staging: {target} has {disk.free / 2**30:,.1f} GiB free and the rest of {table.folder} is "
            f"{needed / 2**30:,.1f} GiB; training reads it where it is"
        )
        return None
    if missing:
        say(f"staging: copying {len(missing):,} files, {needed / 2**30:,.2f} GiB, to {target}")
    hashes = {part.file: part.sha256 for part in parts}
    for file in missing:
        _copy(table.folder / file, target / file, hashes[file], stopping)
    if (table.folder / INDEX_NAME).is_file():
        commit.write_bytes(target / INDEX_NAME, (table.folder / INDEX_NAME).read_bytes())
    commit.write_json(target / DONE_NAME, {"format": FORMAT, "identity": table.identity, "files": files})
    return target


def _is_whole(table: Table, target: Path, files: dict[str, int]) -> bool:
    """Whether a copy says that it is complete, and every file has its size."""
    try:
        told: Any = json.loads((target / DONE_NAME).read_text())
    except (OSError, ValueError):
        return False
    claims = {"format": FORMAT, "identity": table.identity, "files": files}
    return bool(told == claims) and all(_has(target / file, size) for file, size in files.items())


def _has(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _copy(source: Path, target: Path, sha256: str, stopping: Callable[[], bool]) -> None:
    """Copy a file whole or not at all; `sha256` "": of a table without an index, whose bytes nobody vouches for."""
    commit.make_folder(target.parent)
    staged = commit.staging_path(target)
    try:
        with source.open("rb") as stream, commit.CommitStream(staged) as sink:
            while piece := stream.read(PIECE_BYTES):
                if stopping():
                    raise Interrupted
                sink.write(piece)
    except OSError as error:
        where = f"shard {source} cannot be copied to {target.parent}"
        raise DataError(f"{where} ({error.strerror}); start again") from error
    if sha256 and sink.sha256 != sha256:
        commit.sweep(target.parent, older_than=clock.now() + 1)
        raise DataError(f"shard {source} has another SHA-256 than the index says; restore it")
    commit.commit_file(staged, target)


def _write_join(folder: Path, target: Path, places: list[Path]) -> None:
    """The joined table of the copies: the same file, with other paths."""
    document = json.loads((folder / JOIN_NAME).read_text())
    for entry, place in zip(document["tables"], places, strict=True):
        entry["folder"] = str(PurePosixPath("..") / place.name)
    commit.make_folder(target)
    commit.write_json(target / JOIN_NAME, document)


def check_root(text: str) -> Path:
    """`data.stage_to` as a path. Raises UserError for one that is not absolute: a node's disk is not the workspace."""
    path = Path(text)
    if not path.is_absolute():
        raise UserError(f"data.stage_to is {text!r}; give an absolute path on a disk of the node, as in /scratch/me")
    return path
