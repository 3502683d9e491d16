"""Exponential moving averages of parameters: fp32, placed like the parameters, updated once per iteration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@torch.no_grad()
def update_ema_(ema: Sequence[Tensor], parameters: Sequence[Tensor], decay: float) -> None:
    """In place: ema <- decay * ema + (1 - decay) * parameter, for lists of fp32 tensors of the same shapes."""
    torch._foreach_mul_(list(ema), decay)
    torch._foreach_add_(list(ema), list(parameters), alpha=1.0 - decay)


class EmaSet:
    """All averages of all roles: `averages[role][name]` maps parameter names to fp32 tensors.

    Deliberate deviation from the energy reference: its average advances at every micro-step, also where no optimizer
    step happened; ours advances once per iteration, and not at all when a non-finite step was skipped.
    """

    def __init__(self, modules: Mapping[str, nn.Module], decays: Mapping[str, float]) -> None:
        """Start every average at the current weights. `decays`: average name -> decay in [0, 1)."""
        self.decays = dict(decays)
        self._modules = dict(modules)
        self.averages: dict[str, dict[str, dict[str, Tensor]]] = {
            role: {
                name: {key: p.detach().clone().float() for key, p in module.named_parameters()} for name in decays
            }
            for role, module in modules.items()
        }
        # decided once: turns switch requires_grad of other roles off and on
        self._trained: dict[str, list[str]] = {}
        self._sources: dict[str, list[Tensor]] = {}
        for role, module in modules.items():
            trained = {key: p for key, p in module.named_parameters() if p.requires_grad}
            self._trained[role] = list(trained)
            self._sources[role] = [p.detach() for p in trained.values()]  # views: they follow the optimizer

    def update(self, roles: Sequence[str]) -> None:
        """Advance the averages of these roles towards the current weights; frozen parameters stay as they began."""
        for role in roles:
            for name, decay in self.decays.items():
                average = self.averages[role][name]
                update_ema_([average[key] for key in self._trained[role]], self._sources[role], decay)

    def tensors(self, role: str) -> dict[str, Tensor]:
        """`NAME/parameter` -> tensor of one role: the layout below `ema/ROLE/` of a checkpoint."""
        return {
            f"{name}/{key}": tensor for name, average in self.averages[role].items() for key, tensor in average.items()
        }

    @contextmanager
    def applied(self, name: str | None) -> Iterator[None]:
        """Inside the block the modules hold average `name` (None: the raw weights); outside, what they held before."""
        if name is None:
            yield
            return
        kept: list[tuple[nn.Parameter, Tensor]] = []
        for role, module in self._modules.items():
            average = self.averages[role][name]
            for key, parameter in module.named_parameters():
                kept.append((parameter, parameter.data))
                parameter.data = average[key]
        try:
            yield
        finally:
            for parameter, data in kept:
                parameter.data = data
