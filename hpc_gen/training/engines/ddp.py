"""Data-parallel engine: every rank holds all parameters; gradients are summed in fixed-order flat buckets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hpc_gen.config.experiment import TrainConfig
from hpc_gen.methods.protocol import Method, Turn
from hpc_gen.runtime.ranks import Ranks
from hpc_gen.training.engines.buckets import GradientBuckets
from hpc_gen.training.engines.layout import Layout
from hpc_gen.training.engines.objective import ObjectiveEngine
from hpc_gen.training.optimizers import RoleOptimizer


class DdpEngine(ObjectiveEngine):
    """Wraps the objective, not the network, so losses that differentiate inside the forward reduce correctly too."""

    name = "ddp"

    def __init__(
        self, method: Method, modules: Mapping[str, nn.Module], config: TrainConfig, ranks: Ranks, device: torch.device
    ) -> None:
        """`modules`: the method's own roles, materialised with the same values on every rank."""
        super().__init__(method, modules, config, ranks, device)
        self._buckets: dict[str, GradientBuckets] = {}
        self._split()
        for role, module in self._modules.items():
            module.to(device)
            if self._groups[role]:
                self._hold(role)
        self._ready()

    def _split(self) -> None:
        """Nothing is split here."""

    def _hold(self, role: str) -> None:
        """Parts, optimizer and buckets of a trained role, of the parameters that its module has now."""
        module = self._modules[role]
        self._parts[role] = {name: p.detach() for name, p in module.named_parameters()}
        layouts = self._layouts.setdefault(role, {})
        for name, parameter in module.named_parameters():
            layouts.setdefault(name, Layout.whole(parameter.shape))
        optimizer = RoleOptimizer(module, self._groups[role], self._config.optimizer, layouts)
        self._optimizers[role] = optimizer
        bucket_bytes = int(self._config.engine.bucket_mb * 2**20)
        trained = list(optimizer.parameters.values())
        self._buckets[role] = GradientBuckets(trained, self._ranks, bucket_bytes, self._reduced_over())

    def _reduced_over(self) -> Any | None:
        """The ranks that hold the same parameters; None = all."""
        return None

    def _begin(self, role: str, micro_batches: int) -> None:
        self._buckets[role].begin()

    def _backward(self, role: str, total: Tensor, last: bool) -> None:
        if last:
            self._buckets[role].arm()
        total.backward()

    def _reduce(self, role: str) -> None:
        self._buckets[role].finish()

    def _apply(self, turn: Turn, lr: float, sound: bool) -> float:
        buckets, optimizer = self._buckets[turn.role], self._optimizers[turn.role]
        norm = self._norm(turn.role)
        grad_norm = float(norm)
        if sound and math.isfinite(grad_norm):
            clip = self._config.optimizer.clip
            if clip is not None and grad_norm > clip:
                buckets.scale(clip / (norm + 1e-6))
            names = {name: p for name, p in optimizer.parameters.items() if p in buckets.touched}
            self._same_reach(turn, list(names))
            buckets.detach_untouched(set(names.values()))
            optimizer.step(lr)
        return grad_norm

    def _norm(self, role: str) -> Tensor:
        """Norm of the whole gradient of a role: scalar fp32, the same on every rank."""
        return self._buckets[role].norm()
