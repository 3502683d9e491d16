"""Exponential moving averages of parameters: fp32, placed like the parameters, updated once per iteration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from hpc_gen.runtime.errors import CheckpointError
from hpc_gen.training.checkpoint.pieces import Pieces, kind_of
from hpc_gen.training.engines.base import Holder, Parts
from hpc_gen.training.engines.layout import Layout
from hpc_gen.training.engines.whole import Plain


@torch.no_grad()
def update_ema_(ema: Sequence[Tensor], parameters: Sequence[Tensor], decay: float) -> None:
    """In place: ema <- decay * ema + (1 - decay) * parameter, for lists of fp32 tensors of the same shapes."""
    torch._foreach_mul_(list(ema), decay)
    torch._foreach_add_(list(ema), list(parameters), alpha=1.0 - decay)


class EmaSet:
    """All averages of all roles: `averages[role][name]` maps parameter names to this rank's fp32 parts.

    Deliberate deviation from the energy reference: its average advances at every micro-step, also where no optimizer
    step happened; ours advances once per iteration, and not at all when a non-finite step was skipped.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], decays: Mapping[str, float], holder: Holder | None = None
    ) -> None:
        """Start every average at the current weights. `decays`: average name -> decay in [0, 1).

        `holder`: the engine that holds the parameters of these roles; None = the modules themselves, whole.
        """
        self.decays = dict(decays)
        self._holder: Holder = _Modules(modules) if holder is None else holder
        self.averages: dict[str, dict[str, dict[str, Tensor]]] = {}
        # decided once: turns switch requires_grad of other roles off and on
        self._trained: dict[str, list[str]] = {}
        self._sources: dict[str, list[Tensor]] = {}
        for role, module in modules.items():
            parts = self._holder.parts(role)
            self.averages[role] = {name: {k: p.detach().clone().float() for k, p in parts.items()} for name in decays}
            self._trained[role] = [key for key, p in module.named_parameters() if p.requires_grad]
            self._sources[role] = [parts[key].detach() for key in self._trained[role]]  # they follow the optimizer

    def update(self, roles: Sequence[str]) -> None:
        """Advance the averages of these roles towards the current weights; frozen parameters stay as they began."""
        for role in roles:
            for name, decay in self.decays.items():
                average = self.averages[role][name]
                update_ema_([average[key] for key in self._trained[role]], self._sources[role], decay)

    def tensors(self, role: str) -> dict[str, Tensor | Pieces]:
        """`NAME/parameter` -> tensor or pieces of one role: the layout below `ema/ROLE/` of a checkpoint."""
        layouts = self._holder.layouts(role)
        return {
            f"{name}/{key}": layouts[key].state(part)
            for name, average in self.averages[role].items()
            for key, part in average.items()
        }

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over whole tensors `ema/ROLE/NAME/parameter`, one at a time. Raises CheckpointError for what lacks."""
        for role, averages in self.averages.items():
            layouts = self._holder.layouts(role)
            for name, average in averages.items():
                for key, part in average.items():
                    place = f"ema/{role}/{name}/{key}"
                    if place not in tensors or kind_of(tensors, place)[1] != layouts[key].shape:
                        raise CheckpointError(f"no '{place}' of the right shape; was train.ema changed?")
                    layouts[key].read(part, tensors, place)

    @contextmanager
    def applied(self, name: str | None) -> Iterator[None]:
        """Inside the block the modules hold average `name` (None: the raw weights), whole on every rank.

        Outside they hold what they held before. Collective where an engine shards them.
        """
        parts = None if name is None else {role: averages[name] for role, averages in self.averages.items()}
        with self._holder.whole(parts):
            yield


class _Modules:
    """Modules that nobody shards: every rank holds all of them."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._plain = {role: Plain(module) for role, module in modules.items()}

    def parts(self, role: str) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self._plain[role].module.named_parameters()}

    def layouts(self, role: str) -> dict[str, Layout]:
        return {name: Layout.whole(shape) for name, shape in self._plain[role].shapes.items()}

    @contextmanager
    def whole(self, parts: Parts | None = None) -> Iterator[None]:
        shown: list[AbstractContextManager[None]] = []
        if parts is not None:
            shown = [plain.shown(parts[role]) for role, plain in self._plain.items()]
        with _nested(shown):
            yield


@contextmanager
def _nested(contexts: Sequence[AbstractContextManager[None]]) -> Iterator[None]:
    if not contexts:
        yield
        return
    with contexts[0], _nested(contexts[1:]):
        yield
