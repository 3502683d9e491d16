"""Typed sections of the energy method: `method:` (EnergyConfig) and `sample.settings` (SamplingSettings)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool, model_validator

from hpc_gen.config.base import PositiveInt, Section
from hpc_gen.config.errors import KeyProblem


class EnergyConfig(Section):
    """The network, its diffusion process and its training inputs (specs/energy.md sections 3 and 4)."""

    variant: Literal["standard"] = "standard"
    """What the network returns: standard = the noise itself."""
    input: Literal["pixels", "latents"] = "latents"
    """Table column to learn: pixels = uint8 images scaled to [-1, 1], latents = floats as a tokenizer stored them."""
    image_size: PositiveInt
    """Side of the images, in pixels."""
    tokenizer_stride: PositiveInt = 16
    """Pixels per latent cell and side; used with latents only."""
    channels: PositiveInt
    """Channels of the input: 1 or 3 for pixels, those of the tokenizer for latents (KL16: 16)."""
    patch_size: PositiveInt = 1
    """Side of the square patch that becomes one token, in input cells."""
    hidden: PositiveInt
    """Width of the tokens; a multiple of 4 (two axes of sine and cosine positions) and of heads."""
    depth: PositiveInt
    """Transformer blocks."""
    heads: PositiveInt
    """Attention heads per block."""
    mlp_ratio: Annotated[float, Field(gt=0.0)] = 4.0
    """Width of the feed-forward layer over `hidden`."""
    num_classes: PositiveInt | None = None
    """Classes; null = those of the training table. Index num_classes itself is the null class."""
    label_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Share of training samples whose label is replaced by the null class."""
    diffusion_timesteps: Annotated[int, Field(ge=21)] = 1000
    """Timesteps T of the training chain (linear betas scaled by 1000 / T)."""
    horizontal_flip: bool = False
    """Mirror half of the training images, chosen by a draw; pixels only."""

    @property
    def column(self) -> str:
        """The table column that training reads: `pixels` or `latents`."""
        return self.input

    @property
    def input_size(self) -> int:
        """Side of the network's input in cells: pixels, or latent cells."""
        return self.image_size if self.input == "pixels" else self.image_size // self.tokenizer_stride

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape [C, S, S] of one sample."""
        return self.channels, self.input_size, self.input_size

    @model_validator(mode="after")
    def _sizes_fit(self) -> EnergyConfig:
        if self.input == "pixels" and self.channels not in (1, 3):
            raise KeyProblem("method.channels", f"'method.channels' = {self.channels}, but pixels have 1 or 3")
        if self.input == "latents" and self.image_size % self.tokenizer_stride:
            raise KeyProblem(
                "method.image_size",
                f"'method.image_size' = {self.image_size} is not a multiple of 'method.tokenizer_stride' = "
                f"{self.tokenizer_stride}",
            )
        if self.input_size % self.patch_size:
            raise KeyProblem(
                "method.patch_size",
                f"'method.patch_size' = {self.patch_size} does not divide the input's side of {self.input_size}; "
                "choose a divisor",
            )
        if self.hidden % self.heads or self.hidden % 4:
            raise KeyProblem(
                "method.hidden",
                f"'method.hidden' = {self.hidden} must be a multiple of 4 and of 'method.heads' = {self.heads}",
            )
        if self.horizontal_flip and self.input == "latents":
            raise KeyProblem(
                "method.horizontal_flip",
                "'method.horizontal_flip' works on pixels only, because a mirrored latent is not the latent of a "
                "mirrored image; set it to false",
            )
        return self


class SamplingSettings(Section):
    """The respaced ancestral sampler (specs/energy.md section 6)."""

    steps: Annotated[int, Field(ge=1, strict=True)] | str = 250
    """Network evaluations: a count, counts per section as '10,15,20', or 'ddimN'."""
    guidance: Annotated[float, Field(ge=0.0)] = 1.0
    """Classifier-free guidance w in eps = null + w (class - null); 1.0 = off (half the cost)."""
    clip_denoised: StrictBool | Annotated[float, Field(gt=0.0)] | None = None
    """Limit of the predicted clean sample at each step: true = 1.0 (the reference), false = none, or a number;
    null = 1.0 for pixels and none for latents, which reach about +-4."""

    def clip_limit(self, kind: str) -> float | None:
        """The limit as a number, or None for no clipping; `kind` is EnergyConfig.input."""
        if self.clip_denoised is None:
            return 1.0 if kind == "pixels" else None
        if isinstance(self.clip_denoised, bool):
            return 1.0 if self.clip_denoised else None
        return self.clip_denoised
