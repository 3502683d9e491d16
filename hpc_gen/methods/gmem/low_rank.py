"""The leading directions of a bank's rows, in passes over pieces of it: the bank is never in memory as a whole.

Both methods work on the second moments of the centred rows, in float64: the singular vectors on the side of the E
elements of a row are few and small, those on the side of the N rows are only ever made piece by piece.

exact: the E x E moments of all pieces are merged (Chan et al. 1982), then one eigendecomposition. One pass.
randomised: subspace iteration with Gaussian start (Halko, Martinsson, Tropp 2011, algorithms 4.4 and 5.1), E x (rank +
oversampling) numbers; a pass for the mean, one per iteration and one, and one to turn the subspace.

Shapes: n rows of a piece, N of all, E elements of a row, R rank, L = R + oversampling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from hpc_gen.runtime.errors import UserError
from hpc_gen.runtime.randomness import Draw, Normal, Stream

LowRankMethod = Literal["exact", "randomised"]
LOW_RANK_METHODS: tuple[LowRankMethod, ...] = ("exact", "randomised")
Passes = Callable[[], Iterable[Tensor]]
"""One pass over all rows: pieces [n, E], each time the same."""


@dataclass(frozen=True)
class Directions:
    """Mean [E], right singular vectors [E, R] and singular values [R] of the centred rows, float64, largest first.

    `total` is the sum of squares of all centred rows; the first R directions hold sum(singular_values^2) of it.
    """

    mean: Tensor
    right: Tensor
    singular_values: Tensor
    total: float

    @property
    def held(self) -> float:
        """Share of the variance that a bank of this rank holds, 0 to 1."""
        return min(1.0, float(self.singular_values.square().sum()) / self.total)

    @cached_property
    def basis(self) -> Tensor:
        """V sqrt(S), [E, R] float32, as the reference keeps it."""
        return (self.right * self.singular_values.sqrt()).float()

    def coefficients(self, rows_nE: Tensor) -> Tensor:
        """U sqrt(S) of these rows, [n, R] float32."""
        return ((rows_nE.double() - self.mean) @ self.right / self.singular_values.sqrt()).float()


@dataclass(frozen=True)
class Randomised:
    """Options of the randomised method: more of either is closer to the best; the seed draws the start."""

    oversampling: int = 10
    power_iterations: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("oversampling", "power_iterations", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} of a low-rank bank is {getattr(self, name)}; give 0 or more")


def exact(passes: Passes, rank: int) -> Directions:
    """The best directions in the sense of squares. Raises UserError for a rank that the rows do not have."""
    count, mean, moments = 0, torch.zeros(()), torch.zeros(())
    for piece in passes():
        wide = piece.double()
        own_mean = wide.mean(dim=0)
        wide = wide - own_mean
        if not count:
            count, mean, moments = len(wide), own_mean, wide.T @ wide
            continue
        both, apart = count + len(wide), own_mean - mean
        moments += wide.T @ wide + torch.outer(apart, apart) * (count * len(wide) / both)
        mean = mean + apart * (len(wide) / both)
        count = both
    _check_rank(count, len(mean), rank)
    values, vectors = torch.linalg.eigh(moments)
    return _directions(mean, vectors.flip(1), values.flip(0), rank, float(moments.trace()))


def randomised(passes: Passes, rank: int, options: Randomised | None = None) -> Directions:
    """Nearly the best directions; the same for the same rows, options and threads. Raises UserError as `exact`.

    With 2 iterations and 10 more directions than asked for, what is left of the rows was never more than 1.01 times
    the least possible in our tests; without iterations it is sqrt(1 + R / 9) times in the mean (their theorem 10.5).
    """
    options = options or Randomised()
    count, mean, total = 0, torch.zeros(()), 0.0
    for piece in passes():
        wide = piece.double()
        own_mean, both = wide.mean(dim=0), count + len(wide)
        apart = own_mean - mean if count else own_mean
        total += float((wide - own_mean).square().sum())
        total += float(apart.square().sum()) * count * len(wide) / both
        mean = mean + apart * (len(wide) / both)
        count = both
    _check_rank(count, len(mean), rank)
    wanted = min(rank + options.oversampling, count, len(mean))
    start = Stream(options.seed, "bank/low_rank").batch(Draw((len(mean),), Normal()), list(range(wanted)))
    span_EL = torch.linalg.qr(start.T.double()).Q
    for _ in range(options.power_iterations + 1):
        again_EL = torch.zeros_like(span_EL)
        for piece in passes():
            centred = piece.double() - mean
            again_EL += centred.T @ (centred @ span_EL)
        span_EL = torch.linalg.qr(again_EL).Q
    inner_LL = torch.zeros(wanted, wanted, dtype=torch.float64)
    for piece in passes():
        seen_nL = (piece.double() - mean) @ span_EL
        inner_LL += seen_nL.T @ seen_nL
    values, turns = torch.linalg.eigh(inner_LL)
    return _directions(mean, span_EL @ turns.flip(1), values.flip(0), rank, total)


def _check_rank(rows: int, width: int, rank: int) -> None:
    if not 1 <= rank <= min(rows, width):
        raise UserError(f"a bank of {rows} rows of {width} has no rank {rank}; give 1 to {min(rows, width)}")


def _directions(mean: Tensor, vectors: Tensor, values: Tensor, rank: int, total: float) -> Directions:
    """The first `rank` of them, each with its largest element positive: a direction has no sign of its own."""
    smallest = float(values[0]) * len(mean) * torch.finfo(torch.float64).eps
    if not float(values[rank - 1]) > smallest:
        raise UserError(f"the bank's rows span fewer than {rank} directions; give a smaller rank")
    right = vectors[:, :rank]
    signs = right.gather(0, right.abs().argmax(dim=0, keepdim=True)).sign()
    return Directions(mean, right * signs, values[:rank].sqrt(), total)
