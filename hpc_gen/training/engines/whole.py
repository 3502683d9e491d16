"""Modules as plain ones again, for validation, previews and evaluation: all parameters, none of an engine's hooks.

Whatever shards a module, outside of a step it is used like any other: by the sampler, which may call any method of it,
as often as its data say. So the weights are gathered once (parameter by parameter, from masters or from an average of
them), put into the module for a while, and the engine's own parameters and hooks come back unharmed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hpc_gen.runtime.ranks import Ranks
from hpc_gen.training.engines.base import Parts
from hpc_gen.training.engines.layout import Layout

GATHER_ELEMENTS = 2**24  # of one collective: 64 MiB
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Plain:
    """What a module was before an engine took it: its submodules, parameter slots, hooks and forward methods."""

    def __init__(self, module: nn.Module) -> None:
        """Remember a module as the method built it."""
        self.module = module
        self.shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        first: dict[int, str] = {}
        self._slots: list[tuple[nn.Module, dict[str, str | None]]] = []  # owner, key -> name of the parameter
        for prefix, owner in module.named_modules():
            names: dict[str, str | None] = {}
            for key, parameter in owner._parameters.items():
                name = f"{prefix}.{key}" if prefix else key
                names[key] = None if parameter is None else first.setdefault(id(parameter), name)
            self._slots.append((owner, names))
        self._children = [(owner, dict(owner._modules)) for owner in module.modules()]
        self._hooks = [(owner, {kind: set(getattr(owner, kind)) for kind in _HOOKS}) for owner in module.modules()]
        self._forwards = [(owner, owner.__dict__.get("forward")) for owner in module.modules()]

    @contextmanager
    def shown(self, full: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the module is what it was, with the parameters `full` [name -> whole tensor], no gradients."""
        undo: list[tuple[Any, str, Any]] = []
        parameters = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in full.items()}
        for owner, children in self._children:
            undo.append((owner, "_modules", owner._modules))
            owner.__dict__["_modules"] = children
        for owner, kept in self._hooks:
            for kind, ids in kept.items():
                hooks = getattr(owner, kind)
                if len(hooks) != len(ids):
                    undo.append((owner, kind, hooks))
                    owner.__dict__[kind] = OrderedDict((i, hook) for i, hook in hooks.items() if i in ids)
        for owner, forward in self._forwards:
            present = owner.__dict__.get("forward")
            if present is not forward:
                undo.append((owner, "forward", present))
                owner.__dict__.pop("forward", None)
                if forward is not None:
                    owner.__dict__["forward"] = forward
        for owner, names in self._slots:
            if names:
                undo.append((owner, "_parameters", owner._parameters))
                owner.__dict__["_parameters"] = {k: None if n is None else parameters[n] for k, n in names.items()}
        try:
            yield
        finally:
            for owner, key, value in reversed(undo):
                owner.__dict__[key] = value


@contextmanager
def gathered(
    plain: Mapping[str, Plain],
    layouts: Mapping[str, Mapping[str, Layout]],
    parts: Parts,
    ranks: Ranks,
    device: torch.device,
) -> Iterator[None]:
    """All roles as plain modules with the weights that the ranks' `parts` make up (collective at the start only)."""
    with _all_shown([plain[role].shown(gather(parts[role], layouts[role], ranks, device)) for role in plain]):
        yield


@contextmanager
def _all_shown(contexts: list[Any]) -> Iterator[None]:
    if not contexts:
        yield
        return
    with contexts[0], _all_shown(contexts[1:]):
        yield


@torch.no_grad()
def gather(
    parts: Mapping[str, Tensor], layouts: Mapping[str, Layout], ranks: Ranks, device: torch.device
) -> dict[str, Tensor]:
    """Whole tensors by name on `device`, on every rank; those that are whole there already are not copied."""
    found: dict[str, Tensor] = {}
    batch: list[str] = []
    for name, part in parts.items():
        layout = layouts[name]
        if layout.replicated:
            found[name] = part.view(layout.shape).to(device)
            continue
        batch.append(name)
        if sum(_numel(layouts[each]) for each in batch) >= GATHER_ELEMENTS:
            found.update(_gather_batch(batch, parts, layouts, ranks, device))
            batch = []
    if batch:
        found.update(_gather_batch(batch, parts, layouts, ranks, device))
    return {name: found[name] for name in parts}


def _gather_batch(
    names: list[str],
    parts: Mapping[str, Tensor],
    layouts: Mapping[str, Layout],
    ranks: Ranks,
    device: torch.device,
) -> dict[str, Tensor]:
    """One collective for several tensors: each rank adds what it owns to zeros, which is exact."""
    size = sum(_numel(layouts[name]) for name in names)
    flat = torch.zeros(size, dtype=parts[names[0]].dtype, device=device)
    found: dict[str, Tensor] = {}
    offset = 0
    for name in names:
        layout = layouts[name]
        found[name] = flat[offset : offset + _numel(layout)].view(layout.shape)
        offset += _numel(layout)
        if layout.owner:
            layout.put(parts[name], found[name])
    ranks.all_reduce_sum_(flat)
    return found


def _numel(layout: Layout) -> int:
    return torch.Size(layout.shape).numel()
