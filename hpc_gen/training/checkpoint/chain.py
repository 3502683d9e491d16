"""Saving and loading through one run: asynchronous, fenced, verified, with fall-back and retention.

A save copies this rank's share of the state into host buffers (that copy is the only stall), and a thread then writes
it: data files by every rank, the manifest last by rank 0, one rename. Loading verifies the manifest before anything is
parsed and falls back, loudly, to the newest whole checkpoint.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpc_gen.runtime import clock, commit
from hpc_gen.runtime.errors import CheckpointError, FencedError, HpcGenError
from hpc_gen.runtime.fence import Fence
from hpc_gen.runtime.journal import Journal
from hpc_gen.runtime.ranks import Ranks
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.training.checkpoint import manifest, read, storage
from hpc_gen.training.checkpoint.host import HostBuffers
from hpc_gen.training.checkpoint.pieces import Pieces

SETTLE_S = 600.0  # longest that a failed attempt waits for the save under way


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the last `last`, those at multiples of `every` images (None: none), and the best."""

    last: int
    every: int | None = None


@dataclass
class Loaded:
    """A verified checkpoint: CPU tensors by flat name, each read from disk when it is asked for."""

    images_seen: int
    path: Path
    facts: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


class CheckpointChain:
    """The `checkpoints/` folder of one run, seen by one rank."""

    def __init__(
        self,
        run: RunFolder,
        ranks: Ranks,
        fence: Fence | None,
        journal: Journal,
        retention: Retention,
        say: Callable[[str], None],
    ) -> None:
        """`say` prints a line to the person watching (rank 0); faults are loud through it and the journal."""
        self._run, self._ranks, self._fence, self._journal = run, ranks, fence, journal
        self._retention, self._say = retention, say
        self._buffers = HostBuffers()
        self._host: dict[str, Tensor | Pieces] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._owners: dict[str, int] = {}
        self.best_images: int | None = None
        self.begun_images: int | None = None  # of the newest save that was begun, and of the newest that is whole
        self.committed_images: int | None = None

    @property
    def fence(self) -> Fence | None:
        """The fence that every commit of this run re-reads."""
        return self._fence

    # -- saving ---------------------------------------------------------------------------------------------------

    def reserve(self, state: Mapping[str, Tensor | Pieces]) -> None:
        """Begin to make the host buffers for such a state in the background, so that the first save is no slower than
        the others. What is not foreseen is made by the save that needs it.
        """
        self._buffers.reserve(self._share(state))

    def save(self, images_seen: int, state: Mapping[str, Tensor | Pieces], facts: Mapping[str, Any]) -> float:
        """Begin to save; returns the seconds the caller was stalled. `state` has the same keys on every rank.

        A plain tensor is the same on every rank, and one rank writes it; of Pieces every rank writes its own boxes.
        Waits for the save before it (raising what went wrong there), copies this rank's share and returns; the
        tensors may change afterwards.
        """
        begun = clock.monotonic()
        self.wait()
        self._host = self._buffers.copy(self._share(state))
        stall_s = clock.monotonic() - begun
        self.begun_images = images_seen
        self._journal.event("save_begin", images_seen=images_seen, stall_s=stall_s)
        self._thread = threading.Thread(
            target=self._write_guarded, args=(images_seen, dict(facts), stall_s), name="checkpoint-save", daemon=True
        )
        self._thread.start()
        return stall_s

    def wait(self) -> None:
        """Until the save under way is committed on every rank; raises its error, if any."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def settle(self, limit_s: float = SETTLE_S) -> None:
        """Let the save under way end, well or not (its error is in the journal): for the end of a failed attempt.

        A rank that is gone for ever is not waited for: the thread ends with the process, and its commit with the fence.
        """
        if self._thread is not None:
            self._thread.join(limit_s)

    @property
    def saving(self) -> bool:
        """Whether a save is being written."""
        return self._thread is not None and self._thread.is_alive()

    def _share(self, state: Mapping[str, Tensor | Pieces]) -> dict[str, Tensor | Pieces]:
        """This rank's boxes, and its part of replicated tensors: largest first to the least loaded rank, the same on
        every rank.
        """
        # a tensor without elements has no box anywhere, but a name and a shape that must not be lost
        whole: dict[str, Tensor] = {
            name: value if isinstance(value, Tensor) else torch.empty(value.shape, dtype=value.dtype)
            for name, value in state.items()
            if isinstance(value, Tensor) or math.prod(value.shape) == 0
        }
        if self._owners.keys() != whole.keys():
            loads = [0] * self._ranks.world_size
            self._owners = {}
            for name in sorted(whole, key=lambda key: (-whole[key].nbytes, key)):
                owner = loads.index(min(loads))
                loads[owner] += max(1, whole[name].nbytes)
                self._owners[name] = owner
        share: dict[str, Tensor | Pieces] = {}
        for name in sorted(state):
            value = whole.get(name, state[name])
            if isinstance(value, Pieces) or self._owners[name] == self._ranks.rank:
                share[name] = value
        return share

    def _write_guarded(self, images_seen: int, facts: dict[str, Any], stall_s: float) -> None:
        try:
            begun = clock.monotonic()
            size = self.write(images_seen, self._host, facts)
            self.committed_images = images_seen
            write_s = clock.monotonic() - begun
            told = {"images_seen": images_seen, "bytes": size, "stall_s": stall_s, "write_s": write_s}
            if self._ranks.is_main:  # what was committed, for when retention has removed it
                told["manifest"] = read.manifest_sha256(self._final(images_seen))
                told["digest"] = facts.get("digest")
            self._journal.event("save_committed", **told)
        except BaseException as error:  # handed to the loop by wait(); nothing is swallowed
            self._journal.event("save_failed", images_seen=images_seen, error=str(error))
            self._error = error

    def write(self, images_seen: int, share: Mapping[str, Tensor | Pieces], facts: Mapping[str, Any]) -> int:
        """Write and commit synchronously (collective over the save group); returns the bytes of the checkpoint.

        Raises the same kind of error on every rank; what was staged is removed then, so a full disk is not kept full.
        """
        final = self._final(images_seen)
        # the attempt is part of the name: a zombie of the attempt before must not stage into our folder
        attempt = self._fence.attempt if self._fence is not None else 0
        staging = self._run.checkpoints / f".tmp-{final.name}-{attempt:04d}"
        try:
            self._on_main(lambda: self._prepare(staging))
            written = storage.save(share, staging, self._ranks.save_group)
            gathered = self._ranks.save_all_gather(written)
            files = {name: dict(entry) for part in gathered for name, entry in part.items()}
            content = manifest.Manifest(images_seen, self._ranks.world_size, files, facts)
            self._on_main(lambda: self._commit(staging, final, content))
        except FencedError:
            raise  # the folder is another attempt's now; it sweeps
        except Exception:
            self._clean(staging)
            raise
        return sum(int(entry["bytes"]) for entry in files.values())

    def _final(self, images_seen: int) -> Path:
        return self._run.checkpoints / f"{images_seen:012d}"

    def _on_main(self, action: Callable[[], None]) -> None:
        """Rank 0 acts, the others wait; its failure is raised on every rank, so that none waits for it for ever."""
        failure: Exception | None = None
        if self._ranks.is_main:
            try:
                action()
            except Exception as error:
                failure = error
        # only our own errors are sure to survive the journey to other ranks
        told = failure if failure is None or isinstance(failure, HpcGenError) else CheckpointError(repr(failure))
        told = self._ranks.save_all_gather(told)[0]
        if failure is not None:
            raise failure
        if told is not None:
            raise told

    def _prepare(self, staging: Path) -> None:
        commit.make_folder(self._run.checkpoints)
        commit.remove_tree(staging)
        commit.make_folder(staging)

    def _clean(self, staging: Path) -> None:
        if self._ranks.is_main:
            try:
                commit.remove_tree(staging)
            except (OSError, HpcGenError) as error:  # swept by the next attempt; what failed before says more
                self._journal.event("fault", what="staging of a failed save is left behind", detail=str(error))

    def _commit(self, staging: Path, final: Path, content: manifest.Manifest) -> None:
        for name, entry in content.files.items():
            path = staging / name
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                raise CheckpointError(f"{path} vanished or shrank before its commit; is another process at work here?")
        commit.write_json(staging / manifest.NAME, content.to_json())
        # a run that fell back or was rolled back passes the same position again: equal content is kept, other replaced
        vouched = {name: int(entry["bytes"]) for name, entry in content.files.items()}
        commit.commit_directory(staging, final, self._fence, vouched)
        self._retire()

    def _set_aside(self, path: Path) -> None:
        """Out of the chain but not deleted: it may be the only trace of what went wrong."""
        if self._fence is not None:
            self._fence.check()
        aside = path.with_name(f"broken-{path.name}")
        commit.remove_tree(aside)
        commit.ops.rename(path, aside)
        commit.ops.fsync_dir(path.parent)

    def _retire(self) -> None:
        committed = read.list_checkpoints(self._run)
        keep = {info.images_seen for info in committed[-max(1, self._retention.last) :]}
        if self._retention.every:
            keep |= {info.images_seen for info in committed if info.images_seen % self._retention.every == 0}
        if self.best_images is not None:
            keep.add(self.best_images)
        for info in committed:
            if info.images_seen not in keep:
                if self._fence is not None:
                    self._fence.check()
                commit.remove_tree(info.path)

    # -- loading --------------------------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Whether the run has a checkpoint, whole or not (rank 0; the others get False)."""
        return self._ranks.is_main and bool(_numbered(self._run))

    def load_newest(self) -> Loaded | None:
        """The newest whole checkpoint (collective), or None when the run has none at all.

        Rank 0 verifies; a checkpoint that is not whole is reported, set aside, and the one before it is tried. Raises
        CheckpointError when checkpoints exist but none is whole: training from scratch would hide the loss.
        """
        chosen: str | None = None
        failure: str | None = None
        if self._ranks.is_main:
            broken: dict[Path, str] = {}
            for path in _numbered(self._run):
                found = read.verify(path)
                if not found:
                    chosen = str(path)
                    break
                broken[path] = found[0]
                self._journal.event("fault", what="checkpoint is not whole", detail=found[0])
                self._say(f"checkpoint {path.name} is not whole ({found[0]}); falling back to the one before it")
            if chosen is not None:
                for path in broken:
                    self._set_aside(path)  # retention counts whole checkpoints only
            elif broken:
                # nothing is set aside: the next attempt must not find an empty chain and begin anew in silence
                failure = (
                    f"no checkpoint of {self._run.path} is whole: {next(iter(broken.values()))}; restore one from a "
                    f"copy, or move {self._run.checkpoints} away to begin anew"
                )
        chosen, failure = self._ranks.broadcast_object((chosen, failure))
        if failure is not None:
            raise CheckpointError(failure)
        if chosen is None:
            return None
        path = Path(chosen)
        content = manifest.read(path)
        return Loaded(content.images_seen, path, content.facts, storage.StoredTensors(path))

    def sweep(self) -> None:
        """Remove what killed saves left behind (rank 0, at the start of an attempt, fence held)."""
        if self._ranks.is_main and self._run.checkpoints.is_dir():
            if self._fence is not None:
                self._fence.check()
            for path in sorted(self._run.checkpoints.iterdir()):
                if path.name.startswith((".tmp-", ".trash-")):
                    commit.remove_tree(path)


def _numbered(run: RunFolder) -> list[Path]:
    """Every folder that is named like a checkpoint, whole or not, newest first."""
    if not run.checkpoints.is_dir():
        return []
    return sorted((path for path in run.checkpoints.iterdir() if path.name.isdigit()), key=_position, reverse=True)


def _position(path: Path) -> int:
    return int(path.name)
