"""The experiment: one YAML file in `job_configs/`, as frozen typed models; docstrings give the unit of each key.

Keys marked as operation say how and where work runs; all others change numbers and are part of the identity hash.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from hpc_gen.config.base import (
    OPERATION,
    WHEN_SET,
    EntryName,
    FolderName,
    KeyName,
    NonEmpty,
    PositiveInt,
    Section,
)
from hpc_gen.config.daily import InitFromConfig, NotifyConfig
from hpc_gen.config.data import FeedKeys, SourceKeys
from hpc_gen.config.engine import EngineConfig
from hpc_gen.config.errors import KeyProblem
from hpc_gen.config.evaluate import EvaluateConfig, ExtractorConfig, ReferenceConfig
from hpc_gen.config.sample import SampleConfig, Seed
from hpc_gen.config.tokenizer import TokenizerConfig
from hpc_gen.config.train import (
    EmaConfig,
    NonFiniteConfig,
    OnlineEvaluationConfig,
    OptimizerConfig,
    PreviewConfig,
    ScheduleConfig,
    TrainConfig,
    ValidateConfig,
)

__all__ = [
    "DataConfig",
    "EmaConfig",
    "EncodeConfig",
    "EngineConfig",
    "EvaluateConfig",
    "Experiment",
    "ExtraStage",
    "ExtractorConfig",
    "InitFromConfig",
    "NonFiniteConfig",
    "NotifyConfig",
    "OnlineEvaluationConfig",
    "OptimizerConfig",
    "PreviewConfig",
    "ReferenceConfig",
    "ReportConfig",
    "SampleConfig",
    "ScheduleConfig",
    "TokenizerConfig",
    "TrackingConfig",
    "TrainConfig",
    "ValidateConfig",
]

Byte = Annotated[int, Field(ge=0, le=255)]

BUILT_IN_STAGES = ("encode", "train", "sample", "evaluate", "report")
"""Stages every experiment may have, in their order."""


class DataConfig(FeedKeys):
    """The table that training reads."""

    table: NonEmpty = Field(json_schema_extra=OPERATION)
    """Folder of the training table, relative to the workspace; what it holds is identified by its own index."""
    validation_table: NonEmpty | None = Field(default=None, json_schema_extra=OPERATION)
    """Folder of the held-out table; null = none."""
    shuffle_shards: PositiveInt = 16
    """Shards whose rows are shuffled together."""
    prefetch: PositiveInt = Field(default=4, json_schema_extra=OPERATION)
    """Global batches that are read and drawn ahead."""
    class_names: NonEmpty | None = Field(default=None, json_schema_extra=OPERATION)
    """File of names for captions, a line "ID NAME" per class, relative to the workspace; null = those of the table."""
    forecast: Literal["refuse", "warn", "off"] = Field(default="refuse", json_schema_extra=OPERATION)
    """A stage whose files will not fit on the disk: refuse = it does not start; warn = it says so; off = no look."""
    tokenizer: TokenizerConfig | None = None
    """What made the latents of the table and decodes them, where no section 'encode' says so; null = nothing did."""


class EncodeConfig(SourceKeys):
    """The encode stage: images become the shards of `data.table`."""

    channels: Literal[1, 3] = 3
    """Stored channels: 1 grey, 3 colour."""
    shard_rows: PositiveInt = 1024
    """Rows of one shard, the unit of this stage."""
    format: Literal["ptshard", "pt", "npz", "safetensors", "webdataset"] = "ptshard"
    """ptshard, safetensors, webdataset (tar): shards of many rows; pt, npz: a file per image in class folders, as the
    energy reference caches them."""
    classes: Annotated[list[str | int], Field(min_length=1)] | None = None
    """Keep these classes only, by name (of a folder: n01440764) or number; labels keep their own ids. null = all."""
    limit: PositiveInt | None = None
    """Keep at most this many rows of each split; null = all."""
    validation: bool = True
    """Encode the held-out split too, into `data.validation_table`."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """What makes the stored columns of the pixels."""
    also: dict[KeyName, TokenizerConfig] | None = Field(default=None, json_schema_extra=WHEN_SET)
    """More tokenizers by names of your own, whose columns are made in the same pass and stored beside the first's."""
    threads: PositiveInt = 1
    """CPU threads per task of the tokenizer's network; belongs to the identity."""
    max_bad_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Share of unreadable images that is tolerated (they are counted and listed); above it the stage fails."""
    tasks: PositiveInt = Field(default=1, json_schema_extra=OPERATION)
    """Processes that share the units."""
    background: tuple[Byte, Byte, Byte] = (255, 255, 255)
    """Colour behind transparent pixels, red green blue 0..255."""

    @model_validator(mode="after")
    def _rows_of_files_hold_one_tokenizer(self) -> EncodeConfig:
        if self.also and self.format in ("pt", "npz"):
            raise KeyProblem(
                "encode.also",
                f"'encode.also' does not go with 'encode.format' = '{self.format}', whose files hold moments alone; "
                "use ptshard",
            )
        return self


class ReportConfig(Section):
    """The report stage: one self-contained HTML page."""

    title: str | None = Field(default=None, json_schema_extra=OPERATION)
    """Title of the page; null = the experiment's name."""


