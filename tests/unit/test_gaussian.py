"""hpc_gen.diffusion.gaussian: schedules, respacing, and the ancestral posterior by its closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hpc_gen.diffusion.gaussian import (
    GaussianDiffusion,
    cosine_betas,
    linear_betas,
    named_betas,
    respaced_timesteps,
)
from hpc_gen.runtime.errors import UserError


@pytest.mark.parametrize(("num_timesteps", "first", "last"), [(1000, 1e-4, 0.02), (500, 2e-4, 0.04), (20, 0.005, 1.0)])
def test_linear_betas_scale_with_the_number_of_timesteps(num_timesteps: int, first: float, last: float) -> None:
    betas = linear_betas(num_timesteps)
    assert len(betas) == num_timesteps and betas.dtype == np.float64
    assert betas[0] == pytest.approx(first) and betas[-1] == pytest.approx(last)
    assert np.diff(betas) == pytest.approx((last - first) / (num_timesteps - 1))


def test_cosine_betas_are_capped() -> None:
    betas = cosine_betas(1000)
    assert betas.max() == 0.999 and betas.min() > 0


@pytest.mark.parametrize("call", [lambda: linear_betas(19), lambda: cosine_betas(0)])
def test_impossible_lengths_are_refused(call: object) -> None:
    with pytest.raises(UserError, match="use at least"):
        call()  # type: ignore[operator]


def test_schedules_by_name() -> None:
    assert (named_betas("linear", 100) == linear_betas(100)).all()
    with pytest.raises(UserError, match="did you mean 'cosine'"):
        named_betas("cosin", 100)


@pytest.mark.parametrize("betas", [[], [0.0, 0.1], [0.1, 1.1], [[0.1]]])
def test_odd_betas_are_refused(betas: list[float]) -> None:
    with pytest.raises(ValueError, match="betas"):
        GaussianDiffusion(np.array(betas, dtype=np.float64))


@pytest.mark.parametrize(("num_timesteps", "count"), [(1000, 250), (500, 8), (77, 77), (30, 2), (1000, 13), (31, 30)])
def test_a_count_keeps_both_ends_and_is_ascending(num_timesteps: int, count: int) -> None:
    kept = respaced_timesteps(num_timesteps, count)
    assert len(kept) == count and kept == sorted(set(kept))
    assert (kept[0], kept[-1]) == (0, num_timesteps - 1)
    assert respaced_timesteps(num_timesteps, f" {count} ") == kept


def test_sections_share_the_remainder_from_the_front() -> None:
    # 11 timesteps in 3 sections: 4, 4, 3.
    assert respaced_timesteps(11, "1,2,3") == [0, 4, 7, 8, 9, 10]


def test_strides_round_half_to_even() -> None:
    assert respaced_timesteps(6, 3) == [0, 2, 5]  # the middle is 2.5


def test_ddim_takes_the_smallest_integer_stride() -> None:
    assert respaced_timesteps(1000, "ddim50") == list(range(0, 1000, 20))
    assert respaced_timesteps(10, "ddim4") == [0, 3, 6, 9]


@pytest.mark.parametrize("spacing", ["", "many", "10;20", "ddimx", "1.5", "0", "-3", "101", "60,10", "ddim77", "10,,5"])
def test_impossible_spacings_are_refused_by_name(spacing: str) -> None:
    with pytest.raises(UserError, match="steps|timesteps"):
        respaced_timesteps(100, spacing)


def test_respaced_chain_keeps_alpha_bar_and_maps_to_original_timesteps() -> None:
    full = GaussianDiffusion(linear_betas(300))
    short = full.respaced("10,15,20")
    kept = respaced_timesteps(300, "10,15,20")
    assert short.timestep_map == kept
    assert short.alphas_cumprod == pytest.approx(full.alphas_cumprod[kept], rel=1e-12)
    again = short.respaced(5)  # a respaced chain of a respaced one still names original timesteps
    assert again.timestep_map == [kept[i] for i in respaced_timesteps(45, 5)]


def test_full_chain_maps_to_itself_and_one_step_works() -> None:
    full = GaussianDiffusion(linear_betas(50))
    assert full.timestep_map == list(range(50))
    one = full.respaced(1)
    assert one.timestep_map == [0] and one.posterior_std(0) == 0.0


def test_noising_matches_the_step_by_step_chain() -> None:
    diffusion = GaussianDiffusion(linear_betas(40))
    signal, variance = 1.0, 0.0
    for t, beta in enumerate(diffusion.betas):
        signal, variance = signal * (1 - beta) ** 0.5, variance * (1 - beta) + beta
        x_t = diffusion.add_noise(torch.ones(1, dtype=torch.float64), torch.tensor([t]), torch.zeros(1))
        assert x_t.item() == pytest.approx(signal, rel=1e-12)
        x_t = diffusion.add_noise(torch.zeros(1), torch.tensor([t]), torch.ones(1, dtype=torch.float64))
        assert x_t.item() == pytest.approx(variance**0.5, rel=1e-6)


def test_timesteps_are_per_sample_and_dtypes_are_kept() -> None:
    diffusion = GaussianDiffusion(linear_betas(100))
    for dtype in (torch.float32, torch.float64):
        x0, noise = torch.randn(3, 2, 4, 4, dtype=dtype), torch.randn(3, 2, 4, 4, dtype=dtype)
        t = torch.tensor([0, 99, 50])
        together = diffusion.add_noise(x0, t, noise)
        assert together.dtype == dtype
        for i in range(3):
            assert torch.equal(together[i : i + 1], diffusion.add_noise(x0[i : i + 1], t[i : i + 1], noise[i : i + 1]))


def test_true_noise_predicts_the_clean_sample() -> None:
    diffusion = GaussianDiffusion(linear_betas(100))
    x0, noise = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    for index in (0, 37, 99):
        x_t = diffusion.add_noise(x0, torch.full((2,), index), noise)
        assert torch.allclose(diffusion.predict_x0(x_t, index, noise), x0, atol=1e-9)


def test_posterior_is_bayes_rule() -> None:
    """Mean and variance of q(x_{t-1} | x_t, x_0) against the product of two Gaussians."""
    diffusion = GaussianDiffusion(linear_betas(60))
    x0, x_t = torch.tensor([0.7], dtype=torch.float64), torch.tensor([-0.4], dtype=torch.float64)
    for index in (1, 20, 59):
        beta, previous = diffusion.betas[index], diffusion.alphas_cumprod[index - 1]
        prior_precision, likelihood_precision = 1 / (1 - previous), (1 - beta) / beta
        variance = 1 / (prior_precision + likelihood_precision)
        mean = variance * (
            prior_precision * previous**0.5 * x0.item() + likelihood_precision * x_t.item() / (1 - beta) ** 0.5
        )
        assert diffusion.posterior_mean(x0, x_t, index).item() == pytest.approx(mean, rel=1e-9)
        assert diffusion.posterior_std(index) == pytest.approx(variance**0.5, rel=1e-9)
    assert diffusion.posterior_std(0) == diffusion.posterior_std(1)  # clipped: the true one is 0 and has no logarithm
