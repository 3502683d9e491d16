"""Keys of `encode` that say where images come from, and of `data` that say how rows reach the training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hpc_gen.config.base import OPERATION, WHEN_SET, NonEmpty, PositiveInt, Section
from hpc_gen.config.errors import KeyProblem

OWN_SOURCES = ("folder", "tar", "edm_zip", "parquet")


class SourceKeys(Section):
    """Of `encode`: the images, how they are decoded and which part of them is kept."""

    source: Literal["mnist", "emoji", "cifar10", "folder", "tar", "edm_zip", "parquet"]
    """Where images come from: a data set that `hpc-gen shards fetch` knows, a folder with one folder per class, tar
    archives, the zip of EDM's dataset tool, or Parquet files with image bytes."""
    source_path: str | None = Field(default=None, json_schema_extra=OPERATION)
    """Folder or file of the images; null = where `hpc-gen shards fetch` puts them. Required for your own images."""
    image_size: PositiveInt
    """Side of the square that is stored or tokenized, in pixels."""
    crop: Literal["adm", "short_bicubic", "short_bilinear", "edm_center", "edm_stretch"] | None = Field(
        default=None, json_schema_extra=WHEN_SET
    )
    """How the square is cut: adm (halve, then bicubic), short_bicubic or short_bilinear (shorter side, then the
    middle), edm_center or edm_stretch (Lanczos); null = adm."""
    crop_size: PositiveInt | None = None
    """Side of the centre crop that is then resized to image_size; null = crop at image_size."""
    short_side: PositiveInt | None = Field(default=None, json_schema_extra=WHEN_SET)
    """crop short_*: what the shorter side is scaled to before the middle is cut; null = the crop's own side."""
    decode: Literal["pillow", "dali", "dali_gpu"] | None = Field(default=None, json_schema_extra=WHEN_SET)
    """Who decodes JPEGs; Pillow crops in any case. dali = DALI on CPU threads, dali_gpu = on the GPU, whose pixels may
    differ by a few levels; null = pillow."""
    row_ids: Literal[True] | None = Field(default=None, json_schema_extra=WHEN_SET)
    """true = a column `row_id`, the number of the image in its source, by which tables of it can be joined."""

    @model_validator(mode="after")
    def _crop_is_not_enlarged(self) -> SourceKeys:
        if self.crop_size is not None and self.crop_size < self.image_size:
            raise KeyProblem(
                "encode.crop_size",
                f"'encode.crop_size' = {self.crop_size} is smaller than 'encode.image_size' = {self.image_size}; "
                "raise it, or leave it out",
            )
        return self

    @model_validator(mode="after")
    def _short_side_has_a_use(self) -> SourceKeys:
        side = self.crop_size or self.image_size
        if self.short_side is None:
            return self
        if self.crop not in ("short_bicubic", "short_bilinear"):
            raise KeyProblem(
                "encode.short_side", "'encode.short_side' needs 'encode.crop' short_bicubic or short_bilinear"
            )
        if self.short_side < side:
            raise KeyProblem(
                "encode.short_side",
                f"'encode.short_side' = {self.short_side} is smaller than the crop of {side}; raise it, or leave it "
                "out",
            )
        return self

    @model_validator(mode="after")
    def _own_images_have_a_path(self) -> SourceKeys:
        if self.source in OWN_SOURCES and self.source_path is None:
            what = {"folder": "the folder of the images"}.get(self.source, "the file of the images or its folder")
            raise KeyProblem("encode.source", f"'encode.source' = '{self.source}' needs 'encode.source_path', {what}")
        return self


class FeedKeys(Section):
    """Of `data`: how rows get from the table to the training; none changes a number."""

    feed: Literal["torch", "dali"] = Field(default="torch", json_schema_extra=OPERATION)
    """Who carries batches to the device: torch, or a DALI pipeline that copies them ahead; the bits are the same."""
    workers: int = Field(default=0, ge=0, json_schema_extra=OPERATION)
    """Processes per rank that read and draw ahead; 0 = a thread, which is faster wherever rows are mapped files."""
    stage_to: NonEmpty | None = Field(default=None, json_schema_extra=OPERATION)
    """Absolute path on a disk of the node (NVMe) to which the table is copied and verified before training; null = read
    it where it is."""
