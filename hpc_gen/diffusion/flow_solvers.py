"""Solvers from noise at t = 0 to data: fixed and adaptive steps of the ODE, Euler and Heun of the SDE.

`velocity(x, t_B)` is the network; each drift costs one call (the reference makes two, specs/gmem.md section 5.2). All
of them yield every state of the grid, the initial one apart, so that the caller keeps what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hpc_gen.diffusion.flow import Diffusion, FlowPath, like, score_of_velocity, shifted
from hpc_gen.runtime.errors import DivergedError

Velocity = Callable[[Tensor, Tensor], Tensor]
Poll = Callable[[], None]

# Dormand & Prince 1980, the pair of orders 5 and 4: rows of stages, weights of the solution, weights of its error
_STAGES: tuple[tuple[float, ...], ...] = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_TIMES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_ERROR = (
    35 / 384 - 5179 / 57600,
    0.0,
    500 / 1113 - 7571 / 16695,
    125 / 192 - 393 / 640,
    -2187 / 6784 + 92097 / 339200,
    11 / 84 - 187 / 2100,
    -1 / 40,
)
_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 10.0
_MAX_STEPS = 10_000  # of one solution; a healthy network needs some dozens


def ode_grid(points: int, shift: float = 0.0, start: float = 0.0, end: float = 1.0) -> Tensor:
    """Times float32 [points] from `start` to `end`."""
    return shifted(torch.linspace(start, end, points), shift)


def sde_grid(points: int, last_step_size: float) -> Tensor:
    """Times float32 [points] from 0 to 1 - last_step_size; the last one is where the last-step rule begins."""
    return torch.linspace(0.0, 1 - last_step_size, points)


def _times(t: Tensor, x: Tensor) -> Tensor:
    return t.to(x.device, x.dtype).expand(len(x))


def euler_ode(velocity: Velocity, x: Tensor, grid: Tensor, poll: Poll) -> Iterator[Tensor]:
    """x + (t' - t) v(x, t): one call per step."""
    for here, there in zip(grid[:-1], grid[1:], strict=True):
        poll()
        x = x + (there - here).to(x.device) * velocity(x, _times(here, x))
        yield x


def heun_ode(velocity: Velocity, x: Tensor, grid: Tensor, poll: Poll) -> Iterator[Tensor]:
    """The trapezoid of the velocities at both ends: two calls per step."""
    for here, there in zip(grid[:-1], grid[1:], strict=True):
        poll()
        step = (there - here).to(x.device)
        first = velocity(x, _times(here, x))
        second = velocity(x + step * first, _times(there, x))
        x = x + step * (first + second) / 2
        yield x


def dopri5_ode(
    velocity: Velocity, x: Tensor, grid: Tensor, poll: Poll, atol: float = 1e-6, rtol: float = 1e-3
) -> Iterator[Tensor]:
    """Adaptive steps that end on every point of the grid; the error is judged over the whole batch.

    Deliberate deviation: the reference's solver interpolates at the grid's points, ours steps onto them; both lie
    within the tolerance. Raises DivergedError when the step size falls to nothing.
    """
    t, step, slope = float(grid[0]), None, velocity(x, _times(grid[0], x))
    steps = 0
    for target in grid[1:].tolist():
        while t < target:
            poll()
            steps += 1
            if step is None:
                step = _first_step(velocity, x, slope, t, atol, rtol)
            if steps > _MAX_STEPS or not step > 1e-9:
                raise DivergedError(
                    f"dopri5 does not get beyond t = {t:.4g} in {steps} steps; raise sample.settings.rtol, or use "
                    "method=euler"
                )
            taken = min(step, target - t)
            last = taken == target - t
            proposed, end_slope, error = _dopri5_step(velocity, x, slope, t, taken)
            scale = atol + rtol * torch.maximum(x.abs(), proposed.abs())
            ratio = float((error / scale).square().mean().sqrt())
            if ratio <= 1:  # NaN is refused, too
                x, slope, t = proposed, end_slope, (target if last else t + taken)
            grown = _SAFETY * ratio**-0.2 if ratio > 0 else _GROW
            factor = min(_GROW, max(_SHRINK, grown)) if ratio == ratio else _SHRINK
            # a step cut short by the grid says little about the next one
            step = max(step, taken * factor) if last and ratio <= 1 else taken * factor
        yield x


def _dopri5_step(velocity: Velocity, x: Tensor, slope: Tensor, t: float, step: float) -> tuple[Tensor, Tensor, Tensor]:
    """Solution of order 5, its slope, and the difference to order 4."""
    slopes = [slope]
    for row, part in zip(_STAGES, _TIMES, strict=True):
        point = x + step * sum((w * k for w, k in zip(row, slopes, strict=True) if w), torch.zeros_like(x))
        slopes.append(velocity(point, x.new_full((len(x),), t + part * step)))
    error = step * sum((w * k for w, k in zip(_ERROR, slopes, strict=True) if w), torch.zeros_like(x))
    return point, slopes[-1], error


def _first_step(velocity: Velocity, x: Tensor, slope: Tensor, t: float, atol: float, rtol: float) -> float:
    """Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, section II.4."""
    scale = atol + rtol * x.abs()

    def size(value: Tensor) -> float:
        return float((value / scale).square().mean().sqrt())

    d0, d1 = size(x), size(slope)
    guess = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
    d2 = size(velocity(x + guess * slope, x.new_full((len(x),), t + guess)) - slope) / guess
    other = max(1e-6, guess * 1e-3) if max(d1, d2) <= 1e-15 else (0.01 / max(d1, d2)) ** 0.2
    return min(100 * guess, other)


@dataclass(frozen=True)
class StochasticSampler:
    """dx = (v + w score) dt + sqrt(2 w) dW over a uniform grid, then the last step without noise."""

    path: FlowPath
    diffusion: Diffusion
    method: str = "heun"
    last_step: str = "mean"
    last_step_size: float = 0.004

    def __call__(
        self, velocity: Velocity, x: Tensor, points: int, noise: Callable[[int], Tensor], poll: Poll
    ) -> Iterator[Tensor]:
        """The state after each of the `points - 1` steps and after the last one; `noise(k)` is standard normal."""
        last = 0.0 if self.last_step == "none" else self.last_step_size
        grid = sde_grid(points, last)
        dt = (grid[1] - grid[0]).to(x.device)
        for k, here in enumerate(grid[:-1]):
            poll()
            t_B = _times(here, x)
            kick = noise(k).to(x.device, x.dtype) * dt.sqrt() * (2 * self.diffusion(x, t_B)).sqrt()
            if self.method == "euler":
                x = x + dt * self._drift(velocity, x, t_B) + kick
            else:
                x = self._heun(velocity, x + kick, t_B, dt)
            yield x
        poll()
        yield self._finish(velocity, x, _times(grid[-1], x), last)

    def _drift(self, velocity: Velocity, x: Tensor, t_B: Tensor) -> Tensor:
        v = velocity(x, t_B)
        return v + self.diffusion(x, t_B) * score_of_velocity(self.path, v, x, t_B)

    def _heun(self, velocity: Velocity, x: Tensor, t_B: Tensor, dt: Tensor) -> Tensor:
        """The noise is in x already: it is drawn first, once per step."""
        first = self._drift(velocity, x, t_B)
        second = self._drift(velocity, x + dt * first, t_B + dt)
        return x + dt * (first + second) / 2

    def _finish(self, velocity: Velocity, x: Tensor, t_B: Tensor, size: float) -> Tensor:
        if self.last_step == "none" or size == 0:
            return x
        if self.last_step == "mean":
            return x + size * self._drift(velocity, x, t_B)
        v = velocity(x, t_B)
        if self.last_step == "euler":
            return x + size * v
        assert self.last_step == "tweedie", self.last_step
        t = like(t_B, x)
        alpha, sigma = self.path.alpha(t)[0], self.path.sigma(t)[0]
        return x / alpha + sigma**2 / alpha * score_of_velocity(self.path, v, x, t_B)
