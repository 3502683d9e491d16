"""Typed sections of the energy method: `method:` (EnergyConfig) and `sample.settings` (SamplingSettings)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool, model_validator

from hpc_gen.config.base import WHEN_SET, PositiveInt, Section
from hpc_gen.config.errors import KeyProblem


class EnergyHeadConfig(Section):
    """What the energy variant adds: head, inner loop and its losses (specs/energy.md sections 3.1, 5.1 and 5.2)."""

    grad_multiplier: Annotated[float, Field(gt=0.0)] = 1.0
    """Noise prediction = grad_multiplier * dE/dx. At initialisation dE/dx is about 5000 times too small, so values of
    some hundreds train much faster; 1 is the reference."""
    linear_then_mean: bool = False
    """True: head on every token, then the mean; false: mean of the tokens, then the head."""
    step_size: Annotated[float, Field(gt=0.0)] = 0.01
    """Step size of the inner loop; part of the weights as `alpha`."""
    learnable_step_size: bool = False
    """Train the step size with the refinement loss."""
    step_size_lr_scale: Annotated[float, Field(gt=0.0)] = 1.0
    """Learning rate of the step size over that of the weights (the reference has the option, but it has no effect)."""
    refinement_weight: Annotated[float, Field(ge=0.0)] = 0.1
    """Weight of the refinement loss; used with a learnable step size only."""
    refinement: Literal["per_sample", "reference"] = "per_sample"
    """per_sample: mean over samples, erratic paths cost; reference: summed over `step_group`, erratic paths pay."""
    refinement_test: bool | None = Field(default=None, json_schema_extra=WHEN_SET)
    """True: the walk of the refinement loss refuses steps uphill, as the reference's does where it samples without the
    inner loop; else it takes every step."""
    contrastive_weight: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the contrastive loss on the energy landscape; 0 = off, the reference's value is 0.05."""
    contrastive_step_size: Annotated[float, Field(gt=0.0)] | None = None
    """Step size of the negatives' chain; null = the model's own (the reference uses 0.01 whatever is configured)."""
    always_accept: bool = False
    """Skip the acceptance test in the negatives' chain."""
    inner_clamp: Literal["off", "signal"] = "off"
    """Bound of the inner loop's samples: signal = 2 sqrt(alpha_bar) as in the reference, which destroys samples at
    high noise; off = none."""
    step_group: PositiveInt = 1
    """Consecutive samples whose mean timestep sets their number of inner steps; above 1, train.coupling_group must be
    a multiple. 1 = each by its own; the reference takes the whole batch of a rank."""
    second_order: Literal["double_backward", "forward_over_reverse"] = "double_backward"
    """How the squared error reaches the weights: differentiate the backward pass, or differentiate a directional
    derivative block by block with checkpoints (a quarter to a half of the memory, about twice the time)."""

    @model_validator(mode="after")
    def _step_size_is_trained(self) -> EnergyHeadConfig:
        if self.learnable_step_size and self.refinement_weight == 0:
            raise KeyProblem(
                "method.energy.refinement_weight",
                "'method.energy.learnable_step_size' is true, but with 'method.energy.refinement_weight' = 0 nothing "
                "trains it; raise the weight, or fix the step size",
            )
        return self


class EnergyConfig(Section):
    """The network, its diffusion process and its training inputs (specs/energy.md sections 3 and 4)."""

    variant: Literal["standard", "energy"] = "standard"
    """What the network returns: standard = the noise itself, energy = a scalar whose gradient is the noise."""
    energy: EnergyHeadConfig = EnergyHeadConfig()
    """The energy variant's head, inner loop and losses; not used by the standard variant."""
    input: Literal["pixels", "latents", "moments"] = "latents"
    """Table column to learn: pixels = uint8 images scaled to [-1, 1]; latents = floats as they are; moments = mean
    and log variance of a KL tokenizer, sampled anew at each read and scaled as the table's tokenizer says."""
    image_size: PositiveInt
    """Side of the images, in pixels."""
    tokenizer_stride: PositiveInt = 16
    """Pixels per latent cell and side; not used with pixels."""
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
    """Mirror half of the training images, chosen by a draw: pixels, or moments (of the mirrored image, from the
    column moments_flip)."""
    checkpoint_blocks: bool = False
    """Recompute each transformer block in the backward pass instead of keeping its activations."""

    @property
    def column(self) -> str:
        """The table column that training reads: `pixels`, `latents` or `moments`."""
        return self.input

    @property
    def row_shape(self) -> tuple[int, int, int]:
        """Shape of one row of that column: moments hold twice the channels."""
        channels, side, _ = self.input_shape
        return (2 * channels if self.input == "moments" else channels), side, side

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
        if self.input != "pixels" and self.image_size % self.tokenizer_stride:
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
                "'method.horizontal_flip' works on pixels and moments only: a mirrored latent is not the latent "
                "of a mirrored image; set it to false",
            )
        return self


class SamplingSettings(Section):
    """The respaced ancestral sampler and the energy variant's inner loop (specs/energy.md sections 5.2 and 6)."""

    steps: Annotated[int, Field(ge=1, strict=True)] | str = 250
    """Network evaluations: a count, counts per section as '10,15,20', or 'ddimN'."""
    guidance: Annotated[float, Field(ge=0.0)] = 1.0
    """Classifier-free guidance w in eps = null + w (class - null); 1.0 = off (half the cost)."""
    clip_denoised: StrictBool | Annotated[float, Field(gt=0.0)] | None = None
    """Limit of the predicted clean sample at each step: true = 1.0 (the reference), false = none, or a number;
    null = 1.0 for pixels and none for latents, which reach about +-4."""

    inner_loop: StrictBool = False
    """Descend on the energy after every step (energy variant only); about eight times the cost."""
    inner_t: Literal["mapped", "index", "reached"] = "mapped"
    """Timestep of the inner loop after the step at index i: mapped = that of index i in the full chain; index = i
    itself (the reference, half the true noise at 250 of 500 steps); reached = the level the step led to."""
    inner_steps: PositiveInt | None = None
    """Inner steps after every step; null = 5 to 10, growing with the noise (the reference)."""
    inner_step_size: Annotated[float, Field(gt=0.0)] | None = None
    """Step size; null = that of the checkpoint, `alpha`."""
    inner_clamp: Literal["off", "signal"] = "off"
    """Bound of the inner loop's samples: signal = 2 sqrt(alpha_bar), the reference; off = none."""
    always_accept: StrictBool = False
    """Take every inner step, even uphill."""

    def clip_limit(self, kind: str) -> float | None:
        """The limit as a number, or None for no clipping; `kind` is EnergyConfig.input."""
        if self.clip_denoised is None:
            return 1.0 if kind == "pixels" else None
        if isinstance(self.clip_denoised, bool):
            return 1.0 if self.clip_denoised else None
        return self.clip_denoised
