"""Flow and stochastic-interpolant paths between noise (t = 0) and data (t = 1), and what follows from a velocity.

x_t = alpha(t) x1 + sigma(t) x0 with data x1 and noise x0; the velocity is alpha' x1 + sigma' x0 (Ma et al. 2024, "SiT",
arXiv 2401.08740, section 2 and appendix A). Facts: specs/gmem.md sections 4 and 5. Shapes: [B, ...] samples, times [B].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Prediction = Literal["velocity", "noise", "score"]
LossWeight = Literal["none", "velocity", "likelihood"]

VP_BETAS = (0.1, 20.0)  # smallest and largest rate of the variance-preserving path


def like(t_B: Tensor, x: Tensor) -> Tensor:
    """Times [B] as [B, 1, ...] beside samples [B, ...]."""
    return t_B.reshape(-1, *[1] * (x.ndim - 1))


class FlowPath(Protocol):
    """Coefficients of a path and their derivatives, for times of any shape."""

    name: str

    def alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Weight of the data and its derivative."""
        ...

    def sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Weight of the noise and its derivative."""
        ...

    def alpha_ratio(self, t: Tensor) -> Tensor:
        """alpha' / alpha, written so that it is exact where alpha vanishes in floating point."""
        ...


class LinearPath:
    """alpha = t, sigma = 1 - t: the path of rectified flow, of LightningDiT and GMem."""

    name = "linear"

    def alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t and 1."""
        return t, torch.ones_like(t)

    def sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """1 - t and -1."""
        return 1 - t, -torch.ones_like(t)

    def alpha_ratio(self, t: Tensor) -> Tensor:
        """1 / t."""
        return 1 / t


class GvpPath:
    """alpha = sin(pi t / 2), sigma = cos(pi t / 2): generalised variance preserving."""

    name = "gvp"

    def alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Sine of the angle and its derivative."""
        angle = t * math.pi / 2
        return angle.sin(), math.pi / 2 * angle.cos()

    def sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine of the angle and its derivative."""
        angle = t * math.pi / 2
        return angle.cos(), -math.pi / 2 * angle.sin()

    def alpha_ratio(self, t: Tensor) -> Tensor:
        """pi / (2 tan(pi t / 2))."""
        return math.pi / (2 * torch.tan(t * math.pi / 2))


class VpPath:
    """The variance-preserving diffusion of score models run backwards: alpha = exp(-B(1 - t) / 2)."""

    name = "vp"

    def _exponent(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """log alpha and its derivative."""
        low, high = VP_BETAS
        left = 1 - t
        return -0.25 * left**2 * (high - low) - 0.5 * left * low, 0.5 * left * (high - low) + 0.5 * low

    def alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """exp of the exponent and its derivative."""
        exponent, slope = self._exponent(t)
        return exponent.exp(), exponent.exp() * slope

    def sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(1 - alpha^2) and its derivative."""
        exponent, slope = self._exponent(t)
        sigma = (1 - (2 * exponent).exp()).sqrt()
        return sigma, (2 * exponent).exp() * 2 * slope / (-2 * sigma)

    def alpha_ratio(self, t: Tensor) -> Tensor:
        """The slope of the exponent."""
        return self._exponent(t)[1]


PATHS: dict[str, FlowPath] = {path.name: path for path in (LinearPath(), GvpPath(), VpPath())}


