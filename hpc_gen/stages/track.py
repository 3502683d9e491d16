"""Publishing a run's history to wandb from its journal alone, later and anywhere: `hpc-gen track sync`.

The same publisher as in training (runtime/tracking.py): it asks the server how many rows it has and sends the rest, so
it may be killed, repeated, and run on any machine that sees the folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hpc_gen.config import loader
from hpc_gen.config.loader import Resolved
from hpc_gen.runtime.errors import HpcGenError, UserError
from hpc_gen.runtime.journal import Reader
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.runtime.tracking import WandbMirror
from hpc_gen.runtime.tracking_rows import rows_of
from hpc_gen.stages import control
from hpc_gen.training.checkpoint import manifest


class TrackError(HpcGenError):
    """The rows did not all go out; the command may be repeated."""


@dataclass(frozen=True)
class Published:
    """What may be published: rows up to the newest committed checkpoint, and what an earlier publisher released."""

    rows: int
    upto_images: int
    released: int
    run_id: str


@dataclass(frozen=True)
class _Online:
    """Tracking settings of a run, laid over: this command publishes, whatever training did."""

    project: str | None
    entity: str | None
    loss_term: str | None
    wandb: str = "online"


def look(run: RunFolder) -> Published:
    """Nothing is changed. Raises UserError where there is nothing to publish."""
    committed = _newest_checkpoint(run)
    if committed is None:
        raise UserError(
            f"{run.path} has no checkpoint yet; rows are published up to the newest one, so that none has to be undone"
        )
    rows = rows_of(Reader(run, stage="train", task=0).events(), committed)
    marker: dict[str, Any] = {}
    try:
        marker = json.loads((run.path / "wandb" / "mirror.json").read_bytes())
    except (OSError, ValueError):
        pass  # nothing was released, or the publisher will say what is wrong with it
    return Published(len(rows), committed, int(marker.get("rows") or 0), str(marker.get("run_id") or ""))


def sync(
    run: RunFolder,
    resolved: Resolved,
    say: Callable[[str], None],
    *,
    dry_run: bool = False,
    wait_s: float = 600.0,
    client_settings: dict[str, Any] | None = None,
) -> None:
    """Send what the server lacks. Raises UserError while the run publishes by itself, TrackError when it fails."""
    found, tracking = look(run), resolved.experiment.tracking
    where = f"project {tracking.project}" + (f" of {tracking.entity}" if tracking.entity else "")
    known = f"as {found.run_id}, {found.released} rows released before" if found.run_id else "as a new wandb run"
    say(f"{found.rows} rows up to {found.upto_images:,} images, {where}, {known}")
    if dry_run:
        return
    at_work = control.holder(run)
    if at_work is not None and at_work.stage == "train" and tracking.wandb != "disabled":
        raise UserError(
            f"attempt {at_work.attempt} of {run.name} is at work on {at_work.host} and publishes by itself "
            f"(tracking.wandb={tracking.wandb}); two writers would spoil the history: wait until it has ended"
        )
    settings = _Online(tracking.project, tracking.entity, tracking.loss_term)
    mirror = WandbMirror(run, settings, config=loader.flat(resolved), client_settings=client_settings)
    mirror.publish(found.upto_images, final=True, wait_s=wait_s)
    if mirror.problem is not None:
        raise TrackError(f"not all rows went out: {mirror.problem}; the command may be repeated")
    say(f"published: {found.rows} rows of {run.name} are on the server as {look(run).run_id}")


def _newest_checkpoint(run: RunFolder) -> int | None:
    """images_seen of the newest committed checkpoint, by the manifests alone."""
    folder = run.checkpoints
    numbers = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    for number in sorted(numbers, reverse=True):
        try:
            return manifest.read(run.checkpoints / f"{number:012d}").images_seen
        except HpcGenError:
            continue  # not whole: `checkpoints verify` names it
    return None
