"""What is done to checkpoints from outside of training: `hpc-gen checkpoints convert` and `prune`.

Between engines nothing has to be converted: all of them write and read the one layout, whatever the number of ranks.
Converted are checkpoints of many ranks into one file, for copying and for other programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from hpc_gen.runtime import commit, tensor_files
from hpc_gen.runtime.errors import CheckpointError, UserError
from hpc_gen.runtime.progress import count, format_bytes
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import garbage
from hpc_gen.stages.run_setup import load_run
from hpc_gen.stages.weights import Say
from hpc_gen.training.checkpoint import manifest, read, storage
from hpc_gen.training.checkpoint.read import CheckpointInfo

Form = Literal["merged", "safetensors"]
FORMS: tuple[Form, ...] = ("merged", "safetensors")
BEST = "train/best_images"


def convert(
    run: RunFolder,
    say: Say,
    *,
    to: Form = "merged",
    at: int | None = None,
    target: Path | None = None,
    dry_run: bool = False,
) -> Path:
    """Write a whole checkpoint (`at` None: the newest) in another form; one tensor at a time is in memory.

    merged: a checkpoint folder as one rank would have written it, which torch.distributed.checkpoint reads as well.
    safetensors: one flat file of everything, names as in the checkpoint. `target` None: exports/ of the run. Nothing is
    overwritten. Raises UserError for a target that is there, CheckpointError for a checkpoint that is not whole.
    """
    info = read.newest(run) if at is None else read.at(run, at)
    name = f"{info.images_seen:012d}" if to == "merged" else f"checkpoint-{info.images_seen:012d}.safetensors"
    path = target if target is not None else run.exports / name
    if path.exists():
        raise UserError(f"{path} exists already; remove it, or choose another place with --output")
    if found := read.verify(info.path):
        raise CheckpointError(f"{info.path} is not whole: {found[0]}; choose another with --at")
    if dry_run:
        say(f"would write {info.path} ({count(info.world_size, 'rank')}, {format_bytes(info.bytes)}) as {to} to {path}")
        return path
    stored = storage.StoredTensors(info.path)
    size = _merge(info, stored, path) if to == "merged" else _flatten(info, stored, path)
    say(f"{path}: {len(stored)} tensors, {format_bytes(size)}")
    return path


def _merge(info: CheckpointInfo, stored: storage.StoredTensors, path: Path) -> int:
    """The facts go on; where it comes from is added, for the bytes are not those that the run committed."""
    content = manifest.read(info.path)
    commit.make_folder(path.parent)
    staging = commit.staging_path(path)
    commit.make_folder(staging)
    try:
        files = storage.rewrite(stored, staging)
        converted = {"manifest": read.manifest_sha256(info.path), "world_size": content.world_size}
        facts = {**content.facts, "converted": converted}
        commit.write_json(staging / manifest.NAME, manifest.Manifest(content.images_seen, 1, files, facts).to_json())
        commit.commit_directory(staging, path)
    except Exception:
        commit.remove_tree(staging)
        raise
    return sum(int(entry["bytes"]) for entry in files.values())


def _flatten(info: CheckpointInfo, stored: storage.StoredTensors, path: Path) -> int:
    content = manifest.read(info.path)
    facts = {f"hpc_gen.{key}": str(value) for key, value in content.facts.items() if isinstance(value, (str, int))}
    facts |= {"format": "pt", "hpc_gen.images_seen": str(info.images_seen)}
    facts["hpc_gen.checkpoint"] = read.manifest_sha256(info.path)
    tensor_files.write_tensors(path, stored, facts, described=stored.described())
    return path.stat().st_size


def prune(
    run: RunFolder,
    say: Say,
    *,
    last: int | None = None,
    every: int | None = None,
    keep: Sequence[int] = (),
    dry_run: bool = False,
) -> int:
    """Remove committed checkpoints but the last `last`, multiples of `every`, those in `keep` and the best one.

    `last` and `every` None: as `train.keep_last` and `train.keep_every` say. The newest whole one always stays, and
    what the sample stage names. Returns the bytes. Raises UserError while an attempt may be at work, and for a position
    in `keep` that is not there.
    """
    if (busy := garbage.at_work(run)) is not None:
        raise UserError(f"nothing is removed from {run.path}: {busy}")
    found = read.list_checkpoints(run)
    whole = next((info for info in reversed(found) if not read.verify(info.path)), None)
    if whole is None:
        raise CheckpointError(f"{run.path} has no whole checkpoint; nothing is removed")
    experiment = load_run(run).experiment
    train = experiment.train
    last = last if last is not None else train.keep_last if train is not None else 1
    every = every if every is not None else train.keep_every if train is not None else None
    positions = [info.images_seen for info in found]
    if missing := sorted(set(keep) - set(positions)):
        have = ", ".join(map(str, positions))
        raise UserError(f"{run.path} has no checkpoint at {missing[0]} images to keep; it has: {have}")
    stays = {*positions[-max(1, last) :], *keep, whole.images_seen}
    stays |= {images for images in positions if every and images % every == 0}
    best = storage.load(whole.path, BEST).get(BEST)
    stays |= {int(best)} if best is not None else set()
    if experiment.sample is not None and experiment.sample.checkpoint != "latest":
        stays.add(experiment.sample.checkpoint)
    going = [garbage.measured(info.path) for info in found if info.images_seen not in stays]
    for line in garbage.report(run.name, going, dry_run):
        say(line)
    if going and not dry_run:
        garbage.remove(run, going)
    return sum(each.bytes for each in going)
