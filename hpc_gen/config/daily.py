"""Sections of daily work: the weights that training begins from, and who is told how a stage ended."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hpc_gen.config.base import OPERATION, KeyName, NonEmpty, Section, Sha256
from hpc_gen.config.errors import KeyProblem

Outcome = Literal["done", "failed", "diverged", "stopped", "requeued"]


class InitFromConfig(Section):
    """Weights to begin from: of a file, or of a checkpoint of another run; the optimizer begins afresh at 0 images."""

    weights: NonEmpty | None = Field(default=None, json_schema_extra=OPERATION)
    """File of weights, relative to the workspace: safetensors, or of torch.save."""
    key: NonEmpty | None = None
    """Entry of the file with the weights, as in model_ema; null = model, or the only one."""
    run: NonEmpty | None = Field(default=None, json_schema_extra=OPERATION)
    """Run to take the weights from: a name below WORKSPACE/runs, or a path relative to the workspace."""
    checkpoint: Annotated[int, Field(ge=0)] | Literal["latest"] = Field(default="latest", json_schema_extra=OPERATION)
    """Which checkpoint of that run, in images seen, or 'latest' when the new run is made."""
    ema: KeyName | None = None
    """Which average of that run's weights; null = the weights themselves."""
    role: KeyName | None = None
    """Network to fill; null = every one that a run has, for a file the only one that is trained."""
    strict: bool = True
    """Refuse keys that are missing, too many or of another shape; false = take what fits and list the rest."""
    sha256: Sha256 | None = None
    """SHA-256 of the file, or of the checkpoint's manifest.json; null = filled in when the run is made."""

    @model_validator(mode="after")
    def _one_source(self) -> InitFromConfig:
        if (self.weights is None) == (self.run is None):
            given = "neither is" if self.weights is None else "both are"
            raise KeyProblem(
                "train.init_from",
                f"exactly one of 'train.init_from.weights' and 'train.init_from.run' must be given, but {given}",
            )
        foreign = ("checkpoint", "ema") if self.weights is not None else ("key",)
        for name in foreign:
            if getattr(self, name) not in (None, "latest"):
                raise KeyProblem(
                    f"train.init_from.{name}",
                    f"'train.init_from.{name}' does not go with 'train.init_from."
                    f"{'weights' if self.weights is not None else 'run'}'; leave it out",
                )
        return self


class NotifyConfig(Section):
    """A command that is told how each stage ended."""

    command: Annotated[list[NonEmpty], Field(min_length=1)] = Field(json_schema_extra=OPERATION)
    """Program and its arguments, run without a shell; the environment holds HPC_GEN_RUN, HPC_GEN_STAGE,
    HPC_GEN_OUTCOME, HPC_GEN_EXIT_CODE and HPC_GEN_MESSAGE."""
    on: Annotated[list[Outcome], Field(min_length=1)] = Field(
        default=["done", "failed", "diverged", "stopped", "requeued"], json_schema_extra=OPERATION
    )
    """Outcomes to tell of."""
