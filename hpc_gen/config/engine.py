"""The `train.engine` section: how parameters, gradients and optimizer state lie over ranks.

What changes the last bits of a step on a given number of ranks belongs to the identity. What only says how the work
lies over ranks (the mesh, as `train.ranks` itself) or repeats the same arithmetic (checkpointing) does not.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hpc_gen.config.base import OPERATION, WHEN_SET, PositiveInt, Section
from hpc_gen.config.errors import KeyProblem

# key -> engines that know it
_KNOWN_TO = {
    "stage": ("fsdp", "deepspeed"),
    "shards": ("fsdp",),
    "param_dtype": ("fsdp", "deepspeed"),
    "loss_scale": ("deepspeed",),
    "offload": ("fsdp", "deepspeed"),
    "tensor_parallel": ("ddp",),
}


class EngineConfig(Section):
    """How parameters, gradients and optimizer state lie over ranks."""

    name: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    """Engine: ddp keeps a full copy on every rank and reduces gradients in flat buckets of fixed order; fsdp shards by
    torch's fully_shard; deepspeed by its ZeRO."""
    bucket_mb: Annotated[float, Field(gt=0.0)] = 25.0
    """Size of one gradient bucket, in MiB."""
    stage: Annotated[int, Field(ge=1, le=3)] | None = Field(default=None, json_schema_extra=WHEN_SET)
    """ZeRO stage: 1 = optimizer state is sharded (deepspeed only), 2 = gradients too, 3 = parameters too; null = 3 for
    fsdp, 2 for deepspeed."""
    shards: PositiveInt | None = Field(default=None, json_schema_extra=OPERATION)
    """Ranks that share one copy of the state (hybrid sharding; ranks / shards copies); null = all ranks."""
    tensor_parallel: PositiveInt = Field(default=1, json_schema_extra=OPERATION)
    """Ranks that share every matrix product of a method that allows it."""
    param_dtype: Literal["bf16", "fp16"] | None = Field(default=None, json_schema_extra=WHEN_SET)
    """Number format of the parameters that the networks see; masters stay fp32. null = fp32."""
    loss_scale: Annotated[float, Field(gt=0.0)] | None = Field(default=None, json_schema_extra=WHEN_SET)
    """Fixed loss scale of fp16; null = found while training."""
    offload: Literal["cpu"] | None = Field(default=None, json_schema_extra=WHEN_SET)
    """Keep the sharded state in host memory and step the optimizer there; null = on the device."""
    compile: Literal["blocks"] | None = Field(default=None, json_schema_extra=WHEN_SET)
    """blocks = compile each block that the method names; null = nothing."""
    checkpointing: Literal["none", "full", "selective"] = Field(default="none", json_schema_extra=OPERATION)
    """Activations that are recomputed in the backward pass: those of every block, or of every n-th one."""
    checkpoint_every: Annotated[int, Field(ge=2)] = Field(default=2, json_schema_extra=OPERATION)
    """n of selective checkpointing."""

    @property
    def zero_stage(self) -> int:
        """The stage in force; 0 for ddp."""
        if self.name == "ddp":
            return 0
        return self.stage if self.stage is not None else {"fsdp": 3, "deepspeed": 2}[self.name]

    def data_ranks(self, ranks: int) -> int:
        """How many ways the global batch is cut over `ranks` ranks."""
        return max(1, ranks // self.tensor_parallel)

    @model_validator(mode="after")
    def _keys_of_this_engine(self) -> EngineConfig:
        for key, engines in _KNOWN_TO.items():
            value = getattr(self, key)
            if value not in (None, 1 if key == "tensor_parallel" else None) and self.name not in engines:
                raise KeyProblem(
                    f"train.engine.{key}",
                    f"'train.engine.{key}' = {value} means nothing to engine '{self.name}', only to "
                    f"{' and '.join(engines)}; remove it, or choose such a 'train.engine.name'",
                )
        if self.name == "fsdp" and self.stage == 1:
            raise KeyProblem(
                "train.engine.stage",
                "'train.engine.stage' = 1 exists in deepspeed only; fsdp shards gradients with the optimizer state: "
                "use 2, or 'train.engine.name=deepspeed'",
            )
        if self.param_dtype == "fp16" and self.name != "deepspeed":
            raise KeyProblem(
                "train.engine.param_dtype",
                "'train.engine.param_dtype' = fp16 needs a loss scale, which deepspeed alone has; use bf16, or "
                "'train.engine.name=deepspeed'",
            )
        if self.loss_scale is not None and self.param_dtype != "fp16":
            raise KeyProblem(
                "train.engine.loss_scale",
                "'train.engine.loss_scale' is for 'train.engine.param_dtype' = fp16 only; remove it",
            )
        return self
