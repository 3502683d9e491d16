"""(f) What the energy variant costs: a training step's time and peak live bytes for each way to its second order."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from measure import Table, by_turns
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpc_gen.methods.energy.config import EnergyConfig, EnergyHeadConfig
from hpc_gen.methods.energy.objective import ROLE, EnergyDiffusion
from hpc_gen.methods.protocol import Turn
from hpc_gen.runtime.randomness import Stream

TURN = Turn(ROLE, "denoise")
# name -> keys of the method's section
ROUTES: dict[str, dict[str, Any]] = {
    "standard": {"variant": "standard"},
    "standard, checkpointed blocks": {"variant": "standard", "checkpoint_blocks": True},
    "energy, double backward": {},
    "energy, double backward, checkpointed blocks": {"checkpoint_blocks": True},
    "energy, forward over reverse by block": {"energy": EnergyHeadConfig(second_order="forward_over_reverse")},
}


class LiveBytes(TorchDispatchMode):
    """Bytes of tensor memory that operators have made and nobody has freed yet, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage() not in given:
                self._take(leaf.untyped_storage())
        return out

    def _take(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known or not storage.nbytes():
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


def bench(quick: bool) -> list[Table]:
    """One table: a row per route."""
    torch.set_num_threads(1)
    sizes = {"hidden": 32, "depth": 2, "heads": 2} if quick else {"hidden": 384, "depth": 12, "heads": 6}
    rows, rounds = (2, 2) if quick else (4, 5)
    base = {"variant": "energy", "input": "latents", "channels": 16, "num_classes": 10, "image_size": 256, **sizes}
    if quick:
        base["image_size"] = 64
    tokens = (base["image_size"] // 16) ** 2
    table = Table(
        "Training step of the energy variant",
        f"Forward and backward of the squared error, {sizes['depth']} blocks of width {sizes['hidden']}, {tokens} "
        f"tokens, {rows} samples, fp32, one thread, {rounds} rounds by turns. Peak: live bytes of tensors made by "
        "operators during the step (activations, tangents, gradients; not the weights). Ratios are to the plain "
        "double backward.",
        ("route", "seconds", "time ratio", "peak live MiB", "memory ratio"),
    )
    steps = {name: _step(EnergyConfig(**{**base, **change}), rows) for name, change in ROUTES.items()}
    peaks = {name: _peak(step) for name, step in steps.items()}
    found = by_turns(steps, rounds)
    plain = "energy, double backward"
    for name in ROUTES:
        ratio = found[name].over(found[plain]).show()
        memory = (f"{peaks[name] / 2**20:.1f}", f"{peaks[name] / peaks[plain]:.2f}")
        table.add(name, found[name].show("{:.3f}"), ratio, *memory)
    return [table]


def _step(config: EnergyConfig, rows: int) -> Callable[[], None]:
    """One forward and backward pass over fixed rows."""
    method = EnergyDiffusion(config, 10)
    method.model.to_empty(device="cpu")
    method.initialise(ROLE, torch.Generator().manual_seed(0))
    draws = {name: Stream(0, name).batch(draw, range(rows)) for name, draw in method.draws(TURN).items()}
    batch = {"latents": torch.randn(rows, *config.row_shape), "labels": torch.arange(rows)}

    def step() -> None:
        method.model.zero_grad(set_to_none=True)
        method.objective(TURN, batch, draws).terms["mse"].sum.backward()

    return step


def _peak(step: Callable[[], None]) -> int:
    """Peak live bytes of one step, after one that warms up."""
    step()
    with LiveBytes() as live:
        step()
    return live.peak
