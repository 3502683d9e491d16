"""Weights that training begins from, `train.init_from`: read, compared with the networks, and put into them.

Weights only: the optimizer begins afresh, the averages begin at what was loaded, the clock at 0. What does not fit is
refused, or with `strict: false` left out, counted and listed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpc_gen.config.experiment import Experiment, InitFromConfig
from hpc_gen.methods import registry
from hpc_gen.methods.protocol import Method
from hpc_gen.runtime.errors import CheckpointError, DataError
from hpc_gen.stages.origin import Source, locate
from hpc_gen.stages.weights import Say, adapted, chosen_role, differences, open_weights
from hpc_gen.training.checkpoint import read


@dataclass(frozen=True)
class Taken:
    """What was loaded: `facts` for the checkpoints, and every difference by role (empty lists where all fitted)."""

    facts: dict[str, Any]
    differences: dict[str, list[str]]


def take_initial_weights(
    experiment: Experiment, workspace: Path, method: Method, modules: Mapping[str, nn.Module], say: Say
) -> Taken | None:
    """Fill the method's networks as `train.init_from` says; None where the experiment has no such section.

    All or nothing over all roles. Raises UserError or CheckpointError where the source is not there, DataError where it
    does not fit: with `strict` by a single key, without it by all of them.
    """
    chosen = experiment.train.init_from if experiment.train is not None else None
    if chosen is None:
        return None
    source = locate(chosen, workspace)
    given = _of_file(experiment, chosen, source, method, modules, say) if chosen.weights is not None else None
    if given is None:
        given = _of_run(chosen, source, method)
    fitting: dict[str, dict[str, Tensor]] = {}
    found: dict[str, list[str]] = {}
    for role, flat in given.items():
        own = modules[role].state_dict()
        found[role] = differences(own, flat)
        if found[role] and chosen.strict:
            more = f" and {len(found[role]) - 1} more differences" if len(found[role]) > 1 else ""
            raise DataError(
                f"{source.path}: role '{role}' {found[role][0]}{more}; change the method section, or take what fits "
                "with train.init_from.strict=false"
            )
        fitting[role] = {name: flat[name] for name, value in own.items() if name in flat and _fits(value, flat[name])}
        if not fitting[role]:
            raise DataError(f"{source.path}: not one tensor fits role '{role}' ({found[role][0]}); name another source")
    with torch.no_grad():
        for role, state in fitting.items():
            own = modules[role].state_dict()
            for name, value in state.items():
                own[name].copy_(value)
    for role, state in fitting.items():
        _tell(role, len(state), len(modules[role].state_dict()), found[role], say)
    for role in sorted(set(modules) - set(given)):
        say(f"initial weights of role '{role}': those of the method, the source was not asked for it")
    return Taken(_facts(chosen, source, fitting, found), found)


def _fits(own: Tensor, value: Tensor) -> bool:
    return not differences({"": own}, {"": value})


def _of_file(
    experiment: Experiment,
    chosen: InitFromConfig,
    source: Source,
    method: Method,
    modules: Mapping[str, nn.Module],
    say: Say,
) -> dict[str, dict[str, Tensor]]:
    """The state dict of a weights file for its one role, under the method's keys."""
    entry, config = registry.typed_config(experiment.method)
    role = chosen_role([name for name in modules if method.parameter_groups(name)], chosen.role)
    file = open_weights(source.path, chosen.key, None)  # `locate` has compared the hash
    flat, notes = adapted(entry, role, file.weights, config, modules[role].state_dict())
    for note in notes:
        say(f"{source.path.name}: {note}")
    return {role: flat}


def _of_run(chosen: InitFromConfig, source: Source, method: Method) -> dict[str, dict[str, Tensor]]:
    """Weights of a checkpoint by role; frozen roles have no average, theirs are the weights themselves.

    Without `strict` a role that the checkpoint does not have keeps its initial values.
    """
    names = list(method.roles())
    if chosen.role is not None:
        names = [chosen_role(names, chosen.role)]
    there = read.roles(source.path)
    lacking = [name for name in names if name not in there]
    if lacking and (chosen.strict or len(lacking) == len(names)):
        raise CheckpointError(
            f"{source.path} has no role '{lacking[0]}' (it has: {', '.join(there)}); name one with "
            "train.init_from.role, or another run"
        )
    return {
        name: read.load_role(source.path, name, chosen.ema if method.parameter_groups(name) else None)
        for name in names
        if name in there
    }


def _tell(role: str, taken: int, total: int, found: list[str], say: Say) -> None:
    said = f"; {len(found)} differences, which keep their initial values or are left out:" if found else ""
    say(f"initial weights of role '{role}': {taken} of {total} tensors taken{said}")
    for line in found:
        say(f"  the source {line}")


def _facts(
    chosen: InitFromConfig, source: Source, fitting: Mapping[str, Mapping[str, Tensor]], found: Mapping[str, list[str]]
) -> dict[str, Any]:
    """What every checkpoint says of it; names and hashes, no path of this machine."""
    return {
        "source": source.path.name if chosen.weights is not None else source.path.parent.parent.name,
        "sha256": source.sha256,
        "images_seen": source.checkpoint,
        "ema": chosen.ema,
        "taken": {role: len(state) for role, state in sorted(fitting.items())},
        "differences": {role: len(lines) for role, lines in sorted(found.items())},
    }
