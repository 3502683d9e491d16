"""Reading checkpoints without an engine: listing, verification, weights of one role for sampling and export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import CheckpointError
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.training.checkpoint import manifest, storage


@dataclass(frozen=True)
class CheckpointInfo:
    """One committed checkpoint: its place on the clock, its folder, and what its manifest says: size, ranks, engine."""

    images_seen: int
    path: Path
    bytes: int
    world_size: int
    engine: str = ""


def list_checkpoints(run: RunFolder) -> list[CheckpointInfo]:
    """Committed checkpoints, oldest first; their content is not verified. Folders without a manifest are left out."""
    found: list[CheckpointInfo] = []
    if not run.checkpoints.is_dir():
        return found
    for path in run.checkpoints.iterdir():
        if not path.name.isdigit():
            continue
        try:
            facts = manifest.read(path)
        except CheckpointError:
            continue  # verify() names it
        size = sum(int(file["bytes"]) for file in facts.files.values())
        engine = str(facts.facts.get("engine", ""))
        found.append(CheckpointInfo(int(path.name), path, size, facts.world_size, engine))
    return sorted(found, key=lambda info: info.images_seen)


def verify(path: Path) -> list[str]:
    """Problems of one checkpoint folder, a sentence each: sizes, hashes, and that its metadata can be read."""
    found = manifest.problems(path)
    if not found:
        try:
            storage.keys(path)
        except CheckpointError as error:
            found.append(str(error))
    return found


def newest(run: RunFolder) -> CheckpointInfo:
    """The newest committed checkpoint. Raises CheckpointError when there is none."""
    found = list_checkpoints(run)
    if not found:
        raise CheckpointError(f"{run.path} has no checkpoint; run its train stage first")
    return found[-1]


def at(run: RunFolder, images_seen: int) -> CheckpointInfo:
    """The checkpoint at a position of the clock. Raises CheckpointError naming those that exist."""
    found = list_checkpoints(run)
    for info in found:
        if info.images_seen == images_seen:
            return info
    have = ", ".join(str(info.images_seen) for info in found) or "none"
    raise CheckpointError(f"{run.path} has no checkpoint at {images_seen} images; it has: {have}")


def load_role(path: Path, role: str, ema: str | None = None) -> dict[str, Tensor]:
    """Weights of one role after verification: raw (`ema` None) or the named average with the raw buffers.

    Returns parameter and buffer name -> CPU tensor. Raises CheckpointError when the checkpoint is not whole, or has
    no such role or average.
    """
    found = verify(path)
    if found:
        raise CheckpointError(f"{path} is not whole: {found[0]}; choose another checkpoint")
    prefix = f"model/{role}/"
    weights = {name[len(prefix) :]: tensor for name, tensor in storage.load(path, prefix).items()}
    if not weights:
        raise CheckpointError(f"{path} has no role '{role}'; it has: {', '.join(_second_names(path, 'model'))}")
    if ema is not None:
        prefix = f"ema/{role}/{ema}/"
        average = {name[len(prefix) :]: tensor for name, tensor in storage.load(path, prefix).items()}
        if not average:
            raise CheckpointError(f"{path} has no average '{ema}' of '{role}'; set sample.ema to one it has, or null")
        weights.update(average)
    return weights


def roles(path: Path) -> list[str]:
    """The roles whose weights a checkpoint holds. Raises CheckpointError when it is not whole."""
    found = verify(path)
    if found:
        raise CheckpointError(f"{path} is not whole: {found[0]}; choose another checkpoint")
    return _second_names(path, "model")


def manifest_sha256(path: Path) -> str:
    """The hash that names a checkpoint's content: SHA-256 of its manifest file."""
    return commit.sha256_file(path / manifest.NAME)


def _second_names(path: Path, first: str) -> list[str]:
    return sorted({name.split("/")[1] for name in storage.keys(path) if name.startswith(f"{first}/")})
