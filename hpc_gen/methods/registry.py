"""Methods by name: one line here per method; `module:ATTRIBUTE` names one that lives outside the library."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from hpc_gen.runtime.errors import UserError, nearest

if TYPE_CHECKING:  # typing a config needs no torch
    from torch import Tensor

    from hpc_gen.data.table import Table
    from hpc_gen.methods.protocol import Method, TableFacts

    Export = Callable[[str, Mapping[str, Tensor], Any, Table | None], tuple[dict[str, Tensor], dict[str, str]]]
    Official = Callable[[str, Mapping[str, Tensor], Any, Mapping[str, Tensor]], tuple[dict[str, Tensor], list[str]]]


@dataclass(frozen=True)
class MethodEntry:
    """How a method is configured and built.

    `config` types the experiment's `method:` section (without `name`), `settings` types `sample.settings`, `build`
    makes the method on the meta device from its config and facts of the training table. Two hooks for weights of other
    programs, for methods whose state dict is not theirs already:
    `export(role, state, config, table)` gives the tensors and metadata that `weights export` writes of a role;
    `official(role, flat, config, own)` turns a state dict of theirs into one with the keys of `own`, the role's state
    as this experiment would begin it, with a sentence for each thing that the user should know of.
    """

    config: type[BaseModel]
    settings: type[BaseModel]
    build: Callable[[Any, TableFacts], Method]
    export: Export | None = None
    official: Official | None = None


# name -> "module:ATTRIBUTE" of its MethodEntry; imported only when asked for
METHODS: dict[str, str] = {
    "autoencoder": "hpc_gen.methods.autoencoder.recipe:ENTRY",
    "energy": "hpc_gen.methods.energy.recipe:ENTRY",
    "gmem": "hpc_gen.methods.gmem.recipe:ENTRY",
}


def entry(name: str) -> MethodEntry:
    """The entry of a registered method, or of an own one given as `module:ATTRIBUTE`.

    Raises UserError when the name is unknown (naming the nearest) or the entry cannot be imported.
    """
    if ":" not in name and name not in METHODS:
        raise UserError(f"unknown method '{name}'{nearest(name, METHODS)}; known methods: {', '.join(sorted(METHODS))}")
    target = METHODS.get(name, name)
    module_name, _, attribute = target.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # the last two: ".module:X", ":X"
        raise UserError(f"method '{name}' cannot be imported from '{target}' ({error}); check the path") from error
    if not isinstance(found, MethodEntry):
        raise UserError(f"'{target}' is a {type(found).__name__}, not a MethodEntry; point method.name at one")
    return found


def typed_config(section: Mapping[str, Any]) -> tuple[MethodEntry, BaseModel]:
    """Entry and validated config of an experiment's `method:` section (a mapping with `name`)."""
    found = entry(str(section["name"]))
    return found, found.config.model_validate({key: value for key, value in section.items() if key != "name"})
