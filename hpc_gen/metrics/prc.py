"""Improved precision and recall (Kynkaanniemi et al. 2019), by torch-fidelity's function on float64 features."""

from __future__ import annotations

from torch import Tensor

from hpc_gen.metrics import fidelity
from hpc_gen.metrics.moments import check_finite
from hpc_gen.runtime.errors import UserError

NEIGHBORHOOD = 3


def precision_recall(features: Tensor, reference: Tensor, neighborhood: int = NEIGHBORHOOD) -> tuple[float, float]:
    """Share of samples [N, D] inside the reference's manifold, and of reference images [M, D] inside the samples'.

    A manifold is the union of balls that reach to the `neighborhood`-th neighbour. Raises UserError for too few images.
    """
    fewest = min(len(features), len(reference))
    if fewest <= neighborhood:
        raise UserError(
            f"precision and recall need more than {neighborhood} images in each set, not {fewest}; use more images"
        )
    check_finite(features)
    check_finite(reference)
    return fidelity.precision_recall(features.double(), reference.double(), neighborhood)
