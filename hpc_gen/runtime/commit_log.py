"""For tests and `prove`: kill a process at a counted file operation, and simulate a power cut after it.

    commit.ops.observer = DurabilityLog(scratch, kill_at=17)  # in a forked child: it dies before operation 17
    ...
    log = DurabilityLog.replay(scratch)  # in the parent
    log.apply_power_cut()  # what was not made durable by then is lost

A kill alone loses nothing that was written: the kernel still holds it. A power cut also loses what was not
fsynced, and that is what finds a missing fsync. The model is the weakest that POSIX allows:

- content: bytes written to a file and not fsynced since are lost; the whole content goes (`content="empty"`), or
  half of it stays (`content="torn"`);
- names: files and folders created, and renames made, in a folder that was not fsynced since may be lost or kept.
  Real file systems do either, so a test runs both: `names="keep"` keeps the renames of files whose content is lost
  (the classic zero-length file), `names="lose"` undoes them.

An operation is announced before it happens, so the last one announced in each thread counts as not done, unless
`settle()` says that it returned. Not modelled: removed names that come back (whoever reads must ignore staging and
trash names anyway).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hpc_gen.runtime.commit import ops

_RECORD = "operations.jsonl"


@dataclass(frozen=True)
class Operation:
    """One announced operation. Of a rename, `path` is the target, `source` the old name, and `backup` a hard link
    to the file that it replaced, if any."""

    thread: int
    name: str
    path: Path
    source: Path | None = None
    backup: Path | None = None


@dataclass
class _Volatile:
    """What a power cut could take: contents, names in the order they appeared, renames in the order they happened."""

    contents: set[Path] = field(default_factory=set)
    created: set[Path] = field(default_factory=set)
    renames: list[Operation] = field(default_factory=list)


def kill_self() -> None:
    """End this process as kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


class DurabilityLog:
    """An observer of `commit.ops` that knows what would survive. Thread-safe."""

    def __init__(self, scratch: Path, kill_at: int | None = None, kill: Callable[[], None] = kill_self) -> None:
        """`scratch`: folder outside what is tested, one per process: the record of operations for `replay`, and
        hard links to replaced files, lie there. `kill_at`: number (from 1) of the operation before which `kill`
        is called; a test within one process passes a function that raises a BaseException."""
        scratch.mkdir(parents=True, exist_ok=True)
        self.operations: list[Operation] = []
        self._scratch = scratch
        self._kill_at = kill_at
        self._kill = kill
        self._settled: set[int] = set()  # indices of last operations known to have returned
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """Operations announced so far."""
        return len(self.operations)

    def __call__(self, name: str, path: Path) -> None:
        """The observer: called before each operation."""
        with self._lock:
            if self.count + 1 == self._kill_at:
                self._kill()
            source = ops.renaming_from() if name == "rename" else None
            backup = self._keep(path) if name == "rename" else None
            operation = Operation(threading.get_ident(), name, path, source, backup)
            self.operations.append(operation)
            fields = {key: str(value) for key, value in vars(operation).items() if value is not None}
            with open(self._scratch / _RECORD, "ab", buffering=0) as stream:
                stream.write(json.dumps(fields).encode() + b"\n")  # in the kernel before a kill can come

    def _keep(self, path: Path) -> Path | None:
        if not path.is_file():
            return None
        backup = self._scratch / f"replaced-{self.count}"
        os.link(path, backup)
        return backup

    @classmethod
    def replay(cls, scratch: Path) -> DurabilityLog:
        """The log of a process that is gone, from what it left in `scratch`."""
        log = cls(scratch)
        record = scratch / _RECORD
        for line in record.read_text().splitlines() if record.exists() else []:
            facts = json.loads(line)
            source, backup = (Path(facts[key]) if key in facts else None for key in ("source", "backup"))
            log.operations.append(Operation(int(facts["thread"]), facts["name"], Path(facts["path"]), source, backup))
        return log

    def settle(self) -> None:
        """Say that every operation announced so far has returned."""
        self._settled = set(range(self.count))

    def unsynced(self) -> list[Path]:
        """Files whose content a power cut would lose, by their present names."""
        return sorted(self._volatile().contents)

    def undurable_renames(self) -> list[tuple[Path, Path]]:
        """Renames (source, target) that a power cut could undo."""
        return [(rename.source or rename.path, rename.path) for rename in self._volatile().renames]

    def apply_power_cut(
        self, names: Literal["keep", "lose"] = "keep", content: Literal["empty", "torn"] = "empty"
    ) -> list[str]:
        """Make the file system what a power cut may leave of it; returns a line for each thing lost."""
        volatile = self._volatile()
        lost: list[str] = []
        for path in sorted(volatile.contents):
            if path.is_file() and path.stat().st_size > 0:
                os.truncate(path, path.stat().st_size // 2 if content == "torn" else 0)
                lost.append(f"content of {path}")
        if names == "lose":
            for path in sorted(volatile.created, reverse=True):
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.exists():
                    path.unlink()
                else:
                    continue
                lost.append(f"name {path}")
            for rename in reversed(volatile.renames):
                lost += _undo(rename)
        return lost

    def _volatile(self) -> _Volatile:
        last = {operation.thread: index for index, operation in enumerate(self.operations)}
        undone = set(last.values()) - self._settled
        state = _Volatile()
        for index, operation in enumerate(self.operations):
            _follow(state, operation, done=index not in undone)
        return state


def _follow(state: _Volatile, operation: Operation, done: bool) -> None:
    """Take one operation into account. One that may not have happened counts when it endangers, never when it saves."""
    path = operation.path
    if operation.name in ("open", "write"):
        state.contents.add(path)
    if operation.name in ("open", "mkdir"):
        state.created.add(path)
    elif operation.name == "fsync" and done:
        state.contents.discard(path)
    elif operation.name == "fsync_dir" and done:
        state.created = {name for name in state.created if name.parent != path}
        state.renames = [rename for rename in state.renames if rename.path.parent != path]
    elif operation.name in ("unlink", "rmdir"):
        state.contents.discard(path)
        state.created.discard(path)
    elif operation.name == "rename" and operation.source is not None:
        if not done and operation.source.exists():
            return  # announced, and the process died before it
        state.contents.discard(path)  # of the file that is replaced
        state.contents = {_moved(name, operation.source, path) for name in state.contents}
        state.created = {_moved(name, operation.source, path) for name in state.created}
        state.renames.append(operation)


def _moved(name: Path, source: Path, target: Path) -> Path:
    return target / name.relative_to(source) if name == source or source in name.parents else name


def _undo(rename: Operation) -> list[str]:
    """Undo one rename where that is possible now."""
    if rename.source is None:
        return []
    lost: list[str] = []
    if rename.path.exists() and not rename.source.exists() and rename.source.parent.is_dir():
        os.rename(rename.path, rename.source)
        lost.append(f"rename of {rename.source} to {rename.path}")
    if rename.backup is not None and not rename.path.exists():
        os.link(rename.backup, rename.path)
    return lost
