"""The energy variant: gradient as prediction, its losses, moments as input, guidance, and both second-order routes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from hpc_gen.methods.energy.config import EnergyConfig, EnergyHeadConfig, SamplingSettings
from hpc_gen.methods.energy.losses import landscape_of, refinement_errors
from hpc_gen.methods.energy.model import Derivatives
from hpc_gen.methods.energy.objective import ROLE, EnergyDiffusion
from hpc_gen.methods.energy.recipe import ENTRY
from hpc_gen.methods.energy.sampler import guided_landscape
from hpc_gen.methods.energy.second_order import squared_errors
from hpc_gen.methods.protocol import Curve, Measures, TableFacts, Turn
from hpc_gen.nn.posterior import LatentScale, sample_moments
from hpc_gen.runtime.errors import UserError
from hpc_gen.runtime.randomness import Draws, Stream

CLASSES = 4
TURN = Turn(ROLE, "denoise")


def method(energy: dict[str, Any] | None = None, facts: TableFacts | None = None, **change: Any) -> EnergyDiffusion:
    """A materialised energy model whose zero parameters were redrawn, so that its gradient is not zero."""
    base = {"variant": "energy", "input": "latents", "image_size": 8, "tokenizer_stride": 2, "channels": 3}
    sizes = {"hidden": 16, "depth": 2, "heads": 2, "diffusion_timesteps": 50}
    config = EnergyConfig(**{**base, **sizes, "energy": EnergyHeadConfig(**(energy or {})), **change})
    built = ENTRY.build(config, facts or TableFacts(num_classes=CLASSES))
    assert isinstance(built, EnergyDiffusion)
    built.model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    built.initialise(ROLE, generator)
    for parameter in built.model.parameters():
        if not parameter.any():
            parameter.data.normal_(0.0, 0.2, generator=generator)
    return built


def a_batch(built: EnergyDiffusion, rows: int = 6, start: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Rows and draws of positions start .. start + rows - 1, as the feed would give them."""
    ids = list(range(start, start + rows))
    draws = {name: Stream(3, name).batch(draw, ids) for name, draw in built.draws(TURN).items()}
    shape = built.config.row_shape
    table = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in ids])
    batch = {name: table for name in built.columns() if name != "labels"}
    return {**batch, "labels": torch.tensor([i % CLASSES for i in ids])}, draws


def gradients(built: EnergyDiffusion) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in built.model.named_parameters() if p.grad is not None}


def means(built: EnergyDiffusion, batch: dict[str, Tensor], draws: dict[str, Tensor]) -> dict[str, float]:
    counts = built.counts(TURN, batch, draws)
    terms = built.objective(TURN, batch, draws).terms
    assert terms.keys() == counts.keys()
    return {name: float(term.sum.detach()) / counts[name] for name, term in terms.items()}


