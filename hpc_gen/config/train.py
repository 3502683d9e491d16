"""The `train` section. The clock is images: every interval is in images and a whole number of global batches."""

from __future__ import annotations

import warnings
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hpc_gen.config.base import OPERATION, WHEN_SET, KeyName, PositiveInt, Section
from hpc_gen.config.daily import InitFromConfig
from hpc_gen.config.engine import EngineConfig
from hpc_gen.config.errors import KeyProblem
from hpc_gen.config.observe import ProfileConfig
from hpc_gen.config.tokenizer import TokenizerConfig
from hpc_gen.config.width import check_widths

# `validate` is the right word for the key; pydantic's deprecated class method of that name is never called here.
warnings.filterwarnings("ignore", message='Field name "validate" in "TrainConfig"')

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]

WITH_AVERAGE = ("validate", "preview", "evaluate")
"""Sections of training that look at an average of the weights."""


class OptimizerConfig(Section):
    """AdamW with decoupled weight decay; exactly one of `lr` and `blr` is given."""

    lr: Annotated[float, Field(gt=0.0)] | None = None
    """Learning rate per optimizer step; null = derived from `blr`."""
    blr: Annotated[float, Field(gt=0.0)] | None = None
    """Learning rate at a global batch of 256 images: lr = blr * global_batch / 256."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay rates of the first and second moments."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.02
    """Decoupled weight decay of the groups to which the method applies it."""
    clip: Annotated[float, Field(gt=0.0)] | None = 3.0
    """Largest norm of the gradient over all parameters; null = no clipping."""

    @model_validator(mode="after")
    def _one_rate(self) -> OptimizerConfig:
        if (self.lr is None) == (self.blr is None):
            given = "neither is" if self.lr is None else "both are"
            raise KeyProblem(
                "train.optimizer.lr",
                f"exactly one of 'train.optimizer.lr' and 'train.optimizer.blr' must be given, but {given}",
            )
        return self


class ScheduleConfig(Section):
    """Learning rate over images seen."""

    kind: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or half a cosine down to `min_lr` at `total_images`."""
    warmup_images: Annotated[int, Field(ge=0)] = 0
    """Linear warm-up from zero, in images."""
    min_lr: Annotated[float, Field(ge=0.0)] = 0.0
    """Learning rate at the end of the cosine."""


class EmaConfig(Section):
    """One exponential moving average of the weights."""

    decay: Fraction
    """Share of the average that is kept at each optimizer step."""


class ValidateConfig(Section):
    """The training loss on held-out rows, with the same draws at every validation."""

    every_images: PositiveInt
    """Interval, in images; a multiple of the global batch."""
    num_images: PositiveInt
    """Rows of the validation table that are used, from its start."""
    ema: KeyName | None = None
    """Which average of the weights; null = the weights themselves; absent = the first of `train.ema`."""
    seed_purpose: KeyName = "validate"
    """Name of the random stream of validation, apart from those of training."""


class PreviewConfig(Section):
    """A few samples drawn during training, one per label or row, with the same noise each time."""

    every_images: PositiveInt | None = None
    """Interval, in images; a multiple of the global batch; null = only `at_images`."""
    at_images: list[PositiveInt] = Field(default_factory=list)
    """Further places, in images; multiples of the global batch."""
    labels: Annotated[list[int | str], Field(min_length=1)] | None = None
    """Class of each image, by number or by name; null = `rows` are given."""
    rows: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = Field(
        default=None, json_schema_extra=WHEN_SET
    )
    """Row of each image in the table that images are conditioned on: that of `sample.conditions` (a memory bank), else
    the training table; null = `labels` are given."""
    batch: PositiveInt | None = None
    """Images per batch, with which the pictures are the same bits on any number of ranks; null = each rank's share."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Seed of the pictures; null = that of the experiment."""
    ema: KeyName | None = None
    """Which average of the weights; null = the weights themselves; absent = the first of `train.ema`."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Sampler settings, typed by the method."""

    @model_validator(mode="after")
    def _labels_or_rows(self) -> PreviewConfig:
        if (self.labels is None) == (self.rows is None):
            given = "neither is" if self.labels is None else "both are"
            raise KeyProblem(
                "train.preview.labels" if self.labels is not None else "train.preview",
                f"exactly one of 'train.preview.labels' and 'train.preview.rows' must be given, but {given}",
            )
        return self


