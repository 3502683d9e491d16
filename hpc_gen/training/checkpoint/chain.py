"""Saving and loading through one run: asynchronous, fenced, verified, with fall-back and retention.

A save copies this rank's share of the state into host buffers (that copy is the only stall), and a thread then writes
it: data files by every rank, the manifest last by rank 0, one rename. Loading verifies the manifest before anything is
parsed and falls back, loudly, to the newest whole checkpoint.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from hpc_gen.runtime import clock, commit
from hpc_gen.runtime.errors import CheckpointError
from hpc_gen.runtime.fence import Fence
from hpc_gen.runtime.journal import Journal
from hpc_gen.runtime.ranks import Ranks
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.training.checkpoint import manifest, read, storage


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the last `last`, those at multiples of `every` images (None: none), and the best."""

    last: int
    every: int | None = None


@dataclass
class Loaded:
    """A verified checkpoint in memory: CPU tensors by flat name."""

    images_seen: int
    path: Path
    facts: Mapping[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)


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
        self._host: dict[str, Tensor] = {}
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

    def save(self, images_seen: int, state: Mapping[str, Tensor], facts: Mapping[str, Any]) -> float:
        """Begin to save; returns the seconds the caller was stalled. `state` has the same keys on every rank.

        Waits for the save before it (raising what went wrong there), copies this rank's share and returns; the
        tensors may change afterwards.
        """
        begun = clock.monotonic()
        self.wait()
        share = self._share(state)
        for name in list(self._host):
            if name not in share:
                del self._host[name]
        for name, tensor in share.items():
            host = self._host.get(name)
            if host is None or host.shape != tensor.shape or host.dtype != tensor.dtype:
                self._host[name] = tensor.detach().to("cpu", copy=True)
            else:
                host.copy_(tensor.detach())
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

    @property
    def saving(self) -> bool:
        """Whether a save is being written."""
        return self._thread is not None and self._thread.is_alive()

    def _share(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of replicated tensors: largest first to the least loaded rank, the same on every rank."""
        if self._owners.keys() != state.keys():
            loads = [0] * self._ranks.world_size
            self._owners = {}
            for name in sorted(state, key=lambda key: (-state[key].nbytes, key)):
                owner = loads.index(min(loads))
                loads[owner] += max(1, state[name].nbytes)
                self._owners[name] = owner
        return {name: state[name] for name in sorted(state) if self._owners[name] == self._ranks.rank}

    def _write_guarded(self, images_seen: int, facts: dict[str, Any], stall_s: float) -> None:
        try:
            begun = clock.monotonic()
            size = self.write(images_seen, self._host, facts)
            self.committed_images = images_seen
            write_s = clock.monotonic() - begun
            self._journal.event(
                "save_committed", images_seen=images_seen, bytes=size, stall_s=stall_s, write_s=write_s
            )
        except BaseException as error:  # handed to the loop by wait(); nothing is swallowed
            self._journal.event("save_failed", images_seen=images_seen, error=str(error))
            self._error = error

    def write(self, images_seen: int, share: Mapping[str, Tensor], facts: Mapping[str, Any]) -> int:
        """Write and commit synchronously (collective over the save group); returns the bytes of the checkpoint."""
        group = self._ranks.save_group
        final = self._run.checkpoints / f"{images_seen:012d}"
        staging = self._run.checkpoints / f".tmp-{images_seen:012d}"
        if self._ranks.is_main:
            commit.make_folder(self._run.checkpoints)
            commit.remove_tree(staging)
            commit.make_folder(staging)
        self._ranks.save_barrier()
        written = storage.save(share, staging, group)
        gathered = self._ranks.save_all_gather(written)
        failure: BaseException | None = None
        size = 0
        if self._ranks.is_main:
            try:
                files = {name: dict(entry) for part in gathered for name, entry in part.items()}
                size = sum(int(entry["bytes"]) for entry in files.values())
                self._commit(staging, final, manifest.Manifest(images_seen, self._ranks.world_size, files, facts))
            except Exception as error:  # told to every rank below, then raised on each
                failure = error
        failures = self._ranks.save_all_gather(failure)
        for error in failures:
            if error is not None:
                raise error
        return size

    def _commit(self, staging: Path, final: Path, content: manifest.Manifest) -> None:
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

    def load_newest(self, not_after: int | None = None) -> Loaded | None:
        """The newest whole checkpoint (collective), or None when the run has none at all.

        Rank 0 verifies; a checkpoint that is not whole is reported and the one before it is tried. Raises
        CheckpointError when checkpoints exist but none is whole: training from scratch would hide the loss.
        """
        chosen: str | None = None
        failure: str | None = None
        if self._ranks.is_main:
            candidates = read.list_checkpoints(self._run)
            broken = _uncommitted(self._run)
            for info in reversed(candidates):
                if not_after is not None and info.images_seen > not_after:
                    continue
                found = read.verify(info.path)
                if not found:
                    chosen = str(info.path)
                    break
                broken.append(found[0])
                self._journal.event("fault", what="checkpoint is not whole", detail=found[0])
                self._say(f"checkpoint {info.images_seen} is not whole ({found[0]}); falling back to the one before it")
                self._set_aside(info.path)  # retention counts whole checkpoints only
            if chosen is None and broken:
                failure = f"no checkpoint of {self._run.path} is whole: {broken[0]}"
        chosen, failure = self._ranks.broadcast_object((chosen, failure))
        if failure is not None:
            raise CheckpointError(failure)
        if chosen is None:
            return None
        path = Path(chosen)
        content = manifest.read(path)
        return Loaded(content.images_seen, path, content.facts, storage.load(path))

    def sweep(self) -> None:
        """Remove what killed saves left behind (rank 0, at the start of an attempt, fence held)."""
        if self._ranks.is_main and self._run.checkpoints.is_dir():
            if self._fence is not None:
                self._fence.check()
            for path in sorted(self._run.checkpoints.iterdir()):
                if path.name.startswith((".tmp-", ".trash-")):
                    commit.remove_tree(path)


def _uncommitted(run: RunFolder) -> list[str]:
    """Numbered folders without a readable manifest: they were damaged after their commit."""
    if not run.checkpoints.is_dir():
        return []
    listed = {info.path for info in read.list_checkpoints(run)}
    odd = [path for path in run.checkpoints.iterdir() if path.name.isdigit() and path not in listed]
    return [manifest.problems(path)[0] for path in sorted(odd)]


