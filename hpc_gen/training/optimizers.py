"""One AdamW per role, with the method's parameter groups and state addressed by parameter name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hpc_gen.config.experiment import OptimizerConfig
from hpc_gen.methods.protocol import ParameterGroup
from hpc_gen.runtime.errors import CheckpointError

STATE_NAMES = ("exp_avg", "exp_avg_sq", "step")


class RoleOptimizer:
    """AdamW of one role. `names` lists its parameters in the order of the module."""

    def __init__(self, module: nn.Module, groups: list[ParameterGroup], config: OptimizerConfig) -> None:
        """Raises AssertionError when the groups do not cover each trainable parameter exactly once (our bug)."""
        parameters = dict(module.named_parameters())
        listed = [name for group in groups for name in group.names]
        trainable = [name for name, p in parameters.items() if p.requires_grad]
        assert sorted(listed) == sorted(trainable), sorted(set(listed) ^ set(trainable))
        self.parameters: dict[str, nn.Parameter] = {name: parameters[name] for name in trainable}
        self._scales = [group.lr_scale for group in groups if group.names]
        self._adamw = torch.optim.AdamW(
            [
                {
                    "params": [parameters[name] for name in group.names],
                    "weight_decay": config.weight_decay if group.weight_decay is None else group.weight_decay,
                }
                for group in groups
                if group.names
            ],
            lr=0.0,
            betas=config.betas,
            eps=config.eps,
            fused=True,  # one pass over the state: a quarter of the time of the default on a CPU
        )

    def step(self, lr: float) -> None:
        """One update with the gradients in place; parameters whose gradient is None are left alone."""
        for group, scale in zip(self._adamw.param_groups, self._scales, strict=True):
            group["lr"] = lr * scale
        self._adamw.step()

    def state(self) -> dict[str, Tensor]:
        """`PARAMETER/exp_avg`, `/exp_avg_sq`, `/step` of every parameter that has been stepped."""
        out: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            for key, value in self._adamw.state.get(parameter, {}).items():
                out[f"{name}/{key}"] = value
        return out

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state as `state()` gave it; parameters that are absent start afresh.

        Raises CheckpointError for a name this role lacks, a shape that does not fit, or half a parameter's state.
        """
        self._adamw.state.clear()
        for key, value in state.items():
            name, _, kind = key.rpartition("/")
            parameter = self.parameters.get(name)
            if parameter is None or kind not in STATE_NAMES:
                raise CheckpointError(f"optimizer state '{key}' belongs to no parameter; was the model changed?")
            if kind != "step" and value.shape != parameter.shape:
                raise CheckpointError(
                    f"optimizer state '{key}' has shape {tuple(value.shape)}, the parameter {tuple(parameter.shape)}"
                )
            self._adamw.state[parameter][kind] = value.to(parameter.device, copy=True)
        for name, parameter in self.parameters.items():
            lacking = [kind for kind in STATE_NAMES if kind not in self._adamw.state.get(parameter, STATE_NAMES)]
            if lacking:
                raise CheckpointError(f"optimizer state of '{name}' lacks '{lacking[0]}'; the checkpoint is not whole")
