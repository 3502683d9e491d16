"""What a run began from: the run it was forked from, or weights; needs neither torch nor the typed experiment."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hpc_gen.runtime.errors import CheckpointError
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.training.checkpoint import manifest

FORKED = "forked_from"  # key of hashes.json
TABLE_WAS_THERE = ("forked from", "imported from")  # of `origins`: both refuse to begin without the table


def forked_from(run: RunFolder) -> Mapping[str, Any] | None:
    """What a fork says of its parent (run, identity, manifest_sha256, images_seen, changed); None for other runs."""
    try:
        found = json.loads(run.hashes_path.read_bytes()).get(FORKED)
    except (OSError, ValueError, AttributeError):
        return None  # load_run refuses such a run; who only looks on says nothing of it
    return found if isinstance(found, dict) else None


def fork_line(origin: Mapping[str, Any]) -> str:
    """That, for people."""
    changed = ", ".join(origin.get("changed") or ()) or "nothing"
    return (
        f"{origin.get('run')} at {int(origin.get('images_seen') or 0):,} images (identity "
        f"{str(origin.get('identity'))[:16]}, checkpoint {str(origin.get('manifest_sha256'))[:16]}); changed: {changed}"
    )


def origins(run: RunFolder) -> list[tuple[str, str]]:
    """Everything the weights of a run began from, as (what, words); empty for the method's own initial values."""
    found: list[tuple[str, str]] = []
    parent = forked_from(run)
    if parent is not None:
        found.append(("forked from", fork_line(parent)))
    facts = _newest_facts(run)
    if isinstance(imported := facts.get("imported"), dict):
        found.append(("imported from", f"{imported.get('file')}, SHA-256 {imported.get('sha256')}"))
    if isinstance(initial := facts.get("initial"), dict):
        place = initial.get("images_seen")
        where = "" if place is None else f" at {place:,} images, {initial.get('ema') or 'raw weights'}"
        left = sum((initial.get("differences") or {}).values())
        lacking = f"; {left} tensors did not fit" if left else ""
        found.append(("begun from", f"{initial.get('source')}{where}, SHA-256 {initial.get('sha256')}{lacking}"))
    return found


def _newest_facts(run: RunFolder) -> Mapping[str, Any]:
    """What the newest readable checkpoint says of itself."""
    paths = [path for path in run.checkpoints.iterdir() if path.name.isdigit()] if run.checkpoints.is_dir() else []
    for path in sorted(paths, reverse=True):
        try:
            return manifest.read(path).facts
        except CheckpointError:
            continue  # `checkpoints verify` names it
    return {}
