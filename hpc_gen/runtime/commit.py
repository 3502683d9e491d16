"""The only door for writes to run folders and tables: things appear whole, by rename, or not at all.

Order of every commit: write under a staging name -> fsync the content -> ask the fence -> rename -> fsync the
parent folder. A kill between any two operations leaves the old state or the new one, and a staging name that
`sweep` removes; a power cut after the last operation loses nothing. Nothing is overwritten in place.

Every system call goes through `ops`, which announces it to `ops.observer` first: tests count operations, kill
the process at one, and simulate power cuts (commit_log.py).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hpc_gen.runtime import clock
from hpc_gen.runtime.commit_stream import (
    CommitStream,
    absolute,
    durable_bytes,
    forget,
    remember,
    sync_file,
    synced_files,
)
from hpc_gen.runtime.errors import UserError
from hpc_gen.runtime.file_operations import FileOperations, ops

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "CommitStream",
    "FenceLike",
    "FileOperations",
    "commit_directory",
    "commit_file",
    "make_folder",
    "ops",
    "remove_tree",
    "rename_staged",
    "sha256_file",
    "staging_path",
    "sweep",
    "sync_file",
    "synced_files",
    "write_bytes",
    "write_json",
    "write_text",
]

STAGING_PREFIX = ".tmp-"
TRASH_PREFIX = ".trash-"
_TRIES = 5


class FenceLike(Protocol):
    """What a commit asks before it renames (fence.Fence)."""

    def check(self) -> None:
        """Raise FencedError when this process may no longer commit."""


def staging_path(final: str | os.PathLike[str]) -> Path:
    """A fresh name beside `final` to write under, random because hosts share process ids."""
    path = absolute(final)
    return path.with_name(f"{STAGING_PREFIX}{path.name}-{os.getpid()}-{secrets.token_hex(4)}")


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Create a folder and its missing parents durably; existing ones are left alone."""
    folder = absolute(path)
    if not folder.is_dir():
        make_folder(folder.parent)
        try:
            ops.mkdir(folder)
        except FileExistsError:
            if not folder.is_dir():
                raise UserError(f"{folder} is a file where a folder is needed; move it away") from None
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTSUP, errno.ENOSYS) or not folder.parent.is_dir():
                raise
            # the parent is there, but some file systems (/proc, an autofs mount) let nobody make folders
            raise UserError(
                f"no folder can be made in {folder.parent} ({os.strerror(error.errno)}); use another workspace"
            ) from error
        ops.fsync_dir(folder.parent)
    return folder


def write_bytes(path: str | os.PathLike[str], data: Buffer, fence: FenceLike | None = None) -> None:
    """Write a whole file, replacing an older one atomically. Raises UserError (disk full), FencedError."""
    final = absolute(path)
    make_folder(final.parent)
    staged = staging_path(final)
    try:
        with CommitStream(staged) as stream:
            stream.write(data)
        commit_file(staged, final, fence)
    except Exception:  # not BaseException: a simulated kill must leave what a kill leaves
        forget(staged)
        ops.unlink(staged)
        raise


def write_text(path: str | os.PathLike[str], text: str, fence: FenceLike | None = None) -> None:
    """Write a whole UTF-8 text file; as write_bytes."""
    write_bytes(path, text.encode(), fence)


def write_json(path: str | os.PathLike[str], obj: Any, fence: FenceLike | None = None) -> None:
    """Write `obj` as JSON with sorted keys; as write_bytes. Raises ValueError for NaN and infinity."""
    try:
        text = json.dumps(obj, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False)
    except ValueError as error:
        raise ValueError(f"cannot write {path} as JSON: {error}") from error
    write_bytes(path, (text + "\n").encode(), fence)


