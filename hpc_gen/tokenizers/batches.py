"""Forward passes of one size, whatever is encoded: so that a row's bytes do not depend on the rows beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

BATCH = 8
"""Images of one forward pass. A constant: another one would change the last bits of tables and samples."""


def full_batches(pixels: Tensor, batch: int = BATCH) -> Iterator[Tensor]:
    """`pixels` [N, ...] in parts of `batch`, the last filled up with zeros."""
    for part in pixels.split(batch):
        filling = part.new_zeros((batch - len(part), *part.shape[1:]))
        yield torch.cat([part, filling]) if len(filling) else part


def in_batches(
    function: Callable[[Tensor], dict[str, Tensor]], pixels: Tensor, batch: int = BATCH
) -> dict[str, Tensor]:
    """`function` over full batches of `pixels`, its columns joined again, N rows each, on the CPU."""
    parts = [function(part) for part in full_batches(pixels, batch)]
    return {name: torch.cat([part[name].cpu() for part in parts])[: len(pixels)] for name in parts[0]}
