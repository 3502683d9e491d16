"""The two optional losses of the energy variant: contrast with worse samples, and refinement of the step size.

Facts: specs/energy.md section 5.1. Shapes: B batch, [B, C, S, S] samples, K inner steps, G groups of samples.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hpc_gen.diffusion.gaussian import GaussianDiffusion
from hpc_gen.methods.energy.config import EnergyHeadConfig
from hpc_gen.methods.energy.inner import (
    INNER_STEPS_SAMPLING,
    INNER_STEPS_TRAINING,
    Descent,
    Landscape,
    descend,
    descend_with_graph,
    inner_step_counts,
    signal_bound,
)
from hpc_gen.methods.energy.model import PureDiffusion

NEGATIVE_SPREAD = 3.0  # negatives start this many standard deviations away
NEGATIVE_LIMIT = 2.0  # and end within this bound, as clean samples
VARIANCE_WEIGHT = 0.1


def landscape_of(model: PureDiffusion, t_B: Tensor, y_B: Tensor) -> Landscape:
    """The model's energy at fixed timesteps and classes."""
    return Landscape(energy=lambda x: model.energy(x, t_B, y_B), slope=lambda x: model.energy_and_noise(x, t_B, y_B))


def negatives(
    model: PureDiffusion,
    diffusion: GaussianDiffusion,
    config: EnergyHeadConfig,
    x0: Tensor,
    t_B: Tensor,
    y_B: Tensor,
    noise: Tensor,
    perturbation: Tensor,
) -> tuple[Tensor, Tensor]:
    """Noised negatives before and after the inner loop, [B, C, S, S] each; no gradient passes through the walk."""
    start = diffusion.add_noise(x0 + NEGATIVE_SPREAD * perturbation, t_B, noise)
    size = config.contrastive_step_size if config.contrastive_step_size is not None else model.alpha.detach()
    counts_B = inner_step_counts(t_B, diffusion.num_timesteps, INNER_STEPS_SAMPLING, config.step_group)
    walked = descend(
        landscape_of(model, t_B, y_B),
        start,
        counts_B,
        Descent(size, always_accept=config.always_accept),
        bound=signal_bound(diffusion, t_B, start) if config.inner_clamp == "signal" else None,
    )
    return start, walked


def contrastive_errors(
    model: PureDiffusion,
    diffusion: GaussianDiffusion,
    config: EnergyHeadConfig,
    x0: Tensor,
    t_B: Tensor,
    y_B: Tensor,
    noise: Tensor,
    perturbation: Tensor,
) -> Tensor:
    """log(1 + exp(E+ - E-)) of each sample [B]: real samples must lie lower than what the inner loop makes of bad ones.

    Both sides are noised with the same `noise`, and one class per sample serves all evaluations.
    """
    _, walked = negatives(model, diffusion, config, x0, t_B, y_B, noise, perturbation)
    clean = (walked / diffusion.signal_scale(t_B, walked)).clamp(-NEGATIVE_LIMIT, NEGATIVE_LIMIT)
    # E+ and E- in one evaluation of twice the batch.
    pair = torch.cat([diffusion.add_noise(x0, t_B, noise), diffusion.add_noise(clean, t_B, noise)])
    positive_B, negative_B = model.energy(pair, torch.cat([t_B, t_B]), torch.cat([y_B, y_B])).chunk(2)
    return F.softplus(positive_B - negative_B)


def refinement_path(
    model: PureDiffusion,
    diffusion: GaussianDiffusion,
    config: EnergyHeadConfig,
    x0: Tensor,
    t_B: Tensor,
    y_B: Tensor,
    noise: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The walk with its graph: (noised start, refined [B, C, S, S], energies [K, B] before each step)."""
    start = diffusion.add_noise(x0, t_B, noise).detach()
    counts_B = inner_step_counts(t_B, diffusion.num_timesteps, INNER_STEPS_TRAINING, config.step_group)
    refined, energies_KB = descend_with_graph(
        landscape_of(model, t_B, y_B),
        start,
        counts_B,
        Descent(model.alpha),
        bound=signal_bound(diffusion, t_B, start) if config.inner_clamp == "signal" else None,
        tested=bool(config.refinement_test),
    )
    return start, refined, energies_KB


def refinement_errors(energies_KB: Tensor, counts_B: Tensor, config: EnergyHeadConfig) -> Tensor:
    """How badly the inner loop lowers the energy: one value in (0, 1) per sample [B], or per group [G].

    reference: sigmoid((-sum of drops - 0.1 variance of drops) / K) over a whole group, which saturates with its size
    and rewards erratic paths. per_sample, a deliberate deviation: each sample by itself, with the variance (biased, so
    that a single drop is no NaN) as a cost.
    """
    drops_JB = energies_KB[:-1] - energies_KB[1:]
    if config.refinement == "per_sample":
        steps_B = counts_B.to(drops_JB.dtype)
        inside_JB = torch.arange(1, len(drops_JB) + 1, device=counts_B.device)[:, None] < counts_B
        mean_B = drops_JB.sum(dim=0) / (steps_B - 1)
        variance_B = ((drops_JB - mean_B).square() * inside_JB).sum(dim=0) / (steps_B - 1)
        return torch.sigmoid((-drops_JB.sum(dim=0) + VARIANCE_WEIGHT * variance_B) / steps_B)
    values = []
    for first in range(0, len(counts_B), config.step_group):
        count = int(counts_B[first])
        drops = drops_JB[: count - 1, first : first + config.step_group]
        values.append(torch.sigmoid((-drops.sum() - VARIANCE_WEIGHT * drops.var()) / count))
    return torch.stack(values)
