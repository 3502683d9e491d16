"""The respaced ancestral sampler, guidance, and the small formulas of the reference's inner loop and evaluation.

Facts: specs/energy.md sections 4 to 6. Shapes: B batch, [B, C, S, S] samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from hpc_gen.diffusion.gaussian import GaussianDiffusion, Table

# Base counts of inner steps before they are stretched by the noise level (specs/energy.md section 5.1).
INNER_STEPS_SAMPLING = 5
INNER_STEPS_TRAINING = 2
INNER_STEPS_LIMIT = 10

Predict = Callable[[Tensor, Tensor], Tensor]


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance on all channels: u + w (c - u) (arXiv 2207.12598, with w = 1 being off)."""
    return unconditional + scale * (conditional - unconditional)


def guided_prediction(network: Callable[..., Tensor], y_B: Tensor, null_class: int, scale: float) -> Predict:
    """Noise prediction (x, t) for the classes `y_B`, guided when `scale` is not 1.

    The batch is doubled and its second half gets the null class. Deliberate deviation: the reference does not double
    the batch, reuses the first half's predictions and guides only 3 channels, so its guided images mean nothing.
    """
    if scale == 1.0:
        return lambda x, t_B: network(x, t_B, y_B)
    both_2B = torch.cat([y_B, torch.full_like(y_B, null_class)])

    def predict(x: Tensor, t_B: Tensor) -> Tensor:
        conditional, unconditional = network(torch.cat([x, x]), torch.cat([t_B, t_B]), both_2B).chunk(2)
        return guided(conditional, unconditional, scale)

    return predict


def ancestral_steps(
    predict: Predict,
    chain: GaussianDiffusion,
    x: Tensor,
    step_noise: Callable[[int], Tensor],
    *,
    clip: float | None,
    poll: Callable[[], None],
) -> Iterator[Tensor]:
    """Walk a (respaced) chain down from the noise `x`, yielding the sample after each step; the last is the result.

    `step_noise(k)` gives the noise of the k-th executed step and is not asked for the last, which adds none. `clip`
    bounds the predicted clean sample. `poll` is called before each step and may raise StopRequested.
    """
    for k, index in enumerate(reversed(range(chain.num_timesteps))):
        poll()
        # The network is told the index in the original chain, the formulas use that of the respaced one.
        t_B = torch.full((len(x),), chain.timestep_map[index], dtype=torch.int64, device=x.device)
        x0 = chain.predict_x0(x, index, predict(x, t_B).to(x.dtype))
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
        x = chain.posterior_mean(x0, x, index)
        if index:
            x = x + chain.posterior_std(index) * step_noise(k).to(x)
        yield x


def to_images(x: Tensor) -> Tensor:
    """Pixels in [-1, 1], float [N, 1 or 3, H, W], to uint8 [N, 3, H, W]: clipped, rounded, grey repeated."""
    images = ((x.float() + 1) / 2 * 255).clamp(0, 255).round().to(torch.uint8)
    return images.expand(-1, 3, -1, -1).contiguous() if images.shape[1] == 1 else images


def inner_step_count(t: Tensor, num_timesteps: int, base: int) -> int:
    """Steps of the inner loop for a batch at timesteps `t`: int(base (1 + 2 mean(t) / T)), within 1 and 10.

    Computed in float32 like the reference, because int() sits on exact boundaries (T = 500, t = 50 gives 6).
    """
    stretch = 1.0 + 2.0 * (t.float().mean() / num_timesteps)
    return max(1, min(int(base * stretch), INNER_STEPS_LIMIT))


def inner_clamp(diffusion: GaussianDiffusion) -> Table:
    """Largest absolute value the reference's inner loop allows at each timestep: 2 sqrt(alpha_bar), float64 [T]."""
    return 2.0 * np.sqrt(diffusion.alphas_cumprod)


def evaluation_layout(
    num_images: int, num_classes: int, batch: int, world_size: int, rank: int
) -> tuple[Tensor, Tensor]:
    """Image ids and labels, both int64 [steps, batch], that one rank of the reference's evaluation draws.

    Labels are sorted (id // (num_images / classes)); ids at or above `num_images` get label 0 and are thrown away. Ours
    samples by plan instead (hpc_gen.sampling); this names which class an image made by the reference has.
    """
    steps = num_images // (batch * world_size) + 1
    first = torch.arange(steps)[:, None] * (world_size * batch) + rank * batch
    ids = first + torch.arange(batch)
    labels = torch.where(ids < num_images, ids // (num_images // num_classes), 0)
    return ids, labels
