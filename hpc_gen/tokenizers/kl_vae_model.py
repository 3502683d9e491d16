"""The KL autoencoder of the LDM family (Rombach et al. 2022, arXiv 2112.10752), single device, one class for all.

State-dict keys, their order and the placement of attention are those of the official files: SD f8 (specs/dim.md 5.5),
KL16 of MAR (specs/energy.md 3.4), VA-VAE f16d32 (specs/gmem.md 3.4). There is no dropout and no time embedding.

Shape suffixes: B batch, C channels, H, W sides of the map (N = H * W cells), Z stored latent channels (embed_dim),
h, w latent sides.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_gen.config.kl_vae import NORM_GROUPS, KlVaeConfig

NORM_EPS = 1e-6


class Norm(nn.GroupNorm):
    """Group norm with 32 groups and a learned affine map."""

    def __init__(self, channels: int) -> None:
        super().__init__(NORM_GROUPS, channels, eps=NORM_EPS)


class ResidualBlock(nn.Module):
    """Two norm-swish-convolution steps; a 1 x 1 convolution on the short cut where channels change."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = Norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = Norm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map [B, channels_out, H, W]."""
        inner_BCHW = self.conv1(F.silu(self.norm1(x_BCHW)))
        inner_BCHW = self.conv2(F.silu(self.norm2(inner_BCHW)))
        return inner_BCHW + (x_BCHW if self.nin_shortcut is None else self.nin_shortcut(x_BCHW))


class CellAttention(nn.Module):
    """Every cell attends to every cell: one head over all channels, scale C^-0.5, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map of the same shape."""
        normed_BCHW = self.norm(x_BCHW)
        q_B1NC, k_B1NC, v_B1NC = (
            conv(normed_BCHW).flatten(2).transpose(1, 2)[:, None] for conv in (self.q, self.k, self.v)
        )
        mixed_B1NC = F.scaled_dot_product_attention(q_B1NC, k_B1NC, v_B1NC)
        return x_BCHW + self.proj_out(mixed_B1NC[:, 0].transpose(1, 2).reshape(x_BCHW.shape))


class Downsample(nn.Module):
    """Halves the side: one row and column of zeros at the bottom and the right, then a convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map [B, C, H / 2, W / 2]."""
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the side: each cell four times, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map [B, C, 2 H, 2 W]."""
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, attention after each where the level attends, then the change of resolution."""

    def __init__(self, channels_in: int, channels_out: int, num_blocks: int, attends: bool) -> None:
        super().__init__()
        sizes = [channels_in] + [channels_out] * num_blocks
        self.block = nn.ModuleList(ResidualBlock(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True))
        self.attn = nn.ModuleList(CellAttention(channels_out) for _ in range(num_blocks) if attends)
        self.downsample: Downsample | None = None
        self.upsample: Upsample | None = None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map [B, channels_out, H, W] at the side that the next level has."""
        for i, block in enumerate(self.block):
            x_BCHW = block(x_BCHW)
            if len(self.attn):
                x_BCHW = self.attn[i](x_BCHW)
        if self.downsample is not None:
            return self.downsample(x_BCHW)
        return x_BCHW if self.upsample is None else self.upsample(x_BCHW)


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = CellAttention(channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map of the same shape."""
        return self.block_2(self.attn_1(self.block_1(x_BCHW)))


class Encoder(nn.Module):
    """Images to the input of `quant_conv`."""

    def __init__(self, config: KlVaeConfig) -> None:
        super().__init__()
        widths = [config.ch * multiple for multiple in config.ch_mult]
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.down = nn.ModuleList(
            Level(before, width, config.num_res_blocks, config.attends(i))
            for i, (before, width) in enumerate(zip([config.ch, *widths[:-1]], widths, strict=True))
        )
        for level, width in zip(self.down[:-1], widths[:-1], strict=True):
            level.downsample = Downsample(width)
        self.mid = Middle(widths[-1])
        self.norm_out = Norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map [B, 2 z_channels, h, w]."""
        x_BCHW = self.conv_in(x_BCHW)
        for level in self.down:
            x_BCHW = level(x_BCHW)
        return self.conv_out(F.silu(self.norm_out(self.mid(x_BCHW))))


class Decoder(nn.Module):
    """Output of `post_quant_conv` to images. `up` is indexed like the encoder's `down`: 0 has full resolution."""

    def __init__(self, config: KlVaeConfig) -> None:
        super().__init__()
        widths = [config.ch * multiple for multiple in config.ch_mult]
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList(
            Level(below, width, config.num_res_blocks + 1, config.decoder_attention and config.attends(i))
            for i, (below, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))
        )
        for level, width in zip(self.up[1:], widths[1:], strict=True):
            level.upsample = Upsample(width)
        self.norm_out = Norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.in_channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Images [B, in_channels, H, W]."""
        x_BCHW = self.mid(self.conv_in(x_BCHW))
        for level in reversed(self.up):
            x_BCHW = level(x_BCHW)
        return self.conv_out(F.silu(self.norm_out(x_BCHW)))


class KlAutoencoder(nn.Module):
    """Images [B, C, H, W] in [-1, 1] to the moments of a Gaussian over latents, and latents back to images."""

    def __init__(self, config: KlVaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Moments [B, 2Z, h, w] of images in [-1, 1] whose sides are multiples of the stride: mean, log variance."""
        return self.quant_conv(self.encoder(images_BCHW))

    def decode(self, z_BZhw: Tensor) -> Tensor:
        """Images [B, C, H, W], about [-1, 1] and not clipped, of unscaled latents."""
        return self.decoder(self.post_quant_conv(z_BZhw))


def to_pixels(images: Tensor) -> Tensor:
    """Images in [-1, 1], any float [N, C, H, W], to uint8: (x + 1) / 2 * 255, clipped, rounded half to even."""
    return ((images.float() + 1) / 2 * 255).clamp(0, 255).round().to(torch.uint8)


@torch.no_grad()
def initialise(model: KlAutoencoder, generator: torch.Generator) -> None:
    """Fill every parameter: norms 1 and 0, convolutions uniform within 1 / sqrt(fan-in) (torch's default).

    Values are drawn on the CPU in state-dict order, so no device changes them.
    """
    for module in model.modules():
        if isinstance(module, Norm):
            module.weight.fill_(1.0)
            module.bias.fill_(0.0)
        elif isinstance(module, nn.Conv2d):
            bound = 1 / math.sqrt(module.weight[0].numel())
            for parameter in module.parameters():
                value = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
                parameter.copy_(value.uniform_(-bound, bound, generator=generator))
