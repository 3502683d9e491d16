"""The section `evaluate`: which metrics, by which networks, against which real images."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from hpc_gen.config.base import OPERATION, WHEN_SET, FolderName, NonEmpty, PositiveInt, Section, Sha256
from hpc_gen.config.errors import KeyProblem

MetricName = Literal["fid", "kid", "prc", "isc", "sfid", "density_coverage", "clip_fid", "fd_dinov2"]
SECOND_LOOKS = {"clip_fid": "clip", "fd_dinov2": "dinov2"}
"""Metrics that look at the images through a network of their own -> the key that names it."""


class ExtractorConfig(Section):
    """The network whose features the metrics compare."""

    name: str = "inception"
    """inception, inception-trunk (no logits), clip-vit-b-32 ..., dinov2-vit-l-14 ... or random-conv (tests)."""
    weights: str | None = Field(default=None, json_schema_extra=OPERATION)
    """File of the weights; null = where `hpc-gen weights fetch` puts them."""
    sha256: Sha256 | None = None
    """Expected SHA-256 of that file; null = the one pinned for this extractor."""


class SecondExtractorConfig(ExtractorConfig):
    """A network of one metric only, with the statistics that this metric may compare with."""

    statistics: NonEmpty | None = Field(default=None, json_schema_extra=OPERATION)
    """File of statistics of this network's features; null = computed from the reference's images."""


class ReferenceConfig(Section):
    """The real images to compare with: a table or files of images, stored statistics (mean and covariance), or both."""

    table: NonEmpty | None = Field(default=None, json_schema_extra=OPERATION)
    """Folder of a table with pixels, relative to the workspace; null = statistics alone: no kid, no prc."""
    images: NonEmpty | None = Field(default=None, json_schema_extra=OPERATION)
    """In place of a table: a folder of images, or an .npz with arr_0 [N, H, W, 3] as the ADM evaluator has it."""
    rows: PositiveInt | None = None
    """Use the first rows of the table (or images) only; null = all."""
    statistics: NonEmpty | None = Field(default=None, json_schema_extra=OPERATION)
    """File with mu [D] and sigma [D, D] (mu_s, sigma_s for sfid) for the Frechet distance, relative to the workspace;
    null = computed from the images."""
    statistics_sha256: Sha256 | None = None
    """Expected SHA-256 of that file; null = any (what was used stands in the results)."""

    @property
    def has_images(self) -> bool:
        """Whether real images are named, not only statistics of them."""
        return self.table is not None or self.images is not None

    @model_validator(mode="after")
    def _something_to_compare_with(self) -> ReferenceConfig:
        if self.table is not None and self.images is not None:
            raise KeyProblem(
                "evaluate.reference.images", "'evaluate.reference' names both 'table' and 'images'; give one"
            )
        if not self.has_images and self.statistics is None:
            raise KeyProblem(
                "evaluate.reference",
                "'evaluate.reference' names neither 'table' nor 'statistics'; give a table of pixels or an .npz file",
            )
        if not self.has_images and self.rows is not None:
            raise KeyProblem("evaluate.reference.rows", "'evaluate.reference.rows' needs 'evaluate.reference.table'")
        if self.statistics is None and self.statistics_sha256 is not None:
            raise KeyProblem(
                "evaluate.reference.statistics_sha256",
                "'evaluate.reference.statistics_sha256' needs 'evaluate.reference.statistics'",
            )
        return self


class EvaluateConfig(Section):
    """The evaluate stage: features of samples and reference, then the metrics."""

    metrics: Annotated[list[MetricName], Field(min_length=1)] = ["fid", "kid", "prc"]
    """Frechet distance, kernel distance, precision and recall, inception score; spatial Frechet distance, density and
    coverage, Frechet distances of CLIP and of DINOv2 features."""
    extractor: ExtractorConfig = ExtractorConfig()
    clip: SecondExtractorConfig | None = Field(default=None, json_schema_extra=WHEN_SET)
    """The network of clip_fid; required with that metric."""
    dinov2: SecondExtractorConfig | None = Field(default=None, json_schema_extra=WHEN_SET)
    """The network of fd_dinov2; required with that metric."""
    reference: ReferenceConfig
    batch: PositiveInt = 32
    """Images per forward pass of the extractor; changes last bits, so it belongs to the identity."""
    block_images: PositiveInt = 256
    """Images of one block of features, the unit of this stage."""
    kid_subset_size: Annotated[int, Field(ge=2)] = 1000
    """Images of one random subset of the kernel distance."""
    isc_split_images: Annotated[int, Field(ge=2)] | None = Field(default=None, json_schema_extra=WHEN_SET)
    """Inception score over runs of so many images in their order (ADM's evaluator: 5000); null = over ten splits of
    the shuffled images, as torch-fidelity does."""
    tag: FolderName = "main"
    """Which set of samples; also the name of the result, metrics/TAG.json."""
    threads: PositiveInt = 1
    """CPU threads per task; belongs to the identity."""
    tasks: PositiveInt = Field(default=1, json_schema_extra=OPERATION)
    """Processes that share the units."""

    @field_validator("metrics")
    @classmethod
    def _each_once(cls, metrics: list[str]) -> list[str]:
        twice = sorted({name for name in metrics if metrics.count(name) > 1})
        if twice:
            raise KeyProblem("evaluate.metrics", f"'evaluate.metrics' names {', '.join(twice)} twice; name each once")
        return metrics

    @model_validator(mode="after")
    def _own_networks_are_named(self) -> EvaluateConfig:
        for metric, key in SECOND_LOOKS.items():
            if metric in self.metrics and getattr(self, key) is None:
                raise KeyProblem(
                    "evaluate.metrics",
                    f"metric '{metric}' needs 'evaluate.{key}': name and weights of its network",
                )
        return self

    @model_validator(mode="after")
    def _subset_fits_the_reference(self) -> EvaluateConfig:
        rows = self.reference.rows
        if "kid" in self.metrics and rows is not None and self.kid_subset_size > rows:
            raise KeyProblem(
                "evaluate.kid_subset_size",
                f"'evaluate.kid_subset_size' = {self.kid_subset_size} exceeds 'evaluate.reference.rows' = {rows}; "
                "lower the first",
            )
        return self
