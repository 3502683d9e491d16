"""New files written front to back, and the record of which staged content this process has made durable."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from hpc_gen.runtime.file_operations import ops

if TYPE_CHECKING:
    from typing_extensions import Buffer

_BUFFER_BYTES = 1 << 20  # small writes (torch.save makes many) are gathered up to this size

# Content fsynced by this process and not yet committed: absolute path -> bytes. Single dict operations only,
# so no lock is needed between the threads of an asynchronous save, and a forked child inherits no held one.
_synced: dict[str, int] = {}


def absolute(path: str | os.PathLike[str]) -> Path:
    """An absolute path; links are not followed, so a name stays what the caller called it."""
    return Path(os.path.abspath(path))


class CommitStream(io.IOBase):
    """A new file written once from front to back: SHA-256 and size known at the end, fsynced by `close`.

    Serves as the stream of torch.save and of torch.distributed.checkpoint's FileSystemWriter (they write,
    tell, flush). Not seekable: `seek` accepts only the present position. Leaving a `with` block by an
    exception closes the file without calling it durable.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Create `path`; FileExistsError when it exists, for nothing is overwritten in place."""
        self._descriptor = -1  # for __del__ when the open fails
        self.path = absolute(path)
        self._digest = hashlib.sha256()
        self._buffer = bytearray()
        self._durable_bytes = -1
        self.bytes = 0
        _synced.pop(str(self.path), None)
        self._descriptor = ops.open_write(self.path)

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of everything written so far."""
        return self._digest.hexdigest()

    @property
    def closed(self) -> bool:
        """Whether the file is closed."""
        return self._descriptor < 0

    def writable(self) -> bool:
        """True: this is what the stream is for."""
        return True

    def tell(self) -> int:
        """Bytes written so far, buffered ones included."""
        return self.bytes

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Accept a seek that stays where the stream is; raise io.UnsupportedOperation otherwise."""
        target = offset if whence == os.SEEK_SET else self.bytes + offset
        if target != self.bytes:
            raise io.UnsupportedOperation(f"{self.path} is written front to back; cannot seek to {target}")
        return target

    def write(self, data: Buffer, /) -> int:
        """Append bytes (any C-contiguous buffer); returns how many."""
        if self._descriptor < 0:
            raise ValueError(f"write to closed file {self.path}")
        view = memoryview(data)
        if view.nbytes == 0:
            return 0
        view = view.cast("B")
        self._digest.update(view)
        self.bytes += view.nbytes
        if len(self._buffer) + view.nbytes < _BUFFER_BYTES:
            self._buffer += view
        else:
            self.flush()
            ops.write(self._descriptor, view, self.path)
        return view.nbytes

    def flush(self) -> None:
        """Hand buffered bytes to the operating system (not yet durable)."""
        if self._buffer and self._descriptor >= 0:
            data, self._buffer = self._buffer, bytearray()
            ops.write(self._descriptor, memoryview(data), self.path)

    def fileno(self) -> int:
        """The descriptor, after a flush. Whoever writes through it is caught by `fsync`."""
        self.flush()
        return self._descriptor

    def fsync(self) -> None:
        """Make everything written so far durable."""
        self.flush()
        if self._durable_bytes == self.bytes:
            return
        size = os.fstat(self._descriptor).st_size
        assert size == self.bytes, f"{self.path} has {size} bytes but {self.bytes} went through its stream"
        ops.fsync(self._descriptor, self.path)
        self._durable_bytes = self.bytes
        remember(self.path, self.bytes)

    def close(self) -> None:
        """Fsync and close; may be called twice."""
        if self._descriptor >= 0:
            try:
                self.fsync()
            finally:
                self._close_descriptor()

    def _close_descriptor(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._close_descriptor()

    def __del__(self) -> None:
        self._close_descriptor()  # abandoned: not durable, and io.IOBase would call close()


def sync_file(path: str | os.PathLike[str]) -> None:
    """Make a file durable that a foreign library wrote under a staging name."""
    file = absolute(path)
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        ops.fsync(descriptor, file)
        remember(file, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


def synced_files(folder: str | os.PathLike[str]) -> dict[str, int]:
    """Files below a staging folder that this process has made durable: relative path -> bytes.

    Other ranks send theirs to the rank that commits, which passes them to `commit_directory` as `vouched`.
    """
    prefix = f"{absolute(folder)}{os.sep}"
    return {name[len(prefix) :]: size for name, size in list(_synced.items()) if name.startswith(prefix)}


def durable_bytes(path: Path) -> int | None:
    """Size a staged file (absolute path) had when this process made it durable; None: it has not."""
    return _synced.get(str(path))


def remember(path: Path, size: int) -> None:
    """Note that a staged file (absolute path) of `size` bytes is durable."""
    _synced[str(path)] = size


def forget(path: Path) -> None:
    """Drop what is known of a path and of all below it."""
    prefix = f"{path}{os.sep}"
    for name in list(_synced):
        if name == str(path) or name.startswith(prefix):
            _synced.pop(name, None)
