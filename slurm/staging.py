"""Copying the training table to a disk of the node, so that training does not read it over the network.

The first process of each node copies, the others wait for its word. A copy is whole or absent (renamed when done, each
shard compared with the hash in the index), is kept for the next start on this node, and is found by the identity of the
table. Where it does not fit, or cannot be made, the table is read from where it lies, and the log says so.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from hpc_gen.data.index import FACTS_FOLDER, INDEX_NAME, TableIndex
from hpc_gen.runtime import clock, commit, env
from hpc_gen.runtime.errors import DataError, HpcGenError
from hpc_gen.runtime.fence import Job
from hpc_gen.runtime.progress import format_count
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages.build import STAGED
from hpc_gen.stages.run_setup import load_run

FOLDER, KEEP_FREE_GB = "HPC_GEN_STAGE_FOLDER", "HPC_GEN_STAGE_KEEP_GB"  # set by the batch body
OLD_S = 86400.0
_POLL_S = 0.2

Say = Callable[[str], None]


def stage_in(run: RunFolder, job: Job, local_rank: int, say: Say) -> None:
    """Have the training table on this node, if the profile wants it there, and tell the stage where (env STAGED)."""
    folder = env.get(FOLDER)
    if folder is None:
        return
    base = Path(folder) / f"hpc-gen-{os.getuid()}"
    word = base / f"{job.job_id}.{job.restart_count}.json"
    if local_rank == 0:
        place = _try(run, base, float(env.get(KEEP_FREE_GB) or 0), say)
        _tell(word, place)
    else:
        place = _wait(word)
    if place is not None:
        env.set_default(STAGED, place)


def _try(run: RunFolder, base: Path, keep_free_gb: float, say: Say) -> str | None:
    """The folder in which the copy lies under the table's name; None where there is none, for a reason that is said."""
    begun = clock.monotonic()
    name = load_run(run).experiment.data.table
    try:
        place, size = copy(run.workspace / name, base, name, keep_free_gb)
    except (OSError, HpcGenError) as error:
        say(f"hpc-gen: table {name} is read from where it lies: {error}")
        return None
    what = f"{format_count(size)}B copied in {clock.monotonic() - begun:.1f} s" if size else "there already"
    say(f"hpc-gen: table {name} is read from {place} ({what})")
    return str(place)


def copy(table: Path, base: Path, name: str, keep_free_gb: float) -> tuple[Path, int]:
    """Copy a table to BASE/IDENTITY/NAME; returns BASE/IDENTITY and the bytes copied (0: it was there).

    Raises DataError for a folder that is no whole table or has no room, and for a shard that is not what the index
    says; OSError.
    """
    index = TableIndex.read(table)
    place = base / index.identity[:32]
    target = place / name
    if (target / INDEX_NAME).is_file():
        return place, 0
    files = {shard.file for shard in index.shards}
    size = sum(shard.bytes for shard in index.shards)
    base.mkdir(parents=True, exist_ok=True, mode=0o700)
    commit.sweep(base, older_than=clock.now() - OLD_S)  # of starts that were killed while copying
    free = shutil.disk_usage(base).free
    if free - size < keep_free_gb * 1e9:
        raise DataError(
            f"{base} has {format_count(free)}B free, the table takes {format_count(size)}B, and {keep_free_gb:g} GB "
            "must stay free"
        )
    staging = commit.staging_path(place)
    try:
        for shard in index.shards:
            copied = staging / name / shard.file
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(table / shard.file, copied)
            if shard.sha256 and commit.sha256_file(copied) != shard.sha256:
                raise DataError(f"{table / shard.file} is not what {INDEX_NAME} says; see `hpc-gen shards verify`")
        for path in sorted(table.iterdir()):
            if path.is_file() and path.name not in files:
                shutil.copyfile(path, staging / name / path.name)
            elif path.is_dir() and path.name == FACTS_FOLDER:
                shutil.copytree(path, staging / name / path.name)
        if place.exists():
            shutil.rmtree(place, ignore_errors=True)  # a copy of before, without its index
        os.replace(staging, place)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return place, size


def _tell(word: Path, place: str | None) -> None:
    """Let the other processes of the node know. Raises DataError, for they would wait for ever."""
    try:
        word.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        staged = word.with_suffix(".part")
        staged.write_text(json.dumps({"place": place}))
        os.replace(staged, word)
    except OSError as error:
        raise DataError(
            f"{word} cannot be written ({error}), so the processes of this node cannot agree on the copy of the table; "
            "leave out 'staging', or name another folder"
        ) from error


def _wait(word: Path) -> str | None:
    while True:
        try:
            place = json.loads(word.read_text())["place"]
        except FileNotFoundError:
            clock.sleep(_POLL_S)
            continue
        return str(place) if place is not None else None
