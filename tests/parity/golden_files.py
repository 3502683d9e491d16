"""Finds and reads golden cases. A damaged file becomes a case with a `problem`, so that collection never crashes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file
from torch import Tensor

OFFICIAL = "official_shapes"
PARITY_FOLDER = Path(__file__).resolve().parent
REPOSITORY = PARITY_FOLDER.parents[1]

Found = TypeVar("Found", "Case", "OfficialModel")


class GoldenError(AssertionError):
    """A golden file is malformed; the message names the file and what is wrong."""


class Strict(dict[str, Any]):
    """A dictionary of a golden file: a key that a handler asks for in vain is the file's fault, and is said so."""

    def __missing__(self, key: str) -> Any:
        raise GoldenError(f"the golden case has no '{key}'; it has {', '.join(map(str, self)) or 'nothing'}")


@dataclass(frozen=True)
class Case:
    """METHOD/CASE.json and, where there is one, METHOD/CASE.safetensors."""

    method: str
    name: str
    json_path: Path
    record: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None

    @property
    def id(self) -> str:
        """Test id `METHOD-CASE`."""
        return f"{self.method}-{self.name}"

    @property
    def kind(self) -> str:
        """What to build and run."""
        return str(self.record["kind"])

    @property
    def owner(self) -> str:
        """The method folder that must pass this case."""
        return str(self.record.get("owner", self.method))

    @property
    def rules(self) -> list[dict[str, Any]]:
        """Comparison rules in order."""
        return list(self.record["compare"])

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the case; none when it has no tensor file. Asking for one it lacks raises GoldenError."""
        path = self.json_path.with_suffix(".safetensors")
        if not path.exists():
            return Strict()
        try:
            return Strict(load_file(path))
        except Exception as error:  # whatever the reader trips over, the file is what is wrong
            raise GoldenError(f"{path} cannot be read as safetensors: {error}") from error


@dataclass(frozen=True)
class OfficialModel:
    """One model of METHOD/official_shapes.json."""

    method: str
    name: str
    json_path: Path
    record: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None

    @property
    def id(self) -> str:
        """Test id `METHOD-official-MODEL`."""
        return f"{self.method}-official-{self.name}"


def roots() -> list[Path]:
    """HPC_GEN_GOLDEN alone when it is set; else the shipped cases and ../shared/golden where that exists."""
    chosen = os.environ.get("HPC_GEN_GOLDEN")
    if chosen:
        return [Path(chosen)]
    shared = REPOSITORY.parent / "shared" / "golden"
    return [PARITY_FOLDER / "golden"] + ([shared] if shared.is_dir() else [])


def samples(method: str, name: str) -> list[Path]:
    """Files or folders METHOD/NAME that are no case but belong to one (shards, a zip); none under HPC_GEN_GOLDEN when
    the folder that it names has none. The shipped ones must be there, so a suite without them does not pass as whole.
    """
    shipped = PARITY_FOLDER / "golden" / method / name
    if not shipped.exists():
        raise GoldenError(f"{shipped} is not in this checkout")
    return [root / method / name for root in roots() if (root / method / name).exists()]


def _first_of_each(found: list[Found]) -> list[Found]:
    """Without repetitions: the shipped cases are copies of shared ones."""
    return list({(item.method, item.name): item for item in reversed(found)}.values())[::-1]


def cases(folders: list[Path]) -> list[Case]:
    """All METHOD/CASE below the folders, sorted; of two with one name the first folder's counts."""
    found = []
    for folder in folders:
        names = {path.with_suffix("") for ending in ("json", "safetensors") for path in folder.glob(f"*/*.{ending}")}
        found += [_read_case(path) for path in sorted(names) if path.name != OFFICIAL]
    return sorted(_first_of_each(found), key=lambda case: case.id)


def official_models(folders: list[Path]) -> list[OfficialModel]:
    """All models of every METHOD/official_shapes.json, sorted; of two with one name the first folder's counts."""
    found = []
    for folder in folders:
        for path in sorted(folder.glob(f"*/{OFFICIAL}.json")):
            found += _read_official(path)
    return sorted(_first_of_each(found), key=lambda model: model.id)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"), object_hook=Strict)
    except (OSError, ValueError) as error:
        raise GoldenError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(record, dict):
        raise GoldenError(f"{path} must hold a JSON object, not a {type(record).__name__}")
    return record


def _read_case(stem: Path) -> Case:
    path = stem.with_name(stem.name + ".json")
    method, name = stem.parent.name, stem.name
    try:
        record = _read_object(path)
        checks: dict[str, Callable[[Any], bool]] = {
            "kind": lambda value: isinstance(value, str),
            "compare": lambda value: isinstance(value, list) and all(isinstance(rule, dict) for rule in value),
        }
        for key, valid in checks.items():
            if key not in record:
                raise GoldenError(f"{path} has no '{key}'")
            if not valid(record[key]):
                raise GoldenError(f"'{key}' of {path} is not what a golden case needs: {str(record[key])[:80]}")
        if not isinstance(record.get("owner", method), str):
            raise GoldenError(f"'owner' of {path} is not the name of a method folder")
    except GoldenError as error:
        return Case(method, name, path, problem=str(error))
    return Case(method, name, path, record)


def _read_official(path: Path) -> list[OfficialModel]:
    method = path.parent.name
    try:
        record = _read_object(path)
    except GoldenError as error:
        return [OfficialModel(method, "unreadable", path, problem=str(error))]
    models = []
    for name, entry in record.items():
        if isinstance(entry, dict) and isinstance(entry.get("state_dict"), dict):
            models.append(OfficialModel(method, name, path, entry))
        else:
            problem = f"model '{name}' of {path} has no 'state_dict' of keys and shapes"
            models.append(OfficialModel(method, name, path, problem=problem))
    return models
