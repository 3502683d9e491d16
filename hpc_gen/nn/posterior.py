"""The Gaussian posterior of a KL autoencoder, stored as moments, and the scale in which diffusion sees its latents.

Facts: specs/energy.md section 3.4. Shapes: B batch, C latent channels, [B, 2C, h, w] moments = mean, then log variance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpc_gen.runtime.errors import DataError

LOG_VARIANCE_LIMITS = (-30.0, 20.0)


def mean_and_std(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, each [B, C, h, w], in the dtype of `moments` [B, 2C, h, w]."""
    if moments.ndim != 4 or moments.shape[1] % 2:
        raise DataError(f"moments have shape {list(moments.shape)}, expected [N, 2C, h, w]; encode the table anew")
    mean, log_variance = moments.chunk(2, dim=1)
    return mean, (log_variance.clamp(*LOG_VARIANCE_LIMITS) / 2).exp()


def sample_moments(moments: Tensor, noise: Tensor) -> Tensor:
    """One latent [B, C, h, w] per row: mean + std * noise, in the dtype of `noise` (half moments are widened first)."""
    mean, std = mean_and_std(moments.to(noise.dtype))
    return mean + std * noise


def kl_to_standard_normal(moments: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(0, 1)) of each sample [B], summed over channels and cells, in nats."""
    mean, log_variance = moments.chunk(2, dim=1)
    log_variance = log_variance.clamp(*LOG_VARIANCE_LIMITS)
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).flatten(1).sum(dim=1)


@dataclass(frozen=True)
class LatentScale:
    """x = (z - shift) * scale: from an autoencoder's latents z to what diffusion is trained on, and back.

    One value for all channels, or one per channel. KL16 of MAR: scale 0.2325, shift 0.
    """

    scale: tuple[float, ...] = (1.0,)
    shift: tuple[float, ...] = (0.0,)

    @classmethod
    def of(cls, tokenizer: Mapping[str, Any]) -> LatentScale:
        """The scale that a tokenizer's identity names ("scale" and "shift", numbers or lists); 1 and 0 without."""
        return cls(_values(tokenizer.get("scale", 1.0)), _values(tokenizer.get("shift", 0.0)))

    def normalise(self, z: Tensor) -> Tensor:
        """Latents [B, C, h, w] as diffusion sees them."""
        scale, shift = self._like(z)
        return (z - shift) * scale

    def restore(self, x: Tensor) -> Tensor:
        """Latents [B, C, h, w] as the decoder wants them."""
        scale, shift = self._like(x)
        return x / scale + shift

    def _like(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for values in (self.scale, self.shift):
            if len(values) not in (1, x.shape[1]):
                raise DataError(
                    f"the tokenizer names {len(values)} scales or shifts for latents of {x.shape[1]} channels; "
                    "give one, or one per channel"
                )
        return _as_tensor(self.scale, x), _as_tensor(self.shift, x)


def _values(given: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in given) if isinstance(given, list | tuple) else (float(given),)


def _as_tensor(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)
