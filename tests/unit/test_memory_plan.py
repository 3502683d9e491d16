"""Bytes per rank by hand: ddp, both stages of fsdp, hybrid shards, deepspeed, offload, tensor parallelism; live bytes of
ddp. What real ranks hold: distributed/test_memory_live."""

from __future__ import annotations

from typing import Any

import pytest
from solo import train_config

from hpc_gen.methods.energy.config import EnergyConfig
from hpc_gen.methods.energy.objective import EnergyDiffusion
from hpc_gen.training.memory_plan import MemoryPlan, plan_memory

SHAPE = {"input": "latents", "image_size": 32, "tokenizer_stride": 4, "channels": 4, "patch_size": 2, "hidden": 64,
         "depth": 3, "heads": 2, "num_classes": 10}  # fmt: skip


def dit(**changes: Any) -> EnergyDiffusion:
    return EnergyDiffusion(EnergyConfig.model_validate({**SHAPE, **changes}), 10)


def plan(world_size: int, activations: int | None = 0, variant: str = "standard", **engine: Any) -> MemoryPlan:
    config = train_config(
        ranks=world_size,
        global_batch=64,
        log_every=64,
        save_every=64,
        engine=engine,
        ema={"a": {"decay": 0.9}, "b": {"decay": 0.99}},
    )
    return plan_memory(dit(variant=variant), config, world_size, activations)


def numbers(**changes: Any) -> tuple[int, int, int, int]:
    """Parameters, those trained, those of one block, those outside of blocks."""
    named = list(dit(**changes).roles()["denoiser"].named_parameters())
    block = sum(p.numel() for name, p in named if name.startswith("dit.blocks.0."))
    inside = sum(p.numel() for name, p in named if ".blocks." in name)
    whole = sum(p.numel() for _, p in named)
    return whole, sum(p.numel() for _, p in named if p.requires_grad), block, whole - inside


ALPHA = 4  # bytes of the step size, a buffer


def test_ddp_holds_all_of_it_on_every_rank() -> None:
    whole, trained, _, _ = numbers()
    for ranks in (1, 8):
        found = plan(ranks, 1000, name="ddp").bytes
        assert found == {
            "parameters": 4 * whole + ALPHA, "copies": 0, "gradients": 4 * trained, "reduction": 0,
            "optimizer": 8 * trained, "averages": 8 * whole, "activations": 1000,
        }  # fmt: skip
        assert plan(ranks, 1000, name="ddp").device_bytes == sum(found.values())


@pytest.mark.parametrize("ranks", [2, 4, 64])
def test_fsdp_holds_its_part_and_gathers(ranks: int) -> None:
    """Rows of 64 and 192 divide; the frozen position code has one row, which rank 0 holds."""
    whole, trained, block, rest = numbers()
    for stage, gathered in ((3, rest + 2 * block), (2, whole)):
        found = plan(ranks, name="fsdp", stage=stage).bytes
        assert found["parameters"] == pytest.approx(4 * whole / ranks + 4 * 16 * 64, rel=0.2)
        assert found["optimizer"] == pytest.approx(8 * trained / ranks, rel=0.2)
        assert found["optimizer"] >= 8 * trained / ranks and found["averages"] >= 2 * 4 * whole / ranks
        assert found["copies"] == 4 * gathered
        assert plan(ranks, name="fsdp", stage=stage, param_dtype="bf16").bytes["copies"] == 2 * gathered


def test_hybrid_shards_offload_and_late_gradients() -> None:
    assert plan(64, name="fsdp", shards=4).bytes == plan(4, name="fsdp").bytes
    assert "16 copies of 4 shards" in plan(64, name="fsdp", shards=4).lines()[0]
    whole = plan(4, 10**9, name="fsdp")
    assert whole.device_bytes == sum(whole.bytes.values()) - whole.bytes["gradients"] - whole.bytes["reduction"]
    off = plan(4, 10**9, name="fsdp", offload="cpu")
    assert off.device_bytes == off.bytes["copies"] + 10**9 and "in host memory" in "\n".join(off.lines())


def test_a_loss_that_differentiates_inside_has_no_units() -> None:
    whole, trained, _, _ = numbers(variant="energy")
    found = plan(4, variant="energy", name="fsdp", stage=2).bytes
    assert found["copies"] == 4 * whole and found["reduction"] == 8 * trained


def test_deepspeed_by_stage() -> None:
    whole, trained, _, _ = numbers()
    one, two, three = (plan(8, name="deepspeed", stage=stage).bytes for stage in (1, 2, 3))
    assert one["gradients"] == 4 * trained and two["gradients"] == pytest.approx(trained / 2, rel=0.01)
    assert one["copies"] == two["copies"] == 4 * whole and three["copies"] < whole * 3
    for found in (one, two, three):
        assert found["optimizer"] == pytest.approx(trained, rel=0.01)


def test_tensor_parallel_halves_the_split_layers() -> None:
    whole, trained, block, rest = numbers()
    found = plan(2, name="ddp", tensor_parallel=2).bytes
    assert 4 * whole / 2 < found["parameters"] < 4 * whole


def test_what_is_not_known_is_said() -> None:
    lines = plan(2, None, name="ddp").lines()
    assert any(line.split() == ["activations", "?"] for line in lines)
    assert "activations" not in plan(2, None, name="ddp").summary()
    assert plan(2, None, name="ddp").summary().startswith(" ".join(lines[-1].split()[-2:]))
