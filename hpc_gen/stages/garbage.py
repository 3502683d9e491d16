"""What a run folder holds that nobody needs any more: `hpc-gen gc`.

Deleted are what killed attempts were writing, checkpoints that were set aside as broken, and checkpoints beyond the
retention that the config asks for now. Never deleted: the newest whole checkpoint, previews, samples, exports, logs,
and anything at all while an attempt may be at work. The deletion itself is an attempt that holds the fence.
"""

from __future__ import annotations

import json
import os
import platform
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hpc_gen.config.experiment import Experiment
from hpc_gen.runtime import clock, commit, journal
from hpc_gen.runtime.errors import ExitCode, HpcGenError, UserError
from hpc_gen.runtime.fence import Fence, claim_attempt, process_start_ticks, read_attempt
from hpc_gen.runtime.journal import Journal
from hpc_gen.runtime.progress import format_bytes, format_duration
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages.control import runs_folder
from hpc_gen.stages.run_setup import load_run
from hpc_gen.training.checkpoint import read, storage

STAGE = "gc"
SILENT_S = 24 * 3600.0  # an attempt of another host that has been silent for so long is taken to be dead
ORPHAN_S = 3600.0  # staging beside runs, of which nobody can tell whose it is
STAGING, TRASH = commit.STAGING_PREFIX, commit.TRASH_PREFIX

UNFINISHED = "unfinished writes of killed attempts"
BROKEN = "checkpoints set aside as broken"
RETIRED = "checkpoints beyond the retention"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Garbage:
    """A file or folder that may go, with what it takes on the disk."""

    kind: str
    path: Path
    bytes: int
    files: int


def collect(run: RunFolder) -> list[Garbage]:
    """Everything in a run folder that may go. Raises UserError when an attempt may be at work there."""
    busy = at_work(run)
    if busy is not None:
        raise UserError(f"nothing is removed from {run.path}: {busy}")
    return [*_unfinished(run), *_checkpoints(run, load_run(run).experiment)]


def clean(run: RunFolder, say: Say, *, dry_run: bool = False) -> int:
    """Remove what `collect` finds, telling it by kind; returns the bytes. Raises UserError, FencedError."""
    found = collect(run)
    for line in report(run.name, found, dry_run):
        say(line)
    if found and not dry_run:
        remove(run, found)
    return sum(each.bytes for each in found)


def clean_all(workspace: Path, say: Say, *, dry_run: bool = False) -> int:
    """`clean` of every run of a workspace, and of run folders that were never finished; returns the bytes.

    Runs that are at work or cannot be read are named and left alone.
    """
    total = 0
    folder = runs_folder(workspace)
    for path in sorted(folder.glob("*/config.yaml")):
        try:
            total += clean(RunFolder(path.parent), say, dry_run=dry_run)
        except (HpcGenError, ValueError) as error:  # ConfigError is a ValueError
            say(f"{path.parent.name}: left alone: {error}")
    orphans = list(_orphans(folder))
    for line in report(str(folder), orphans, dry_run):
        say(line)
    if not dry_run:
        for each in orphans:
            commit.remove_tree(each.path)
    total += sum(each.bytes for each in orphans)
    say(f"{'would free' if dry_run else 'freed'} {format_bytes(total)} in all")
    return total


def report(name: str, found: list[Garbage], dry_run: bool) -> Iterator[str]:
    """Lines by kind: number, bytes, and each path."""
    if not found:
        yield f"{name}: nothing to remove"
        return
    verb = "would remove" if dry_run else "removing"
    for kind in (UNFINISHED, BROKEN, RETIRED):
        mine = [each for each in found if each.kind == kind]
        if mine:
            size, files = sum(each.bytes for each in mine), sum(each.files for each in mine)
            yield f"{name}: {verb} {kind}: {len(mine)}, {format_bytes(size)} in {files:,} files and folders"
            for each in mine:
                yield f"  {format_bytes(each.bytes):>9}  {each.path}"


# ---------------------------------------------------------------- who is at work


