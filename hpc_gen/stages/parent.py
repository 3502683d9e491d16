"""Whose child a forked run is, as its hashes.json tells; needs neither torch nor the typed experiment."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hpc_gen.runtime.run_folder import RunFolder

FORKED = "forked_from"  # key of hashes.json


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
