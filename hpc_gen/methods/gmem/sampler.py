"""From a trained network to a solution: guidance over an interval of time, and the solver that the settings name.

Facts: specs/gmem.md sections 3.2 and 5. Shapes: B batch, [B, C, S, S] samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hpc_gen.diffusion.flow import Diffusion, LinearPath
from hpc_gen.diffusion.flow_solvers import (
    Poll,
    StochasticSampler,
    Velocity,
    dopri5_ode,
    euler_ode,
    heun_ode,
    ode_grid,
)
from hpc_gen.methods.gmem.config import GuidanceInterval, SamplingSettings
from hpc_gen.methods.gmem.model import LightningDiT


def guided_velocity(model: LightningDiT, condition: Tensor, null: Tensor, guidance: GuidanceInterval) -> Velocity:
    """v_null + scale (v - v_null) inside the interval, v before it, v_null after it; compared in float32.

    Deliberate deviation: outside the interval the network is called on one half only, where the reference computes
    both and drops one.
    """

    def velocity(x: Tensor, t_B: Tensor) -> Tensor:
        t = t_B[0].float()
        if guidance.scale == 1.0 or bool(t < t.new_tensor(guidance.start)):
            return model(x, t_B, condition)
        if guidance.end is not None and bool(t > t.new_tensor(guidance.end)):
            return model(x, t_B, null)
        both = model(torch.cat([x, x]), torch.cat([t_B, t_B]), torch.cat([condition, null]))
        v, v_null = both.chunk(2)
        return v_null + guidance.scale * (v - v_null)

    return velocity


def solution(
    velocity: Velocity, x: Tensor, settings: SamplingSettings, noise: Callable[[int], Tensor], poll: Poll
) -> Iterator[Tensor]:
    """Every state after the noise `x`, the last one being the sample; `noise(k)` is standard normal like x."""
    if settings.mode == "sde":
        path = LinearPath()
        diffusion = Diffusion(path, settings.form, settings.norm)
        sampler = StochasticSampler(path, diffusion, settings.method, settings.last_step, settings.last_step_size)
        return sampler(velocity, x, settings.points, noise, poll)
    grid = ode_grid(settings.points, settings.shift)
    if settings.method == "dopri5":
        return dopri5_ode(velocity, x, grid, poll, settings.atol, settings.rtol)
    return (euler_ode if settings.method == "euler" else heun_ode)(velocity, x, grid, poll)
