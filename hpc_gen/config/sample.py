"""The section `sample`: which images are drawn, of which classes, and in which form they are kept."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hpc_gen.config.base import OPERATION, WHEN_SET, FolderName, KeyName, NonEmpty, PositiveInt, Section
from hpc_gen.config.errors import KeyProblem

Seed = Annotated[int, Field(ge=0, lt=2**63)]


class SampleConfig(Section):
    """The sample stage: images 0 .. num_images - 1, each defined by its id, the seed and the settings."""

    num_images: PositiveInt
    """Images to draw."""
    block_images: PositiveInt = 64
    """Images of one block, the unit of this stage; a block is always computed whole."""
    batch: PositiveInt = 64
    """Images per batch inside a block; changes last bits, so it belongs to the identity."""
    ema: KeyName | None = "main"
    """Which average of the weights to use; null = the weights themselves."""
    checkpoint: Annotated[int, Field(ge=0)] | Literal["latest"] = "latest"
    """Which checkpoint, in images seen, or 'latest'."""
    classes: Literal["balanced", "sorted", "uniform", "file"] = "balanced"
    """Class of image i: balanced = i modulo classes, sorted = equal runs in order, uniform = drawn, file = listed."""
    class_file: NonEmpty | None = Field(default=None, json_schema_extra=OPERATION)
    """For classes 'file': a class number per line (or .npy, or .npz with arr_1), relative to the workspace; its content
    is part of the plan."""
    conditions: NonEmpty | None = Field(default=None, json_schema_extra=OPERATION)
    """Folder of the table whose rows images are conditioned on (a memory bank), relative to the workspace; its identity
    is part of the plan. null = data.table."""
    rows: Literal["in_order", "uniform"] | None = Field(default=None, json_schema_extra=WHEN_SET)
    """Row of image i: in_order = i modulo rows, uniform = drawn at random with replacement; null = in_order."""
    seed: Seed = 0
    """Seed of the samples, apart from that of training."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Sampler settings, typed by the method."""
    output: Literal["png", "npz", "features"] = Field(default="png", json_schema_extra=OPERATION)
    """png = a folder of images per block; npz = that, and samples/TAG/samples.npz (arr_0, arr_1) for the ADM evaluator;
    features = what section 'evaluate' compares is computed at once, and no image is kept."""
    tag: FolderName = "main"
    """Name of this set of samples in the run folder."""
    threads: PositiveInt = 1
    """CPU threads per task; belongs to the identity."""
    tasks: PositiveInt = Field(default=1, json_schema_extra=OPERATION)
    """Processes that share the units."""

    @model_validator(mode="after")
    def _batch_fits_the_block(self) -> SampleConfig:
        if self.batch > self.block_images:
            raise KeyProblem(
                "sample.batch",
                f"'sample.batch' = {self.batch} is larger than 'sample.block_images' = {self.block_images}; "
                "a batch lies inside one block",
            )
        return self

    @model_validator(mode="after")
    def _file_has_a_path(self) -> SampleConfig:
        if (self.classes == "file") != (self.class_file is not None):
            raise KeyProblem(
                "sample.class_file" if self.class_file is not None else "sample.classes",
                "'sample.classes' = 'file' and 'sample.class_file' belong together; give both or neither",
            )
        return self
