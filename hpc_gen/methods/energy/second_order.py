"""The gradient of a loss on dE/dx without differentiating a backward pass: forward over reverse, block by block.

Let eps = m dE/dx and L(eps) a loss. With v = dL/deps held fixed, dL/dtheta = d/dtheta <m v, dE/dx>, and <m v, dE/dx>
is the derivative of E along m v: one forward pass with tangents, which is then differentiated once. Each block is
recomputed in that backward pass, so only its inputs are kept. What it costs: docs/benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hpc_gen.methods.energy.model import Block, Derivatives, PureDiffusion


def squared_errors(
    model: PureDiffusion, x_BCSS: Tensor, t_B: Tensor, y_B: Tensor, noise_BCSS: Tensor
) -> tuple[Tensor, Tensor]:
    """(energies [B], squared errors of the noise prediction per sample [B]); the second carries the exact gradient.

    The same values as through PureDiffusion.energy_and_noise. The gradient with respect to `x_BCSS` is not provided.
    """
    with torch.no_grad():
        energy_B, predicted = model.energy_and_noise(x_BCSS.detach(), t_B, y_B)
        error = noise_BCSS - predicted
        error_B = error.square().flatten(1).mean(dim=1)
    if not torch.is_grad_enabled():
        return energy_B, error_B
    per_sample = error[0].numel()
    direction = -2.0 / per_sample * model.grad_multiplier * error
    slope_B = directional_derivative(model, x_BCSS.detach(), direction, t_B, y_B)
    return energy_B, error_B + slope_B - slope_B.detach()


def directional_derivative(model: PureDiffusion, x_BCSS: Tensor, v_BCSS: Tensor, t_B: Tensor, y_B: Tensor) -> Tensor:
    """d/ds E(x + s v) at s = 0 for each sample [B], differentiable with respect to the weights."""
    dit = model.dit
    x_BND = dit.embed(x_BCSS)
    with torch.autocast(v_BCSS.device.type, enabled=False):  # the embedding is affine: its derivative has no bias
        kernel = dit.x_embedder.proj
        v_BND = torch.nn.functional.conv2d(v_BCSS, kernel.weight, stride=kernel.stride).flatten(2).transpose(1, 2)
    c_BD = dit.condition(t_B, y_B)
    for block in dit.blocks:
        x_BND, v_BND = checkpoint(_through(block), x_BND, v_BND, c_BD, use_reentrant=False, preserve_rng_state=False)
    _, slope_B = torch.func.jvp(dit.energy_layer, (x_BND,), (v_BND,))
    return slope_B


def _through(block: Block) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """One block on values and tangents: (x, v, c) -> (block(x, c), its derivative along v)."""

    def run(x_BND: Tensor, v_BND: Tensor, c_BD: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(lambda x: block(x, c_BD, Derivatives.FORWARD), (x_BND,), (v_BND,))

    return run
