"""The architecture of a KL autoencoder, as `encode.tokenizer.architecture` and `method.architecture` spell it.

Facts: specs/energy.md section 3.4, specs/dim.md section 5.5, specs/gmem.md section 3.4. Free of torch, as config is.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from hpc_gen.config.base import PositiveInt, Section

NORM_GROUPS = 32
"""Groups of every group norm; so the channels of every level are a multiple of it."""


class KlVaeConfig(Section):
    """Sizes of a KL autoencoder in the LDM family: SD f8, KL16 and VA-VAE differ in these keys only."""

    ch: PositiveInt = 128
    """Channels of the level with full resolution; a multiple of 32."""
    ch_mult: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    """Channels of each level over `ch`; each level but the last halves the side."""
    num_res_blocks: PositiveInt = 2
    """Residual blocks per level of the encoder; the decoder has one more."""
    attn_resolutions: tuple[PositiveInt, ...] = ()
    """Sides of the levels that attend after each block, for an image of side `resolution`; the middle always does."""
    decoder_attention: bool = False
    """Whether these levels of the decoder attend, too (VA-VAE); else its middle alone (KL16)."""
    resolution: PositiveInt = 256
    """Nominal side of the images; it places attention and nothing else, so other sides work as well."""
    z_channels: PositiveInt
    """Channels of the latent inside the two 1 x 1 convolutions around it."""
    embed_dim: PositiveInt
    """Channels of the latent that is stored: moments have twice as many."""
    in_channels: PositiveInt = 3
    """Channels of the images: 3 for colour, 1 for grey."""

    @property
    def stride(self) -> int:
        """Pixels per latent cell and side."""
        return int(2 ** (len(self.ch_mult) - 1))

    def attends(self, level: int) -> bool:
        """Whether a level attends after each block; level 0 has full resolution."""
        return self.resolution // 2**level in self.attn_resolutions

    @model_validator(mode="after")
    def _sizes_fit(self) -> KlVaeConfig:
        if self.ch % NORM_GROUPS:
            raise ValueError(f"ch = {self.ch} is not a multiple of the {NORM_GROUPS} groups of a norm; use one that is")
        if self.resolution % self.stride:
            raise ValueError(
                f"resolution = {self.resolution} cannot be halved {len(self.ch_mult) - 1} times (ch_mult has "
                f"{len(self.ch_mult)} levels); use a multiple of {self.stride}"
            )
        sides = [self.resolution // 2**level for level in range(len(self.ch_mult))]
        for side in self.attn_resolutions:
            if side not in sides:
                raise ValueError(
                    f"attn_resolutions names {side}, but at resolution {self.resolution} the levels have the sides "
                    f"{', '.join(map(str, sides))}; name some of these"
                )
        return self
