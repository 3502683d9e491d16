"""The architecture of a VQGAN, as `encode.tokenizer.vqgan` spells it.

Facts: specs/digit.md section 5 (MAGE's network, which is not taming's: no attention, average pooling, no biases in most
places, a shortcut that drops its input). Free of torch, as config is.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from hpc_gen.config.base import PositiveInt, Section
from hpc_gen.config.kl_vae import NORM_GROUPS


class VqganConfig(Section):
    """Sizes of a VQGAN of the MAGE family; the defaults are its one published file."""

    ch: PositiveInt = 128
    """Channels of the level with full resolution; a multiple of 32."""
    ch_mult: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 1, 2, 2, 4)
    """Channels of each level over `ch`; each level but the last halves the side."""
    num_res_blocks: PositiveInt = 2
    """Residual blocks per level, of encoder and decoder alike."""
    z_channels: PositiveInt = 256
    """Channels of a codebook entry."""
    codes: PositiveInt = 1024
    """Entries of the codebook."""

    @property
    def stride(self) -> int:
        """Pixels per code and side."""
        return int(2 ** (len(self.ch_mult) - 1))

    @model_validator(mode="after")
    def _sizes_fit(self) -> VqganConfig:
        if self.ch % NORM_GROUPS:
            raise ValueError(f"ch = {self.ch} is not a multiple of the {NORM_GROUPS} groups of a norm; use one that is")
        return self
