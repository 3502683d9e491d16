"""The inner loop of the energy variant: gradient descent on the energy, with a test that refuses steps uphill.

Facts: specs/energy.md section 5.2. Shapes: B batch, [B, C, S, S] samples, K inner steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hpc_gen.diffusion.gaussian import GaussianDiffusion
from hpc_gen.methods.protocol import Curve

# Base counts of inner steps before they are stretched by the noise level (specs/energy.md section 5.1).
INNER_STEPS_SAMPLING = 5
INNER_STEPS_TRAINING = 2
INNER_STEPS_LIMIT = 10

SMALLEST_STEP = 1e-4  # a learned step size may not turn the descent around
SIGNAL_LIMIT = 2.0  # the reference's bound on clean samples


@dataclass(frozen=True)
class Landscape:
    """The energy as a function of the samples alone: timesteps, classes and guidance are fixed."""

    energy: Callable[[Tensor], Tensor]  # x -> energies [B]
    slope: Callable[[Tensor], tuple[Tensor, Tensor]]  # x -> energies [B], noise prediction [B, C, S, S]


def inner_step_counts(t_B: Tensor, num_timesteps: int, base: int, group: int) -> Tensor:
    """Inner steps of each sample, int64 [B]: int(base (1 + 2 mean(t) / T)) within 1 and 10, the mean over its group.

    Groups are `group` consecutive samples. Computed in float32 like the reference, because int() sits on exact
    boundaries (T = 500, t = 50 gives 6).
    """
    stretch_G = 1.0 + 2.0 * (t_B.float().view(-1, group).mean(dim=1) / num_timesteps)
    counts_G = (base * stretch_G).to(torch.int64).clamp(1, INNER_STEPS_LIMIT)
    return counts_G.repeat_interleave(group)


def signal_bound(diffusion: GaussianDiffusion, t_B: Tensor, like: Tensor) -> Tensor:
    """The reference's largest absolute value at each sample's timestep: 2 sqrt(alpha_bar), shaped like [B, 1, 1, 1]."""
    return SIGNAL_LIMIT * diffusion.signal_scale(t_B, like)


@dataclass
class InnerTrace:
    """What the inner loops of one or more calls measured, as sums that add up over batches.

    `change[j]`: energy after j steps minus the energy at the start, per sample that was still in its loop.
    """

    accepted: float = 0.0
    tested: float = 0.0
    change_sums: list[float] = field(default_factory=list)
    change_counts: list[float] = field(default_factory=list)

    def note_energies(self, energies: list[Tensor], counts_B: Tensor) -> None:
        """Take in the energies [B] after 0, 1, ... steps of one loop."""
        for j, energy_B in enumerate(energies):
            inside_B = counts_B >= j
            if j == len(self.change_sums):
                self.change_sums.append(0.0)
                self.change_counts.append(0.0)
            self.change_sums[j] += float((energy_B - energies[0])[inside_B].double().sum())
            self.change_counts[j] += float(inside_B.sum())

    def curves(self) -> dict[str, Curve]:
        """`inner_energy_change` over inner steps; `energy_accept_rate` (one entry, 0 to 1) where tests were made."""
        found = {"inner_energy_change": Curve(tuple(self.change_sums), tuple(self.change_counts))}
        if self.tested:
            found["energy_accept_rate"] = Curve((self.accepted,), (self.tested,))
        return found


@dataclass(frozen=True)
class Descent:
    """How the inner loop walks. `step_size`: a number, or the learnable parameter as a tensor."""

    step_size: Tensor | float
    always_accept: bool = False
    uphill: bool = False

    def step(self, x: Tensor, noise: Tensor, bound: Tensor | None) -> Tensor:
        """One proposal."""
        size = self.step_size
        size = size.clamp(min=SMALLEST_STEP) if isinstance(size, Tensor) else max(size, SMALLEST_STEP)
        moved = x + size * noise if self.uphill else x - size * noise
        return moved if bound is None else moved.clamp(-bound, bound)


def descend(
    landscape: Landscape,
    x: Tensor,
    counts_B: Tensor,
    descent: Descent,
    *,
    bound: Tensor | None = None,
    trace: InnerTrace | None = None,
    poll: Callable[[], None] = lambda: None,
) -> Tensor:
    """`x` after `counts_B` inner steps each, without gradients through the walk.

    A sample whose step was refused stays where it is for good, because every later proposal would be the same; when
    none moves any more the network is not asked again. One evaluation per step serves both the test and the next
    proposal (the reference makes two). Deliberate deviation: the reference makes the test unless two flags are set,
    ours unless `always_accept` is.
    """
    last = int(counts_B.max()) - 1
    with torch.no_grad():
        energy_B, noise = landscape.slope(x)
        energies = [energy_B]
        going_B = torch.ones_like(counts_B, dtype=torch.bool)
        for k in range(last + 1):
            poll()
            inside_B = counts_B > k
            going_B = going_B & inside_B
            if bool(going_B.any()):
                proposal = descent.step(x, noise, bound)
                if k == last:
                    new_energy_B, new_noise = landscape.energy(proposal), noise
                else:
                    new_energy_B, new_noise = landscape.slope(proposal)
                if not descent.always_accept:
                    going_B = going_B & ~(new_energy_B > energy_B)
                x = torch.where(_wide(going_B, x), proposal, x)
                noise = torch.where(_wide(going_B, x), new_noise, noise)
                energy_B = torch.where(going_B, new_energy_B, energy_B)
            energies.append(energy_B)
            if trace is not None and not descent.always_accept:
                trace.tested += float(inside_B.sum())
                trace.accepted += float(going_B.sum())
        if trace is not None:
            trace.note_energies(energies, counts_B)
    return x


def descend_with_graph(
    landscape: Landscape,
    x: Tensor,
    counts_B: Tensor,
    descent: Descent,
    *,
    bound: Tensor | None = None,
    tested: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `descend`, and differentiable all the way: (x, energies [K, B] before each step).

    Every step is taken unless `tested`, whatever `descent` says; the test itself is not differentiated.

    Entries of a sample beyond its own count repeat the energy of its last one, so differences there are zero.
    """
    energies: list[Tensor] = []
    for k in range(int(counts_B.max())):
        inside_B = counts_B > k
        energy_B, noise = landscape.slope(x)
        energies.append(torch.where(inside_B, energy_B, energies[-1]) if energies else energy_B)
        proposal = descent.step(x, noise, bound)
        if tested:
            with torch.no_grad():
                inside_B = inside_B & ~(landscape.energy(proposal) > energy_B)
        x = torch.where(_wide(inside_B, x), proposal, x)
    return x, torch.stack(energies)


def _wide(mask_B: Tensor, like: Tensor) -> Tensor:
    return mask_B.view(-1, *([1] * (like.ndim - 1)))
