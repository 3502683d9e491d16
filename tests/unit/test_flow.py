"""Flow paths and solvers on fields that are known: conversions undo each other, orders of convergence, cost, grids."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from hpc_gen.diffusion import flow
from hpc_gen.diffusion.flow_solvers import (
    StochasticSampler,
    dopri5_ode,
    euler_ode,
    heun_ode,
    ode_grid,
    sde_grid,
)
from hpc_gen.runtime.errors import DivergedError, StopRequested
from hpc_gen.runtime.stop import Cause, Stop

PATHS = list(flow.PATHS.values())


def nothing() -> None:
    """A poll that never stops."""


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_velocity_noise_and_score_are_one_thing(path: flow.FlowPath) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, x1 = (torch.randn(6, 3, 2, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    x, velocity = flow.interpolate(path, x0, x1, t)
    assert torch.allclose(flow.noise_of_velocity(path, velocity, x, t), x0)
    score = flow.score_of_velocity(path, velocity, x, t)
    assert torch.allclose(score, -x0 / flow.like(path.sigma(t)[0], x0))  # Gaussian noise around alpha x1
    assert torch.allclose(flow.velocity_of_score(path, score, x, t), velocity)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_derivatives_of_the_coefficients(path: flow.FlowPath) -> None:
    t = torch.linspace(0.05, 0.95, 10, dtype=torch.float64, requires_grad=True)
    for coefficient in (path.alpha, path.sigma):
        value, slope = coefficient(t)
        (expected,) = torch.autograd.grad(value.sum(), t)
        assert torch.allclose(slope, expected)
    assert torch.allclose(path.alpha_ratio(t), path.alpha(t)[1] / path.alpha(t)[0])


def _rotation(x: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
    """x' = 2 pi t (x rotated by a right angle): at t = 1 the angle is pi."""
    turned = torch.stack([-x[:, 1], x[:, 0]], dim=1)
    return 2 * math.pi * flow.like(t_B, x) * turned


def _last(states: object) -> torch.Tensor:
    *_, last = states  # type: ignore[misc]
    return last


@pytest.mark.parametrize(("solver", "order"), [(euler_ode, 1), (heun_ode, 2)])
def test_fixed_steps_converge_with_their_order(solver: object, order: int) -> None:
    x = torch.tensor([[1.0, 0.0], [0.3, -2.0]], dtype=torch.float64)
    errors = []
    for points in (41, 81, 161):
        grid = torch.linspace(0, 1, points, dtype=torch.float64)
        errors.append(float((_last(solver(_rotation, x, grid, nothing)) + x).abs().max()))  # type: ignore[operator]
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.25)


def test_dopri5_keeps_its_tolerance_and_ends_on_the_grid() -> None:
    x = torch.tensor([[1.0, 0.0], [0.3, -2.0]], dtype=torch.float64)
    calls = []

    def field(x: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        calls.append(float(t_B[0]))
        return _rotation(x, t_B)

    grid = torch.linspace(0, 1, 5, dtype=torch.float64)
    states = list(dopri5_ode(field, x, grid, nothing, atol=1e-8, rtol=1e-8))
    assert len(states) == 4
    for t, state in zip(grid[1:].tolist(), states, strict=True):
        angle = math.pi * t**2
        turned = torch.stack([-x[:, 1], x[:, 0]], dim=1)
        assert torch.allclose(state, math.cos(angle) * x + math.sin(angle) * turned, atol=1e-6)
    assert max(calls) <= 1.0 and len(calls) < 1000


def test_dopri5_of_a_field_that_is_no_number_says_so() -> None:
    with pytest.raises(
        DivergedError, match=r"dopri5 does not get beyond t = 0 in \d+ steps; raise sample.settings.rtol"
    ):
        _last(dopri5_ode(lambda x, t: x * float("nan"), torch.ones(1, 2), ode_grid(3), nothing))


@pytest.mark.parametrize(
    ("method", "calls", "last"),
    [
        ("euler", 49, "none"),
        *((m, c, last) for m, c in (("euler", 49), ("heun", 98)) for last in ("mean", "euler", "tweedie")),
    ],
)
def test_one_network_call_per_drift(method: str, calls: int, last: str) -> None:
    """99 evaluations of 50 points with Heun and a last step; the reference makes 198 (specs/gmem.md section 5.2)."""
    made = []

    def field(x: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        made.append(float(t_B[0]))
        return -x

    path = flow.LinearPath()
    sampler = StochasticSampler(path, flow.Diffusion(path), method, last, 0.004)
    states = list(sampler(field, torch.ones(2, 1), 50, lambda k: torch.zeros(2, 1), nothing))
    assert len(states) == 50
    assert len(made) == calls + (last != "none")
    assert all(bool(torch.isfinite(state).all()) for state in states)


def test_the_sde_samples_the_distribution_of_the_data() -> None:
    """Data N(1, 0.25): the velocity is known, and both solvers end at that mean and spread."""
    path, mean, spread = flow.LinearPath(), 1.0, 0.5

    def field(x: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        t = flow.like(t_B, x)
        variance = t**2 * spread**2 + (1 - t) ** 2
        data = mean + t * spread**2 / variance * (x - t * mean)  # E[x1 | x_t]
        noise = (1 - t) / variance * (x - t * mean)  # E[x0 | x_t]
        return data - noise

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20_000, 1, generator=generator)
    for form in ("linear", "sigma", "decreasing", "increasing-decreasing"):
        sampler = StochasticSampler(path, flow.Diffusion(path, form), "heun", "mean", 0.004)
        noise = torch.randn(60, 20_000, 1, generator=generator)
        end = _last(sampler(field, x, 60, lambda k, noise=noise: noise[k], nothing))
        assert float(end.mean()) == pytest.approx(mean, abs=0.02), form
        assert float(end.std()) == pytest.approx(spread, rel=0.05), form


def test_a_stop_is_heard_within_a_step() -> None:
    def stop() -> None:
        raise StopRequested(Stop(Cause.PREEMPTED, "SIGTERM"))

    path = flow.LinearPath()
    sampler = StochasticSampler(path, flow.Diffusion(path))
    for states in (
        euler_ode(_rotation, torch.ones(1, 2), ode_grid(3), stop),
        dopri5_ode(_rotation, torch.ones(1, 2), ode_grid(3), stop),
        sampler(_rotation, torch.ones(1, 2), 3, lambda k: torch.zeros(1, 2), stop),
    ):
        with pytest.raises(StopRequested):
            next(states)


def test_grids() -> None:
    assert ode_grid(50).tolist() == torch.linspace(0, 1, 50).tolist()
    shifted = ode_grid(50, 0.3)
    assert shifted[0] == 0 and shifted[-1] == 1 and bool((shifted[1:-1] < ode_grid(50)[1:-1]).all())
    assert float(sde_grid(50, 0.004)[-1]) == pytest.approx(0.996)
