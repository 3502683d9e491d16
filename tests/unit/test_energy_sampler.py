"""The ancestral sampler of methods/energy: repeatable, cut anywhere, guided right, stoppable at each step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from hpc_gen.diffusion.gaussian import GaussianDiffusion, linear_betas
from hpc_gen.methods.energy.config import EnergyConfig, SamplingSettings
from hpc_gen.methods.energy.objective import ROLE, EnergyDiffusion
from hpc_gen.methods.energy.recipe import ENTRY
from hpc_gen.methods.energy.sampler import (
    ancestral_steps,
    evaluation_layout,
    guided,
    to_images,
)
from hpc_gen.methods.protocol import TableFacts
from hpc_gen.runtime.errors import DivergedError, UserError
from hpc_gen.runtime.randomness import Draws

CLASSES = 4
LABELS = torch.tensor([0, 3, 1, 2, 0, 1])


def method(**change: Any) -> EnergyDiffusion:
    """A materialised method whose zero parameters were redrawn, so that its output is not zero."""
    base = {"input": "pixels", "image_size": 8, "channels": 1, "patch_size": 2, "hidden": 16, "depth": 1, "heads": 2}
    config = EnergyConfig(**{**base, "diffusion_timesteps": 50, **change})
    built = ENTRY.build(config, TableFacts(num_classes=CLASSES))
    assert isinstance(built, EnergyDiffusion)
    built.model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    built.initialise(ROLE, generator)
    for parameter in built.model.parameters():
        if not parameter.any():
            parameter.data.normal_(0.0, 0.1, generator=generator)
    built.model.eval()
    return built


def latents(**change: Any) -> EnergyDiffusion:
    return method(**{"input": "latents", "image_size": 8, "tokenizer_stride": 2, "channels": 3, **change})


def generate(built: EnergyDiffusion, ids: list[int], labels: torch.Tensor = LABELS, **settings: Any) -> torch.Tensor:
    draws = Draws(11, "sample", ids)
    chosen = SamplingSettings(**{"steps": 5, **settings})
    return built.generate({"labels": labels[: len(ids)]}, draws, chosen, lambda: None)


@contextmanager
def calls(built: EnergyDiffusion) -> Iterator[list[tuple[torch.Tensor, ...]]]:
    """Records the arguments of every network call."""
    seen: list[tuple[torch.Tensor, ...]] = []
    handle = built.model.register_forward_pre_hook(lambda _, args: seen.append(args))
    yield seen
    handle.remove()


def test_pixels_become_three_channel_images() -> None:
    images = generate(method(), [0, 1])
    assert images.shape == (2, 3, 8, 8) and images.dtype == torch.uint8 and images.is_contiguous()
    assert torch.equal(images[:, 0], images[:, 2])
    colour = generate(method(channels=3), [0, 1])
    assert colour.shape == (2, 3, 8, 8) and not torch.equal(colour[:, 0], colour[:, 2])


def test_latents_stay_floats() -> None:
    sample = generate(latents(), [0, 1, 2])
    assert sample.shape == (3, 3, 4, 4) and sample.dtype == torch.float32 and not sample.requires_grad


def test_generation_is_repeatable_and_keyed_by_image_id() -> None:
    built = latents()
    assert torch.equal(generate(built, [4, 9]), generate(built, [4, 9]))
    assert not torch.equal(generate(built, [4, 9])[1], generate(built, [4, 8])[1])


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_generation_does_not_depend_on_the_cut_of_the_batch(guidance: float) -> None:
    built = latents()
    whole = generate(built, [0, 1, 2, 3, 4, 5], guidance=guidance)
    parts = [generate(built, [0], LABELS[:1], guidance=guidance)]
    parts += [generate(built, [1, 2, 3, 4, 5], LABELS[1:], guidance=guidance)]
    assert torch.allclose(torch.cat(parts), whole, atol=2e-5)


def test_training_mode_changes_nothing() -> None:
    built = latents()
    expected = generate(built, [0, 1])
    built.model.train()
    assert torch.equal(generate(built, [0, 1]), expected)


def test_poll_is_called_before_each_step_and_stops_the_chain() -> None:
    built = latents()
    polls: list[int] = []

    def poll() -> None:
        polls.append(1)
        if len(polls) == 3:
            raise KeyboardInterrupt

    with calls(built) as seen, pytest.raises(KeyboardInterrupt):
        built.generate({"labels": LABELS[:1]}, Draws(0, "sample", [0]), SamplingSettings(steps=5), poll)
    assert len(seen) == 2


def test_network_sees_original_timesteps_from_the_top() -> None:
    built = latents()
    with calls(built) as seen:
        generate(built, [0, 1], steps="ddim10")
    assert [args[1].tolist() for args in seen] == [[t, t] for t in range(45, -1, -5)]
    assert all(args[1].dtype == torch.int64 for args in seen)


def test_each_step_draws_its_own_noise_and_the_last_none() -> None:
    built = latents()
    taken: list[tuple[str, int]] = []

    class Recorded(Draws):
        def take(self, name: str, draw: Any, k: int = 0) -> torch.Tensor:
            taken.append((name, k))
            return super().take(name, draw, k)

    built.generate({"labels": LABELS[:2]}, Recorded(0, "sample", [0, 1]), SamplingSettings(steps=4), lambda: None)
    assert taken == [("x_T", 0), ("step_noise", 0), ("step_noise", 1), ("step_noise", 2)]


def test_without_guidance_the_batch_is_not_doubled() -> None:
    built = latents()
    with calls(built) as seen:
        generate(built, [0, 1, 2], guidance=1.0)
    assert [len(args[0]) for args in seen] == [3] * 5


def test_guidance_doubles_the_batch_with_the_null_class() -> None:
    built = latents()
    with calls(built) as seen:
        generate(built, [0, 1, 2], guidance=2.0)  # an odd batch, which the reference cannot
    for x, t, y in seen:
        assert len(x) == len(t) == 6 and torch.equal(x[:3], x[3:]) and torch.equal(t[:3], t[3:])
        assert y.tolist() == [0, 3, 1, CLASSES, CLASSES, CLASSES]


def test_guidance_moves_every_channel_away_from_the_null_class() -> None:
    built = latents()
    null = torch.full((2,), CLASSES)
    without, alone = generate(built, [0, 1], guidance=0.0), generate(built, [0, 1], null)
    assert float((without - alone).abs().max()) <= 1e-5 * float(alone.abs().max())
    plain, strong = generate(built, [0, 1]), generate(built, [0, 1], guidance=4.0)
    assert ((plain - strong).abs().amax(dim=(0, 2, 3)) > 1e-3).all()


def test_guidance_formula() -> None:
    c, u = torch.tensor([3.0]), torch.tensor([1.0])
    assert [guided(c, u, w).item() for w in (0.0, 1.0, 2.5)] == [1.0, 3.0, 6.0]


def test_guidance_without_a_trained_null_class_is_refused() -> None:
    with pytest.raises(UserError, match=r"method\.label_dropout"):
        generate(latents(label_dropout=0.0), [0], guidance=2.0)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (torch.tensor([CLASSES + 1]), "classes 0 to 3"),
        (torch.tensor([-1]), "classes 0 to 3"),
        (torch.tensor([1.0]), "int64"),
        (torch.tensor([[1]]), "int64"),
    ],
)
def test_wrong_labels_are_refused(labels: torch.Tensor, words: str) -> None:
    with pytest.raises(UserError, match=words):
        generate(latents(), [0], labels)


def test_more_steps_than_timesteps_are_refused() -> None:
    with pytest.raises(UserError, match="give 1 to 50"):
        generate(latents(), [0], steps=51)


@pytest.mark.parametrize(
    ("value", "pixels", "floats"),
    [(None, 1.0, None), (True, 1.0, 1.0), (False, None, None), (4.0, 4.0, 4.0), (1, 1.0, 1.0)],
)
def test_clip_setting(value: Any, pixels: float | None, floats: float | None) -> None:
    settings = SamplingSettings(clip_denoised=value)
    assert (settings.clip_limit("pixels"), settings.clip_limit("latents")) == (pixels, floats)


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0}, {"steps": True}, {"guidance": -1.0}, {"guidance": float("nan")}, {"clip_denoised": 0.0}, {"clip_denoised": -2.0},
        {"clip_denoised": float("inf")}, {"temperature": 0.5},
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SamplingSettings(**settings)


def oracle(chain: GaussianDiffusion, x0: torch.Tensor, full: GaussianDiffusion) -> Any:
    """A predictor that knows the clean sample: its noise is what x_t holds besides it."""

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        bar = torch.from_numpy(full.alphas_cumprod)[t].view(-1, 1)
        return (x - bar.sqrt() * x0) / (1 - bar).sqrt()

    return predict


def test_perfect_predictions_lead_to_the_clean_sample() -> None:
    full = GaussianDiffusion(linear_betas(100))
    chain = full.respaced(20)
    x0 = torch.tensor([[0.5, -0.9]], dtype=torch.float64)
    noise = torch.randn(21, 1, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    predict = oracle(chain, x0, full)
    states = list(ancestral_steps(predict, chain, noise[20], lambda k: noise[k], clip=None, poll=lambda: None))
    assert len(states) == 20 and torch.allclose(states[-1], x0, atol=1e-9)
    # Each state is a sample of the posterior around the clean one, so it drifts there and is never there before.
    assert (states[0] - x0).abs().max() > 0.1


def test_clipping_bounds_the_clean_prediction() -> None:
    chain = GaussianDiffusion(linear_betas(100)).respaced(5)
    wild = torch.full((1, 2), 50.0)

    def walk(clip: float | None) -> torch.Tensor:
        steps = ancestral_steps(
            lambda x, t: -wild, chain, torch.zeros(1, 2), lambda k: torch.zeros(1, 2), clip=clip, poll=lambda: None
        )
        return list(steps)[-1]

    assert walk(0.3) == pytest.approx(torch.full((1, 2), 0.3), abs=1e-6)
    assert walk(None).abs().min() > 0.3


def test_pixels_that_are_no_numbers_are_not_turned_into_images() -> None:
    built = method()
    built.model.dit.final_layer.linear.bias.data.fill_(float("nan"))
    with pytest.raises(DivergedError, match="not finite"):
        generate(built, [0])


def test_images_are_clipped_and_rounded() -> None:
    values = torch.tensor([-1.5, -1.0, 0.0, 0.9999, 1.0, 7.0]).view(1, 1, 1, 6)
    assert to_images(values)[0, 1, 0].tolist() == [0, 0, 128, 255, 255, 255]


def test_reference_evaluation_layout() -> None:
    ids, labels = evaluation_layout(num_images=6, num_classes=3, batch=2, world_size=2, rank=1)
    assert ids.tolist() == [[2, 3], [6, 7]] and labels.tolist() == [[1, 1], [0, 0]]
