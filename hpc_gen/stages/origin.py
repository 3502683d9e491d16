"""Weights of others that a training uses: `train.init_from` and `train.frozen` are pinned to a content, so that the
identity covers it.

Starts no torch: it looks at names and hashes only. The weights are read by stages/initial.py and stages/frozen.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_gen.config import loader
from hpc_gen.config.experiment import InitFromConfig
from hpc_gen.config.loader import Resolved
from hpc_gen.config.tokenizer import TokenizerConfig
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import CheckpointError, DataError, UserError
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages.control import find_run
from hpc_gen.training.checkpoint import manifest

CARRIED = ("imported", "initial", "forked")
"""Facts of a checkpoint that every later one repeats: what the weights began from stays told to the end."""


@dataclass(frozen=True)
class Source:
    """Weights on the disk: a file, or the folder of a checkpoint (then `checkpoint` is its images_seen)."""

    path: Path
    sha256: str
    checkpoint: int | None


def init_from(resolved: Resolved | None) -> InitFromConfig | None:
    """The section `train.init_from`, or None."""
    train = resolved.experiment.train if resolved is not None else None
    return train.init_from if train is not None else None


def pinned(resolved: Resolved, workspace: Path, before: Resolved | None = None) -> Resolved:
    """The experiment with the content of `train.init_from` and `train.frozen` in it: hashes, and 'latest' as a number.

    So the identity covers what was loaded. `before`: the experiment of the run that exists already; asked for the same
    it keeps its pins, whatever became of the source. Raises UserError when there is no such source, DataError when its
    hash is not the one that is given.
    """
    changes: dict[str, Any] = {}
    given, held = init_from(resolved), init_from(before)
    if given is not None and held is not None and _asks_the_same(given, held):
        changes |= {"train.init_from.sha256": held.sha256, "train.init_from.checkpoint": held.checkpoint}
    elif given is not None:
        found = locate(given, workspace)
        changes["train.init_from.sha256"] = found.sha256
        if found.checkpoint is not None:
            changes["train.init_from.checkpoint"] = found.checkpoint
    there = _frozen(before)
    for name, network in _frozen(resolved).items():
        known = there.get(name)
        if known is None or network.model_copy(update={"sha256": network.sha256 or known.sha256}) != known:
            changes[f"train.frozen.{name}.sha256"] = _frozen_sha256(name, network, workspace)
        else:
            changes[f"train.frozen.{name}.sha256"] = known.sha256
    return loader.with_changes(resolved, changes) if changes else resolved


def _frozen(resolved: Resolved | None) -> dict[str, TokenizerConfig]:
    """The section `train.frozen`, {} where there is none."""
    train = resolved.experiment.train if resolved is not None else None
    return (train.frozen or {}) if train is not None else {}


def _frozen_sha256(name: str, network: TokenizerConfig, workspace: Path) -> str | None:
    """SHA-256 of a frozen network's file, compared with the one that is given; None for one without a file."""
    if network.weights is None:
        return None
    path, key = workspace / network.weights, f"train.frozen.{name}"
    try:
        found = commit.sha256_file(path)
    except OSError as error:
        raise UserError(
            f"'{key}.weights' cannot be read: {path} ({error.strerror}); paths are relative to the workspace"
        ) from error
    if network.sha256 not in (None, found):
        raise DataError(
            f"{path} has the SHA-256 {found}, '{key}.sha256' is {network.sha256}: it is not what was asked for; "
            "restore it, or begin another run"
        )
    return found


def _asks_the_same(given: InitFromConfig, held: InitFromConfig) -> bool:
    update: dict[str, Any] = {}
    if given.sha256 is None:
        update["sha256"] = held.sha256
    if given.checkpoint == "latest":
        update["checkpoint"] = held.checkpoint
    return given.model_copy(update=update) == held


def locate(chosen: InitFromConfig, workspace: Path) -> Source:
    """The source of `train.init_from`, its hash compared. Raises UserError, CheckpointError, DataError."""
    if chosen.weights is not None:
        path = workspace / chosen.weights
        try:
            found = Source(path, commit.sha256_file(path), None)
        except OSError as error:
            raise UserError(
                f"'train.init_from.weights' cannot be read: {path} ({error.strerror}); paths are relative to the "
                "workspace"
            ) from error
    else:
        assert chosen.run is not None  # one of both, by InitFromConfig
        found = _checkpoint_of(_run_of(chosen.run, workspace), chosen)
    if chosen.sha256 not in (None, found.sha256):
        raise DataError(
            f"{found.path} has the SHA-256 {found.sha256}, 'train.init_from.sha256' is {chosen.sha256}: it is not what "
            "was asked for; restore it, or begin another run"
        )
    return found


def _run_of(text: str, workspace: Path) -> RunFolder:
    below = RunFolder(workspace / text)
    return below if below.exists() else find_run(text, workspace)


def _checkpoint_of(run: RunFolder, chosen: InitFromConfig) -> Source:
    """The checkpoint folder that is asked for; that it is whole is verified when it is read."""
    found: dict[int, Path] = {}
    for path in run.checkpoints.iterdir() if run.checkpoints.is_dir() else ():
        if path.name.isdigit() and (path / manifest.NAME).is_file():
            found[int(path.name)] = path
    images_seen = max(found, default=-1) if chosen.checkpoint == "latest" else chosen.checkpoint
    if images_seen not in found:
        have = ", ".join(str(number) for number in sorted(found)) or "none yet"
        which = "" if chosen.checkpoint == "latest" else f" at {chosen.checkpoint} images"
        raise CheckpointError(f"'train.init_from': {run.path} has no checkpoint{which}; it has: {have}")
    path = found[images_seen]
    return Source(path, commit.sha256_file(path / manifest.NAME), images_seen)
