"""Frozen networks of a training, `train.frozen`: read, tried on one row, and handed to the method that asks them.

They are whole on the device of each rank and belong to no engine, checkpoint or average (methods/protocol.py,
AsksFrozen). What they are is in the identity by the SHA-256 of their files (stages/origin.py) and in every manifest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpc_gen import tokenizers
from hpc_gen.config.experiment import Experiment
from hpc_gen.config.tokenizer import TokenizerConfig
from hpc_gen.methods.protocol import AsksFrozen, ColumnSpec, FrozenNetwork, FrozenSpec, Method
from hpc_gen.runtime.errors import DataError, UserError, nearest
from hpc_gen.tokenizers import OnDevice

KEY = "train.frozen"


def give_frozen(experiment: Experiment, method: Method, workspace: Path, device: torch.device) -> dict[str, Any]:
    """Give `method` the frozen networks that it asks for, on `device`; returns their identities by name, for manifests.

    Raises UserError where `train.frozen` does not name exactly these, or names one that gives something else than the
    method needs; DataError for a file that is not what it should be, or whose network gives values that are not finite.
    """
    asked = method.frozen() if isinstance(method, AsksFrozen) else {}
    named = (experiment.train.frozen if experiment.train is not None else None) or {}
    for name in asked:
        if name not in named:
            raise UserError(
                f"this method asks the frozen network '{name}' in training, but '{KEY}.{name}' does not say which; "
                "give its tokenizer section (name, weights), as encode.also has it"
            )
    for name in named:
        if name not in asked:
            known = f"it asks {', '.join(asked)}{nearest(name, asked)}" if asked else "it asks none"
            raise UserError(f"'{KEY}.{name}' is a network that this method does not ask ({known}); remove it")
    if not asked:
        return {}
    networks: dict[str, FrozenNetwork] = {}
    identities: dict[str, Any] = {}
    for name, spec in asked.items():
        networks[name], identities[name] = _opened(name, named[name], workspace, device)
        _try(name, networks[name], spec, named[name])
    assert isinstance(method, AsksFrozen)
    method.take_frozen(networks)
    return identities


def give_stand_ins(method: Method) -> None:
    """Give a method that is only measured networks that cost nothing: their outputs are zeros of the right shape."""

    def stand_in(spec: FrozenSpec) -> FrozenNetwork:
        def zeros(inputs: Tensor) -> dict[str, Tensor]:
            return {
                name: inputs.new_zeros((len(inputs), *each.shape), dtype=getattr(torch, each.dtypes[-1]))
                for name, each in spec.outputs.items()
            }

        return zeros

    if isinstance(method, AsksFrozen):
        method.take_frozen({name: stand_in(spec) for name, spec in method.frozen().items()})


def _opened(
    name: str, config: TokenizerConfig, workspace: Path, device: torch.device
) -> tuple[FrozenNetwork, dict[str, Any]]:
    built = tokenizers.build(config.name, workspace=workspace, device=device, **config.settings())
    if not isinstance(built, OnDevice):
        raise UserError(f"'{KEY}.{name}.name' = '{config.name}' cannot be asked in training; dinov2 can")
    return built.on_device, built.identity


def _try(name: str, network: FrozenNetwork, spec: FrozenSpec, config: TokenizerConfig) -> None:
    """Ask about one black image: what cannot work is refused before the first step."""
    found = network(torch.zeros((1, *spec.inputs.shape), dtype=getattr(torch, spec.inputs.dtypes[0])))
    for output, wanted in spec.outputs.items():
        if output not in found:
            raise UserError(
                f"'{KEY}.{name}' gives no {output} (it gives: {', '.join(sorted(found))}); name them in its columns"
            )
        if misfit := _misfit(found[output], wanted):
            raise UserError(f"'{KEY}.{name}' gives {output} of {misfit}; change its grid or weights, or the method")
        if not bool(torch.isfinite(found[output]).all()):
            raise DataError(
                f"'{KEY}.{name}': the network of {config.weights} gives {output} that are not finite; get the file "
                "anew, or set precision and compute of its section to float32"
            )


def _misfit(rows: Tensor, wanted: ColumnSpec) -> str:
    """What is wrong with one row, "" when nothing is."""
    dtype, shape = str(rows.dtype).removeprefix("torch."), tuple(rows.shape[1:])
    if shape != wanted.shape:
        return f"shape {list(shape)}, the method needs {list(wanted.shape)}"
    return "" if dtype in wanted.dtypes else f"{dtype}, the method reads {' or '.join(wanted.dtypes)}"
