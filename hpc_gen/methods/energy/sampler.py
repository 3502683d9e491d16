"""The respaced ancestral sampler, guidance of noise and of energies, and the layout of the reference's evaluation.

Facts: specs/energy.md sections 4 to 6. Shapes: B batch, [B, C, S, S] samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hpc_gen.diffusion.gaussian import GaussianDiffusion
from hpc_gen.methods.energy.config import SamplingSettings
from hpc_gen.methods.energy.inner import (
    INNER_STEPS_SAMPLING,
    Descent,
    InnerTrace,
    Landscape,
    descend,
    inner_step_counts,
    signal_bound,
)
from hpc_gen.methods.energy.losses import landscape_of
from hpc_gen.methods.energy.model import PureDiffusion

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


def guided_landscape(model: PureDiffusion, t_B: Tensor, y_B: Tensor, null_class: int, scale: float) -> Landscape:
    """The energy E(null) + w (E(class) - E(null)), whose gradient is the guided noise; that of the class at w = 1.

    Deliberate deviation: the reference leaves the inner loop out wherever there is guidance.
    """
    if scale == 1.0:
        return landscape_of(model, t_B, y_B)
    both = landscape_of(model, torch.cat([t_B, t_B]), torch.cat([y_B, torch.full_like(y_B, null_class)]))

    def energy(x: Tensor) -> Tensor:
        return guided(*both.energy(torch.cat([x, x])).chunk(2), scale)

    def slope(x: Tensor) -> tuple[Tensor, Tensor]:
        energy_2B, noise = both.slope(torch.cat([x, x]))
        return guided(*energy_2B.chunk(2), scale), guided(*noise.chunk(2), scale)

    return Landscape(energy, slope)


class InnerLoop:
    """Descends on the energy after each ancestral step, as the sampler settings say (specs/energy.md section 6)."""

    def __init__(
        self,
        model: PureDiffusion,
        diffusion: GaussianDiffusion,
        chain: GaussianDiffusion,
        y_B: Tensor,
        null_class: int,
        settings: SamplingSettings,
        trace: InnerTrace,
    ) -> None:
        """`diffusion` is the full chain that timesteps refer to, `chain` the respaced one that is walked."""
        self._model, self._diffusion, self._chain = model, diffusion, chain
        self._y_B, self._null_class, self._settings, self._trace = y_B, null_class, settings, trace
        size = settings.inner_step_size
        self._descent = Descent(model.alpha if size is None else size, always_accept=settings.always_accept)

    def __call__(self, x: Tensor, index: int, poll: Callable[[], None]) -> Tensor:
        """The samples [B, C, S, S] that the step at `index` has led to, moved downhill."""
        t = self._timestep(index)
        if t is None:
            return x
        t_B = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
        if self._settings.inner_steps is not None:
            counts_B = torch.full_like(t_B, self._settings.inner_steps)
        else:
            counts_B = inner_step_counts(t_B, self._diffusion.num_timesteps, INNER_STEPS_SAMPLING, group=1)
        return descend(
            guided_landscape(self._model, t_B, self._y_B, self._null_class, self._settings.guidance),
            x,
            counts_B,
            self._descent,
            bound=signal_bound(self._diffusion, t_B, x) if self._settings.inner_clamp == "signal" else None,
            trace=self._trace,
            poll=poll,
        )

    def _timestep(self, index: int) -> int | None:
        """Timestep of the full chain that the inner loop is told after the step at `index`; None: no loop."""
        if self._settings.inner_t == "index":
            return index
        if self._settings.inner_t == "mapped":
            return self._chain.timestep_map[index]
        return self._chain.timestep_map[index - 1] if index else None  # a clean sample has no level


def ancestral_steps(
    predict: Predict,
    chain: GaussianDiffusion,
    x: Tensor,
    step_noise: Callable[[int], Tensor],
    *,
    clip: float | None,
    poll: Callable[[], None],
    after_step: Callable[[Tensor, int, Callable[[], None]], Tensor] | None = None,
) -> Iterator[Tensor]:
    """Walk a (respaced) chain down from the noise `x`, yielding the sample after each step; the last is the result.

    `step_noise(k)` gives the noise of the k-th executed step and is not asked for the last, which adds none. `clip`
    bounds the predicted clean sample. `poll` is called before each step and may raise StopRequested. `after_step(x,
    index, poll)` may move the samples after each step.
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
        if after_step is not None:
            x = after_step(x, index, poll)
        yield x


def to_images(x: Tensor) -> Tensor:
    """Pixels in [-1, 1], float [N, 1 or 3, H, W], to uint8 [N, 3, H, W]: clipped, rounded, grey repeated."""
    images = ((x.float() + 1) / 2 * 255).clamp(0, 255).round().to(torch.uint8)
    return images.expand(-1, 3, -1, -1).contiguous() if images.shape[1] == 1 else images


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