def at_work(run: RunFolder) -> str | None:
    """Why a run must be left alone, in words; None when every attempt has ended, or its process is gone.

    Of a process on another host nobody can tell: it counts as alive until its journal has been silent for a day, or
    (training) until a later attempt has taken the fence.
    """
    try:
        lock = json.loads(run.lock.read_bytes())
    except (OSError, ValueError):
        lock = {}
    for attempt in journal.attempts(run):
        named = lock.get("attempt") == attempt.number
        holds = named and not lock.get("released")
        if not holds and (named or attempt.end is not None):
            continue
        if attempt.stage == "train" and int(lock.get("attempt") or 0) > attempt.number:
            continue  # fenced off: it may not write any more, and what it was writing is garbage
        facts = lock if holds else read_attempt(run, attempt.number)
        host, pid = str(facts.get("host") or attempt.host), int(facts.get("pid") or -1)
        who = f"attempt {attempt.number} ({attempt.stage})"
        if host == socket.gethostname():
            started = process_start_ticks(pid) if pid > 0 else None
            if started is not None and started == facts.get("pid_start"):
                return f"{who} is at work in process {pid}; wait for it, or `hpc-gen preempt {run.name}`"
        elif (silent_s := clock.now() - attempt.last_seen) < SILENT_S:
            return (
                f"{who} on {host or 'another host'} did not say that it ended and wrote its last line "
                f"{format_duration(silent_s)} ago; wait for it, resume it, or come back when it has been silent for "
                f"{format_duration(SILENT_S)}"
            )
    return None


# ---------------------------------------------------------------- what may go


def _unfinished(run: RunFolder) -> Iterator[Garbage]:
    """Staging and trash anywhere in the run folder, last touched before this process began."""
    for here, folders, names in os.walk(run.path):
        if Path(here) == run.path and "code" in folders:
            folders.remove("code")
        mine = [name for name in [*folders, *names] if name.startswith((STAGING, TRASH))]
        folders[:] = [name for name in folders if name not in mine]
        for name in sorted(mine):
            found, touched = _measured(UNFINISHED, Path(here, name))
            if touched < clock.process_start():
                yield found


def _orphans(folder: Path) -> Iterator[Garbage]:
    """Run folders whose making was killed."""
    for path in sorted(folder.glob(".t*")):
        if path.name.startswith((STAGING, TRASH)):
            found, touched = _measured(UNFINISHED, path)
            if touched < clock.now() - ORPHAN_S:
                yield found


def _checkpoints(run: RunFolder, experiment: Experiment) -> Iterator[Garbage]:
    """Broken ones that were set aside, and whole ones that the retention does not ask for; none without a whole one."""
    committed = read.list_checkpoints(run)  # oldest first; folders without a readable manifest are not ours to judge
    newest = next((info for info in reversed(committed) if not read.verify(info.path)), None)
    if newest is None:
        return
    for path in sorted(run.checkpoints.glob("broken-*")):
        yield _measured(BROKEN, path)[0]
    train, sample = experiment.train, experiment.sample
    if train is None:
        return
    older = [info.images_seen for info in committed if info.images_seen <= newest.images_seen]
    keep = set(older[-train.keep_last :])
    keep |= {images for images in older if train.keep_every and images % train.keep_every == 0}
    best = storage.load(newest.path, "train/best_images").get("train/best_images")
    keep |= {int(best)} if best is not None else set()
    if sample is not None and sample.checkpoint != "latest":
        keep.add(sample.checkpoint)
    for info in committed:
        if info.images_seen < newest.images_seen and info.images_seen not in keep:
            yield measured(info.path)


def measured(checkpoint: Path) -> Garbage:
    """A checkpoint that goes for the sake of retention."""
    return _measured(RETIRED, checkpoint)[0]


def _measured(kind: str, path: Path) -> tuple[Garbage, float]:
    """What a path takes on the disk, links not followed, and when anything of it was touched last (wall seconds)."""
    size, files, touched = 0, 0, 0.0
    paths = [path]
    for here, folders, names in os.walk(path):
        paths += [Path(here, name) for name in [*folders, *names]]
    for each in paths:
        try:
            facts = each.lstat()
        except FileNotFoundError:
            touched = float("inf")  # somebody is at it
            continue
        size, files, touched = size + facts.st_blocks * 512, files + 1, max(touched, facts.st_mtime)
    return Garbage(kind, path, size, files), touched


def remove(run: RunFolder, found: list[Garbage]) -> None:
    """Delete under the fence, so that no attempt can begin meanwhile; what went is in the journal."""
    number = claim_attempt(run, STAGE)
    fence, told = Fence.take(run, number), Journal(run, number, STAGE)
    code, cause = ExitCode.BUG, "error"
    told.event("attempt_start", world_size=1, rank=0, host=platform.node(), process_start=clock.process_start())
    try:
        for each in found:
            commit.remove_tree(each.path, fence)
            told.event("removed", what=each.kind, path=each.path.relative_to(run.path).as_posix(), bytes=each.bytes)
        code, cause = ExitCode.DONE, "done"
    except HpcGenError as error:
        code, cause = error.exit_code, str(error)
        raise
    finally:
        told.event("attempt_end", exit_code=int(code), cause=cause)
        told.close()
        fence.release(cause)
