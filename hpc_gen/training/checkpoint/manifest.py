"""`manifest.json`: what a checkpoint folder must hold, written last and verified before anything else is parsed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import CheckpointError

NAME = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """Facts of one checkpoint. `files`: name -> {bytes, sha256}; `facts`: identity hash, method, table, engine ...

    It holds no time and no host, so two runs that did the same work have the same manifest, byte for byte.
    """

    images_seen: int
    world_size: int
    files: Mapping[str, Mapping[str, Any]]
    facts: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The content of manifest.json, with a hash of itself: nothing else tells of a bit flipped in `facts`."""
        content = {
            "format": FORMAT,
            "images_seen": self.images_seen,
            "world_size": self.world_size,
            "files": {name: dict(self.files[name]) for name in sorted(self.files)},
            "facts": dict(self.facts),
        }
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return {**content, "sha256": hashlib.sha256(canonical.encode()).hexdigest()}


def read(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder. Raises CheckpointError when it is absent or not a manifest."""
    path = folder / NAME
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no {NAME}: the checkpoint was never committed") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    try:
        if content["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {content['format']}, this program reads format {FORMAT}")
        files = {
            str(name): {"bytes": int(facts["bytes"]), "sha256": str(facts["sha256"])}
            for name, facts in content["files"].items()
        }
        return Manifest(int(content["images_seen"]), int(content["world_size"]), files, dict(content["facts"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a checkpoint manifest ({error!r})") from error


def problems(folder: Path) -> list[str]:
    """Everything that keeps a checkpoint folder from being whole, one sentence each; empty when it is whole."""
    try:
        manifest = read(folder)
    except CheckpointError as error:
        return [str(error)]
    found: list[str] = []
    if json.loads((folder / NAME).read_text()) != manifest.to_json():
        found.append(f"{folder / NAME} does not have the SHA-256 that it was written with")
    if folder.name.isdigit() and int(folder.name) != manifest.images_seen:
        found.append(f"{folder} is named for {int(folder.name)} images but its manifest says {manifest.images_seen}")
    present = {path.name for path in folder.iterdir()} - {NAME}
    for name in sorted(present - set(manifest.files)):
        found.append(f"{folder / name} is not in the manifest")
    for name, facts in manifest.files.items():
        path = folder / name
        if Path(name).name != name:
            found.append(f"{folder / NAME} names '{name}', which is outside the checkpoint")
        elif not path.is_file():
            found.append(f"{path} is missing")
        elif path.stat().st_size != facts["bytes"]:
            found.append(f"{path} has {path.stat().st_size} bytes, the manifest says {facts['bytes']}")
        elif commit.sha256_file(path) != facts["sha256"]:
            found.append(f"{path} does not have the SHA-256 of the manifest")
    return found
