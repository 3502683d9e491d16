"""The DINOv2 vision transformer and what is stored of it, as `encode.tokenizer.dinov2` spells it.

Facts: specs/gmem.md section 3.3, specs/digit.md section 3. Free of torch, as config is.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hpc_gen.config.base import OPERATION, WHEN_SET, NonEmpty, PositiveInt, Section, Sha256

PATCH = 14
"""Pixels per token and side, of every published DINOv2."""

Dinov2Column = Literal["cls_tokens", "representations", "features", "codes"]


class Dinov2Architecture(Section):
    """Sizes of the transformer; every published DINOv2 differs in these keys only."""

    width: PositiveInt
    """Channels of a token."""
    depth: PositiveInt
    """Blocks."""
    heads: PositiveInt
    """Heads of attention; they divide the width."""
    registers: Annotated[int, Field(ge=0)] = 0
    """Register tokens: 0, or 4 in the variants that have them."""
    swiglu: bool = False
    """Gated feed-forward (ViT-g) in place of the plain one with an exact GELU."""
    position_grid: PositiveInt = 37
    """Side of the position table in tokens: 37, for images of 518 pixels."""

    @property
    def hidden(self) -> int:
        """Width inside the feed-forward: 4 times the width, of a gated one two thirds of that, a multiple of 8."""
        hidden = 4 * self.width
        return (hidden * 2 // 3 + 7) // 8 * 8 if self.swiglu else hidden

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> Dinov2Architecture:
        if self.width % self.heads:
            raise ValueError(f"heads = {self.heads} does not divide width = {self.width}; use a number that does")
        return self


class Dinov2Config(Section):
    """What the tokenizer `dinov2` stores, and by which rule it sees the image."""

    architecture: Dinov2Architecture | None = None
    """Sizes of the network; null = those of the preset, or what the file says of itself."""
    columns: Annotated[list[Dinov2Column], Field(min_length=1)] = ["cls_tokens", "representations"]
    """cls_tokens (GMem's snippets) [width] and representations [tokens, width]: class and patch tokens of the last
    block; features [tokens, width]: patch tokens of an inner block (DiGIT); codes [tokens]: their nearest centroids."""
    flip: bool = True
    """Store each column of the mirror image, too, under its name with _flip: one coin then flips all of a row."""
    grid: PositiveInt = 16
    """Tokens per side: the image is scaled to 14 times that (bicubic, no antialias)."""
    any_size: bool | None = Field(default=None, json_schema_extra=WHEN_SET)
    """True: images of any side are scaled to the grid; else only sides that the published programs use."""
    positions: Literal["gmem", "digit", "hub"] = "gmem"
    """How the position table is brought to the grid: gmem = to 16 with antialias, then enlarged as DINO did; digit =
    DINO's rule (offset 0.1, no antialias) at once; hub = with antialias at once."""
    layer_from_end: PositiveInt = 3
    """features, codes: which block, counted from the end: 3 of 12 blocks = after the tenth."""
    centroids: NonEmpty | None = Field(default=None, json_schema_extra=OPERATION)
    """codes: file .npy of the centroids, float32 [codes, width], relative to the workspace."""
    centroids_sha256: Sha256 | None = None
    """codes: SHA-256 that this file must have; null = any (tables know the centroids by their content)."""
    precision: Literal["float16", "bfloat16", "float32"] = "float16"
    """representations, features: how they are stored; cls_tokens are always float32."""
    compute: Literal["bfloat16"] | None = Field(default=None, json_schema_extra=WHEN_SET)
    """Number format of the network's matrix products; null = float32, as the references."""

    @model_validator(mode="after")
    def _columns_fit(self) -> Dinov2Config:
        if len(set(self.columns)) < len(self.columns):
            raise ValueError(f"columns = {', '.join(self.columns)} names one twice; name each once")
        if "codes" in self.columns and self.centroids is None:
            raise ValueError("columns names 'codes', which need 'centroids', the file of the centroids")
        if "codes" not in self.columns and self.centroids is not None:
            raise ValueError("'centroids' is given, but columns does not name 'codes'; name them, or remove it")
        return self
