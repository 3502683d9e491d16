"""Discrete Gaussian diffusion (DDPM): beta schedules, respacing, and the posterior of the ancestral chain.

Source: Ho et al. 2020 (arXiv 2006.11239, equations by number below) and Nichol & Dhariwal 2021 (arXiv 2102.09672) for
the cosine schedule and respacing. Tables are float64 on the CPU; tensors are scaled in their own dtype.

Shapes: B batch, T timesteps of the chain; samples are [B, ...].
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpc_gen.runtime.errors import UserError, nearest

Table = NDArray[np.float64]


def linear_betas(num_timesteps: int) -> Table:
    """Linear betas [T] from 0.0001 to 0.02 at T = 1000; other T scale both ends by 1000 / T.

    Raises UserError where the last beta would exceed 1 (T below 20).
    """
    if num_timesteps < 20:
        raise UserError(f"a linear beta schedule of {num_timesteps} timesteps has betas above 1; use at least 20")
    scale = 1000 / num_timesteps
    return np.linspace(scale * 0.0001, scale * 0.02, num_timesteps, dtype=np.float64)


def cosine_betas(num_timesteps: int) -> Table:
    """Cosine betas [T]: alpha_bar(u) = cos((u + 0.008) / 1.008 * pi / 2)^2, each beta at most 0.999."""
    if num_timesteps < 1:
        raise UserError(f"a cosine beta schedule of {num_timesteps} timesteps is empty; use at least 1")

    def alpha_bar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    steps = [
        min(1 - alpha_bar((i + 1) / num_timesteps) / alpha_bar(i / num_timesteps), 0.999) for i in range(num_timesteps)
    ]
    return np.array(steps, dtype=np.float64)


SCHEDULES: dict[str, Callable[[int], Table]] = {"linear": linear_betas, "cosine": cosine_betas}


def named_betas(schedule: str, num_timesteps: int) -> Table:
    """Betas [T] of a schedule by name; UserError for an unknown name."""
    if schedule not in SCHEDULES:
        known = ", ".join(sorted(SCHEDULES))
        raise UserError(f"unknown beta schedule '{schedule}'{nearest(schedule, SCHEDULES)}; known schedules: {known}")
    return SCHEDULES[schedule](num_timesteps)


def respaced_timesteps(num_timesteps: int, spacing: int | str) -> list[int]:
    """The timesteps a shorter chain keeps, ascending.

    `spacing`: a count; a comma list with one count per equal section of the chain ("10,15,20"; the first T mod n
    sections are one longer); or "ddimN", the smallest integer stride from 0 that gives exactly N. The fractional stride
    of a section is accumulated in floating point and rounded half to even, as in the reference.
    Raises UserError for text that is none of these and for counts that do not fit.
    """
    text = str(spacing).strip()
    try:
        if text.startswith("ddim"):
            return _integer_stride(num_timesteps, int(text[len("ddim") :]))
        counts = [int(part) for part in text.split(",")]
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"sampling steps '{spacing}' are not understood; give a count (250), counts per section ('10,15,20') "
            "or 'ddimN'"
        ) from None
    kept: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        size = num_timesteps // len(counts) + (1 if section < num_timesteps % len(counts) else 0)
        if not 1 <= count <= size:
            raise UserError(
                f"sampling steps '{spacing}' ask for {count} of the {size} timesteps of section {section + 1}; "
                f"give 1 to {size}"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += size
    return sorted(set(kept))


def _integer_stride(num_timesteps: int, count: int) -> list[int]:
    for stride in range(1, num_timesteps):
        kept = range(0, num_timesteps, stride)
        if len(kept) == count:
            return list(kept)
    raise UserError(
        f"no integer stride gives exactly {count} of {num_timesteps} timesteps; "
        f"use a plain count instead of 'ddim{count}'"
    )


class GaussianDiffusion:
    """A chain q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t) and its posterior, with fixed small variance.

    `timestep_map[i]` is the timestep the network must be told at index `i`: the identity for a full chain, the index in
    the original chain for a respaced one.
    """

    def __init__(self, betas: Table, timestep_map: list[int] | None = None) -> None:
        """`betas` float64 [T], each in (0, 1]; raises ValueError otherwise."""
        betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError(f"betas must be a non-empty list of numbers in (0, 1], got shape {betas.shape}")
        self.betas = betas
        self.num_timesteps = len(betas)
        self.timestep_map = list(range(len(betas))) if timestep_map is None else list(timestep_map)

        bar = np.cumprod(1.0 - betas)
        previous = np.append(1.0, bar[:-1])
        self.alphas_cumprod = bar
        self.sqrt_alphas_cumprod = np.sqrt(bar)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - bar)
        with np.errstate(divide="ignore"):  # a last beta of exactly 1 leaves no signal: infinities, as in the reference
            self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / bar)
            self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / bar - 1)
        # The posterior q(x_{t-1} | x_t, x_0), eq. 7 of 2006.11239.
        self.posterior_variance = betas * (1.0 - previous) / (1.0 - bar)
        self.posterior_mean_coef1 = betas * np.sqrt(previous) / (1.0 - bar)
        self.posterior_mean_coef2 = (1.0 - previous) * np.sqrt(1.0 - betas) / (1.0 - bar)
        # The variance is 0 at index 0, so its logarithm is taken from index 1. A chain of one step never uses it.
        self.posterior_log_variance_clipped = (
            np.log(np.append(self.posterior_variance[1], self.posterior_variance[1:]))
            if len(betas) > 1
            else np.full(1, -np.inf)
        )
        self._on_device: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def respaced(self, spacing: int | str) -> GaussianDiffusion:
        """The chain over the kept timesteps: betas from the retained alpha_bar (2102.09672, section 4)."""
        kept = respaced_timesteps(self.num_timesteps, spacing)
        last = 1.0
        betas = []
        for index in kept:
            betas.append(1.0 - self.alphas_cumprod[index] / last)
            last = self.alphas_cumprod[index]
        return GaussianDiffusion(np.array(betas), [self.timestep_map[index] for index in kept])

    def add_noise(self, x0: Tensor, t_B: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise (eq. 4 of 2006.11239); `t_B` int64 indices."""
        signal = self._at("sqrt_alphas_cumprod", t_B, x0)
        return signal * x0 + self._at("sqrt_one_minus_alphas_cumprod", t_B, x0) * noise

    def signal_scale(self, t_B: Tensor, like: Tensor) -> Tensor:
        """sqrt(alpha_bar) at each sample's index, shaped [B, 1, ...] to multiply `like`."""
        return self._at("sqrt_alphas_cumprod", t_B, like)

    def predict_x0(self, x_t: Tensor, index: int, epsilon: Tensor) -> Tensor:
        """The clean sample that `epsilon` implies at one index for the whole batch (eq. 15 of 2006.11239)."""
        return (
            self.sqrt_recip_alphas_cumprod[index].item() * x_t
            - self.sqrt_recipm1_alphas_cumprod[index].item() * epsilon
        )

    def posterior_mean(self, x0: Tensor, x_t: Tensor, index: int) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0) at one index for the whole batch (eq. 7 of 2006.11239)."""
        return self.posterior_mean_coef1[index].item() * x0 + self.posterior_mean_coef2[index].item() * x_t

    def posterior_std(self, index: int) -> float:
        """Standard deviation of the noise of one ancestral step (fixed small variance); unused at index 0."""
        return math.exp(0.5 * self.posterior_log_variance_clipped[index].item())

    def _at(self, table: str, t_B: Tensor, like: Tensor) -> Tensor:
        """Entries of a table for each sample, shaped [B, 1, ...] to multiply `like`; each table travels only once."""
        key = (table, like.device, like.dtype)
        if key not in self._on_device:
            self._on_device[key] = torch.from_numpy(getattr(self, table)).to(device=like.device, dtype=like.dtype)
        return self._on_device[key][t_B].view(-1, *([1] * (like.ndim - 1)))
