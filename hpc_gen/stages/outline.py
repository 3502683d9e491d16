"""The stages of a run and what each has to do, kept beside the hashes: `status` then needs no config, no pydantic."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hpc_gen.runtime.run_folder import RunFolder

if TYPE_CHECKING:
    from hpc_gen.config.experiment import Experiment


@dataclass(frozen=True)
class StageOutline:
    """One stage: `total` in `unit` (None: not known before it ends)."""

    name: str
    total: int | None
    unit: str


@dataclass(frozen=True)
class Outline:
    """The identity of a run and its stages in order."""

    identity: str
    stages: tuple[StageOutline, ...]


def stages_of(experiment: Experiment) -> tuple[StageOutline, ...]:
    """The stages that an experiment runs, in order."""
    found = []
    for name in experiment.stage_order():
        total, unit = 1 if name == "report" else None, "units"
        if name == "train":
            assert experiment.train is not None
            total, unit = experiment.train.end_images, "images"
        elif name == "sample" and experiment.sample is not None:
            total = -(-experiment.sample.num_images // experiment.sample.block_images)
        found.append(StageOutline(name, total, unit))
    return tuple(found)


def to_json(experiment: Experiment) -> list[dict[str, Any]]:
    """The stages as they stand in hashes.json."""
    return [asdict(stage) for stage in stages_of(experiment)]


def read(run: RunFolder) -> Outline:
    """The outline of a run: from hashes.json, else from its config. Raises ConfigError when neither can be read."""
    try:
        content = json.loads(run.hashes_path.read_bytes())
        if "becoming" not in content:  # else a kill may have left it behind the config
            return Outline(str(content["identity"]), tuple(StageOutline(**stage) for stage in content["stages"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # a run of an earlier version, or damaged: the config says it, too
    from hpc_gen.config import loader

    resolved = loader.load(run.config_path)
    return Outline(resolved.identity, stages_of(resolved.experiment))
