"""From the `train.engine` section to an engine; what cannot work is refused here, before anything is built."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from hpc_gen.config.experiment import TrainConfig
from hpc_gen.methods.protocol import Method
from hpc_gen.runtime.errors import UserError
from hpc_gen.runtime.ranks import Ranks
from hpc_gen.training.engines.base import Engine
from hpc_gen.training.engines.ddp import DdpEngine


def build_engine(
    method: Method, modules: Mapping[str, nn.Module], config: TrainConfig, ranks: Ranks, device: torch.device
) -> Engine:
    """The engine that the experiment asks for, around `modules`: the method's own roles with their values.

    Collective. Raises UserError where `refuse` does.
    """
    refuse(method, config, ranks.world_size)
    return DdpEngine(method, modules, config, ranks, device)


def refuse(method: Method, config: TrainConfig, world_size: int) -> None:
    """Raise UserError for an engine that cannot train this method, or not on so many ranks. Needs no weights."""
    chosen = config.engine
    if chosen.name != "ddp" or chosen.tensor_parallel != 1 or chosen.compile or chosen.checkpointing != "none":
        raise UserError(
            "this version trains with 'train.engine.name' = ddp alone, without tensor parallelism, compilation and "
            "checkpointing of blocks; remove the other keys of 'train.engine'"
        )
