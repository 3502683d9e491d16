"""Tensor parallelism beside data parallelism: neighbouring ranks share every large matrix product of a network.

The split layers are megatron-core's ColumnParallelLinear and RowParallelLinear; which layers, the method's plan says.
Parameters keep their names, and checkpoints those of every other engine. Gradients are summed over the ranks that hold
the same part, in the fixed-order buckets of the ddp engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hpc_gen.config.experiment import TrainConfig
from hpc_gen.methods.protocol import Method, TensorSplit
from hpc_gen.runtime.errors import UserError
from hpc_gen.runtime.ranks import Ranks
from hpc_gen.training.engines.ddp import DdpEngine
from hpc_gen.training.engines.layout import Layout


class TensorParallelEngine(DdpEngine):
    """ddp over groups of `train.engine.tensor_parallel` ranks, each of which holds one copy of the network."""

    def __init__(
        self, method: Method, modules: Mapping[str, nn.Module], config: TrainConfig, ranks: Ranks, device: torch.device
    ) -> None:
        """`modules`: the method's own roles, materialised with the same values on every rank."""
        self._ways = config.engine.tensor_parallel
        self._mesh = ranks.mesh((ranks.world_size // self._ways, self._ways), ("data", "tensor"))
        self._split_names: dict[str, set[str]] = {}
        super().__init__(method, modules, config, ranks, device)

    def _split(self) -> None:
        """Put megatron's layers in the place of the linear ones, each with its share of the values."""
        self.data_rank = self._mesh["data"].get_local_rank()
        self.data_ranks = self._mesh["data"].size()
        self.leads_data = self._mesh["tensor"].get_local_rank() == 0
        for role, module in self._modules.items():
            if not self._groups[role]:
                continue
            layouts = self._layouts[role] = {}
            for name, split in self._method.parallel_plan(role).tensor_splits.items():
                old = module.get_submodule(name)
                found = {key: self._layout(split, key, tuple(p.shape)) for key, p in old.named_parameters()}
                new = _parallel(split, old, self._ways, self._mesh.get_group("tensor"))
                with torch.no_grad():
                    for key, layout in found.items():
                        layout.fill(getattr(new, key), getattr(old, key))
                parent, _, leaf = name.rpartition(".")
                setattr(module.get_submodule(parent), leaf, new)
                old.to("meta")  # its values come back from all ranks where the whole network is wanted
                layouts.update({f"{name}.{key}": layout for key, layout in found.items()})
            self._split_names[role] = {name for name, layout in layouts.items() if not layout.replicated}

    def _layout(self, split: TensorSplit, key: str, shape: tuple[int, ...]) -> Layout:
        """Which part of a weight or bias this rank holds."""
        rank, owner = self._mesh["tensor"].get_local_rank(), self.data_rank == 0
        if split.kind == "row":
            if key == "bias":
                return Layout.whole(shape)
            share = shape[1] // self._ways
            return Layout.stretches(shape, 1, [(rank * share, share)], owner)
        size = shape[0] // split.fused
        share = size // self._ways
        return Layout.stretches(shape, 0, [(i * size + rank * share, share) for i in range(split.fused)], owner)

    def _reduced_over(self) -> Any | None:
        return self._mesh.get_group("data")

    def _norm(self, role: str) -> Tensor:
        """Split gradients count once on each rank of a group, the others once in all."""
        parameters = self._optimizers[role].parameters
        split, whole = (
            self._square([p.grad for name, p in parameters.items() if (name in self._split_names[role]) == wanted])
            for wanted in (True, False)
        )
        self._ranks.all_reduce_sum_(split, self._mesh.get_group("tensor"))
        return (split + whole).sqrt().float()

    def _square(self, gradients: list[Tensor | None]) -> Tensor:
        norms = [torch.linalg.vector_norm(each) for each in gradients if each is not None]
        if not norms:
            return torch.zeros((), dtype=torch.float64, device=self._device)
        return torch.linalg.vector_norm(torch.stack(norms)).double().square()


def _parallel(split: TensorSplit, old: nn.Module, ways: int, group: Any) -> nn.Module:
    """megatron's layer of the same shape, without values, whose forward gives one tensor as the layer it replaces."""
    try:
        from megatron.core.model_parallel_config import ModelParallelConfig
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    except Exception as error:  # it looks for compilers, devices and other packages while it is imported
        raise UserError(
            f"train.engine.tensor_parallel = {ways}, but megatron-core cannot be imported ({error}); install it with "
            "`pip install hpc-gen[deepspeed]`, or remove the key"
        ) from error
    weight = old.get_parameter("weight")
    config = ModelParallelConfig(
        tensor_model_parallel_size=ways,
        use_cpu_initialization=True,  # the other way allocates on a GPU, whatever the device
        perform_initialization=False,
        params_dtype=weight.dtype,
    )
    common: dict[str, Any] = {
        "config": config,
        "init_method": lambda tensor: tensor,
        "bias": "bias" in dict(old.named_parameters()),
        "skip_bias_add": False,
        "tp_group": group,
    }
    new: nn.Module
    if split.kind == "column":
        new = ColumnParallelLinear(weight.shape[1], weight.shape[0], gather_output=False, **common)
    else:
        new = RowParallelLinear(weight.shape[1], weight.shape[0], input_is_parallel=True, **common)
    forward = new.forward
    new.__dict__["forward"] = lambda x: forward(x)[0]  # the other is a bias that was not added
    return new
