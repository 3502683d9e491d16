"""The DINOv2 vision transformer, with and without registers, under the keys of its official files.

Facts: specs/gmem.md section 3.3, specs/digit.md section 3. Shapes: B images, N tokens, D width, G tokens per side,
P = G * G patches; the order of tokens is class, registers, patches row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpc_gen.config.dinov2 import PATCH, Dinov2Architecture

NORM_EPS = 1e-6
OFFSET = 0.1  # of DINO's rule for other grids; kept by the checkpoints and codes that were made with it
GMEM_GRID = 16

Rule = Literal["gmem", "digit", "hub"]


class PatchEmbed(nn.Module):
    """Patches of 14 x 14 pixels to tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, stride=PATCH)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """[B, P, D], row by row."""
        return self.proj(images_B3HW).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Plain softmax attention over all tokens; rows of `qkv` are query, key, value, each head after head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        """[B, N, D]."""
        q_BhNd, k_BhNd, v_BhNd = self.qkv(x_BND).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed_BhNd = F.scaled_dot_product_attention(q_BhNd, k_BhNd, v_BhNd)
        return self.proj(mixed_BhNd.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        """[B, N, D]."""
        return self.fc2(F.gelu(self.fc1(x_BND)))


class GatedMlp(nn.Module):
    """SiLU of the first half times the second half (ViT-g)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        """[B, N, D]."""
        gate, value = self.w12(x_BND).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    """A factor per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x_BND: Tensor) -> Tensor:
        """[B, N, D]."""
        return x_BND * self.gamma


class Block(nn.Module):
    """Attention, then the feed-forward, each normalised before and scaled per channel after."""

    def __init__(self, sizes: Dinov2Architecture) -> None:
        super().__init__()
        width = sizes.width
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, sizes.heads)
        self.ls1 = LayerScale(width)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp: nn.Module = (GatedMlp if sizes.swiglu else Mlp)(width, sizes.hidden)
        self.ls2 = LayerScale(width)

    def forward(self, x_BND: Tensor) -> Tensor:
        """[B, N, D]."""
        x_BND = x_BND + self.ls1(self.attn(self.norm1(x_BND)))
        return x_BND + self.ls2(self.mlp(self.norm2(x_BND)))


class Dinov2(nn.Module):
    """Normalised images to tokens; which block's, the caller says."""

    def __init__(self, sizes: Dinov2Architecture) -> None:
        super().__init__()
        self.sizes = sizes
        self.cls_token = nn.Parameter(torch.zeros(1, 1, sizes.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + sizes.position_grid**2, sizes.width))
        if sizes.registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, sizes.registers, sizes.width))
        self.mask_token = nn.Parameter(torch.zeros(1, sizes.width))  # of its training; official files hold it
        self.patch_embed = PatchEmbed(sizes.width)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.depth))
        self.norm = nn.LayerNorm(sizes.width, eps=NORM_EPS)

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches: class and registers."""
        return 1 + self.sizes.registers

    def embed(self, images_B3HW: Tensor, positions_1ND: Tensor) -> Tensor:
        """Input of the first block [B, 1 + registers + P, D]; positions [1, 1 + P, D], registers get none."""
        patches_BPD = self.patch_embed(images_B3HW)
        x_BND = torch.cat([self.cls_token.expand(len(patches_BPD), -1, -1), patches_BPD], dim=1) + positions_1ND
        if not self.sizes.registers:
            return x_BND
        registers = self.register_tokens.expand(len(x_BND), -1, -1)
        return torch.cat([x_BND[:, :1], registers, x_BND[:, 1:]], dim=1)

    def forward(self, images_B3HW: Tensor, positions_1ND: Tensor, after: Sequence[int]) -> dict[int, Tensor]:
        """{n: tokens [B, 1 + registers + P, D] after n blocks and the final norm} for each n of `after`.

        Blocks beyond the last one asked for are not run. The final norm is applied to inner blocks, too, as both
        references do.
        """
        x_BND = self.embed(images_B3HW, positions_1ND)
        found: dict[int, Tensor] = {}
        for number, block in enumerate(self.blocks[: max(after)], 1):
            x_BND = block(x_BND)
            if number in after:
                found[number] = self.norm(x_BND)
        return found


def positions_of(table_1ND: Tensor, grid: int, rule: Rule) -> Tensor:
    """The position table [1, 1 + side * side, D] resampled to [1, 1 + grid * grid, D], float32; class entry kept.

    Rules (specs/gmem.md section 3.3, specs/digit.md section 3): `gmem` resamples to 16 with antialias when the network
    is loaded and enlarges that by DINO's rule where the grid is another; `digit` is DINO's rule at once; `hub`
    resamples with antialias at once. They move codes: use the one that centroids and generators were made with.
    """
    if rule == "gmem":
        table_1ND = _with_antialias(table_1ND, GMEM_GRID)
        return table_1ND if grid == GMEM_GRID else _with_offset(table_1ND, grid)
    return _with_offset(table_1ND, grid) if rule == "digit" else _with_antialias(table_1ND, grid)


def _with_antialias(table_1ND: Tensor, grid: int) -> Tensor:
    patches = _as_map(table_1ND)
    if patches.shape[-1] != grid:
        patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", antialias=True, align_corners=False)
    return _as_table(table_1ND, patches)


def _with_offset(table_1ND: Tensor, grid: int) -> Tensor:
    patches = _as_map(table_1ND)
    if patches.shape[-1] != grid:
        factor = (grid + OFFSET) / patches.shape[-1]
        patches = F.interpolate(patches, scale_factor=(factor, factor), mode="bicubic", align_corners=False)
    return _as_table(table_1ND, patches)


def _as_map(table_1ND: Tensor) -> Tensor:
    side = round((table_1ND.shape[1] - 1) ** 0.5)
    return table_1ND[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)


def _as_table(table_1ND: Tensor, map_1DGG: Tensor) -> Tensor:
    return torch.cat([table_1ND[:, :1].float(), map_1DGG.flatten(2).transpose(1, 2)], dim=1)
