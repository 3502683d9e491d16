"""Frechet distance of two Gaussians in float64, through symmetric square roots (Dowson and Landau 1982; FID).

|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). The eigenvalues of S1 S2 are those of the symmetric and positive
semi-definite R^T S2 R with S1 = R R^T, so the trace of the root is the sum of the roots of its eigenvalues. No
iteration, no imaginary part, no epsilon on the diagonal: singular covariances (fewer images than features) and constant
features are ordinary input. Directions of S1 below float64's resolution are dropped, as in numpy.linalg.matrix_rank.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from hpc_gen.runtime.errors import UserError

_EPSILON = torch.finfo(torch.float64).eps


class Gaussian(Protocol):
    """Mean float64 [D] and covariance float64 [D, D]: moments of features, or statistics that were stored."""

    @property
    def mean(self) -> Tensor:
        """float64 [D]."""
        ...

    @property
    def covariance(self) -> Tensor:
        """float64 [D, D], symmetric."""
        ...


def root_of(covariance: Tensor) -> Tensor:
    """R [D, r] with covariance = R R^T, r being the rank of the symmetric positive semi-definite float64 [D, D]."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    kept = values > values.max().clamp_min(0.0) * len(values) * _EPSILON
    return vectors[:, kept] * values[kept].sqrt()


def trace_of_root(first: Tensor, second: Tensor) -> float:
    """tr((first second)^(1/2)) for symmetric positive semi-definite float64 [D, D] matrices."""
    root = root_of(first)
    if not root.shape[1]:
        return 0.0
    inner = root.T @ second @ root
    eigenvalues = torch.linalg.eigvalsh((inner + inner.T) / 2)
    return float(eigenvalues.clamp_min(0.0).sqrt().sum())


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Frechet distance of the Gaussians fitted to two sets of features (FID when they are Inception's); >= 0.

    Raises UserError for fewer than two images in a set, or features of other lengths.
    """
    if first.mean.shape != second.mean.shape:
        raise UserError(
            f"features of length {len(first.mean)} and {len(second.mean)} cannot be compared; use one extractor"
        )
    first_covariance, second_covariance = first.covariance, second.covariance
    step = first.mean - second.mean
    total = float(torch.trace(first_covariance) + torch.trace(second_covariance))
    distance = float(step @ step) + total - 2.0 * trace_of_root(first_covariance, second_covariance)
    assert distance > -1e-6 * max(total, 1.0), f"Frechet distance {distance} is negative beyond rounding"
    return max(distance, 0.0)
