"""Blocks of images: fixed batches, draws by id, what a method may return, eval mode around it."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from hpc_gen.runtime.errors import DivergedError, StopRequested, UserError
from hpc_gen.runtime.randomness import Draw
from hpc_gen.runtime.stop import Cause, Stop
from hpc_gen.sampling.generate import generate_block, sampling_mode
from hpc_gen.sampling.plan import SamplePlan

PLAN = SamplePlan("r", 1, "m", None, "h", 5, 12, 6, 4, 1, "cpu", "balanced", 3, {})


def no_poll() -> None:
    pass


class Noise:
    """Images = label * 60 + noise of the id; remembers how it was called."""

    def __init__(self, channels: int = 3, latents: bool = False) -> None:
        self.network = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
        self.batches: list[list[int]] = []
        self.channels, self.latents = channels, latents

    def roles(self):
        return {"generator": self.network}

    def conditions(self, ids, plan):
        return {"labels": plan.labels(ids), "ids": ids}

    def generate(self, conditions, draws, settings, poll):
        assert not self.network.training and not torch.is_grad_enabled()
        poll()
        self.batches.append(conditions["ids"].tolist())
        noise = draws.take("x", Draw((self.channels, 2, 2)))
        values = conditions["labels"].view(-1, 1, 1, 1) * 60.0 + noise
        return values if self.latents else values.clamp(0, 255).to(torch.uint8)


class Doubling:
    """A decoder that says what it was given."""

    def decode(self, latents):
        return (latents * 2).clamp(0, 255).to(torch.uint8)


def test_fixed_batches_and_draws_by_id():
    method = Noise()
    first = generate_block(method, PLAN, range(6), None, no_poll)
    second = generate_block(method, PLAN, range(6, 12), None, no_poll)
    assert method.batches == [[0, 1, 2, 3], [4, 5], [6, 7, 8, 9], [10, 11]]
    assert first.shape == (6, 3, 2, 2) and first.dtype == torch.uint8
    assert (first[:, 0, 0, 0] // 50).tolist() == [0, 1, 2, 0, 1, 2]
    whole = generate_block(Noise(), replace(PLAN, batch=12, block_images=12), range(12), None, no_poll)
    assert torch.equal(torch.cat([first, second]), whole)  # elementwise maths: here even the batch does not matter
    assert not torch.equal(generate_block(Noise(), replace(PLAN, seed=6), range(6), None, no_poll), first)


def test_grey_images_become_colour_ones():
    images = generate_block(Noise(channels=1), PLAN, range(6), None, no_poll)
    assert images.shape == (6, 3, 2, 2)
    assert torch.equal(images[:, 0], images[:, 2])
    assert images.is_contiguous()


def test_latents_need_a_decoder():
    with pytest.raises(UserError, match="names no tokenizer that decodes them"):
        generate_block(Noise(latents=True), PLAN, range(6), None, no_poll)
    images = generate_block(Noise(latents=True), PLAN, range(6), None, no_poll, Doubling())
    assert images[1, 0, 0, 0] > 100


def test_latents_that_are_not_finite_name_the_image():
    method = Noise(latents=True)
    good = method.generate

    def generate(*args):
        latents = good(*args)
        latents[1, 0, 0, 0] = float("nan")
        return latents

    method.generate = generate
    with pytest.raises(DivergedError, match=r"1 of 4 latents are not finite \(image 1 first\)"):
        generate_block(method, PLAN, range(6), None, no_poll, Doubling())


def test_a_stop_inside_leaves_the_method_as_it_was():
    method = Noise()
    method.network[1].eval()
    calls = iter(range(10))

    def poll() -> None:
        if next(calls) == 3:
            raise StopRequested(Stop(Cause.STOPPED, "STOP file"))

    with pytest.raises(StopRequested):
        generate_block(method, PLAN, range(6), None, poll)
    assert method.network.training and not method.network[1].training
    assert torch.is_grad_enabled()


def test_sampling_mode_allows_gradients_inside():
    with sampling_mode(Noise()), torch.enable_grad():
        x = torch.ones(2, requires_grad=True)
        assert torch.autograd.grad((x**2).sum(), x)[0].tolist() == [2.0, 2.0]
