"""Choosing an engine: what its keys mean to the identity, and each refusal with its sentence."""

from __future__ import annotations

from typing import Any

import experiments
import pytest
import torch
from engine_trials import dit
from solo import RecordingRanks, train_config
from tiny_method import Config, TinyMethod
from toys import TwoPlayer

from hpc_gen.config.errors import ConfigError
from hpc_gen.methods.materialise import materialise
from hpc_gen.runtime.errors import UserError
from hpc_gen.training.engines.build import build_engine, refuse
from hpc_gen.training.engines.ddp import DdpEngine

FSDP, DEEPSPEED = "train.engine.name=fsdp", "train.engine.name=deepspeed"


@pytest.mark.parametrize(
    ("overrides", "changes"),
    [
        (["train.engine.checkpointing=full"], False),  # the same arithmetic, twice
        (["train.engine.checkpointing=selective", "train.engine.checkpoint_every=3"], False),
        (["train.ranks=2", "train.engine.tensor_parallel=2"], False),  # as the number of ranks itself
        (["train.engine.compile=null"], False),
        (["train.engine.compile=blocks"], True),
        ([FSDP], True),
        ([DEEPSPEED], True),
    ],
)
def test_what_changes_the_identity(overrides: list[str], changes: bool) -> None:
    assert (experiments.resolved(*overrides).identity != experiments.resolved().identity) == changes


@pytest.mark.parametrize(
    ("more", "changes"),
    [
        ("train.engine.stage=2", True),
        ("train.engine.param_dtype=bf16", True),
        ("train.engine.offload=cpu", True),
        ("train.engine.shards=1", False),
    ],
)
def test_what_changes_the_identity_of_fsdp(more: str, changes: bool) -> None:
    assert (experiments.resolved(FSDP, more).identity != experiments.resolved(FSDP).identity) == changes


def test_stages_in_force() -> None:
    stages = [train_config(engine={"name": name}).engine.zero_stage for name in ("ddp", "fsdp", "deepspeed")]
    assert stages == [0, 3, 2]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["train.engine.stage=2"],
            "'train.engine.stage' = 2 means nothing to engine 'ddp', only to fsdp and deepspeed",
        ),
        (["train.engine.param_dtype=bf16"], "'train.engine.param_dtype' = bf16 means nothing to engine 'ddp'"),
        (["train.engine.offload=cpu"], "'train.engine.offload' = cpu means nothing to engine 'ddp'"),
        ([DEEPSPEED, "train.engine.shards=2"], "'train.engine.shards' = 2 means nothing to engine 'deepspeed'"),
        ([FSDP, "train.engine.tensor_parallel=2"], "'train.engine.tensor_parallel' = 2 means nothing to engine 'fsdp'"),
        ([FSDP, "train.engine.stage=1"], "'train.engine.stage' = 1 exists in deepspeed only"),
        ([FSDP, "train.engine.param_dtype=fp16"], "fp16 needs a loss scale, which deepspeed alone has"),
        (
            [DEEPSPEED, "train.engine.loss_scale=8"],
            "'train.engine.loss_scale' is for 'train.engine.param_dtype' = fp16",
        ),
        (["train.engine.tensor_parallel=2"], "'train.engine.tensor_parallel' = 2 does not divide 'train.ranks' = 1"),
        (
            [FSDP, "train.ranks=4", "train.engine.shards=3"],
            "'train.engine.shards' = 3 does not divide 'train.ranks' = 4",
        ),
        (["train.engine.name=zero"], "did you mean"),
        (["train.engine.stage=4", DEEPSPEED], "train.engine.stage"),
    ],
)
def test_keys_that_do_not_fit_are_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        experiments.resolved(*overrides)
    if sentence != "did you mean":  # of the three names none is near to this one: all are listed
        assert sentence in str(caught.value)
    assert "train.engine." in str(caught.value)