class OnlineEvaluationConfig(Section):
    """Metrics during training, by all ranks; metrics, extractor and reference are those of the `evaluate` section."""

    every_images: PositiveInt | None = None
    """Interval, in images; a multiple of the global batch; null = only `at_end`."""
    at_end: bool = True
    """Evaluate the final weights too, at `total_images`."""
    num_images: PositiveInt
    """Images to draw."""
    batch: PositiveInt = 64
    """Images per batch of one rank; changes last bits, so it belongs to the identity."""
    classes: Literal["balanced", "sorted", "uniform"] = "balanced"
    """Class of image i: balanced = i modulo classes, sorted = equal runs in order, uniform = drawn at random."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the samples: image i is that of the sample stage with this seed and these weights, last bits apart."""
    ema: KeyName | None = None
    """Which average of the weights; null = the weights themselves; absent = the first of `train.ema`."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Sampler settings, typed by the method."""
    budget_s: Annotated[float, Field(gt=0)] | None = Field(default=None, json_schema_extra=OPERATION)
    """Seconds after which an evaluation is given up, told, and training goes on; null = it takes what it takes."""

    @model_validator(mode="after")
    def _happens(self) -> OnlineEvaluationConfig:
        if self.every_images is None and not self.at_end:
            raise KeyProblem(
                "train.evaluate.every_images",
                "'train.evaluate' never happens: give 'train.evaluate.every_images', or leave 'at_end' true",
            )
        return self


class NonFiniteConfig(Section):
    """What happens when a loss or gradient is NaN or infinite: the step is skipped and counted."""

    max_consecutive: PositiveInt = 8
    """Skipped steps in a row after which training goes back to the newest checkpoint."""
    max_rollbacks: Annotated[int, Field(ge=0)] = 2
    """Times that training goes back before it ends as diverged (exit code 75)."""
    spike_factor: Annotated[float, Field(gt=1.0)] | None = Field(default=None, json_schema_extra=WHEN_SET)
    """A loss above this factor times the median of the last 100 steps counts as not finite; null = no limit."""


