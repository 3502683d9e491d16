"""Mean and covariance of features, gathered in pieces: float64, mergeable in any grouping.

Chan, Golub and LeVeque (1979): two pieces with counts n and m, means a and b and scatter matrices A and B (sums of
centred outer products) merge into scatter A + B + n m / (n + m) (b - a)(b - a)^T, which never subtracts large sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpc_gen.runtime.errors import DataError, UserError


@dataclass(frozen=True)
class Moments:
    """Count, mean float64 [D] and scatter float64 [D, D] of a set of feature vectors."""

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, features: Tensor, names: Sequence[str] | None = None) -> Moments:
        """Moments of features [N, D], N >= 1; `names` (one per row) are for messages.

        Raises DataError naming the first row whose features are not finite.
        """
        assert features.dim() == 2 and len(features) > 0, f"features of shape {list(features.shape)} are not [N, D]"
        check_finite(features, names)
        values = features.to(torch.float64)
        mean = values.mean(dim=0)
        centred = values - mean
        return cls(len(values), mean, centred.T @ centred)

    def merged(self, other: Moments) -> Moments:
        """Moments of both sets together. Raises UserError when the features have other lengths."""
        if self.mean.shape != other.mean.shape:
            raise UserError(
                f"features of length {len(self.mean)} and {len(other.mean)} cannot be merged; use one extractor"
            )
        count = self.count + other.count
        step = other.mean - self.mean
        mean = self.mean + step * (other.count / count)
        between = torch.outer(step, step) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance float64 [D, D] (divisor N - 1). Raises UserError for fewer than two vectors."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 images, not {self.count}; sample or reference more images")
        return self.scatter / (self.count - 1)


def check_finite(features: Tensor, names: Sequence[str] | None = None) -> None:
    """Raise DataError naming the first row of [N, ...] that holds NaN or infinity."""
    good = torch.isfinite(features).flatten(1).all(dim=1)
    if not bool(good.all()):
        row = int(torch.nonzero(~good)[0])
        which = names[row] if names is not None else f"row {row}"
        raise DataError(
            f"the features of {which} are not finite ({int((~good).sum())} of {len(good)} images); "
            "look at the image, or at the extractor's weights"
        )


def merge_all(parts: Sequence[Moments]) -> Moments:
    """All parts merged from left to right: a fixed order gives the same bits on any number of tasks."""
    assert parts, "nothing to merge"
    total = parts[0]
    for part in parts[1:]:
        total = total.merged(part)
    return total