def rename_staged(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Rename a file within a staging folder; that its content is durable stays known."""
    old, new = absolute(source), absolute(target)
    size = durable_bytes(old)
    ops.rename(old, new)
    forget(old)
    if size is not None:
        remember(new, size)


def commit_file(staged: str | os.PathLike[str], final: str | os.PathLike[str], fence: FenceLike | None = None) -> None:
    """Move a staged file into place; an older file there is replaced atomically.

    Fsyncs the content unless this process has done so; makes the folders of `final` durably. Both must lie on
    one file system (UserError).
    """
    source, target = absolute(staged), absolute(final)
    if durable_bytes(source) != source.stat().st_size:
        sync_file(source)
    make_folder(target.parent)
    if fence is not None:
        fence.check()
    size = durable_bytes(source)
    _rename(source, target)
    forget(source)
    if size is not None and any(part.startswith(STAGING_PREFIX) for part in target.parts[:-1]):
        remember(target, size)  # a file of a folder that is itself staged: commit_directory asks for it
    ops.fsync_dir(target.parent)


def _rename(source: Path, target: Path) -> None:
    try:
        ops.rename(source, target)
    except OSError as error:
        if error.errno == errno.EXDEV:
            raise UserError(
                f"cannot move {source} to {target}: they are on different file systems; stage beside the final place"
            ) from error
        raise


def commit_directory(
    staging: str | os.PathLike[str],
    final: str | os.PathLike[str],
    fence: FenceLike | None = None,
    vouched: Mapping[str, int] | None = None,
) -> bool:
    """Move a staged folder of parts into place, whole. Returns False when `final` already held the same
    content.

    Every file below `staging` must have been fsynced through this module, by this process or by the ranks
    that vouch for it (`synced_files`), with the size it has now; anything else is a bug and refused
    (AssertionError). A `final` with other content (a corrupt checkpoint made again, a unit made again after a
    change) is first renamed away.
    """
    source, target = absolute(staging), absolute(final)
    known = {**(vouched or {}), **synced_files(source)}
    files, folders = _walk(source)
    for name, size in files.items():
        assert name in known, f"{source / name} was not fsynced through runtime.commit before its commit"
        assert known[name] == size, f"{source / name} has {size} bytes, but {known[name]} were fsynced"
    make_folder(target.parent)
    for folder in folders:  # innermost first
        ops.fsync_dir(folder)
    trash: list[Path] = []
    replaced = _replace(source, target, fence, trash)
    for path in trash:
        _delete(path)
    return replaced


def _replace(source: Path, target: Path, fence: FenceLike | None, trash: list[Path]) -> bool:
    """Rename a whole folder into place; what stood there with other content is renamed to names put in `trash`.

    Another task may commit the same unit at the same moment, hence the tries: each finds a new state of affairs.
    """
    for _ in range(_TRIES):
        if fence is not None:
            fence.check()
        try:
            if os.path.lexists(target):
                if target.is_dir() and _same_content(source, target):
                    ops.fsync_dir(target.parent)  # whoever committed it may have been killed before that
                    remove_tree(source)
                    return False
                aside = _trash_path(target)
                ops.rename(target, aside)
                trash.append(aside)
            _rename(source, target)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST) and source.is_dir():
                continue
            raise
        forget(source)
        ops.fsync_dir(target.parent)
        return True
    raise OSError(errno.EBUSY, f"another process keeps replacing the folder in {_TRIES} tries", str(target))


def _walk(root: Path) -> tuple[dict[str, int], list[Path]]:
    """Files (relative path -> bytes) and folders (innermost first, `root` last) below a staging folder."""
    files: dict[str, int] = {}
    folders: list[Path] = []
    for here, subfolders, names in os.walk(root, topdown=False):
        for name in [*names, *subfolders]:
            path = Path(here, name)
            assert not path.is_symlink(), f"{path} is a link; a committed folder holds plain files only"
        for path in (Path(here, name) for name in names):
            files[path.relative_to(root).as_posix()] = path.stat().st_size
        folders.append(Path(here))
    assert folders, f"{root} is not a folder: nothing to commit"
    return files, folders


def _same_content(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files, byte for byte (sizes first: hashing is the rare case)."""
    files = _walk(one)[0]
    return files == _walk(other)[0] and all(sha256_file(one / n) == sha256_file(other / n) for n in files)


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 (hex) of a file's content."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _trash_path(path: Path) -> Path:
    return path.with_name(f"{TRASH_PREFIX}{path.name}-{os.getpid()}-{secrets.token_hex(4)}")


def remove_tree(path: str | os.PathLike[str], fence: FenceLike | None = None) -> None:
    """Remove a file or folder so that it vanishes at once: renamed away durably, then deleted. Absent:
    nothing.
    """
    target = absolute(path)
    if not os.path.lexists(target):
        return
    if fence is not None:
        fence.check()
    trash = _trash_path(target)
    try:
        ops.rename(target, trash)
    except FileNotFoundError:
        return  # another process removed it first
    forget(target)
    ops.fsync_dir(target.parent)
    _delete(trash)


def _delete(trash: Path) -> None:
    """Delete what has been renamed to a trash name; parts may vanish under us when two processes sweep."""
    if trash.is_symlink() or not trash.is_dir():
        ops.unlink(trash)
        return
    for here, subfolders, names in os.walk(trash, topdown=False):
        for name in names:
            ops.unlink(Path(here, name))
        for name in subfolders:
            _delete(Path(here, name)) if Path(here, name).is_symlink() else _rmdir(Path(here, name))
    _rmdir(trash)


def _rmdir(path: Path) -> None:
    try:
        ops.rmdir(path)
    except FileNotFoundError:
        pass  # another sweeper was faster; the goal is reached


def sweep(folder: str | os.PathLike[str], older_than: float | None = None) -> list[str]:
    """Remove staging and trash names directly in `folder` that killed attempts left; returns the names
    removed.

    Only what was last touched before `older_than` (wall seconds; default: when this process began), so the
    staging of tasks that started with us stays; pass an earlier time where tasks of older jobs may still be
    staging.
    """
    limit = clock.process_start() if older_than is None else older_than
    removed: list[str] = []
    for entry in sorted(absolute(folder).glob(".t*")):
        if entry.name.startswith((STAGING_PREFIX, TRASH_PREFIX)) and _last_touched(entry) < limit:
            _delete(entry)
            removed.append(entry.name)
    return removed


def _last_touched(path: Path) -> float:
    """Newest modification time at or below a path; the far future when it vanishes meanwhile."""
    try:
        times = [path.lstat().st_mtime]
        for here, subfolders, names in os.walk(path):
            times += [os.lstat(os.path.join(here, name)).st_mtime for name in [*subfolders, *names]]
        return max(times)
    except FileNotFoundError:
        return float("inf")
