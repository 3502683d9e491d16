"""One rank in this process, and the pieces of training on it, for unit tests of the engine and what is around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hpc_gen.config.train import TrainConfig
from hpc_gen.methods.materialise import materialise
from hpc_gen.methods.protocol import Method, Turn
from hpc_gen.runtime.randomness import Stream
from hpc_gen.runtime.ranks import PendingReduction, RankInfo, Ranks
from hpc_gen.training.engines.base import MicroBatch
from hpc_gen.training.engines.ddp import DdpEngine


class RecordingRanks(Ranks):
    """The only rank; remembers which tensors were handed to a reduction, in order, and which were waited for."""

    def __init__(self) -> None:
        super().__init__(RankInfo(0, 1, 0, 1, "python"), "gloo", torch.device("cpu"))
        self.launched: list[Tensor] = []
        self.waited: list[Tensor] = []

    def all_reduce_sum_async(self, tensor: Tensor, group: Any = None) -> PendingReduction:
        self.launched.append(tensor)
        ranks = self

        class Pending(PendingReduction):
            def wait(self) -> None:
                ranks.waited.append(tensor)

        return Pending(None)


def train_config(**changes: Any) -> TrainConfig:
    """A `train` section; `optimizer` is merged with a rate of 0.01 without clipping."""
    optimizer = {"lr": 0.01, "clip": None, **changes.pop("optimizer", {})}
    basis = {"total_images": 64, "global_batch": 8, "log_every": 8, "save_every": 8}
    return TrainConfig.model_validate({**basis, "optimizer": optimizer, **changes})


def make_engine(method: Method, seed: int = 0, ranks: Ranks | None = None, **changes: Any) -> DdpEngine:
    """The method's roles with the initial values of `seed`, in an engine on the CPU."""
    modules = materialise(method, seed)
    return DdpEngine(method, modules, train_config(**changes), ranks or RecordingRanks(), torch.device("cpu"))


def micro_batches(
    method: Method, turn: Turn, batch: Mapping[str, Tensor], cut: int, draw_counter: int = 0
) -> list[MicroBatch]:
    """A batch [N, ...] and the draws of rows 0 .. N-1, cut into pieces of `cut` rows."""
    size = len(next(iter(batch.values())))
    draws = {
        name: Stream(0, f"test/{turn.purpose}/{name}").batch(draw, list(range(size)), draw_counter)
        for name, draw in method.draws(turn).items()
    }
    return [
        ({k: v[start : start + cut] for k, v in batch.items()}, {k: v[start : start + cut] for k, v in draws.items()})
        for start in range(0, size, cut)
    ]


def clone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that later steps do not touch."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    """Keys that came, went or no longer hold the same bits."""
    return set(before.keys() ^ after.keys()) | {
        name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])
    }
