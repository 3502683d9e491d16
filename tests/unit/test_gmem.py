"""GMem through the method's protocol: sizes, what training reads, one coin for all columns, losses, samples, weights."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from hpc_gen.methods import registry
from hpc_gen.methods.gmem.bank import LowRankBank, as_condition, interpolated
from hpc_gen.methods.gmem.config import GmemConfig, GuidanceInterval, SamplingSettings
from hpc_gen.methods.gmem.objective import ROLE, Gmem
from hpc_gen.methods.gmem.recipe import ENTRY
from hpc_gen.methods.gmem.weights import adapt_official, official_list, scale_metadata
from hpc_gen.methods.materialise import materialise
from hpc_gen.methods.protocol import TableFacts
from hpc_gen.nn.posterior import LatentScale
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.runtime.randomness import Draws, Stream

TINY: dict[str, Any] = {
    "image_size": 16,
    "tokenizer_stride": 4,
    "channels": 3,
    "hidden": 16,
    "depth": 2,
    "heads": 2,
    "snippet_dim": 6,
    "projector_hidden": 8,
    "repr_dim": 5,
    "repr_after_block": 1,
}
B = 4


def tiny(scale: LatentScale | None = None, num_classes: int = 0, **keys: Any) -> Gmem:
    method = Gmem(GmemConfig(**{**TINY, **keys}), num_classes, scale)
    materialise(method, seed=3)
    return method


def batch_of(method: Gmem, seed: int = 0, rows: int = B) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, spec in method.columns().items():
        if spec.dtypes == ("int64",):
            found[name] = torch.randint(0, method.num_classes, (rows,), generator=generator)
        else:
            found[name] = torch.randn(rows, *spec.shape, generator=generator)
    return found


def draws_of(method: Gmem, rows: int = B) -> dict[str, Tensor]:
    (turn,) = method.turns(0, 0)
    named = method.draws(turn).items()
    return {name: Stream(1, f"train/{turn.purpose}/{name}").batch(draw, range(rows)) for name, draw in named}


def losses(method: Gmem, batch: dict[str, Tensor], draws: dict[str, Tensor]) -> dict[str, float]:
    (turn,) = method.turns(0, 0)
    terms = method.objective(turn, batch, draws).terms
    assert terms.keys() == method.counts(turn, batch, draws).keys()
    return {name: float(term.sum.detach()) / term.count for name, term in terms.items()}


@pytest.mark.parametrize(
    ("keys", "columns"),
    [
        ({}, {"latents", "cls_tokens", "representations"}),
        ({"projection_weight": 0.0}, {"latents", "cls_tokens"}),
        ({"input": "moments"}, {"moments", "cls_tokens", "representations"}),
    ],
)
def test_columns_and_their_mirrored_ones(keys: dict[str, Any], columns: set[str]) -> None:
    assert set(tiny(**keys).columns()) == columns | {f"{name}_flip" for name in columns}
    assert set(tiny(horizontal_flip=False, **keys).columns()) == columns


def test_the_class_condition_reads_labels_and_no_representations() -> None:
    method = tiny(num_classes=3, condition="class")
    assert set(method.columns()) == {"latents", "latents_flip", "labels"}
    assert method.columns()["labels"].max_value == 2
    found = losses(method, batch_of(method), draws_of(method))
    assert set(found) == {"mse", "cosine"}


def test_one_coin_flips_all_columns_of_a_row() -> None:
    """The reference tosses three (specs/gmem.md section 8): a mirrored latent may meet the other image's snippet."""
    method = tiny()
    batch, draws = batch_of(method), draws_of(method)
    draws["flip"] = torch.tensor([0.2, 0.8, 0.2, 0.8])
    mirrored = draws["flip"] < 0.5
    draws["keep"] = torch.ones_like(draws["keep"])
    latents = method.training_input(batch, draws)
    snippets = method.training_condition(batch, draws) * (1 - method.config.snippet_dropout)
    for row in range(B):
        ending = "_flip" if mirrored[row] else ""
        assert torch.equal(latents[row], batch["latents" + ending][row])
        assert torch.allclose(snippets[row], as_condition(batch["cls_tokens" + ending])[row])
    assert set(tiny(independent_flips=True).draws(method.turns(0, 0)[0])) > {"flip_snippet", "flip_representation"}


def test_dropout_of_snippets_is_by_element_and_scaled() -> None:
    method = tiny(horizontal_flip=False)
    batch, draws = batch_of(method, rows=2000), draws_of(method, rows=2000)
    found = method.training_condition(batch, draws)
    whole = as_condition(batch["cls_tokens"])
    kept = found != 0
    assert float(kept.float().mean()) == pytest.approx(0.6, abs=0.02)
    assert torch.allclose(found[kept], (whole / 0.6)[kept])


def test_latents_are_scaled_as_the_tokenizer_says() -> None:
    method = tiny(LatentScale((2.0, 1.0, 0.5), (1.0, 0.0, -1.0)), horizontal_flip=False)
    batch, draws = batch_of(method), draws_of(method)
    expected = (batch["latents"] - torch.tensor([1.0, 0.0, -1.0]).view(1, 3, 1, 1)) * torch.tensor(
        [2.0, 1.0, 0.5]
    ).view(1, 3, 1, 1)
    assert torch.allclose(method.training_input(batch, draws), expected)
    assert json.loads(scale_metadata({"scale": [2.0], "shift": 0.0})["hpc_gen.latent_scale"]) == [2.0]


