"""The tokenizer that stores the pixels themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hpc_gen.runtime.errors import DataError


class Identity:
    """uint8 pixels in, the same uint8 pixels out; encoding and decoding copy nothing."""

    name = "identity"
    columns = ("pixels",)

    @property
    def identity(self) -> dict[str, Any]:
        """Only the name: there is nothing to set."""
        return {"name": self.name}

    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        """uint8 [N, C, H, W] -> {"pixels": the same}. Raises DataError for anything else."""
        return {"pixels": _checked(pixels)}

    def decode(self, latents: Tensor) -> Tensor:
        """uint8 [N, C, H, W] -> the same. Raises DataError for anything else."""
        return _checked(latents)


def _checked(pixels: Tensor) -> Tensor:
    if pixels.dtype != torch.uint8 or pixels.ndim != 4:
        raise DataError(
            f"the identity tokenizer takes uint8 pixels [N, C, H, W], got {pixels.dtype} {list(pixels.shape)}; "
            "round the images to uint8 first, or use the tokenizer that made these latents"
        )
    return pixels