def test_a_global_batch_is_cut_over_data_ranks_only() -> None:
    """Ranks that share a matrix product get the same rows."""
    assert train_config(ranks=16, global_batch=8, engine={"tensor_parallel": 2}).micro_batch_for(8) == 1
    with pytest.raises(ValueError, match="does not divide 'train.global_batch' = 8"):
        train_config(ranks=32, global_batch=8, engine={"tensor_parallel": 2})


ENERGY = {"variant": "energy"}


@pytest.mark.parametrize(
    ("method", "engine", "ranks", "sentence"),
    [
        (dit(**ENERGY), {"name": "fsdp"}, 2, r"differentiates inside its loss, .* at stage 3\) have no gradient; use "),
        (dit(**ENERGY), {"name": "deepspeed", "stage": 3}, 2, r"train.engine.name = deepspeed at stage 3"),
        (dit(**ENERGY), {"name": "fsdp", "stage": 2, "shards": 2}, 4, r"copies of the shards .* are not supported"),
        (dit(**ENERGY), {"compile": "blocks"}, 1, r"torch.compile cannot differentiate a second time"),
        (
            dit(**ENERGY),
            {"name": "fsdp", "stage": 2, "param_dtype": "bf16"},
            1,
            r"must stay fp32; remove train.engine.param",
        ),
        (dit(**ENERGY), {"tensor_parallel": 2}, 2, r"role 'denoiser' of this method cannot be split"),
        (TwoPlayer(), {"tensor_parallel": 2}, 2, r"role 'generator' of this method cannot be split"),
        (dit(heads=1), {"tensor_parallel": 2}, 2, r"does not divide 1 \(heads or inner width\) of role 'denoiser'"),
        (dit(), {"tensor_parallel": 2}, 3, r"does not divide the 3 ranks of this attempt; start a multiple of 2"),
        (dit(), {"tensor_parallel": 2, "compile": "blocks"}, 2, r"megatron-core's layers are not compiled"),
        (dit(), {"name": "fsdp", "shards": 2}, 3, r"train.engine.shards = 2 does not divide the 3 ranks"),
        (dit(), {"name": "deepspeed", "stage": 3, "compile": "blocks"}, 1, r"which train.engine.compile would bake in"),
        (TwoPlayer(), {"name": "deepspeed", "stage": 3}, 2, r"generator, discriminator are trained in turn"),
        (
            TwoPlayer(),
            {"checkpointing": "full"},
            1,
            r"train.engine.checkpointing is set, but this method names no blocks",
        ),
        (TwoPlayer(), {"compile": "blocks"}, 1, r"train.engine.compile is set, but this method names no blocks"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_built(
    method: Any, engine: dict[str, Any], ranks: int, sentence: str
) -> None:
    # three ranks: torchrun may start what the experiment does not say
    started = ranks if ranks != 3 else 2
    config = train_config(engine=engine, ranks=started)
    with pytest.raises(UserError, match=sentence):
        refuse(method, config, ranks, "cpu")


def test_bf16_autocast_and_megatron_on_a_cpu_are_refused() -> None:
    config = train_config(engine={"tensor_parallel": 2}, ranks=2, precision="bf16")
    with pytest.raises(UserError, match="know autocast on GPUs only; use train.precision=fp32 on the CPU"):
        refuse(dit(), config, 2, "cpu")
    refuse(dit(), config, 2, "cuda")


def test_what_works_is_not_refused() -> None:
    for engine in ({}, {"name": "fsdp", "stage": 2}, {"name": "deepspeed", "stage": 1}, {"checkpointing": "full"}):
        refuse(dit(**ENERGY), train_config(engine=engine), 2, "cpu")
    refuse(dit(), train_config(engine={"name": "fsdp", "param_dtype": "bf16", "compile": "blocks"}), 2, "cpu")


def test_the_default_is_ddp_and_needs_no_other_package() -> None:
    method = TinyMethod(Config())
    engine = build_engine(method, materialise(method, 0), train_config(), RecordingRanks(), torch.device("cpu"))
    assert type(engine) is DdpEngine and (engine.data_rank, engine.data_ranks, engine.leads_data) == (0, 1, True)
