"""Typed sections of the gmem method: `method:` (GmemConfig) and `sample.settings` (SamplingSettings)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool, model_validator

from hpc_gen.config.base import WHEN_SET, PositiveInt, Section
from hpc_gen.config.errors import KeyProblem

Dropout = Annotated[float, Field(ge=0.0, lt=1.0)]


class GmemConfig(Section):
    """The network, its condition and its losses (specs/gmem.md sections 3 and 4)."""

    condition: Literal["snippet", "class"] = "snippet"
    """snippet: GMem, one vector of the memory bank per image; class: LightningDiT, a label."""
    input: Literal["latents", "moments"] = "latents"
    """Table column to learn: latents = sampled once when they were encoded; moments = mean and log variance, sampled
    anew at each read. Both are scaled as the table's tokenizer says."""
    image_size: PositiveInt
    """Side of the images, in pixels."""
    tokenizer_stride: PositiveInt = 16
    """Pixels per latent cell and side."""
    channels: PositiveInt = 32
    """Channels of the latents (VA-VAE f16d32: 32)."""
    patch_size: PositiveInt = 1
    """Side of the square patch that becomes one token, in latent cells."""
    hidden: PositiveInt
    """Width of the tokens."""
    depth: PositiveInt
    """Transformer blocks."""
    heads: PositiveInt
    """Attention heads per block; the width of a head is a multiple of 4 with `rope`."""
    mlp_ratio: Annotated[float, Field(gt=0.0)] = 4.0
    """Width of the feed-forward layer over `hidden`; a gated one has two thirds of it."""
    qk_norm: bool = False
    """Norm of queries and keys: cures the NaNs of long bf16 trainings, costs FID at equal steps."""
    swiglu: bool = True
    """Gated feed-forward; false = tanh-GELU."""
    rope: bool = True
    """Rotary positions on queries and keys, besides the fixed ones on the tokens."""
    rms_norm: bool = True
    """RMS norm with a learned weight; false = layer norm without one."""
    shift: bool = True
    """Modulations shift as well as scale and gate; false = the reference's wo_shift."""
    learn_sigma: bool = False
    """Twice the output channels, of which the first half is used (checkpoints that have them)."""
    snippet_dim: PositiveInt = 768
    """Length of a snippet."""
    snippet_dropout: Dropout = 0.4
    """Share of a snippet's elements that are set to zero in training; the others are scaled up."""
    num_classes: PositiveInt | None = None
    """class: number of classes; null = those of the training table. Index num_classes itself is the null class."""
    label_dropout: Dropout = 0.1
    """class: share of training samples whose label is replaced by the null class."""
    projection_weight: Annotated[float, Field(ge=0.0)] = 0.5
    """Weight of the representation loss; 0 = off: no column of representations is read."""
    projector_hidden: PositiveInt = 2048
    """Width inside the projector."""
    repr_dim: PositiveInt = 768
    """Length of a representation (DINOv2 ViT-B: 768)."""
    repr_tokens: PositiveInt | None = None
    """Tokens of a representation; null = those of the network, which they must match."""
    representations: Literal["stored", "online"] | None = Field(default=None, json_schema_extra=WHEN_SET)
    """stored: read from the column `representations`; online: computed in training from the column `pixels` by the
    frozen network `train.frozen.representations`; null = stored."""
    repr_after_block: PositiveInt = 4
    """The projector reads the tokens after this block (1-based)."""
    cosine_loss: bool = True
    """Add 1 - cosine of predicted and true velocity over the channels."""
    lognormal_times: bool = True
    """Times of training are sigmoids of normal draws; false = uniform."""
    horizontal_flip: bool = True
    """Half of the images mirrored: their columns with _flip are read; one coin for all columns of a row."""
    independent_flips: bool = False
    """A coin of its own for each column, as the reference does by mistake: a mirrored latent may meet the snippet of
    the image that is not (specs/gmem.md section 8)."""
    checkpoint_blocks: bool = False
    """Recompute each transformer block in the backward pass instead of keeping its activations."""

    @property
    def input_size(self) -> int:
        """Side of the latents in cells."""
        return self.image_size // self.tokenizer_stride

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape [C, S, S] of one sample."""
        return self.channels, self.input_size, self.input_size

    @property
    def row_shape(self) -> tuple[int, int, int]:
        """Shape of one row of the input's column: moments hold twice the channels."""
        channels, side, _ = self.input_shape
        return (2 * channels if self.input == "moments" else channels), side, side

    @property
    def num_tokens(self) -> int:
        """Tokens of one image."""
        return (self.input_size // self.patch_size) ** 2

    @property
    def projects(self) -> bool:
        """Whether training needs representations."""
        return self.condition == "snippet" and self.projection_weight > 0

    @property
    def online(self) -> bool:
        """Whether they are computed in training."""
        return self.representations == "online"

    @model_validator(mode="after")
    def _sizes_fit(self) -> GmemConfig:
        if self.image_size % (self.tokenizer_stride * self.patch_size):
            raise KeyProblem(
                "method.image_size",
                f"'method.image_size' = {self.image_size} is not a multiple of 'method.tokenizer_stride' * "
                f"'method.patch_size' = {self.tokenizer_stride * self.patch_size}",
            )
        if self.hidden % self.heads or self.hidden % 4:
            raise KeyProblem(
                "method.hidden",
                f"'method.hidden' = {self.hidden} must be a multiple of 4 and of 'method.heads' = {self.heads}",
            )
        if self.rope and (self.hidden // self.heads) % 4:
            raise KeyProblem(
                "method.heads",
                f"heads of width {self.hidden // self.heads} cannot be rotated by row and column in pairs; choose "
                "'method.heads' so that hidden / heads is a multiple of 4, or set 'method.rope' to false",
            )
        if self.condition == "snippet" and self.repr_after_block > self.depth:
            raise KeyProblem(
                "method.repr_after_block",
                f"'method.repr_after_block' = {self.repr_after_block}, but the network has {self.depth} blocks",
            )
        if self.projects and self.repr_tokens not in (None, self.num_tokens):
            raise KeyProblem(
                "method.repr_tokens",
                f"'method.repr_tokens' = {self.repr_tokens}, but the network has {self.num_tokens} tokens per image; "
                "encode representations on the same grid",
            )
        if self.online and not self.projects:
            raise KeyProblem(
                "method.representations",
                "'method.representations' = 'online', but no loss asks for them; remove it, or set "
                "'method.projection_weight' above 0 and 'method.condition' to snippet",
            )
        if self.independent_flips and not self.horizontal_flip:
            raise KeyProblem(
                "method.independent_flips", "'method.independent_flips' needs 'method.horizontal_flip' = true"
            )
        return self


class GuidanceInterval(Section):
    """Where guidance acts: v_null + scale (v - v_null) from time `start` to `end`; before it v, after it v_null."""

    scale: Annotated[float, Field(ge=1.0)] = 1.0
    """1 = off: one network evaluation per step instead of two."""
    start: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Time from which on guidance acts (t = 0 is noise)."""
    end: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """Time after which the null condition alone is used; null = to the end."""


class SamplingSettings(Section):
    """The solver from noise at t = 0 to data at t = 1 (specs/gmem.md section 5)."""

    mode: Literal["sde", "ode"] = "sde"
    """sde: noise at every step; ode: the probability flow."""
    method: Literal["euler", "heun", "dopri5"] = "heun"
    """Solver; dopri5 (ode only) chooses its own steps, for all images of a batch together."""
    points: Annotated[int, Field(ge=2, strict=True)] = 50
    """Points of the time grid, one more than steps."""
    shift: Annotated[float, Field(ge=0.0)] = 0.0
    """ode: t becomes s t / (1 + (s - 1) t), below 1 with more points near the noise; 0 = off."""
    form: Literal["linear", "sigma", "decreasing", "increasing-decreasing"] = "linear"
    """sde: diffusion over time."""
    norm: Annotated[float, Field(ge=0.0)] = 1.0
    """sde: factor of the diffusion."""
    last_step: Literal["mean", "euler", "tweedie", "none"] = "mean"
    """sde: how the last stretch to t = 1 is made, without noise."""
    last_step_size: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.004
    """sde: length of that stretch."""
    atol: Annotated[float, Field(gt=0.0)] = 1e-6
    """dopri5: absolute tolerance."""
    rtol: Annotated[float, Field(gt=0.0)] = 1e-3
    """dopri5: relative tolerance."""
    guidance: GuidanceInterval = GuidanceInterval()
    normalise_snippets: StrictBool = True
    """Scale snippets to length 1, as in training."""

    @model_validator(mode="after")
    def _solver_exists(self) -> SamplingSettings:
        if self.mode == "sde" and self.method == "dopri5":
            raise KeyProblem(
                "sample.settings.method", "'sample.settings.method' = 'dopri5' solves the ode only; use heun or euler"
            )
        if self.mode == "sde" and self.method == "heun" and (self.last_step == "none" or not self.last_step_size):
            raise KeyProblem(
                "sample.settings.last_step",
                "Heun's step looks at its own end, where the score is infinite at t = 1; give "
                "'sample.settings.last_step' and a 'last_step_size' above 0, or use method=euler",
            )
        if self.mode == "sde" and self.shift:
            raise KeyProblem(
                "sample.settings.shift",
                "'sample.settings.shift' changes the grid of the ode only; set it to 0, or mode to 'ode'",
            )
        return self
