"""Typed sections of the autoencoder method: `method:` (AutoencoderConfig) and `sample.settings`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hpc_gen.config.base import PositiveInt, Section
from hpc_gen.config.errors import KeyProblem
from hpc_gen.config.kl_vae import KlVaeConfig


class AutoencoderConfig(Section):
    """The network and its loss: reconstruction plus a small pull of the latents towards a standard normal."""

    architecture: KlVaeConfig
    """Sizes of the network, in the keys of the tokenizer `kl_vae`."""
    image_size: PositiveInt
    """Side of the training images, in pixels; a multiple of the network's stride."""
    reconstruction: Literal["l1", "l2"] = "l1"
    """Error of an image value, in [-1, 1]: its absolute value (sharper), or its square."""
    kl_weight: Annotated[float, Field(ge=0.0)] = 1e-6
    """Weight of the posterior's KL divergence, in nats per image, against the reconstruction error summed over an image
    (as in LDM); the larger, the smoother and the less exact the latents."""
    horizontal_flip: bool = False
    """Mirror half of the training images, chosen by a draw."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape [C, H, W] of one image."""
        return self.architecture.in_channels, self.image_size, self.image_size

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape [Z, h, w] of one latent."""
        side = self.image_size // self.architecture.stride
        return self.architecture.embed_dim, side, side

    @model_validator(mode="after")
    def _sizes_fit(self) -> AutoencoderConfig:
        if self.image_size % self.architecture.stride:
            raise KeyProblem(
                "method.image_size",
                f"'method.image_size' = {self.image_size} is not a multiple of {self.architecture.stride}, the stride "
                "that 'method.architecture.ch_mult' gives; change one of them",
            )
        if self.architecture.in_channels not in (1, 3):
            raise KeyProblem(
                "method.architecture.in_channels",
                f"'method.architecture.in_channels' = {self.architecture.in_channels}, but pixels have 1 or 3",
            )
        return self


class ReconstructionSettings(Section):
    """How images are reconstructed from their own latents."""

    posterior: Literal["mean", "sample"] = "mean"
    """Decode the mean of the posterior, or one draw from it (what a diffusion model is trained on)."""
    beside_original: bool = False
    """Put the original to the left of its reconstruction in one image of twice the width; for previews, not metrics."""
