"""Flat gradient buckets that are summed over ranks in one fixed order.

torch's DistributedDataParallel rebuilds its buckets after the first iteration, so a run that was resumed sums in
another order than one that was not: at four ranks the bits differ. Here the buckets are a function of the parameter
list alone, gradients are views into them (no copies), and reductions start in bucket order, overlapping the backward
pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hpc_gen.runtime.ranks import PendingReduction, Ranks


class GradientBuckets:
    """Gradients of one role. Bucket 0 holds the last parameters, which the backward pass finishes first."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], ranks: Ranks, bucket_bytes: int, group: Any | None = None
    ) -> None:
        """All parameters are fp32 and on one device. `bucket_bytes` > 0: a bucket is closed once it is that large.

        `group`: the ranks that sum with one another; None = all.
        """
        self._ranks = ranks
        self._group = group
        self._parameters = list(parameters)
        self._bucket_of: dict[nn.Parameter, int] = {}
        self._views: dict[nn.Parameter, Tensor] = {}
        self.flats: list[Tensor] = []
        self._sizes: list[int] = []  # parameters per bucket
        self._build(bucket_bytes)
        self._armed = False
        self._ready = [0] * len(self.flats)
        self._next = 0
        self._pending: list[PendingReduction] = []
        self.touched: set[nn.Parameter] = set()
        for parameter in self._parameters:
            parameter.register_post_accumulate_grad_hook(self._on_gradient)

    def _build(self, bucket_bytes: int) -> None:
        members: list[list[nn.Parameter]] = []
        filled = bucket_bytes
        for parameter in reversed(self._parameters):
            assert parameter.dtype == torch.float32, "masters are fp32"
            if filled >= bucket_bytes:
                members.append([])
                filled = 0
            members[-1].append(parameter)
            filled += parameter.numel() * 4
        for index, bucket in enumerate(members):
            flat = torch.zeros(sum(p.numel() for p in bucket), dtype=torch.float32, device=bucket[0].device)
            offset = 0
            for parameter in bucket:
                self._views[parameter] = flat[offset : offset + parameter.numel()].view_as(parameter)
                self._bucket_of[parameter] = index
                offset += parameter.numel()
            self.flats.append(flat)
            self._sizes.append(len(bucket))

    def begin(self) -> None:
        """Zero all gradients and attach them to their parameters."""
        for flat in self.flats:
            flat.zero_()
        for parameter in self._parameters:
            parameter.grad = self._views[parameter]
        self.touched.clear()
        self._ready = [0] * len(self.flats)
        self._next = 0
        self._armed = False

    def arm(self) -> None:
        """The backward pass that follows is the last of this step: reduce buckets as they fill."""
        self._armed = True

    def _on_gradient(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is self._views[parameter], "a gradient left its bucket"
        self.touched.add(parameter)
        if not self._armed:
            return
        self._ready[self._bucket_of[parameter]] += 1
        # start only the next bucket in order, however late it fills: one order on every rank, in every run
        while self._next < len(self.flats) and self._ready[self._next] == self._sizes[self._next]:
            self._launch()

    def _launch(self) -> None:
        self._pending.append(self._ranks.all_reduce_sum_async(self.flats[self._next], self._group))
        self._next += 1

    def finish(self) -> None:
        """Reduce what is left (buckets with unused parameters) and wait; afterwards every rank holds the global sum."""
        while self._next < len(self.flats):
            self._launch()
        for pending in self._pending:
            pending.wait()
        self._pending.clear()

    def norm(self) -> Tensor:
        """L2 norm over all gradients: scalar fp32, the same on every rank."""
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(flat) for flat in self.flats]))

    def scale(self, factor: Tensor) -> None:
        """Multiply all gradients by a scalar."""
        for flat in self.flats:
            flat.mul_(factor)

    def detach_untouched(self, used: set[nn.Parameter]) -> None:
        """Give parameters outside `used` no gradient, so that the optimizer leaves them and their decay alone."""
        for parameter in self._parameters:
            if parameter not in used:
                parameter.grad = None