@pytest.mark.parametrize("linear_then_mean", [False, True])
def test_the_prediction_is_the_scaled_slope(linear_then_mean: bool) -> None:
    built = method({"grad_multiplier": 3.0, "linear_then_mean": linear_then_mean})
    built.model.double()
    x, t, y = torch.randn(2, 3, 4, 4).double(), torch.tensor([3, 40]), torch.tensor([0, 4])
    energy, noise = built.model.energy_and_noise(x, t, y)
    step = torch.zeros_like(x)
    step[:, 1, 2, 3] = 1e-5
    up, down = built.model.energy(x + step, t, y), built.model.energy(x - step, t, y)
    torch.testing.assert_close(noise[:, 1, 2, 3], 3.0 * (up - down) / 2e-5, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(energy, built.model.energy(x, t, y))


def test_no_graph_is_kept_where_none_is_wanted() -> None:
    built = method()
    x, t, y = torch.randn(2, 3, 4, 4), torch.tensor([3, 40]), torch.tensor([0, 4])
    assert built.model(x, t, y).requires_grad
    with torch.no_grad():
        energy, noise = built.model.energy_and_noise(x, t, y)
    assert not energy.requires_grad and not noise.requires_grad and not x.requires_grad


@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_both_second_order_routes_give_the_same_gradients(checkpoint_blocks: bool) -> None:
    found = []
    for route in ("double_backward", "forward_over_reverse"):
        built = method({"second_order": route, "grad_multiplier": 7.0}, checkpoint_blocks=checkpoint_blocks, depth=3)
        built.model.double()
        batch, draws = a_batch(built)
        batch = {name: v.double() if v.is_floating_point() else v for name, v in batch.items()}
        draws = {name: v.double() if v.is_floating_point() else v for name, v in draws.items()}
        value = built.objective(TURN, batch, draws).terms["mse"].sum
        value.backward()
        found.append((float(value.detach()), gradients(built)))
    (value, plain), (other, forward) = found
    assert other == pytest.approx(value, rel=1e-12)
    assert plain.keys() == forward.keys() and len(plain) > 20
    for name, gradient in plain.items():
        torch.testing.assert_close(forward[name], gradient, rtol=1e-9, atol=1e-12)


def test_forward_over_reverse_keeps_no_graph_in_validation() -> None:
    built = method({"second_order": "forward_over_reverse"})
    batch, draws = a_batch(built)
    with torch.no_grad():
        assert not squared_errors(built.model, batch["latents"], draws["t"], batch["labels"], draws["noise"])[
            1
        ].requires_grad


def test_the_fused_norm_would_be_wrong_there() -> None:
    """Why FORWARD exists; if this fails, torch has mended F.layer_norm and the primitive norm may go."""
    x, v = torch.randn(4, 16).double(), torch.randn(4, 16).double()
    wrong = []
    for fused in (True, False):
        weight = torch.eye(16, dtype=torch.float64).requires_grad_()

        def through(z: Tensor, weight: Tensor = weight, fused: bool = fused) -> Tensor:
            from hpc_gen.methods.energy.model import normalise

            return normalise(z @ weight, Derivatives.SECOND if fused else Derivatives.FORWARD).pow(3).sum()

        torch.func.jvp(through, (x,), (v,))[1].backward()
        wrong.append(weight.grad)
    assert wrong[0] is None or not torch.allclose(wrong[0], wrong[1], rtol=1e-6)


def test_every_term_is_off_until_asked_for() -> None:
    batch, draws = a_batch(method())
    assert means(method(), batch, draws).keys() == {"mse"}
    full = method({"contrastive_weight": 0.05, "learnable_step_size": True, "step_size": 0.05})
    found = means(full, *a_batch(full))
    assert found.keys() == {"mse", "contrastive", "refinement", "step_size"}
    assert found["step_size"] == pytest.approx(0.05)
    terms = full.objective(TURN, *a_batch(full)).terms
    assert {name: term.weight for name, term in terms.items()} == {
        "mse": 1.0,
        "contrastive": 0.05,
        "refinement": 0.1,
        "step_size": 0.0,
    }


def test_losses_do_not_depend_on_how_the_batch_is_cut() -> None:
    """The reference couples a rank's whole batch: its refinement loss saturates with the batch size."""
    built = method({"contrastive_weight": 0.05, "learnable_step_size": True, "step_size": 0.05})
    whole = means(built, *a_batch(built, 6))
    parts = [means(built, *a_batch(built, 2, start)) for start in (0, 2, 4)]
    for name in ("mse", "contrastive", "refinement"):
        assert sum(part[name] for part in parts) / 3 == pytest.approx(whole[name], rel=2e-5)


def test_the_step_size_learns_and_has_its_own_rate() -> None:
    built = method({"learnable_step_size": True, "step_size": 0.05, "step_size_lr_scale": 20.0})
    group = built.parameter_groups(ROLE)[-1]
    assert (group.names, group.weight_decay, group.lr_scale) == (("alpha",), 0.0, 20.0)
    term = built.objective(TURN, *a_batch(built)).terms["refinement"]
    term.sum.backward()
    assert built.model.alpha.grad is not None and float(built.model.alpha.grad) != 0.0
    assert "alpha" not in dict(method().model.named_parameters()) and "alpha" in dict(method().model.named_buffers())


def test_refinement_wants_falling_and_steady_energies() -> None:
    config, counts = EnergyHeadConfig(), torch.tensor([3, 3, 3, 2])
    #          falls steadily, falls erratically, rises, one drop only
    energies = torch.tensor([[3.0, 3.0, 1.0, 2.0], [2.0, 4.0, 2.0, 1.0], [1.0, 1.0, 3.0, 1.0]])
    steady, erratic, rising, single = refinement_errors(energies, counts, config).tolist()
    assert steady < erratic < rising
    assert single == pytest.approx(torch.sigmoid(torch.tensor(-0.5)).item())  # no NaN from a variance of one number


def test_refinement_of_the_reference_is_a_nan_for_one_sample_and_two_steps() -> None:
    config = EnergyHeadConfig(refinement="reference")
    value = refinement_errors(torch.tensor([[2.0], [1.0]]), torch.tensor([2]), config)
    assert bool(value.isnan().all())


def test_groups_must_be_whole() -> None:
    built = method({"contrastive_weight": 0.05, "step_group": 4})
    with pytest.raises(UserError, match=r"train\.coupling_group"):
        built.objective(TURN, *a_batch(built, 6))


def test_contrast_walks_with_the_configured_step_size() -> None:
    from hpc_gen.methods.energy.losses import negatives

    batch, draws = a_batch(method({"contrastive_weight": 0.05}))
    found = []
    for change in ({"step_size": 2.0}, {"step_size": 0.001}, {"step_size": 2.0, "contrastive_step_size": 0.001}):
        built = method({"contrastive_weight": 0.05, "always_accept": True, **change})
        names = (draws["t"], batch["labels"], draws["contrastive_noise"], draws["perturbation"])
        found.append(negatives(built.model, built.diffusion, built.config.energy, batch["latents"], *names)[1])
    assert not torch.allclose(found[0], found[1]) and torch.equal(found[1], found[2])


def test_one_label_for_all_evaluations_of_a_sample() -> None:
    """The reference draws a new label dropout at every call, so both sides of its acceptance test may differ."""
    built = method({"contrastive_weight": 0.05, "learnable_step_size": True}, label_dropout=0.5)
    seen: list[Tensor] = []
    inner = built.model.dit.y_embedder.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    batch, draws = a_batch(built)
    built.objective(TURN, batch, draws)
    inner.remove()
    dropped = torch.where(draws["drop"] < 0.5, CLASSES, batch["labels"])
    assert len(seen) > 4 and 0 < int((dropped == CLASSES).sum()) < len(dropped)
    for labels in seen:
        assert torch.equal(labels, dropped) or torch.equal(labels, torch.cat([dropped, dropped]))


def test_moments_are_sampled_and_scaled_as_the_tokenizer_says() -> None:
    facts = TableFacts(num_classes=CLASSES, tokenizer={"name": "kl_vae", "scale": 0.25, "shift": 0.5})
    built = method(facts=facts, input="moments", horizontal_flip=True)
    assert set(built.columns()) == {"moments", "moments_flip", "labels"}
    assert built.columns()["moments"].shape == (6, 4, 4)
    batch, draws = a_batch(built)
    batch["moments"], batch["moments_flip"] = batch["moments"].half(), (batch["moments"] + 1).half()
    x0 = built.training_input(batch, draws)
    for i, mirrored in enumerate((draws["flip"] < 0.5).tolist()):
        row = batch["moments_flip" if mirrored else "moments"][i : i + 1].float()
        z = row[:, :3] + (row[:, 3:] / 2).exp() * draws["posterior"][i : i + 1]
        torch.testing.assert_close(x0[i : i + 1], (z - 0.5) * 0.25)
    assert len(set((draws["flip"] < 0.5).tolist())) == 2


def test_latent_scale_round_trip_and_channels() -> None:
    z = torch.randn(2, 3, 4, 4)
    scale = LatentScale.of({"scale": [1.0, 2.0, 4.0], "shift": [0.0, 1.0, -1.0]})
    torch.testing.assert_close(scale.restore(scale.normalise(z)), z)
    with pytest.raises(ValueError, match="3 scales or shifts for latents of 2 channels"):
        scale.normalise(z[:, :2])
    assert torch.equal(LatentScale.of({}).normalise(z), z)
    assert torch.isfinite(sample_moments(torch.full((1, 2, 1, 1), 1e4), torch.ones(1, 1, 1, 1))).all()


def test_guided_energy_has_the_guided_noise_as_its_slope() -> None:
    built = method()
    x, t, y = torch.randn(3, 3, 4, 4), torch.tensor([7, 7, 7]), torch.tensor([0, 1, 3])
    with torch.no_grad():
        energy, noise = guided_landscape(built.model, t, y, CLASSES, 2.5).slope(x)
        given = landscape_of(built.model, t, y).slope(x)
        null = landscape_of(built.model, t, torch.full_like(y, CLASSES)).slope(x)
    torch.testing.assert_close(energy, null[0] + 2.5 * (given[0] - null[0]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(noise, null[1] + 2.5 * (given[1] - null[1]), rtol=1e-5, atol=1e-6)


def sample(built: EnergyDiffusion, ids: list[int], **settings: Any) -> Tensor:
    labels = torch.tensor([i % CLASSES for i in ids])
    chosen = SamplingSettings(**{"steps": 5, "inner_loop": True, "inner_step_size": 2.0, **settings})
    return built.generate({"labels": labels}, Draws(1, "sample", ids), chosen, lambda: None)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_inner_loop_lowers_the_energy_and_is_measured(guidance: float) -> None:
    built = method({"grad_multiplier": 5.0})
    assert isinstance(built, Measures) and built.take_curves() == {}
    sample(built, [0, 1, 2], guidance=guidance)
    curves = built.take_curves()
    change = curves["inner_energy_change"].means()
    assert change[0] == 0.0 and all(value < 0 for value in change[1:] if value is not None)
    assert 0 < curves["energy_accept_rate"].sums[0] <= curves["energy_accept_rate"].counts[0]
    assert built.take_curves() == {}


def test_images_do_not_depend_on_their_neighbours() -> None:
    built = method({"grad_multiplier": 5.0})
    torch.testing.assert_close(sample(built, [0, 1, 2])[2:], sample(built, [2]), rtol=1e-4, atol=1e-5)


def test_which_timestep_the_inner_loop_is_told() -> None:
    built = method()
    asked: dict[str, list[int]] = {}
    for mode in ("index", "mapped", "reached"):
        seen: list[int] = []
        handle = built.model.dit.t_embedder.register_forward_pre_hook(lambda _, t, seen=seen: seen.append(int(t[0][0])))
        sample(built, [0], inner_t=mode, inner_steps=1, always_accept=True)
        handle.remove()
        # per step: the prediction, then the slope and the energy of one inner step
        asked[mode] = [t for i, t in enumerate(seen) if i % 3 == 1]
    chain = built.diffusion.respaced(5).timestep_map
    assert asked["index"] == [4, 3, 2, 1, 0]
    assert asked["mapped"] == chain[::-1]
    assert asked["reached"] == chain[-2::-1]  # none after the last step, which leaves no noise


def test_the_step_size_asked_for_is_the_one_used() -> None:
    """The reference silently takes the checkpoint's."""
    built = method()
    own = sample(built, [0], inner_step_size=None)
    built.model.alpha.fill_(9.0)
    assert torch.equal(sample(built, [0], inner_step_size=0.01), own)
    assert not torch.equal(sample(built, [0], inner_step_size=None), own)


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(UserError, match=r"method\.variant=energy"):
        sample(method(variant="standard"), [0])
    with pytest.raises(ValidationError, match="refinement_weight"):
        EnergyHeadConfig(learnable_step_size=True, refinement_weight=0.0)


def test_curves_add_up() -> None:
    first, second = Curve((1.0, 2.0), (1.0, 2.0)), Curve((3.0,), (1.0,))
    assert first.added(second) == second.added(first) == Curve((4.0, 2.0), (2.0, 2.0))
    assert Curve((4.0, 0.0), (2.0, 0.0)).means() == [2.0, None]
