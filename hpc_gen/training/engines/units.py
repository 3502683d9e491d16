"""What a method's parallel plan is used for: blocks that are recomputed, compiled, or become units of sharding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hpc_gen.config.experiment import EngineConfig
from hpc_gen.methods.protocol import Method


def prepare_blocks(method: Method, modules: Mapping[str, nn.Module], config: EngineConfig) -> None:
    """Compile and checkpoint the blocks of all trained roles as `train.engine` says, in place.

    Only the call of a block changes: names, parameters and hooks stay, so any engine may take the module afterwards.
    Compilation lies inside of checkpointing: what is recomputed is the compiled block, to the same bits.
    """
    for role, module in modules.items():
        if not method.parameter_groups(role):
            continue
        plan = method.parallel_plan(role)
        if config.compile is not None:
            for name in plan.fsdp_units:
                block = module.get_submodule(name)
                block.__dict__["forward"] = torch.compile(block.forward)
        for name in chosen_blocks(plan.checkpoint_units, config):
            block = module.get_submodule(name)
            block.__dict__["forward"] = _recomputed(block.forward)


def chosen_blocks(units: tuple[str, ...], config: EngineConfig) -> tuple[str, ...]:
    """Blocks whose activations are recomputed: all, every n-th from the first on, or none."""
    if config.checkpointing == "none":
        return ()
    return units if config.checkpointing == "full" else units[:: config.checkpoint_every]


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that keeps its inputs alone for the backward pass; without gradients it is the plain one."""
    from torch.utils.checkpoint import checkpoint

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # methods draw nothing themselves, so there is no random state to keep
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


def cast_at_border(module: nn.Module, dtype: torch.dtype) -> None:
    """Floating-point inputs of the network as a whole arrive in the format of its parameters."""

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def before(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tuple(cast(each) for each in args), {key: cast(each) for key, each in kwargs.items()}

    module.register_forward_pre_hook(before, with_kwargs=True)
