"""A tokenizer without a network, to stand in for kl_vae: cells of 4 x 4 pixels, mean and log variance by arithmetic.

`monkeypatch.setitem(tokenizers.TOKENIZERS, "kl_vae", toy_tokenizer.factory)` puts it where the config can name it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

STRIDE = 4


class ToyTokenizer:
    """Moments [N, 2C, H / 4, W / 4]: the mean of a cell in -1..1 plus its slope to the right, and a fixed variance."""

    name = "kl_vae"
    columns = ("moments", "moments_flip")

    def __init__(self, scale: float = 0.5, weights: str = "toy") -> None:
        self.scale, self.weights = scale, weights
        self.encoded: list[int] = []  # sizes of the batches

    @property
    def identity(self) -> dict[str, Any]:
        """As a real one: the architecture nested."""
        return {
            "name": self.name,
            "architecture": {"stride": STRIDE},
            "weights_sha256": self.weights,
            "scale": self.scale,
        }

    def encode_float32(self, pixels: Tensor) -> dict[str, Tensor]:
        """Both columns in float32."""
        self.encoded.append(len(pixels))
        return {"moments": moments(pixels), "moments_flip": moments(pixels.flip(-1))}

    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        """Both columns in halves."""
        return {name: column.half() for name, column in self.encode_float32(pixels).items()}

    def decode(self, latents: Tensor) -> Tensor:
        """Each cell as a plain square."""
        z = (latents / self.scale).repeat_interleave(STRIDE, -1).repeat_interleave(STRIDE, -2)
        return ((z + 1) / 2 * 255).clamp(0, 255).round().to(torch.uint8)


def moments(pixels: Tensor) -> Tensor:
    """float32 [N, 2C, h, w] of uint8 [N, C, H, W]."""
    values = pixels.float() / 127.5 - 1
    slope = F.avg_pool2d((values[..., 1:] - values[..., :-1]), STRIDE, ceil_mode=True) if values.shape[-1] > 1 else 0
    mean = F.avg_pool2d(values, STRIDE) + 0.1 * slope
    return torch.cat([mean, mean - 3.001], dim=1)


def factory(workspace: Path, device: torch.device, weights: str = "toy", scale: float | None = None, **_: Any) -> Any:
    """What tokenizers.TOKENIZERS holds."""
    return ToyTokenizer(0.5 if scale is None else scale, weights)


def of_rows(rows: dict[int, dict[str, Tensor]]) -> Callable[..., Any]:
    """A factory of a tokenizer that looks an image's moments (float32) up by the value of its first pixel."""

    class Looking(ToyTokenizer):
        def encode_float32(self, pixels: Tensor) -> dict[str, Tensor]:
            found = [rows[int(value)] for value in pixels[:, 0, 0, 0]]
            return {name: torch.stack([row[name] for row in found]) for name in self.columns}

    return lambda workspace, device, **_: Looking()