class TrainConfig(Section):
    """The training stage."""

    total_images: PositiveInt
    """Length of training, in images; a multiple of the global batch."""
    global_batch: PositiveInt
    """Images per optimizer step over all ranks."""
    micro_batch: PositiveInt | None = None
    """Images per forward pass of one rank; null = the rank's whole share of the global batch."""
    coupling_group: PositiveInt = 1
    """Consecutive samples whose loss terms depend on one another; ranks and micro-batches hold whole groups."""
    ranks: PositiveInt = Field(default=1, json_schema_extra=OPERATION)
    """Processes of the local runner; torchrun and srun decide for themselves."""
    width: Annotated[list[PositiveInt], Field(min_length=1)] | None = Field(default=None, json_schema_extra=OPERATION)
    """Numbers of ranks that an attempt may have: each starts with what is there; null = `ranks`, or the launcher's."""
    threads: PositiveInt = 1
    """CPU threads per rank; changes the last bits of sums, so it belongs to the identity."""
    deterministic: bool = True
    """Only deterministic kernels, no autotuning: what "bit for bit" refers to on GPUs."""
    engine: EngineConfig = EngineConfig()
    init_from: InitFromConfig | None = Field(default=None, json_schema_extra=WHEN_SET)
    """Weights that training begins from where there is no checkpoint yet; null = the method's initial values."""
    frozen: dict[KeyName, TokenizerConfig] | None = Field(default=None, json_schema_extra=WHEN_SET)
    """Networks that the method's loss asks and nobody trains, by the names the method gives them; `sha256` of each is
    filled in when the run is made. null = none."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of the networks' matrix products; masters, averages and losses are always fp32."""
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    ema: dict[KeyName, EmaConfig] = Field(default_factory=lambda: {"main": EmaConfig(decay=0.9999)})
    """Averages of the weights by name."""
    log_every: PositiveInt = Field(json_schema_extra=OPERATION)
    """Interval of the printed line and the journal row, in images; a multiple of the global batch."""
    save_every: PositiveInt | None = Field(default=None, json_schema_extra=OPERATION)
    """Interval of checkpoints, in images, a multiple of the global batch; null = chosen by each attempt from the
    measured cost of a save and the time between interruptions."""
    keep_last: PositiveInt = Field(default=2, json_schema_extra=OPERATION)
    """Newest checkpoints that are kept."""
    keep_every: PositiveInt | None = Field(default=None, json_schema_extra=OPERATION)
    """Checkpoints at multiples of this many images are kept for good; a multiple of `save_every`, if that is given."""
    validate: ValidateConfig | None = None  # type: ignore[assignment]
    """Validation during training; null = none."""
    preview: PreviewConfig | None = None
    """Preview pictures during training; null = none."""
    evaluate: OnlineEvaluationConfig | None = None
    """Metrics during training; null = none."""
    non_finite: NonFiniteConfig = NonFiniteConfig()
    time_limit_s: Annotated[float, Field(gt=0.0)] | None = Field(default=None, json_schema_extra=OPERATION)
    """Seconds an attempt may last; null = the launcher's limit, or none."""
    save_before_limit_s: Annotated[float, Field(ge=0.0)] = Field(default=120.0, json_schema_extra=OPERATION)
    """Seconds before the limit at which the attempt saves and stops."""
    stop_at_images: PositiveInt | None = Field(default=None, json_schema_extra=OPERATION)
    """End the stage early, as done, at this many images; a multiple of the global batch."""
    spans: Literal["off", "interval", "each"] = Field(default="interval", json_schema_extra=OPERATION)
    """Where the time of each rank goes: sums per log interval, or each stretch of work with its begin."""
    collective_timeout_s: Annotated[float, Field(ge=1.0)] = Field(default=600.0, json_schema_extra=OPERATION)
    """Seconds that ranks wait for one that does not come, before they name it and end."""
    profile: ProfileConfig | None = Field(default=None, json_schema_extra=WHEN_SET)
    """Steps to record with torch's profiler; null = none."""
    peak_tflops: Annotated[float, Field(gt=0.0)] | None = Field(default=None, json_schema_extra=OPERATION)
    """Peak of one device in TFLOP/s, of which MFU is the share; null = that of a known GPU in bf16, else no MFU."""

    @property
    def learning_rate(self) -> float:
        """Base learning rate per optimizer step: `lr`, or blr * global_batch / 256."""
        if self.optimizer.lr is not None:
            return self.optimizer.lr
        assert self.optimizer.blr is not None  # checked by OptimizerConfig
        return self.optimizer.blr * self.global_batch / 256

    @property
    def end_images(self) -> int:
        """Where this stage ends, in images: `stop_at_images` or `total_images`."""
        return self.total_images if self.stop_at_images is None else self.stop_at_images

    def micro_batch_for(self, world_size: int) -> int:
        """Images per forward pass of one rank out of `world_size`."""
        return self.micro_batch if self.micro_batch is not None else self.global_batch // world_size

    @model_validator(mode="after")
    def _first_average(self) -> TrainConfig:
        """An `ema` that is absent is the first average, so that it stands in the resolved config by name."""
        for name in WITH_AVERAGE:
            section = getattr(self, name)
            if section is not None and "ema" not in section.model_fields_set:
                # not yet seen by anybody, so still ours to fill in; a "before" validator would cost strict typing
                self.__dict__[name] = section.model_copy(update={"ema": next(iter(self.ema), None)})
        return self

    @model_validator(mode="after")
    def _averages_exist(self) -> TrainConfig:
        for name in WITH_AVERAGE:
            chosen = getattr(self, name)
            if chosen is not None and chosen.ema is not None and chosen.ema not in self.ema:
                known = ", ".join(self.ema) or "none"
                raise KeyProblem(
                    f"train.{name}.ema",
                    f"'train.{name}.ema' = '{chosen.ema}' is not an average of 'train.ema' (known: {known}); name one, "
                    "or null",
                )
        return self

    @model_validator(mode="after")
    def _previews_happen(self) -> TrainConfig:
        if self.preview is not None and self.preview.every_images is None and not self.preview.at_images:
            raise KeyProblem(
                "train.preview",
                "'train.preview' never happens: give 'train.preview.every_images' or 'train.preview.at_images'",
            )
        return self

    @model_validator(mode="after")
    def _batches(self) -> TrainConfig:
        if self.ranks % self.engine.tensor_parallel:
            raise KeyProblem(
                "train.engine.tensor_parallel",
                f"'train.engine.tensor_parallel' = {self.engine.tensor_parallel} does not divide 'train.ranks' = "
                f"{self.ranks}; choose a divisor",
            )
        if self.ranks % (self.engine.shards or 1):
            raise KeyProblem(
                "train.engine.shards",
                f"'train.engine.shards' = {self.engine.shards} does not divide 'train.ranks' = {self.ranks}; choose a "
                "divisor",
            )
        ranks = self.engine.data_ranks(self.ranks)
        if self.global_batch % ranks:
            raise KeyProblem(
                "train.ranks",
                f"'train.ranks' = {ranks} does not divide 'train.global_batch' = {self.global_batch}; "
                "choose ranks that do",
            )
        share = self.global_batch // ranks
        micro = self.micro_batch_for(ranks)
        if share % micro:
            raise KeyProblem(
                "train.micro_batch",
                f"'train.micro_batch' * 'train.ranks' = {micro} * {ranks} does not divide 'train.global_batch' = "
                f"{self.global_batch}; choose a micro-batch that divides each rank's share of {share}",
            )
        if micro % self.coupling_group:
            which = "'train.micro_batch'" if self.micro_batch is not None else "each rank's share of the global batch"
            raise KeyProblem(
                "train.coupling_group",
                f"'train.coupling_group' = {self.coupling_group} does not divide {which} = {micro}; "
                "choose whole groups",
            )
        check_widths(self.width, self.global_batch, self.micro_batch, self.ranks, self.engine)
        return self

    @model_validator(mode="after")
    def _intervals(self) -> TrainConfig:
        intervals: dict[str, int | None] = {
            "total_images": self.total_images,
            "stop_at_images": self.stop_at_images,
            "log_every": self.log_every,
            "save_every": self.save_every,
            "validate.every_images": self.validate.every_images if self.validate else None,
            "preview.every_images": self.preview.every_images if self.preview else None,
            "evaluate.every_images": self.evaluate.every_images if self.evaluate else None,
        }
        places = self.preview.at_images if self.preview else []
        intervals.update({f"preview.at_images.{place}": images for place, images in enumerate(places)})
        for name, images in intervals.items():
            if images is not None and images % self.global_batch:
                raise _not_a_multiple(name, images, "global_batch", self.global_batch)
        if self.keep_every is not None and self.keep_every % self.global_batch:
            raise _not_a_multiple("keep_every", self.keep_every, "global_batch", self.global_batch)
        if self.keep_every is not None and self.save_every is not None and self.keep_every % self.save_every:
            raise _not_a_multiple("keep_every", self.keep_every, "save_every", self.save_every)
        return self

    @model_validator(mode="after")
    def _lengths(self) -> TrainConfig:
        for name, images in (
            ("stop_at_images", self.stop_at_images),
            ("schedule.warmup_images", self.schedule.warmup_images),
        ):
            if images is not None and images > self.total_images:
                raise KeyProblem(
                    f"train.{name}",
                    f"'train.{name}' = {images} is beyond the end of training, 'train.total_images' = "
                    f"{self.total_images}; lower it",
                )
        if self.time_limit_s is not None and self.time_limit_s <= self.save_before_limit_s:
            raise KeyProblem(
                "train.time_limit_s",
                f"'train.time_limit_s' = {self.time_limit_s:g} leaves no time before the save at "
                f"'train.save_before_limit_s' = {self.save_before_limit_s:g}; raise the first or lower the second",
            )
        return self


def _not_a_multiple(name: str, value: int, of: str, base: int) -> KeyProblem:
    above = (value // base + 1) * base
    below = above - base
    return KeyProblem(
        f"train.{name}",
        f"'train.{name}' = {value} is not a multiple of 'train.{of}' = {base}; use "
        + (f"{below} or {above}" if below else f"{above}"),
    )
