"""Algebra of the memory bank: snippets as conditions, interpolation, and the low-rank bank (specs/gmem.md section 6).

A bank is a table with a column of snippets [E]; here are the pure functions on its rows. Shapes: N rows, E elements,
R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from hpc_gen.methods.gmem import low_rank
from hpc_gen.runtime.errors import DataError

Interpolation = Literal["linear", "spherical", "concat", "mask"]
LOW_RANK_KEYS = ("C", "M", "S", "mean")
_SMALLEST_SINE = 1e-6


def as_condition(rows_NE: Tensor) -> Tensor:
    """Rows as the network is conditioned on them: each of length 1; a row of zeros, the null snippet, stays."""
    return F.normalize(rows_NE.float(), dim=-1)


def interpolated(
    first_E: Tensor, second_E: Tensor, alphas: Tensor, method: Interpolation, take_first: Tensor | None = None
) -> Tensor:
    """Snippets [A, E] between two of length 1, one per alpha in [0, 1], before they are made length 1 again.

    linear: (1 - a) first + a second; spherical: along the great circle; concat: first half of the first, second half of
    the second; mask: bool `take_first` [A, E] says which elements are the first's. The last two ignore alpha.
    Deliberate deviation: equal ends give themselves also where the reference's spherical one gives zero, the null
    snippet (specs/gmem.md section 8).
    """
    alphas_A1 = alphas[:, None].to(first_E.dtype)
    if method == "linear":
        return (1 - alphas_A1) * first_E + alphas_A1 * second_E
    if method == "spherical":
        angle = torch.acos((first_E @ second_E).clamp(-1.0, 1.0))
        if float(angle.sin()) < _SMALLEST_SINE:
            return (1 - alphas_A1) * first_E + alphas_A1 * second_E
        return (((1 - alphas_A1) * angle).sin() * first_E + (alphas_A1 * angle).sin() * second_E) / angle.sin()
    if method == "concat":
        half = first_E.shape[-1] // 2
        return torch.cat([first_E[:half], second_E[half:]]).expand(len(alphas), -1).clone()
    assert method == "mask" and take_first is not None, method
    return torch.where(take_first, first_E, second_E)


def mixed(rows_NE: Tensor, i: int, j: int, alpha: float) -> Tensor:
    """alpha row_i + (1 - alpha) row_j, [E]: in a bank, alpha weights the first."""
    return alpha * rows_NE[i] + (1 - alpha) * rows_NE[j]


@dataclass(frozen=True)
class LowRankBank:
    """row = C Mᵀ + mean with C = U sqrt(S) [N, R] and M = V sqrt(S) [E, R] of the centred rows' singular vectors."""

    coefficients: Tensor
    basis: Tensor
    singular_values: Tensor
    mean: Tensor

    @classmethod
    def of(cls, rows_NE: Tensor, rank: int) -> LowRankBank:
        """The best bank of this rank in the sense of squares, of rows in memory (low_rank.py has them in pieces).

        Raises UserError for a rank that the rows do not have.
        """
        found = low_rank.exact(lambda: [rows_NE], rank)
        return cls(found.coefficients(rows_NE), found.basis, found.singular_values.float(), found.mean.float())

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], source: str) -> LowRankBank:
        """From the reference's file: keys C, M, S, mean. Raises DataError when they do not fit together."""
        missing = [key for key in LOW_RANK_KEYS if key not in tensors]
        if missing:
            raise DataError(f"{source} has no '{missing[0]}'; a low-rank bank holds {', '.join(LOW_RANK_KEYS)}")
        c, m, s, mean = (tensors[key].float() for key in LOW_RANK_KEYS)
        mean = mean.reshape(-1)
        if c.ndim != 2 or m.shape != (len(mean), c.shape[1]) or s.shape != (c.shape[1],):
            shapes = ", ".join(f"{key} {list(tensors[key].shape)}" for key in LOW_RANK_KEYS)
            raise DataError(f"{source}: {shapes} do not fit together as a low-rank bank; build it again")
        return cls(c, m, s, mean)

    def tensors(self) -> dict[str, Tensor]:
        """Under the reference's keys."""
        return dict(zip(LOW_RANK_KEYS, (self.coefficients, self.basis, self.singular_values, self.mean), strict=True))

    def rows(self, index: Tensor) -> Tensor:
        """Rows [..., E] of the bank at int64 `index`."""
        return self.decode(self.coefficients[index])

    def decode(self, coefficients: Tensor) -> Tensor:
        """Coefficients [..., R] to rows [..., E]."""
        return coefficients @ self.basis.T + self.mean

    def project(self, row: Tensor) -> Tensor:
        """Coefficients [..., R] of any row [..., E]."""
        return (row - self.mean) @ self.basis / self.singular_values

    def appended(self, coefficients: Tensor) -> LowRankBank:
        """The bank with one more row."""
        return replace(self, coefficients=torch.cat([self.coefficients, coefficients.reshape(1, -1)]))