def test_terms_do_not_depend_on_how_the_batch_is_cut() -> None:
    method = tiny()
    batch, draws = batch_of(method), draws_of(method)
    (turn,) = method.turns(0, 0)
    whole = method.objective(turn, batch, draws).terms
    for name in whole:
        parts = [
            method.objective(turn, {k: v[cut] for k, v in batch.items()}, {k: v[cut] for k, v in draws.items()}).terms[
                name
            ]
            for cut in (slice(0, 1), slice(1, B))
        ]
        assert float(sum(part.sum for part in parts)) == pytest.approx(float(whole[name].sum), rel=1e-5)


def test_a_perfect_network_has_no_loss_but_the_representations() -> None:
    method = tiny(horizontal_flip=False)
    batch, draws = batch_of(method), draws_of(method)
    truth = batch["latents"] - draws["noise"]
    method.model.with_representations = lambda *given, project: (truth, batch["representations"])  # type: ignore[method-assign]
    assert losses(method, batch, draws) == pytest.approx({"mse": 0, "cosine": 0, "projection": -1}, abs=1e-6)


def test_rows_that_do_not_fit_are_refused() -> None:
    method = tiny(horizontal_flip=False)
    batch, draws = batch_of(method), draws_of(method)
    with pytest.raises(DataError, match=r"column 'latents' came with rows of torch.float32 \[3, 5, 5\]"):
        losses(method, {**batch, "latents": torch.zeros(B, 3, 5, 5)}, draws)
    with pytest.raises(DataError, match=r"representations have shape \[9, 5\], the network projects to \[16, 5\]"):
        losses(method, {**batch, "representations": torch.zeros(B, 9, 5)}, draws)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"image_size": 18}, "'method.image_size' = 18 is not a multiple"),
        ({"hidden": 12, "heads": 2}, "heads of width 6 cannot be rotated"),
        ({"repr_after_block": 3}, "'method.repr_after_block' = 3, but the network has 2 blocks"),
        ({"repr_tokens": 9}, "'method.repr_tokens' = 9, but the network has 16 tokens"),
        ({"horizontal_flip": False, "independent_flips": True}, "needs 'method.horizontal_flip' = true"),
    ],
)
def test_sizes_that_cannot_be_are_refused(keys: dict[str, Any], told: str) -> None:
    with pytest.raises((ValidationError, ValueError), match=told):
        GmemConfig(**{**TINY, **keys})


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"method": "dopri5"}, "solves the ode only"),
        ({"shift": 0.3}, "changes the grid of the ode only"),
        ({"last_step": "none"}, "the score is infinite"),
    ],
)
def test_solvers_that_cannot_be_are_refused(keys: dict[str, Any], told: str) -> None:
    with pytest.raises((ValidationError, ValueError), match=told):
        SamplingSettings(**keys)


@pytest.mark.parametrize(
    "settings",
    [
        SamplingSettings(points=4),
        SamplingSettings(points=4, method="euler", last_step="tweedie", form="sigma"),
        SamplingSettings(mode="ode", method="euler", points=4, shift=0.3),
        SamplingSettings(mode="ode", method="dopri5", points=3),
        SamplingSettings(points=3, guidance=GuidanceInterval(scale=4.0, start=0.3, end=0.9)),
    ],
    ids=lambda settings: f"{settings.mode}-{settings.method}-{settings.guidance.scale:g}",
)
def test_samples_are_a_function_of_their_ids(settings: SamplingSettings) -> None:
    method = tiny()
    method.model.eval()
    snippets = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))

    def made(ids: list[int]) -> Tensor:
        conditions = {"cls_tokens": snippets[ids]}
        return method.generate(conditions, Draws(5, "sample", ids), settings, lambda: None)

    first, second = made([2, 4, 5]), made([5, 2, 4])
    assert first.shape == (3, 3, 4, 4) and bool(torch.isfinite(first).all())
    if settings.method == "dopri5":  # its steps suit the whole batch
        assert torch.allclose(second, first[[2, 0, 1]], atol=1e-3)
    else:
        assert torch.allclose(second, first[[2, 0, 1]], atol=1e-5)
    longer = method.generate(
        {"cls_tokens": 7 * snippets[[2, 4, 5]]}, Draws(5, "sample", [2, 4, 5]), settings, lambda: None
    )
    assert torch.allclose(longer, first, atol=1e-4)  # only the direction of a snippet matters


def test_snippets_that_do_not_fit_are_refused() -> None:
    method, settings = tiny(), SamplingSettings(points=3)
    for snippets, kind, told in (
        (torch.zeros(2, 7), UserError, r"snippets of shape \[2, 7\] were given, but the network takes \[N, 6\]"),
        (torch.full((2, 6), float("nan")), DataError, "snippets that are not finite"),
    ):
        with pytest.raises(kind, match=told):
            method.generate({"cls_tokens": snippets}, Draws(0, "sample", [0, 1]), settings, lambda: None)


