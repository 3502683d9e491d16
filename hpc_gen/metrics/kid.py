"""Kernel distance (KID, Binkowski et al. 2018), by torch-fidelity's function on float64 features."""

from __future__ import annotations

from torch import Tensor

from hpc_gen.metrics import fidelity
from hpc_gen.metrics.moments import check_finite
from hpc_gen.runtime.errors import UserError

SUBSETS = 100
SEED = 2020  # torch-fidelity's default, so that its command line gives the same subsets


def kernel_distance(
    features: Tensor, reference: Tensor, subset_size: int, subsets: int = SUBSETS, seed: int = SEED
) -> tuple[float, float]:
    """Mean and standard deviation over random subsets of features [N, D] and reference [M, D]; may be below 0.

    Raises UserError when a subset is larger than a set.
    """
    fewest = min(len(features), len(reference))
    if not 2 <= subset_size <= fewest:
        raise UserError(
            f"evaluate.kid_subset_size is {subset_size}, but there are {len(features)} samples and {len(reference)} "
            f"reference images; set it between 2 and {fewest}, or use more images"
        )
    check_finite(features)
    check_finite(reference)
    return fidelity.kernel_distance(features.double(), reference.double(), subsets, subset_size, seed)
