"""The VQGAN of MAGE: images in [0, 1] to the nearest codebook entries, and back, under the keys of its official file.

Facts: specs/digit.md section 5. It is not the usual VQGAN: no attention, average pooling without parameters, no biases
in residual blocks, and a shortcut that drops its input. Shapes: B images, C channels, Z channels of a code.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpc_gen.config.kl_vae import NORM_GROUPS
from hpc_gen.config.vqgan import VqganConfig

NORM_EPS = 1e-6
COMMITMENT = 0.25


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions without bias.

    Where the number of channels changes, the 1 x 1 `nin_shortcut` is applied to the branch and added to it, and the
    input is dropped: the published weights were trained so.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        self.norm2 = _norm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        if channels_in != channels_out:
            self.nin_shortcut = nn.Conv2d(channels_out, channels_out, 1, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map of the same side."""
        branch = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x_BCHW))))))
        return branch + (self.nin_shortcut(branch) if hasattr(self, "nin_shortcut") else x_BCHW)


class Upsample(nn.Module):
    """Nearest neighbour to twice the side, then a 3 x 3 convolution with bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, 2 H, 2 W]."""
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, then, in the decoder, the way up."""

    def __init__(self, channels_in: int, channels_out: int, num_blocks: int, goes_up: bool = False) -> None:
        super().__init__()
        sizes = [channels_in] + [channels_out] * num_blocks
        self.block = nn.ModuleList(ResidualBlock(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True))
        if goes_up:
            self.upsample = Upsample(channels_out)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map at the side that the next level has."""
        for block in self.block:
            x_BCHW = block(x_BCHW)
        return self.upsample(x_BCHW) if hasattr(self, "upsample") else x_BCHW


class Middle(nn.Module):
    """Two blocks at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map of the same shape."""
        return self.block_2(self.block_1(x_BCHW))


class Encoder(nn.Module):
    """Images to vectors, before they are replaced by codes."""

    def __init__(self, config: VqganConfig) -> None:
        super().__init__()
        widths = [config.ch * multiple for multiple in config.ch_mult]
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1, bias=False)
        pairs = zip([config.ch, *widths[:-1]], widths, strict=True)
        self.down = nn.ModuleList(Level(before, width, config.num_res_blocks) for before, width in pairs)
        self.mid = Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 1)

    def forward(self, x_B3HW: Tensor) -> Tensor:
        """[B, Z, h, w]."""
        x_BCHW = self.conv_in(x_B3HW)
        for number, level in enumerate(self.down):
            x_BCHW = level(x_BCHW if number == 0 else F.avg_pool2d(x_BCHW, 2))
        return self.conv_out(F.silu(self.norm_out(self.mid(x_BCHW))))


class Decoder(nn.Module):
    """Codebook entries to images. `up` is indexed like `down`: 0 has full resolution."""

    def __init__(self, config: VqganConfig) -> None:
        super().__init__()
        widths = [config.ch * multiple for multiple in config.ch_mult]
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        pairs = zip([*widths[1:], widths[-1]], widths, strict=True)
        self.up = nn.ModuleList(
            Level(below, width, config.num_res_blocks, goes_up=level > 0) for level, (below, width) in enumerate(pairs)
        )
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z_BZhw: Tensor) -> Tensor:
        """Images [B, 3, H, W], about [0, 1] and not clipped."""
        x_BCHW = self.mid(self.conv_in(z_BZhw))
        for level in reversed(self.up):
            x_BCHW = level(x_BCHW)
        return self.conv_out(F.silu(self.norm_out(x_BCHW)))


class Quantized(NamedTuple):
    """Codes int64 [B, h, w], their entries [B, Z, h, w], and the loss of training (a scalar)."""

    codes: Tensor
    entries: Tensor
    loss: Tensor


class Quantizer(nn.Module):
    """The codebook."""

    def __init__(self, codes: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, channels)

    def codes_of(self, z_BZhw: Tensor) -> Tensor:
        """Number of the nearest entry (squared Euclidean distance, the lowest of equal ones), int64 [B, h, w]."""
        entries = self.embedding.weight
        flat = z_BZhw.movedim(1, -1).flatten(0, 2)
        squared = flat.square().sum(1, keepdim=True) + entries.square().sum(1) - 2 * flat @ entries.T
        return squared.argmin(1).view(len(z_BZhw), *z_BZhw.shape[2:])

    def entries_of(self, codes_Bhw: Tensor) -> Tensor:
        """[B, Z, h, w] of int codes [B, h, w]."""
        return self.embedding(codes_Bhw.long()).movedim(-1, 1)

    def forward(self, z_BZhw: Tensor) -> Quantized:
        """The nearest entries; loss = mean((sg(entries) - z)^2) + 0.25 mean((entries - sg(z))^2)."""
        codes = self.codes_of(z_BZhw)
        entries = self.entries_of(codes)
        loss = F.mse_loss(z_BZhw, entries.detach()) + COMMITMENT * F.mse_loss(entries, z_BZhw.detach())
        return Quantized(codes, entries, loss)


class VqganModel(nn.Module):
    """Images [B, 3, H, W] in [0, 1] to codes, and codes to images; no shift to [-1, 1] anywhere."""

    def __init__(self, config: VqganConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Quantizer(config.codes, config.z_channels)

    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Codes int64 [B, h, w] of images in [0, 1] whose sides are multiples of the stride."""
        return self.quantize.codes_of(self.encoder(images_B3HW))

    def decode(self, codes_Bhw: Tensor) -> Tensor:
        """Images [B, 3, H, W], about [0, 1] and not clipped."""
        return self.decoder(self.quantize.entries_of(codes_Bhw))


def to_pixels(images: Tensor) -> Tensor:
    """Images in [0, 1] to uint8: x * 255, clipped, and cut (not rounded), as the reference writes its PNGs."""
    return (images.float() * 255).clamp(0, 255).to(torch.uint8)
