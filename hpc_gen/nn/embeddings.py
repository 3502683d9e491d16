"""What diffusion transformers share at their ends: patches to tokens, positions, time and class to vectors, modulation.

Used by the backbones of energy diffusion and of GMem, which agree in all of this (specs/energy.md section 3.1,
specs/gmem.md section 3.1).

Shape suffixes: B batch, C input channels, S side of the input, P patch side, G = S / P, N = G * G tokens, D width,
F features of the time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

TIMESTEP_FEATURES = 256


def sincos_positions(width: int, grid: int) -> Tensor:
    """Fixed position code float32 [1, N, D]: the first half of D encodes the column, the second half the row.

    Each half is [sin(p w_i), cos(p w_i)] with w_i = 10000^(-i / (D/4)), positions being plain integers.
    """
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width // 4))
    angles_GI = torch.arange(grid, dtype=torch.float64, device="cpu")[:, None] * frequencies
    axis_GJ = torch.cat([angles_GI.sin(), angles_GI.cos()], dim=1)
    column_GGJ = axis_GJ[None, :, :].expand(grid, grid, -1)
    row_GGJ = axis_GJ[:, None, :].expand(grid, grid, -1)
    return torch.cat([column_GGJ, row_GGJ], dim=2).reshape(1, grid * grid, width).float()


def timestep_features(t_B: Tensor) -> Tensor:
    """[cos(t f_i), sin(t f_i)] float32 [B, F], f_i = exp(-ln(10000) i / 128); t is used as it is:
    the raw index of a chain, or a flow's time in [0, 1]."""
    half = TIMESTEP_FEATURES // 2
    indices = torch.arange(half, dtype=torch.float32, device=t_B.device)
    angles_BI = t_B[:, None].float() * torch.exp(-math.log(10000) * indices / half)
    return torch.cat([angles_BI.cos(), angles_BI.sin()], dim=1)


def modulate(x_BND: Tensor, shift_BD: Tensor | None, scale_BD: Tensor) -> Tensor:
    """Scale and, unless there is none, shift every token of a sample alike."""
    scaled_BND = x_BND * (1 + scale_BD[:, None])
    return scaled_BND if shift_BD is None else scaled_BND + shift_BD[:, None]


def adaptive_parameters(width: int, chunks: int) -> nn.Sequential:
    """SiLU and a linear map from the condition to `chunks` vectors of modulation (adaLN)."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, chunks * width))


class PatchEmbed(nn.Module):
    """Square patches to tokens, row-major: one convolution whose stride is its kernel size."""

    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x_BCSS: Tensor) -> Tensor:
        """Tokens [B, N, D]."""
        return self.proj(x_BCSS).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Timestep index to a vector of the model's width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIMESTEP_FEATURES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_B: Tensor) -> Tensor:
        """Embedding [B, D]."""
        return self.mlp(timestep_features(t_B).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """One vector per class; the last row is the null class."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        # not nn.Embedding(...): it draws initial values, on the meta device by a decomposition that imports torch's
        # compiler (a second of every rank's start); `initialise` draws ours
        table = torch.empty(num_classes + 1, width)
        self.embedding_table = nn.Embedding.from_pretrained(table, freeze=False)

    def forward(self, y_B: Tensor) -> Tensor:
        """Embedding [B, D]."""
        return self.embedding_table(y_B)
