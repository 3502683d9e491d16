"""deepspeed's flat partitions as parameters with names: where each lies in them, and the step that respects it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hpc_gen.runtime.ranks import Ranks
from hpc_gen.training.engines.layout import Layout
from hpc_gen.training.optimizers import RoleOptimizer


class FlatSteps(torch.optim.Optimizer):
    """What deepspeed takes for the optimizer: given its flat gradients, ours steps the stretches of each parameter."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__([{"params": parameters}], {"lr": 0.0})
        self._optimizer: RoleOptimizer | None = None
        self._stretches: dict[str, Tensor] = {}
        self._lr, self._reached = 0.0, frozenset[str]()

    def follow(self, optimizer: RoleOptimizer, stretches: Mapping[str, Tensor]) -> None:
        """From now on a step is one of `optimizer`, whose parameters are these views of deepspeed's masters."""
        self._optimizer, self._stretches = optimizer, dict(stretches)

    def prepare(self, lr: float, reached: frozenset[str]) -> None:
        """For the next step: its rate, and the parameters that may move."""
        self._lr, self._reached = lr, reached

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Step the parameters whose masters deepspeed has put into the groups, with the gradients there."""
        if self._optimizer is None:
            return  # deepspeed tries it once when it begins
        flats = [flat for group in self.param_groups for flat in group["params"]]
        for flat in flats:
            begin = flat.storage_offset()
            for name, view in self._stretches.items():
                if name in self._reached and _is_part(view, flat):
                    start = view.storage_offset() - begin
                    self._optimizer.parameters[name].grad = flat.grad[start : start + view.numel()]
        self._optimizer.step(self._lr)
        for parameter in self._optimizer.parameters.values():
            parameter.grad = None


def _is_part(view: Tensor, flat: Tensor) -> bool:
    same = view.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
    inside = flat.storage_offset() <= view.storage_offset() <= flat.storage_offset() + flat.numel()
    return same and inside


def stretches_12(
    zero: Any, trained: Mapping[str, nn.Parameter], shapes: Mapping[str, tuple[int, ...]], ranks: Ranks
) -> tuple[dict[str, Layout], dict[str, Tensor]]:
    """Layout and view of every parameter in the partition of this rank: all of them flattened in a row, cut evenly."""
    names = {id(parameter): name for name, parameter in trained.items()}
    layouts: dict[str, Layout] = {}
    parts: dict[str, Tensor] = {}
    (group,), (offsets,) = zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets
    flat = zero.single_partition_of_fp32_groups[0].detach()
    low = ranks.rank * flat.numel()
    for parameter, offset in zip(group, offsets, strict=True):
        name = names[id(parameter)]
        size = math.prod(shapes[name])
        start, end = max(offset, low), min(offset + size, low + flat.numel())
        count = max(0, end - start)
        where = start - low if count else 0
        parts[name] = flat[where : where + count]
        layouts[name] = Layout.flat(shapes[name], start - offset if count else 0, count)
    return layouts, parts


def stretches_3(
    zero: Any, trained: Mapping[str, nn.Parameter], shapes: Mapping[str, tuple[int, ...]], ranks: Ranks
) -> tuple[dict[str, Layout], dict[str, Tensor]]:
    """As `stretches_12`; here each parameter is cut evenly by itself, the last share padded."""
    layouts: dict[str, Layout] = {}
    parts: dict[str, Tensor] = {}
    names = {id(parameter): name for name, parameter in trained.items()}
    for index, group in enumerate(zero.fp16_groups):
        flat, offset = zero.fp32_partitioned_groups_flat[index].detach(), 0
        for parameter in group:
            name, share = names[id(parameter)], parameter.partition_numel()
            start = min(share * ranks.rank, math.prod(shapes[name]))
            count = min(share, math.prod(shapes[name]) - start)
            parts[name] = flat[offset : offset + count]
            layouts[name] = Layout.flat(shapes[name], start, count)
            offset += share
    return layouts, parts
