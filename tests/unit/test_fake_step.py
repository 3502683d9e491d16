"""FLOPs and activations on tensors without memory: by hand, by torch's own counter, and by a real step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from solo import micro_batches, train_config
from tiny_method import PIXELS, Config, TinyMethod
from toys import SIDE, TwoPlayer

from hpc_gen.config.train import TrainConfig
from hpc_gen.methods.energy.config import EnergyConfig
from hpc_gen.methods.energy.objective import EnergyDiffusion
from hpc_gen.methods.materialise import materialise
from hpc_gen.training.fake_step import ITERATIONS, FakeStep, _Cost, _drop, measure

SHAPE = {"input": "latents", "image_size": 32, "tokenizer_stride": 4, "channels": 4, "patch_size": 2, "hidden": 64,
         "depth": 3, "heads": 2, "num_classes": 10}  # fmt: skip
COLUMNS = {"latents": ("float32", (4, 8, 8)), "labels": ("int64", ())}


def dit(**changes: Any) -> EnergyDiffusion:
    return EnergyDiffusion(EnergyConfig.model_validate({**SHAPE, **changes}), 10)


def fake(method: EnergyDiffusion, micro_batch: int = 4, config: TrainConfig | None = None, **more: Any) -> FakeStep:
    return measure(method, COLUMNS, config or train_config(), micro_batch, **more)


def real(method: EnergyDiffusion, micro_batch: int = 4) -> _Cost:
    """The same on real tensors."""
    modules = materialise(method, 0)
    generator = torch.Generator().manual_seed(0)
    batch = {
        "latents": torch.randn(micro_batch, 4, 8, 8, generator=generator),
        "labels": torch.zeros(micro_batch, dtype=torch.int64),
    }
    (turn,) = method.turns(0, 0)
    ((columns, draws),) = micro_batches(method, turn, batch, micro_batch)
    for parameter in modules["denoiser"].parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop)
    with _Cost() as cost:
        losses = method.objective(turn, columns, draws)
        total = sum(term.sum * term.weight for term in losses.terms.values() if term.weight)
        del losses
        total.backward()  # type: ignore[union-attr]
    return cost


def test_a_linear_map_by_hand() -> None:
    """64 inputs, one output: 2 * 64 forward, and as many for the gradient of the weight; the input needs none."""
    columns = {"pixels": ("uint8", (1, 8, 8)), "labels": ("int64", ())}
    found = measure(TinyMethod(Config()), columns, train_config(), 8)
    assert found.flops_per_image == 4 * PIXELS and found.turn_flops == {"train": 4 * PIXELS}


@pytest.mark.parametrize("changes", [{}, {"variant": "energy"}], ids=["standard", "energy"])
def test_as_a_real_step(changes: dict[str, Any]) -> None:
    told, measured = fake(dit(**changes)), real(dit(**changes))
    assert told.flops_per_image == measured.flops / 4
    assert told.activation_bytes == pytest.approx(measured.peak, rel=0.02)


def test_as_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    method = dit()
    module = materialise(method, 0)["denoiser"]
    with FlopCounterMode(display=False) as counter:
        module(
            torch.randn(2, 4, 8, 8), torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
        ).sum().backward()
    assert fake(dit(), 2).flops_per_image == counter.get_total_flops() / 2


def test_the_energy_variant_costs_about_twice_as_much() -> None:
    assert 1.8 < fake(dit(variant="energy")).flops_per_image / fake(dit()).flops_per_image < 3.0


def test_an_inner_loop_that_asks_for_values() -> None:
    """Its number of steps follows from the drawn timesteps, which keep their values; its tests are taken as passed."""
    options = {"contrastive_weight": 0.05, "learnable_step_size": True}
    plain, looped = fake(dit(variant="energy", depth=1)), fake(dit(variant="energy", depth=1, energy=options))
    assert looped.flops_per_image > 3 * plain.flops_per_image


def test_recomputation_is_no_work_but_saves_memory() -> None:
    plain, recomputing = fake(dit()), fake(dit(checkpoint_blocks=True))
    assert recomputing.flops_per_image == plain.flops_per_image
    config = train_config(engine={"checkpointing": "full"})
    engine = fake(dit(), config=config, as_engine=True)
    assert fake(dit(), config=config).flops_per_image == plain.flops_per_image
    assert engine.flops_per_image > plain.flops_per_image
    assert engine.activation_bytes < 0.7 * plain.activation_bytes


def test_bytes_grow_with_the_micro_batch_and_shrink_with_the_format() -> None:
    """Both have a part that does not: copies of weights, gradients on their way."""
    one, two, four = (fake(dit(), size).activation_bytes for size in (8, 16, 32))
    assert four - two == pytest.approx(2 * (two - one), rel=0.05)
    wide = {"hidden": 128, "depth": 2}
    bf16 = fake(dit(**wide), 64, train_config(precision="bf16")).activation_bytes
    assert bf16 < 0.8 * fake(dit(**wide), 64).activation_bytes
    config = train_config(engine={"name": "fsdp", "param_dtype": "bf16"}, precision="bf16")
    assert fake(dit(**wide), 64, config, as_engine=True).activation_bytes < 1.1 * bf16


def test_turns_that_come_now_and_then() -> None:
    """An average over many iterations: G and D in each, R1 as often as the method says."""
    method = TwoPlayer()
    found = measure(method, {"pixels": ("uint8", (1, SIDE, SIDE))}, train_config(), 8)
    happened = [turn.purpose for i in range(ITERATIONS) for turn in TwoPlayer().turns(i, 8 * i)]
    expected = sum(found.turn_flops[name] for name in happened) / ITERATIONS
    assert found.flops_per_image == pytest.approx(expected) and set(found.turn_flops) == set(happened)
    assert found.turn_flops["r1"] > 0
