"""The system calls through which commit.py changes files, each announced to an observer before it happens.

Tests count operations, kill the process at one, and simulate power cuts through `ops.observer`
(commit_log.py).
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hpc_gen.runtime.errors import UserError

NO_ROOM = ("the disk is full", "the disk quota is used up")  # how the sentences of such errors can be told
_WRITE_BYTES = 1 << 30  # Linux writes at most 2 GiB - 4 KiB in one call


class FileOperations:
    """System calls that change files, each announced as `observer(name, path)` before it happens.

    Names: open, write, fsync, rename (path = the target; `renaming_from()` = the source), mkdir, unlink,
    rmdir, fsync_dir. A full disk or a missing permission becomes a UserError that names the path.
    """

    def __init__(self) -> None:
        self.observer: Callable[[str, Path], None] | None = None
        self._local = threading.local()

    def renaming_from(self) -> Path | None:
        """Inside an observer called with "rename": the source of that rename."""
        source: Path | None = getattr(self._local, "source", None)
        return source

    def _announce(self, name: str, path: Path) -> None:
        if self.observer is not None:
            self.observer(name, path)

    @contextmanager
    def _explained(self, path: Path, num_bytes: int = 0) -> Iterator[None]:
        """Turn "disk full" and "not permitted" into one sentence with the path and the bytes wanted."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                what = NO_ROOM[0 if error.errno == errno.ENOSPC else 1]
                free = _free_bytes(path)
                raise UserError(
                    f"cannot write {num_bytes} bytes to {path}: {what} ({free} bytes free); "
                    "free some space or use another workspace, then start again: nothing committed was lost"
                ) from error
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                reason = os.strerror(error.errno)
                raise UserError(f"cannot write {path}: {reason}; use a folder you may write") from error
            raise

    def open_write(self, path: Path) -> int:
        """Create a new file for writing and return its descriptor; FileExistsError when the path exists."""
        self._announce("open", path)
        with self._explained(path):
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, descriptor: int, data: memoryview, path: Path) -> None:
        """Write all of `data` (bytes) at the descriptor's position."""
        self._announce("write", path)
        with self._explained(path, data.nbytes):
            while data.nbytes:
                data = data[os.write(descriptor, data[:_WRITE_BYTES]) :]

    def fsync(self, descriptor: int, path: Path) -> None:
        """Make the file's content durable. A failure is final: the kernel may have dropped the pages."""
        self._announce("fsync", path)
        with self._explained(path):
            os.fsync(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Rename on one file system; a file at the target is replaced atomically."""
        self._local.source = source
        self._announce("rename", target)
        with self._explained(target):
            os.rename(source, target)

    def mkdir(self, path: Path) -> None:
        """Create one folder; FileExistsError when it exists."""
        self._announce("mkdir", path)
        with self._explained(path):
            os.mkdir(path)

    def unlink(self, path: Path) -> None:
        """Remove one file; it may be gone already (two sweepers)."""
        self._announce("unlink", path)
        with self._explained(path):
            path.unlink(missing_ok=True)

    def rmdir(self, path: Path) -> None:
        """Remove one empty folder."""
        self._announce("rmdir", path)
        with self._explained(path):
            os.rmdir(path)

    def fsync_dir(self, path: Path) -> None:
        """Make the entries of a folder durable (what was created, renamed or removed in it)."""
        self._announce("fsync_dir", path)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # EINVAL: this file system has nothing to sync for a folder
                raise
        finally:
            os.close(descriptor)


ops = FileOperations()


def _free_bytes(path: Path) -> int:
    for folder in path.parents:
        if folder.is_dir():
            return shutil.disk_usage(folder).free
    return 0
