"""Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020) from one set of distances.

A manifold is the union of balls around the images of a set that reach to their k-th neighbour. Precision: the share of
samples inside the reference's manifold; recall: the share of reference images inside the samples'. Density: in how many
balls of the reference a sample lies, over k; coverage: the share of the reference's balls that hold a sample. Each of
the three matrices of distances (real-real, sample-sample, real-sample) is computed once, in stripes, in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hpc_gen.metrics.moments import check_finite
from hpc_gen.runtime.errors import UserError

NEIGHBORHOOD = 3
DENSITY_NEIGHBORHOOD = 5
_STRIPE = 2**24  # distances computed at once: 128 MB


@dataclass(frozen=True)
class Share:
    """A mean over images and its standard error, the manifolds being held fixed."""

    value: float
    std: float

    @classmethod
    def of(cls, values: Tensor) -> Share:
        """Of one number per image [N]."""
        values = values.double()
        deviation = float(values.std()) if len(values) > 1 else 0.0
        return cls(float(values.mean()), deviation / len(values) ** 0.5)


@dataclass(frozen=True)
class Manifolds:
    """How two sets lie in one another."""

    precision: Share
    recall: Share
    density: Share
    coverage: Share


def precision_recall(features: Tensor, reference: Tensor, neighborhood: int = NEIGHBORHOOD) -> tuple[float, float]:
    """Precision of samples [N, D] and recall of reference images [M, D]. Raises UserError for too few images."""
    found = compare(features, reference, neighborhood, neighborhood)
    return found.precision.value, found.recall.value


def compare(
    features: Tensor,
    reference: Tensor,
    neighborhood: int = NEIGHBORHOOD,
    density_neighborhood: int = DENSITY_NEIGHBORHOOD,
) -> Manifolds:
    """All four shares of samples [N, D] against reference images [M, D], in one pass over their distances.

    On a sphere's rim counts as inside for precision and recall (torch-fidelity), not for density and coverage (Naeem).
    Raises UserError for too few images, DataError for features that are not finite.
    """
    fewest, needed = min(len(features), len(reference)), max(neighborhood, density_neighborhood)
    if fewest <= needed:
        raise UserError(
            f"precision and recall need more than {needed} images in each set, not {fewest}; use more images"
        )
    check_finite(features)
    check_finite(reference)
    samples, real = features.double(), reference.double()
    samples_reach = radii(samples, [neighborhood])[neighborhood]
    reach = radii(real, [neighborhood, density_neighborhood])
    inside = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    balls = torch.zeros(len(samples), dtype=torch.float64, device=samples.device)
    recalled, covered = [], []
    rows = max(1, _STRIPE // len(samples))
    for start in range(0, len(real), rows):
        part = slice(start, start + rows)
        distances = torch.cdist(real[part], samples)
        wide = reach[density_neighborhood][part, None]
        inside |= (distances <= reach[neighborhood][part, None]).any(dim=0)
        balls += (distances < wide).sum(dim=0)
        recalled.append((distances <= samples_reach).any(dim=1))
        covered.append((distances < wide).any(dim=1))
    return Manifolds(
        precision=Share.of(inside),
        recall=Share.of(torch.cat(recalled)),
        density=Share.of(balls / density_neighborhood),
        coverage=Share.of(torch.cat(covered)),
    )


def radii(features: Tensor, neighborhoods: list[int]) -> dict[int, Tensor]:
    """Distance [N] of each image to its k-th neighbour, for each k; an image is its own nearest (rank 0)."""
    found: dict[int, list[Tensor]] = {k: [] for k in neighborhoods}
    rows = max(1, _STRIPE // len(features))
    for part in features.split(rows):
        nearest = torch.cdist(part, features).topk(max(neighborhoods) + 1, dim=1, largest=False).values
        for k, parts in found.items():
            parts.append(nearest[:, k])
    return {k: torch.cat(parts) for k, parts in found.items()}
