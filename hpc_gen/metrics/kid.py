"""Kernel distance (KID, Binkowski et al. 2018) in float64, over the subsets that torch-fidelity draws.

The unbiased estimate of the squared maximum mean discrepancy with k(x, y) = (x.y / D + 1)^3. Small sets have their
kernels computed once and looked up per subset; torch-fidelity computes them anew for each of a hundred.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from hpc_gen.metrics.moments import check_finite
from hpc_gen.runtime.errors import UserError

SUBSETS = 100
SEED = 2020  # torch-fidelity's default, so that its command line gives the same subsets
DEGREE = 3
_WHOLE = 4000  # images of a set up to which the whole kernel is kept: 128 MB in float64

Kernels = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def kernel_distance(
    features: Tensor, reference: Tensor, subset_size: int, subsets: int = SUBSETS, seed: int = SEED
) -> tuple[float, float]:
    """Mean and standard deviation over random subsets of features [N, D] and reference [M, D]; may be below 0.

    Raises UserError when a subset is larger than a set, DataError for features that are not finite.
    """
    fewest = min(len(features), len(reference))
    if not 2 <= subset_size <= fewest:
        raise UserError(
            f"evaluate.kid_subset_size is {subset_size}, but there are {len(features)} samples and {len(reference)} "
            f"reference images; set it between 2 and {fewest}, or use more images"
        )
    check_finite(features)
    check_finite(reference)
    generator = np.random.RandomState(seed)
    found = []
    with _kernels(features.double(), reference.double(), subset_size * subset_size * subsets) as kernels:
        for _ in range(subsets):
            one = torch.from_numpy(generator.choice(len(features), subset_size, replace=False)).to(features.device)
            other = torch.from_numpy(generator.choice(len(reference), subset_size, replace=False)).to(features.device)
            found.append(squared_discrepancy(*kernels(one, other)))
    return float(np.mean(found)), float(np.std(found))


def squared_discrepancy(within: Tensor, across: Tensor, within_other: Tensor) -> float:
    """The unbiased estimate from the kernels [m, m] of a subset with itself, of both, of the other with itself."""
    m = len(within)
    own = float(within.sum() - within.diagonal().sum()) + float(within_other.sum() - within_other.diagonal().sum())
    return own / (m * (m - 1)) - 2 * float(across.sum()) / (m * m)


def polynomial(one: Tensor, other: Tensor) -> Tensor:
    """Kernel float64 [N, M] of features [N, D] and [M, D]."""
    return (one @ other.T / one.shape[1] + 1.0) ** DEGREE


@contextmanager
def _kernels(features: Tensor, reference: Tensor, looked_up: int) -> Iterator[Kernels]:
    """Kernels of subsets given by their rows; from whole kernels where these are small and cost no more."""
    largest = max(len(features), len(reference))
    if largest > _WHOLE or largest * largest > looked_up:
        yield lambda a, b: (
            polynomial(features[a], features[a]),
            polynomial(features[a], reference[b]),
            polynomial(reference[b], reference[b]),
        )
        return
    own, across, others = polynomial(features, features), polynomial(features, reference), None
    others = own if features is reference else polynomial(reference, reference)
    yield lambda a, b: (own[a][:, a], across[a][:, b], others[b][:, b])