def interpolate(path: FlowPath, x0_noise: Tensor, x1_data: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
    """The noisy sample at time t and the velocity there, both like the samples [B, ...]."""
    t = like(t_B, x1_data)
    (alpha, d_alpha), (sigma, d_sigma) = path.alpha(t), path.sigma(t)
    return alpha * x1_data + sigma * x0_noise, d_alpha * x1_data + d_sigma * x0_noise


def drift(path: FlowPath, x: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [B, ...] and variance [B, 1, ...] of the forward diffusion that has this path's marginals.

    velocity = variance * score - mean.
    """
    t = like(t_B, x)
    ratio, (sigma, d_sigma) = path.alpha_ratio(t), path.sigma(t)
    return -ratio * x, ratio * sigma**2 - sigma * d_sigma


def score_of_velocity(path: FlowPath, velocity: Tensor, x: Tensor, t_B: Tensor) -> Tensor:
    """Gradient of the log density at x: (t v - x) / (1 - t) for the linear path."""
    t = like(t_B, x)
    (alpha, d_alpha), (sigma, d_sigma) = path.alpha(t), path.sigma(t)
    reverse = alpha / d_alpha
    return (reverse * velocity - x) / (sigma**2 - reverse * d_sigma * sigma)


def noise_of_velocity(path: FlowPath, velocity: Tensor, x: Tensor, t_B: Tensor) -> Tensor:
    """The noise x0 in x."""
    t = like(t_B, x)
    (alpha, d_alpha), (sigma, d_sigma) = path.alpha(t), path.sigma(t)
    reverse = alpha / d_alpha
    return (reverse * velocity - x) / (reverse * d_sigma - sigma)


def velocity_of_score(path: FlowPath, score: Tensor, x: Tensor, t_B: Tensor) -> Tensor:
    """The inverse of `score_of_velocity`."""
    mean, variance = drift(path, x, t_B)
    return variance * score - mean


def prediction_errors(
    path: FlowPath,
    prediction: Literal["noise", "score"],
    weight: LossWeight,
    output: Tensor,
    x0_noise: Tensor,
    x_t: Tensor,
    t_B: Tensor,
) -> Tensor:
    """Squared error [B] of a network that predicts noise or score, with the weight that makes it one of velocities or a
    likelihood bound (SiT, appendix A).
    """
    _, variance = drift(path, x_t, t_B)
    sigma, _ = path.sigma(like(t_B, x_t))
    factor = {"none": torch.ones_like(sigma), "velocity": (variance / sigma) ** 2, "likelihood": variance / sigma**2}
    error = output - x0_noise if prediction == "noise" else output * sigma + x0_noise
    return (factor[weight] * error.square()).flatten(1).mean(dim=1)


@dataclass(frozen=True)
class Diffusion:
    """w(t) of dx = (v + w score) dt + sqrt(2 w) dW: how much noise the sampler adds and takes away again.

    `form`: linear norm (1 - t); sigma norm sigma(t); decreasing 0.25 (norm cos(pi t) + 1)^2; increasing-decreasing
    norm sin(pi t)^2; sbdm norm times the variance of `drift` (infinite at t = 0 of the linear path); constant norm.
    """

    path: FlowPath
    form: str = "linear"
    norm: float = 1.0

    def __call__(self, x: Tensor, t_B: Tensor) -> Tensor:
        """w [B, 1, ...]."""
        t, norm = like(t_B, x), self.norm
        if self.form == "linear":
            return norm * (1 - t)
        if self.form == "sigma":
            return norm * self.path.sigma(t)[0]
        if self.form == "decreasing":
            return 0.25 * (norm * torch.cos(math.pi * t) + 1) ** 2
        if self.form == "increasing-decreasing":
            return norm * torch.sin(math.pi * t) ** 2
        if self.form == "sbdm":
            return norm * drift(self.path, x, t_B)[1]
        assert self.form == "constant", self.form
        return torch.full_like(t, norm)


def interval(
    path: FlowPath, prediction: Prediction, form: str, sde: bool, last_step_size: float, eps: float
) -> tuple[float, float]:
    """Where the solver begins and ends: away from times at which a coefficient is infinite.

    `eps`: distance kept from them; a stochastic sampler ends `last_step_size` before t = 1 where that is not 0.
    """
    end = 1 - eps if not sde or last_step_size == 0 else 1 - last_step_size
    if path.name == "vp":
        return 0.0, end
    if prediction == "velocity" and not sde:
        return 0.0, 1.0
    return (eps if prediction != "velocity" or (form == "sbdm" and sde) else 0.0), end


def shifted(t: Tensor, shift: float) -> Tensor:
    """t -> s t / (1 + (s - 1) t); 0 leaves it alone. Below 1 the points gather near t = 0."""
    return t if shift == 0 else shift * t / (1 + (shift - 1) * t)


def lognormal_times(normals_B: Tensor) -> Tensor:
    """Sigmoids of standard normal draws: times in (0, 1) that gather in the middle."""
    return torch.sigmoid(normals_B)