class TrackingConfig(Section):
    """wandb as a mirror of the journal."""

    wandb: Literal["disabled", "offline", "online"] = Field(default="disabled", json_schema_extra=OPERATION)
    """offline writes one offline run to be synchronised by hand; online publishes up to the last checkpoint."""
    project: str = Field(default="hpc-gen", json_schema_extra=OPERATION)
    """wandb project."""
    entity: str | None = Field(default=None, json_schema_extra=OPERATION)
    """wandb user or team; null = the account's default."""
    loss_term: NonEmpty | None = Field(default=None, json_schema_extra=OPERATION)
    """Loss term that is published as `loss` and `validation/loss` in place of the total, as in mse; null = total."""


class ExtraStage(Section):
    """A stage of the user's own, made of units."""

    worker: EntryName
    """'module:factory'; factory(context) returns a UnitWorker."""
    after: list[str] = Field(default_factory=list)
    """Stages that must be done before."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Whatever the worker reads."""
    unit_by_unit: bool = Field(default=False, json_schema_extra=OPERATION)
    """Unit i needs only unit i of the stage before it, so that on Slurm task i starts when that one is done."""
    tasks: PositiveInt = Field(default=1, json_schema_extra=OPERATION)
    """Processes that share the units."""


class Experiment(Section):
    """One experiment: what is encoded, trained, sampled and evaluated, and in which stages."""

    name: FolderName = Field(json_schema_extra=OPERATION)
    """Name of the run folder."""
    seed: Seed = 0
    """Seed of weights, order and training draws."""
    method: dict[str, Any]
    """`name` of a registered method (or module:ATTRIBUTE) and its own keys, typed by the method."""
    data: DataConfig
    encode: EncodeConfig | None = None
    train: TrainConfig | None = None
    sample: SampleConfig | None = None
    evaluate: EvaluateConfig | None = None
    report: ReportConfig = ReportConfig()
    tracking: TrackingConfig = TrackingConfig()
    notify: NotifyConfig | None = Field(default=None, json_schema_extra=WHEN_SET)
    """Command that is told how each stage ended; null = nobody is."""
    stages: list[str] | None = Field(default=None, json_schema_extra=OPERATION)
    """Stages to run, in order; null = every configured one."""
    extra_stages: dict[KeyName, ExtraStage] = Field(default_factory=dict)
    """Stages of the user's own, by name."""

    def configured_stages(self) -> list[str]:
        """Every stage that has a section, in an order that honours `after` of the extra ones."""
        order = [name for name in BUILT_IN_STAGES if getattr(self, name) is not None]
        waiting = dict(self.extra_stages)
        while waiting:
            ready = [name for name, stage in waiting.items() if all(other in order for other in stage.after)]
            if not ready:
                name = next(iter(waiting))
                raise KeyProblem(
                    f"extra_stages.{name}.after",
                    f"'extra_stages.{name}.after' = {list(waiting[name].after)} cannot be satisfied: a stage is not "
                    f"configured or waits for this one; configured: {', '.join(order)}",
                )
            for name in ready:
                place = max((order.index(other) + 1 for other in waiting.pop(name).after), default=0)
                while place < len(order) and order[place] in self.extra_stages:
                    place += 1  # extra stages with the same predecessor keep the order in which they were written
                order.insert(place, name)
        return order

    def stage_order(self) -> list[str]:
        """The stages that this experiment runs, in order."""
        return list(self.stages) if self.stages is not None else self.configured_stages()

    @field_validator("method")
    @classmethod
    def _method_is_named(cls, method: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(method.get("name"), str):
            key = "method.name" if "name" in method else "method"
            raise KeyProblem(key, "key 'method.name' is required: the name of a method, as in 'name: energy'")
        return method

    @model_validator(mode="after")
    def _stages_exist(self) -> Experiment:
        clash = sorted(set(self.extra_stages) & set(BUILT_IN_STAGES))
        if clash:
            raise KeyProblem(
                f"extra_stages.{clash[0]}",
                f"'extra_stages.{clash[0]}' has the name of a built-in stage; choose another name",
            )
        configured = self.configured_stages()
        for place, name in enumerate(self.stages or []):
            if name not in configured:
                raise KeyProblem(
                    f"stages.{place}",
                    f"stage '{name}' in 'stages' is not configured; configured: {', '.join(configured)}",
                )
        return self

    @model_validator(mode="after")
    def _tables(self) -> Experiment:
        held_out = self.data.validation_table
        if held_out == self.data.table:
            raise KeyProblem(
                "data.validation_table", "'data.validation_table' is the training table; name another folder"
            )
        if held_out is None and self.encode is not None and self.encode.validation:
            raise KeyProblem(
                "encode.validation" if "validation" in self.encode.model_fields_set else "encode",
                "'encode.validation' is true but 'data.validation_table' names no folder; set one, or "
                "encode.validation=false",
            )
        if held_out is None and self.train is not None and self.train.validate is not None:
            raise KeyProblem("train.validate", "'train.validate' needs 'data.validation_table', the held-out rows")
        return self

    @model_validator(mode="after")
    def _one_tokenizer(self) -> Experiment:
        if self.encode is not None and self.data.tokenizer is not None:
            raise KeyProblem(
                "data.tokenizer", "'data.tokenizer' is for tables made elsewhere; here 'encode.tokenizer' says it"
            )
        return self

    @model_validator(mode="after")
    def _samples(self) -> Experiment:
        sample, train, evaluate = self.sample, self.train, self.evaluate
        if sample is not None and train is not None and sample.ema is not None and sample.ema not in train.ema:
            known = ", ".join(train.ema) or "none"
            raise KeyProblem(
                "sample.ema" if "ema" in sample.model_fields_set else "sample",
                f"'sample.ema' = '{sample.ema}' is not an average of 'train.ema' (known: {known}); name one, or null",
            )
        if train is not None and train.evaluate is not None:
            self._check_online(train.evaluate)
        if sample is None or evaluate is None:
            return self
        if evaluate.tag != sample.tag:
            raise KeyProblem(
                "evaluate.tag" if "tag" in evaluate.model_fields_set else "sample.tag",
                f"'evaluate.tag' = '{evaluate.tag}' is not the set of samples made here, 'sample.tag' = "
                f"'{sample.tag}'; give both the same",
            )
        if "kid" in evaluate.metrics and evaluate.kid_subset_size > sample.num_images:
            raise KeyProblem(
                "evaluate.kid_subset_size" if "kid_subset_size" in evaluate.model_fields_set else "evaluate",
                f"'evaluate.kid_subset_size' = {evaluate.kid_subset_size} exceeds 'sample.num_images' = "
                f"{sample.num_images}; lower the first",
            )
        return self

    def _check_online(self, online: OnlineEvaluationConfig) -> None:
        if self.evaluate is None:
            raise KeyProblem(
                "train.evaluate",
                "'train.evaluate' takes metrics, extractor and reference from the section 'evaluate', which is absent; "
                "add one",
            )
        if "kid" in self.evaluate.metrics and self.evaluate.kid_subset_size > online.num_images:
            raise KeyProblem(
                "train.evaluate.num_images",
                f"'train.evaluate.num_images' = {online.num_images} is less than 'evaluate.kid_subset_size' = "
                f"{self.evaluate.kid_subset_size}; lower the second, or draw more images",
            )
