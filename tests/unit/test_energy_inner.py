"""The inner loop: descent, the acceptance test, step counts, and what each sample owes to its neighbours (nothing)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hpc_gen.diffusion.gaussian import GaussianDiffusion, linear_betas
from hpc_gen.methods.energy.inner import (
    Descent,
    InnerTrace,
    Landscape,
    descend,
    descend_with_graph,
    inner_step_counts,
    signal_bound,
)
from hpc_gen.runtime.errors import StopRequested
from hpc_gen.runtime.stop import Cause, Stop


def bowl(curvature: Tensor) -> Landscape:
    """E = c/2 |x|^2 per sample, with a curvature for each: a step longer than 2/c goes uphill."""

    def energy(x: Tensor) -> Tensor:
        return curvature / 2 * x.square().flatten(1).sum(dim=1)

    return Landscape(energy, lambda x: (energy(x), curvature.view(-1, 1, 1, 1) * x))


def points(count: int) -> Tensor:
    return torch.randn(count, 2, 3, 3, generator=torch.Generator().manual_seed(5))


def test_step_counts_of_the_reference() -> None:
    t = torch.tensor([0, 49, 50, 250, 499])
    assert inner_step_counts(t, 500, 5, group=1).tolist() == [5, 5, 6, 10, 10]
    assert inner_step_counts(t, 500, 2, group=1).tolist() == [2, 2, 2, 4, 5]
    assert inner_step_counts(torch.tensor([0, 100, 499, 499]), 500, 5, group=2).tolist() == [6, 6, 10, 10]


def test_the_reference_bound() -> None:
    t = torch.tensor([0, 100, 200, 300, 499])
    bound = signal_bound(GaussianDiffusion(linear_betas(500)), t, torch.zeros(5, 1, 1, 1, dtype=torch.float64))
    assert bound.flatten().tolist() == pytest.approx([2.000, 1.618, 0.876, 0.316, 0.0123], abs=1e-3)


def test_the_energy_falls_and_the_trace_says_by_how_much() -> None:
    x, trace = points(4), InnerTrace()
    land = bowl(torch.ones(4))
    end = descend(land, x, torch.tensor([5, 5, 3, 3]), Descent(0.5), trace=trace)
    expected = x * torch.tensor([0.5**5, 0.5**5, 0.5**3, 0.5**3]).view(-1, 1, 1, 1)
    torch.testing.assert_close(end, expected)
    curves = trace.curves()
    change = curves["inner_energy_change"]
    assert change.counts == (4.0, 4.0, 4.0, 4.0, 2.0, 2.0)
    assert change.sums[0] == 0.0
    first_two = land.energy(x * 0.5**5)[:2].sum() - land.energy(x)[:2].sum()
    assert change.sums[5] == pytest.approx(float(first_two), rel=1e-5)
    assert all(later < earlier for earlier, later in zip(change.sums, change.sums[1:4], strict=False))
    rate = curves["energy_accept_rate"]
    assert (rate.sums, rate.counts) == ((16.0,), (16.0,))


def test_a_step_uphill_is_refused_and_not_tried_again() -> None:
    x, trace = points(2), InnerTrace()
    end = descend(bowl(torch.tensor([1.0, 5.0])), x, torch.tensor([4, 4]), Descent(0.5), trace=trace)
    assert torch.equal(end[1], x[1]) and not torch.equal(end[0], x[0])
    assert (trace.accepted, trace.tested) == (4.0, 8.0)


def test_no_evaluation_once_nobody_moves() -> None:
    calls = 0
    land = bowl(torch.tensor([5.0]))

    def counted(x: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        return land.slope(x)

    trace = InnerTrace()
    descend(Landscape(land.energy, counted), points(1), torch.tensor([9]), Descent(0.5), trace=trace)
    assert calls == 2  # the start, and the proposal that was refused
    assert (trace.accepted, trace.tested) == (0.0, 9.0)  # refusals are counted all the same
    assert trace.curves()["inner_energy_change"].sums == (0.0,) * 10


def test_always_accept_needs_one_flag() -> None:
    x, trace = points(1), InnerTrace()
    end = descend(bowl(torch.tensor([5.0])), x, torch.tensor([1]), Descent(0.5, always_accept=True), trace=trace)
    torch.testing.assert_close(end, x * -1.5)
    assert trace.tested == 0.0 and "energy_accept_rate" not in trace.curves()


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    curvature, counts = torch.tensor([1.0, 5.0, 0.3]), torch.tensor([2, 4, 6])
    x = points(3)
    together = descend(bowl(curvature), x, counts, Descent(0.5))
    for i in range(3):
        alone = descend(bowl(curvature[i : i + 1]), x[i : i + 1], counts[i : i + 1], Descent(0.5))
        assert torch.equal(together[i : i + 1], alone)


def test_the_walk_with_its_graph_is_the_same_walk() -> None:
    x, counts = points(3), torch.tensor([2, 3, 4])
    land = bowl(torch.tensor([1.0, 0.5, 2.0]))
    size = torch.tensor(0.3, requires_grad=True)
    end, energies = descend_with_graph(land, x, counts, Descent(size))
    torch.testing.assert_close(end.detach(), descend(land, x, counts, Descent(0.3, always_accept=True)))
    assert energies.shape == (4, 3)
    assert torch.equal(energies[2, 0], energies[1, 0]) and torch.equal(energies[3, 0], energies[1, 0])
    energies[-1].sum().backward()
    assert size.grad is not None and float(size.grad) < 0  # a longer step would have come lower


def test_the_walk_with_its_graph_can_refuse_steps_uphill() -> None:
    """As the reference's refinement loss walks where its sampling has no inner loop."""
    x, counts = points(2), torch.tensor([3, 3])
    land = bowl(torch.tensor([1.0, 5.0]))  # the second sample's step is uphill
    size = torch.tensor(0.5, requires_grad=True)
    end, energies = descend_with_graph(land, x, counts, Descent(size), tested=True)
    torch.testing.assert_close(end.detach(), descend(land, x, counts, Descent(0.5)))
    assert torch.equal(end[1].detach(), x[1]) and energies[0, 1] == energies[2, 1]
    assert energies[2, 0] < energies[1, 0] < energies[0, 0]
    energies[-1, 1].backward(retain_graph=True)
    assert size.grad is None or float(size.grad) == 0.0  # a refused step teaches nothing
    energies[-1, 0].backward()
    assert size.grad is not None and float(size.grad) < 0


def test_a_learned_step_size_never_turns_round() -> None:
    x = points(1)
    end = descend(bowl(torch.ones(1)), x, torch.tensor([1]), Descent(torch.tensor(-3.0)))
    torch.testing.assert_close(end, x * (1 - 1e-4))


def test_a_stop_is_seen_between_inner_steps() -> None:
    polls = 0

    def poll() -> None:
        nonlocal polls
        polls += 1
        if polls == 3:
            raise StopRequested(Stop(Cause.STOPPED, "asked"))

    with pytest.raises(StopRequested):
        descend(bowl(torch.ones(1)), points(1), torch.tensor([8]), Descent(0.1), poll=poll)
    assert polls == 3