def test_a_class_out_of_range_and_guidance_without_a_null_class_are_refused() -> None:
    method = tiny(num_classes=3, condition="class", label_dropout=0.0)
    settings = SamplingSettings(points=3)
    with pytest.raises(UserError, match="labels 0 to 7 were asked for"):
        method.generate({"labels": torch.tensor([0, 7])}, Draws(0, "sample", [0, 1]), settings, lambda: None)
    guided = SamplingSettings(points=3, guidance=GuidanceInterval(scale=2.0))
    with pytest.raises(UserError, match="method.label_dropout is 0"):
        method.generate({"labels": torch.tensor([0, 1])}, Draws(0, "sample", [0, 1]), guided, lambda: None)


def test_every_parameter_is_trained_in_one_group_and_gets_a_gradient() -> None:
    for keys in ({}, {"projection_weight": 0.0}, {"condition": "class"}):
        method = tiny(num_classes=3, **keys)
        (turn,) = method.turns(0, 0)
        batch, draws = batch_of(method), draws_of(method)
        torch.stack([t.weight * t.sum for t in method.objective(turn, batch, draws).terms.values()]).sum().backward()
        (group,) = method.parameter_groups(ROLE)
        trained = {name for name, p in method.model.named_parameters() if p.requires_grad}
        assert set(group.names) == trained
        assert {name for name, p in method.model.named_parameters() if p.grad is not None} == trained
        assert ("projector.0.0.weight" in trained) == (not keys)


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    plain, again = tiny(), tiny(checkpoint_blocks=True)
    again.model.load_state_dict(plain.model.state_dict())
    for method in (plain, again):
        losses_of = method.objective(method.turns(0, 0)[0], batch_of(method), draws_of(method)).terms
        sum(term.sum for term in losses_of.values()).backward()  # type: ignore[union-attr]
    for a, b in zip(plain.model.parameters(), again.model.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


def test_nothing_but_biases_begins_at_zero() -> None:
    for name, value in tiny().model.state_dict().items():
        assert name.endswith(".bias") == (float(value.abs().max()) == 0), name


def test_official_files() -> None:
    method = tiny()
    flat = {f"module.{name}": value for name, value in method.model.state_dict().items()}
    found, notes = adapt_official(ROLE, flat, method.config, method.model.state_dict())
    assert list(found) == list(official_list(method.config).state_dict) and notes == []
    moved = {**flat, "module.pos_embed": flat["module.pos_embed"] + 1}
    _, notes = adapt_official(ROLE, moved, method.config, method.model.state_dict())
    assert len(notes) == 1 and "'pos_embed' in the weights differs from ours by up to 1" in notes[0]
    with pytest.raises(DataError, match="a file of GMem's first version"):
        adapt_official(ROLE, {"network": torch.zeros(1), "memorybank": torch.zeros(1)}, method.config, {})


def test_the_registry_builds_it_for_a_table() -> None:
    entry, config = registry.typed_config({"name": "gmem", **TINY})
    assert entry is ENTRY
    method = entry.build(config, TableFacts(tokenizer={"name": "kl_vae", "scale": [2.0, 2.0, 2.0], "shift": 1.0}))
    assert method.scale == LatentScale((2.0, 2.0, 2.0), (1.0,))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"method\.num_classes is 2, but the training table has 5 classes"):
        entry.build(GmemConfig(**TINY, condition="class", num_classes=2), TableFacts(num_classes=5))


def test_the_low_rank_bank_is_the_best_of_its_rank_and_refuses_more() -> None:
    rows = torch.randn(30, 8, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.arange(8.0, 0, -1))
    errors = [
        float((LowRankBank.of(rows, rank).decode(LowRankBank.of(rows, rank).coefficients) - rows).norm())
        for rank in (2, 5, 8)
    ]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-4
    bank = LowRankBank.of(rows, 5)
    assert torch.allclose(bank.project(bank.rows(torch.tensor([3, 4]))), bank.coefficients[[3, 4]], atol=1e-4)
    same = LowRankBank.from_tensors(bank.tensors(), "x")
    assert torch.equal(same.rows(torch.arange(30)), bank.rows(torch.arange(30)))
    with pytest.raises(UserError, match="has no rank 9; give 1 to 8"):
        LowRankBank.of(rows, 9)
    with pytest.raises(DataError, match=r"x has no 'M'"):
        LowRankBank.from_tensors({"C": rows}, "x")
    with pytest.raises(DataError, match="do not fit together"):
        LowRankBank.from_tensors({**bank.tensors(), "S": torch.ones(3)}, "x")


def test_equal_snippets_interpolate_to_themselves() -> None:
    """The reference's spherical method gives the null snippet where the dot product is exactly 1."""
    unit = torch.zeros(6)
    unit[2] = 1.0
    for method in ("linear", "spherical", "concat"):
        between = as_condition(interpolated(unit, unit, torch.linspace(0, 1, 6), method))  # type: ignore[arg-type]
        assert torch.equal(between, unit.expand(6, -1)), method
