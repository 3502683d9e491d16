"""How often a sampler asks its networks: network evaluations per image (NFE), counted and not derived from settings."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hpc_gen.methods.protocol import Curve, Method

NAME = "network_evaluations"


class Effort:
    """What was counted so far; `curve` tells it per image."""

    def __init__(self) -> None:
        self._rows: dict[nn.Module, int] = {}

    def see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pass of a part of a network: the rows of its first tensor count."""
        given = next((each for each in args if isinstance(each, Tensor) and each.dim()), None)
        if given is not None:
            self._rows[module] = self._rows.get(module, 0) + len(given)

    def curve(self, num_images: int) -> Curve:
        """Evaluations of a network, each per image, as a curve of one entry.

        Parts with parameters are counted and the middle one taken: a network may enter its parts by other ways than its
        own forward (energies), or call one of them on tokens or just once.
        """
        counts = sorted(self._rows.values())
        return Curve((float(statistics.median_low(counts)) if counts else 0.0,), (float(num_images),))


@contextmanager
def counted(method: Method) -> Iterator[Effort]:
    """Count inside the block."""
    effort = Effort()
    parts = [
        part
        for role in method.roles().values()
        for part in role.modules()
        if next(part.parameters(recurse=False), None) is not None
    ]
    hooks = [part.register_forward_pre_hook(effort.see) for part in parts]
    try:
        yield effort
    finally:
        for hook in hooks:
            hook.remove()
