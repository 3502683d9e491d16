"""From the `train.engine` section to an engine; what cannot work is refused here, before anything is built."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from hpc_gen.config.experiment import EngineConfig, TrainConfig
from hpc_gen.methods.protocol import Method, ParallelPlan
from hpc_gen.runtime.errors import UserError
from hpc_gen.runtime.ranks import Ranks
from hpc_gen.training.engines.base import Engine
from hpc_gen.training.engines.ddp import DdpEngine
from hpc_gen.training.engines.units import prepare_blocks


def build_engine(
    method: Method, modules: Mapping[str, nn.Module], config: TrainConfig, ranks: Ranks, device: torch.device
) -> Engine:
    """The engine that the experiment asks for, around `modules`: the method's own roles with their values.

    Where `needs_values` says no, they may be on the meta device. Collective. Raises UserError where `refuse` does.
    """
    refuse(method, config, ranks.world_size, device.type)
    if config.engine.compile is not None and config.deterministic:
        import torch._inductor.config as inductor  # a second to import, so not by those who compile nothing

        inductor.deterministic = True
    prepare_blocks(method, modules, config.engine)
    if config.engine.name == "fsdp":
        from hpc_gen.training.engines.fsdp import FsdpEngine

        return FsdpEngine(method, modules, config, ranks, device)
    if config.engine.name == "deepspeed":
        from hpc_gen.training.engines.deepspeed import DeepspeedEngine

        return DeepspeedEngine(method, modules, config, ranks, device)
    if config.engine.tensor_parallel > 1:
        from hpc_gen.training.engines.tensor_parallel import TensorParallelEngine

        return TensorParallelEngine(method, modules, config, ranks, device)
    return DdpEngine(method, modules, config, ranks, device)


def needs_values(config: TrainConfig, ranks: Ranks) -> bool:
    """Whether this rank gives the engine materialised modules; with fsdp rank 0's values reach all the others."""
    return config.engine.name != "fsdp" or ranks.is_main


def refuse(method: Method, config: TrainConfig, world_size: int, device_type: str) -> None:
    """Raise UserError for an engine that cannot train this method, or not on these ranks. Needs no weights."""
    chosen = config.engine
    plans = {role: method.parallel_plan(role) for role in method.roles() if method.parameter_groups(role)}
    inside = [role for role, plan in plans.items() if plan.differentiates_inside]
    if inside:
        _refuse_inside(inside[0], chosen, world_size)
    ways = chosen.shards or 1
    if world_size % ways:
        raise UserError(
            f"train.engine.shards = {ways} does not divide the {world_size} ranks of this attempt; start a multiple of "
            f"{ways}, or change it"
        )
    if chosen.name == "deepspeed":
        _refuse_deepspeed(list(plans), chosen)
    if chosen.tensor_parallel > 1:
        _refuse_tensor_parallel(plans, config, world_size, device_type)
    for key, units in (("compile", "fsdp_units"), ("checkpointing", "checkpoint_units")):
        if getattr(chosen, key) not in (None, "none") and not any(getattr(plan, units) for plan in plans.values()):
            raise UserError(f"train.engine.{key} is set, but this method names no blocks for it; remove the key")


def _refuse_deepspeed(roles: list[str], chosen: EngineConfig) -> None:
    """What deepspeed cannot do for us."""
    if chosen.zero_stage == 3 and len(roles) > 1:
        raise UserError(
            f"roles {', '.join(roles)} are trained in turn, which deepspeed's stage 3 cannot: it follows one network "
            "through its step; use train.engine.stage=2, or train.engine.name=fsdp"
        )
    if chosen.compile is not None and chosen.zero_stage == 3:
        raise UserError(
            "deepspeed's stage 3 fetches parameters by hooks inside of each block, which train.engine.compile would "
            "bake in; use train.engine.stage=2, or train.engine.name=fsdp"
        )


def _refuse_tensor_parallel(
    plans: Mapping[str, ParallelPlan], config: TrainConfig, world_size: int, device_type: str
) -> None:
    """Where matrix products cannot be shared, or not so many ways."""
    ways = config.engine.tensor_parallel
    lacking = [role for role, plan in plans.items() if not plan.tensor_splits]
    if lacking:
        raise UserError(
            f"train.engine.tensor_parallel = {ways}, but role '{lacking[0]}' of this method cannot be split (a loss "
            "that differentiates inside its forward never can); remove the key"
        )
    for role, plan in plans.items():
        for count in plan.tensor_divides:
            if count % ways:
                raise UserError(
                    f"train.engine.tensor_parallel = {ways} does not divide {count} (heads or inner width) of role "
                    f"'{role}'; choose a divisor"
                )
    if world_size % ways:
        raise UserError(
            f"train.engine.tensor_parallel = {ways} does not divide the {world_size} ranks of this attempt; start a "
            f"multiple of {ways}"
        )
    if config.engine.compile is not None:
        raise UserError("megatron-core's layers are not compiled; remove train.engine.compile or tensor_parallel")
    if config.precision != "fp32" and device_type == "cpu":
        raise UserError(
            "megatron-core's layers know autocast on GPUs only; use train.precision=fp32 on the CPU, or remove "
            "train.engine.tensor_parallel"
        )


def _refuse_inside(role: str, chosen: EngineConfig, world_size: int) -> None:
    """What cannot be around a loss that differentiates inside its forward (measured: DESIGN section 4)."""
    why = f"role '{role}' differentiates inside its loss"
    if chosen.zero_stage == 3:
        raise UserError(
            f"{why}, where parameters that are let go of in the forward pass (train.engine.name = {chosen.name} at "
            "stage 3) have no gradient; use train.engine.stage=2, or train.engine.name=ddp"
        )
    if chosen.shards is not None and chosen.shards < world_size:
        raise UserError(
            f"{why}, for which copies of the shards (train.engine.shards = {chosen.shards} on {world_size} ranks) are "
            "not supported; remove train.engine.shards, or use train.engine.name=ddp"
        )
    if chosen.compile is not None:
        raise UserError(f"{why}, which torch.compile cannot differentiate a second time; remove train.engine.compile")
    if chosen.param_dtype is not None:
        raise UserError(
            f"{why}, and its energies and input gradients must stay fp32; remove train.engine.param_dtype (and use "
            "train.precision=bf16)"
        )
