"""Energy diffusion as a method: config errors, table checks, draws, loss terms, label dropout and mirroring by draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from hpc_gen.methods.energy.config import EnergyConfig
from hpc_gen.methods.energy.objective import ROLE, EnergyDiffusion
from hpc_gen.methods.energy.recipe import ENTRY, decay_groups
from hpc_gen.methods.protocol import Method, TableFacts
from hpc_gen.methods.registry import entry, typed_config
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.runtime.randomness import Draw, Integers, Normal, Stream, Uniform

CLASSES = 4
PIXELS: dict[str, Any] = {
    "input": "pixels", "image_size": 8, "channels": 1, "patch_size": 2, "hidden": 16, "depth": 1, "heads": 2,
    "diffusion_timesteps": 50,
}  # fmt: skip
LATENTS = {**PIXELS, "input": "latents", "image_size": 64, "tokenizer_stride": 8, "channels": 5}


def method(section: dict[str, Any] | None = None, **change: Any) -> EnergyDiffusion:
    """A materialised method whose zero parameters were redrawn, so that its output is not zero."""
    built = ENTRY.build(EnergyConfig(**{**(section or PIXELS), **change}), TableFacts(num_classes=CLASSES))
    assert isinstance(built, EnergyDiffusion) and isinstance(built, Method)
    built.model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    built.initialise(ROLE, generator)
    for parameter in built.model.parameters():
        if not parameter.any():
            parameter.data.normal_(0.0, 0.1, generator=generator)
    return built


def batch_and_draws(built: EnergyDiffusion, size: int = 6, **fixed: torch.Tensor) -> tuple[Any, Any]:
    """A micro-batch as the feed makes it; `fixed` replaces draws."""
    generator = torch.Generator().manual_seed(1)
    shape = (size, *built.config.input_shape)
    if built.config.input == "pixels":
        rows = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    else:
        rows = torch.randn(shape, generator=generator).half()
    batch = {built.config.column: rows, "labels": torch.arange(size) % CLASSES}
    turn = built.turns(0, 0)[0]
    draws = {
        n: Stream(0, f"train/{turn.purpose}/{n}").batch(d, list(range(size))) for n, d in built.draws(turn).items()
    }
    return batch, {**draws, **fixed}


def loss(built: EnergyDiffusion, batch: Any, draws: Any) -> torch.Tensor:
    turn = built.turns(0, 0)[0]
    term = built.objective(turn, batch, draws).terms["mse"]
    assert term.count == built.counts(turn, batch, draws)["mse"] and term.weight == 1.0
    return term.sum


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"channels": 2}, "method.channels"),
        ({"patch_size": 3}, "method.patch_size"),
        ({"hidden": 18}, "method.hidden"),
        ({"hidden": 20, "heads": 3}, "method.hidden"),
        ({"input": "latents", "image_size": 60}, "method.image_size"),
        ({"input": "latents", "image_size": 64, "horizontal_flip": True}, "method.horizontal_flip"),
    ],
)
def test_sizes_that_do_not_fit_name_their_key(change: dict[str, Any], key: str) -> None:
    with pytest.raises(ValidationError, match=f"'{key}'"):
        EnergyConfig(**{**PIXELS, **change})


@pytest.mark.parametrize(
    "change",
    [{"variant": "other"}, {"label_dropout": 1.0}, {"diffusion_timesteps": 20}, {"depth": 0}, {"width": 3}],
)
def test_values_out_of_range_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        EnergyConfig(**{**PIXELS, **change})


def test_registry_types_the_section() -> None:
    found, config = typed_config({"name": "energy", **PIXELS})
    assert found is ENTRY is entry("energy")
    assert isinstance(config, EnergyConfig) and config.input_shape == (1, 8, 8)
    assert EnergyConfig(**LATENTS).input_shape == (5, 8, 8)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (TableFacts(), "method.num_classes"),
        (TableFacts(CLASSES, {"pixels": ("uint8", (1, 8, 8))}), "labels"),
        (TableFacts(CLASSES, {"labels": ("int64", ()), "moments": ("float16", (8, 8, 8))}), "method.input"),
        (TableFacts(CLASSES, {"labels": ("int64", ()), "pixels": ("uint8", (1, 16, 16))}), "method.image_size = 8"),
        (TableFacts(CLASSES, {"labels": ("int64", ()), "pixels": ("uint8", (3, 8, 8))}), "method.channels = 1"),
        (TableFacts(CLASSES, {"labels": ("int64", ()), "pixels": ("float32", (1, 8, 8))}), "uint8"),
    ],
)
def test_tables_that_do_not_fit_are_refused_by_key(facts: TableFacts, words: str) -> None:
    with pytest.raises(UserError, match=words):
        ENTRY.build(EnergyConfig(**PIXELS), facts)


def test_fitting_table_and_more_classes_than_the_table_are_taken() -> None:
    facts = TableFacts(CLASSES, {"labels": ("int64", ()), "pixels": ("uint8", (1, 8, 8))})
    assert ENTRY.build(EnergyConfig(**PIXELS), facts).columns()["labels"].max_value == CLASSES - 1
    built = ENTRY.build(EnergyConfig(**PIXELS, num_classes=10), facts)
    assert built.columns()["labels"].max_value == 9
    with pytest.raises(UserError, match=r"method\.num_classes is 3"):
        ENTRY.build(EnergyConfig(**PIXELS, num_classes=3), facts)


def test_protocol_facts() -> None:
    built = method(depth=2)
    (turn,) = built.turns(17, 1000)
    assert list(built.roles()) == [turn.role] == [ROLE]
    assert built.columns()["pixels"].shape == (1, 8, 8)
    assert built.parallel_plan(ROLE).fsdp_units == ("dit.blocks.0", "dit.blocks.1")
    for unit in built.parallel_plan(ROLE).fsdp_units:
        built.model.get_submodule(unit)
    assert built.draws(turn) == {
        "t": Draw((), Integers(0, 50)),
        "noise": Draw((1, 8, 8), Normal()),
        "drop": Draw((), Uniform()),
    }
    assert "drop" not in method(label_dropout=0.0).draws(turn)
    assert "flip" in method(horizontal_flip=True).draws(turn)


def test_model_is_built_without_memory() -> None:
    built = ENTRY.build(EnergyConfig(**PIXELS), TableFacts(CLASSES))
    assert {p.device.type for p in built.roles()[ROLE].parameters()} == {"meta"}


def test_each_trained_parameter_is_in_one_group_and_the_position_code_in_none() -> None:
    built = method()
    undecayed, decayed = built.parameter_groups(ROLE)
    names = undecayed.names + decayed.names
    assert sorted(names) == sorted(n for n, p in built.model.named_parameters() if p.requires_grad)
    assert "dit.pos_embed" not in names and undecayed.weight_decay == 0.0 and decayed.weight_decay is None
    assert all(name.endswith(".bias") for name in undecayed.names)
    assert all(name.endswith(".weight") for name in decayed.names)


def test_only_the_step_size_itself_is_taken_for_it() -> None:
    groups = decay_groups([("alpha", 0), ("x.alphabet", 2), ("diffloss.net.w", 2), ("norm.weight", 1), ("w", 3)])
    assert groups.step_size == ("alpha",)
    assert groups.decayed == ("x.alphabet", "w")
    assert groups.undecayed == ("diffloss.net.w", "norm.weight")


def test_loss_is_the_squared_error_of_the_noise() -> None:
    built = method(label_dropout=0.0)
    batch, draws = batch_and_draws(built)
    x0 = batch["pixels"].float() / 255 * 2 - 1
    bar = torch.from_numpy(built.diffusion.alphas_cumprod)[draws["t"]].float().view(-1, 1, 1, 1)
    x_t = bar.sqrt() * x0 + (1 - bar).sqrt() * draws["noise"]
    error = (built.model(x_t, draws["t"], batch["labels"]) - draws["noise"]).square().mean(dim=(1, 2, 3))
    assert loss(built, batch, draws).item() == pytest.approx(error.sum().item(), rel=1e-5)


def test_terms_add_up_over_any_cut_of_the_batch() -> None:
    built = method()
    batch, draws = batch_and_draws(built)
    whole = loss(built, batch, draws)
    parts = [
        loss(built, {k: v[cut] for k, v in batch.items()}, {k: v[cut] for k, v in draws.items()})
        for cut in (slice(0, 2), slice(2, 3), slice(3, 6))
    ]
    assert sum(part.item() for part in parts) == pytest.approx(whole.item(), rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_labels_are_dropped_by_the_draw_and_never_by_module_mode(training: bool) -> None:
    built = method()
    built.model.train(training)
    batch, draws = batch_and_draws(built)
    below = torch.full((6,), built.config.label_dropout - 1e-6)
    dropped = loss(built, batch, {**draws, "drop": below})
    null = {**batch, "labels": torch.full((6,), CLASSES)}
    assert dropped.item() == loss(built, null, {**draws, "drop": torch.ones(6)}).item()
    kept = loss(built, batch, {**draws, "drop": torch.full((6,), built.config.label_dropout + 1e-6)})
    assert kept.item() == loss(built, batch, {**draws, "drop": torch.ones(6)}).item() != dropped.item()


def test_share_of_dropped_labels() -> None:
    built = method()
    uniform = Stream(0, "train/denoise/drop").batch(built.draws(built.turns(0, 0)[0])["drop"], range(20_000))
    assert (uniform < built.config.label_dropout).float().mean().item() == pytest.approx(0.1, abs=0.01)


def test_pixels_are_scaled_to_minus_one_and_one() -> None:
    built = method()
    ends = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 8, 8)
    x0 = built.training_input({"pixels": ends}, {"noise": torch.zeros(2, 1, 8, 8)})
    assert x0.dtype == torch.float32 and x0[0].eq(-1).all() and x0[1].eq(1).all()


def test_mirroring_follows_its_draw() -> None:
    built = method(horizontal_flip=True)
    batch, draws = batch_and_draws(built, flip=torch.tensor([0.0, 0.49, 0.5, 0.99, 0.2, 0.8]))
    x0 = built.training_input(batch, draws)
    plain = built.training_input(batch, {**draws, "flip": torch.ones(6)})
    for i, mirrored in enumerate([True, True, False, False, True, False]):
        assert torch.equal(x0[i], plain[i].flip(-1) if mirrored else plain[i])


def test_latents_train_in_float32_and_unscaled() -> None:
    built = method(LATENTS)
    batch, draws = batch_and_draws(built)
    x0 = built.training_input(batch, draws)
    assert x0.dtype == torch.float32 and torch.equal(x0, batch["latents"].float())
    loss(built, batch, draws).backward()
    assert all(p.grad is not None for p in built.model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"method\.channels"),
        (torch.zeros(2, 1, 16, 16, dtype=torch.uint8), r"method\.image_size"),
        (torch.zeros(2, 1, 8, 8), "uint8"),
    ],
)
def test_wrong_rows_are_refused_by_key(rows: torch.Tensor, words: str) -> None:
    built = method()
    with pytest.raises(DataError, match=words):
        built.training_input({"pixels": rows}, {"noise": torch.zeros(2, 1, 8, 8)})
    with pytest.raises(DataError, match="floats"):
        method(LATENTS).training_input(
            {"latents": torch.zeros(2, 5, 8, 8, dtype=torch.int64)}, {"noise": torch.zeros(2, 5, 8, 8)}
        )


def test_bf16_autocast_keeps_the_loss_in_float32() -> None:
    built = method()
    batch, draws = batch_and_draws(built)
    exact = loss(built, batch, draws)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = loss(built, batch, draws)
    assert rounded.dtype == torch.float32 and rounded.item() == pytest.approx(exact.item(), rel=0.05)


def test_a_few_steps_lower_the_loss() -> None:
    built = method()
    optimizer = torch.optim.AdamW((p for p in built.model.parameters() if p.requires_grad), lr=3e-3)
    batch, draws = batch_and_draws(built)
    first = loss(built, batch, draws).item()
    for _ in range(30):
        optimizer.zero_grad()
        loss(built, batch, draws).backward()
        optimizer.step()
    assert loss(built, batch, draws).item() < 0.7 * first
