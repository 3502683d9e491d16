"""Weights files against an experiment's model: what is in a file, what the model wants, and where they differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpc_gen.config.experiment import Experiment
from hpc_gen.config.loader import Resolved
from hpc_gen.data.table import Table
from hpc_gen.methods import registry
from hpc_gen.methods.protocol import Method, TableFacts
from hpc_gen.runtime import commit, tensor_files
from hpc_gen.runtime.errors import UserError, nearest
from hpc_gen.runtime.progress import format_bytes
from hpc_gen.stages.build import meta_method, open_table, table_facts
from hpc_gen.stages.run_setup import typed

MODEL_KEY, EMA_KEY = "model", "model_ema"  # of the checkpoints of MAR and mar_ebwm
_NAMED = 20  # differences that are listed before "and N more"

Say = Callable[[str], None]


@dataclass(frozen=True)
class WeightsFile:
    """What is taken from a weights file: the state dict at `key`, and its averages at `ema_key` (None: it has none)."""

    path: Path
    sha256: str
    key: str
    ema_key: str | None
    weights: dict[str, Tensor]
    averages: dict[str, Tensor]

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint made of it says of its origin."""
        return {"file": self.path.name, "sha256": self.sha256, "key": self.key, "ema_key": self.ema_key}


def open_weights(path: Path, key: str | None, sha256: str | None) -> WeightsFile:
    """Read a file: `key`, else its entry `model`, else its only state dict; the averages from its entry `model_ema`.

    Raises UserError, DataError (tensor_files.read_tensors).
    """
    nested = tensor_files.read_nested(path, sha256)
    found = tensor_files.state_dicts(nested)
    if key is None and MODEL_KEY in found:
        key = MODEL_KEY
    weights = tensor_files.select(path, nested, key)
    if key is None:
        key = found[0]
    ema_key = EMA_KEY if EMA_KEY in found else None
    averages = tensor_files.select(path, nested, ema_key) if ema_key is not None else weights
    return WeightsFile(path, commit.sha256_file(path), key, ema_key, weights, averages)


# -- comparing --------------------------------------------------------------------------------------------------------


def differences(own: Mapping[str, Tensor], flat: Mapping[str, Tensor]) -> list[str]:
    """Everything that keeps `flat` from being a state dict with the keys, shapes and kinds of `own`, a phrase each."""
    found = [f"lacks '{name}' {list(value.shape)}" for name, value in own.items() if name not in flat]
    found += [f"has unknown '{name}' {list(value.shape)}" for name, value in flat.items() if name not in own]
    for name, value in flat.items():
        if name not in own:
            continue
        wanted = own[name]
        if value.shape != wanted.shape:
            found.append(f"has '{name}' as {list(value.shape)}, the model needs {list(wanted.shape)}")
        elif value.is_floating_point() != wanted.is_floating_point():
            found.append(f"has '{name}' as {value.dtype}, the model needs {wanted.dtype}")
        elif bad := _not_finite(value):
            found.append(f"has {bad:,} values that are not finite in '{name}'")
    return found


def _not_finite(value: Tensor) -> int:
    if not value.is_floating_point():
        return 0
    wide = value.float() if value.itemsize == 1 else value
    return int((~torch.isfinite(wide)).sum())


def list_weights(resolved: Resolved, workspace: Path) -> Iterator[str]:
    """Every key of every role with its shape and kind, then the counts; lines for people and for `diff`."""
    resolved = typed(resolved)
    for role, module in meta_of(resolved.experiment, workspace).roles().items():
        parameters = dict(module.named_parameters())
        for name, value in module.state_dict().items():
            kind = "buffer"
            if name in parameters:
                kind = "parameter" if parameters[name].requires_grad else "frozen"
            yield f"{role}  {name}  {list(value.shape)}  {kind}"
        yield f"{role}: {counts(module)}"


def counts(module: nn.Module) -> str:
    """Tensors and parameters of a network, for a line."""
    parameters = list(module.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for p in parameters)
    return f"{len(module.state_dict())} tensors, {total:,} parameters, {trained:,} of them trained"


def verify_weights(
    path: Path,
    resolved: Resolved,
    workspace: Path,
    say: Say,
    *,
    key: str | None = None,
    sha256: str | None = None,
    role: str | None = None,
) -> int:
    """Compare a file with the experiment's model, saying all there is to say; returns the number of differences.

    Every state dict of the file is compared, or the one at `key`. Raises UserError and DataError where the file or the
    model cannot be had.
    """
    resolved = typed(resolved)
    entry, config = registry.typed_config(resolved.experiment.method)
    roles = meta_of(resolved.experiment, workspace).roles()
    role = chosen_role(list(roles), role)
    module = roles[role]
    nested = tensor_files.read_nested(path, sha256)
    say(f"{path}: {format_bytes(path.stat().st_size)}, SHA-256 {commit.sha256_file(path)}")
    say(f"role '{role}' of the experiment: {counts(module)}")
    names = {name for name, _ in module.named_parameters()}
    total = 0
    for each in [key] if key is not None else tensor_files.state_dicts(nested) or [None]:
        flat, notes = adapted(entry, role, tensor_files.select(path, nested, each), config, module.state_dict())
        found = differences(module.state_dict(), flat)
        values = sum(value.numel() for name, value in flat.items() if name in names)
        label = f"'{each}'" if each else "the file"
        say(f"{label}: {len(flat)} tensors, {values:,} values of parameters, {len(found)} differences")
        for line in [*notes, *found[:_NAMED]]:
            say(f"  {line}")
        if len(found) > _NAMED:
            say(f"  and {len(found) - _NAMED} more")
        total += len(found)
    return total


def adapted(
    entry: registry.MethodEntry, role: str, flat: Mapping[str, Tensor], config: Any, own: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """The file's state dict under the keys of `own`, by the method's hook, with what the user should know."""
    return entry.official(role, flat, config, own) if entry.official is not None else (dict(flat), [])


def meta_of(experiment: Experiment, workspace: Path) -> Method:
    """The method on the meta device; facts of the table where it is there already."""
    table = known_table(experiment, workspace)
    return meta_method(experiment, table_facts(table) if table is not None else TableFacts())


def known_table(experiment: Experiment, workspace: Path) -> Table | None:
    """The training table, or None where it was not encoded yet."""
    if not (workspace / experiment.data.table).is_dir():
        return None
    return open_table(workspace, experiment.data.table, experiment)


def chosen_role(roles: list[str], role: str | None) -> str:
    """`role`, or the only one there is; UserError naming those that there are."""
    if role is None and len(roles) == 1:
        return roles[0]
    if role in roles:
        assert role is not None
        return role
    said = "several roles; say which with --role" if role is None else f"no role '{role}'{nearest(role, roles)}"
    raise UserError(f"the method has {said}; it has: {', '.join(roles)}")
