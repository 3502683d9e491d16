"""A Frechet distance with its error: jackknife over groups of images, and the value for infinitely many of them.

The distance of N images is biased by about b / N (Chong and Forsyth 2020, arXiv 1911.07023): the line through its
values at N/2 .. N over 1/N meets the axis at the unbiased value. The error is the delete-a-group jackknife over random
groups, which need not be blocks: in a plan sorted by class these are nothing alike. Both need a dozen distances, so the
reference's root R is taken once and all images are projected on it: tr (S S_ref)^(1/2) of any subset is then the sum of
the singular values of its centred rows of X R, by the smaller of the two squares. Limit: the reference is held fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hpc_gen.metrics.frechet import Gaussian, root_of
from hpc_gen.metrics.moments import Moments, check_finite, merge_all

GROUPS = 10
SEED = 2020
FEWEST = 2 * GROUPS  # images from which groups have at least two
_SIZES = (5, 6, 7, 8)  # groups of the smaller sets; nine are the jackknife's, ten all


@dataclass(frozen=True)
class Estimate:
    """The distance of all images, its jackknife error, the extrapolated value and its error.

    The last one is of the fit and of the jackknife together: the points of the fit share images, so that its own error
    is too small by a factor of two or three.
    """

    value: float
    std: float
    infinity: float
    infinity_std: float


def frechet_estimate(features: Tensor, reference: Gaussian) -> Estimate:
    """Estimate of features [N, D] against a Gaussian, N >= FEWEST, on the features' device.

    Raises DataError for features that are not finite.
    """
    assert len(features) >= FEWEST, f"{len(features)} images make no {GROUPS} groups"
    check_finite(features)
    sets = _Subsets(features, reference)
    everything = list(range(GROUPS))
    whole = sets.distance(everything)
    without = [sets.distance([g for g in everything if g != left]) for left in everything]
    std = float(np.sqrt((GROUPS - 1) / GROUPS * np.sum((np.array(without) - np.mean(without)) ** 2)))
    points = [(sets.count(everything), whole)]
    points.append((sets.count(everything[1:]), float(np.mean(without))))
    for size in _SIZES:  # two sets of a size, from either end
        ends = (everything[:size], everything[-size:])
        points.append((sets.count(ends[0]), float(np.mean([sets.distance(end) for end in ends]))))
    infinity, error = _intercept([(1.0 / count, value) for count, value in points])
    return Estimate(whole, std, infinity, float(np.hypot(error, std)))


def _intercept(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Where a least-squares line meets x = 0, and the standard error of that."""
    x, y = (np.array(values) for values in zip(*points, strict=True))
    slope, intercept = np.polyfit(x, y, 1)
    spread = ((x - x.mean()) ** 2).sum()
    variance = ((y - slope * x - intercept) ** 2).sum() / max(len(x) - 2, 1)
    return float(intercept), float(np.sqrt(variance * (1 / len(x) + x.mean() ** 2 / spread)))


class _Subsets:
    """Distances of unions of random groups of images to one reference."""

    def __init__(self, features: Tensor, reference: Gaussian) -> None:
        values, covariance = features.double(), reference.covariance.to(features.device)
        mean, root = reference.mean.to(features.device), root_of(covariance)
        order = torch.from_numpy(np.random.RandomState(SEED).permutation(len(values))).to(values.device)
        self._groups = [order[g::GROUPS] for g in range(GROUPS)]
        self._reference_trace = float(torch.trace(covariance))
        centred = values - mean
        # of each group: count, mean of the features less the reference's, sum of their squared distances from it
        self._counts = [len(group) for group in self._groups]
        self._means = [centred[group].mean(dim=0) for group in self._groups]
        self._squares = [float((centred[group] - m).square().sum()) for group, m in zip(self._groups, self._means)]
        projected = centred @ root
        self._gram: Tensor | None = None
        self._moments: list[Moments] = []
        if len(values) <= projected.shape[1]:
            self._gram = projected @ projected.T
        elif projected.shape[1]:
            self._moments = [Moments.of(projected[group]) for group in self._groups]

    def count(self, chosen: Sequence[int]) -> int:
        """Images in the chosen groups."""
        return sum(self._counts[g] for g in chosen)

    def distance(self, chosen: Sequence[int]) -> float:
        """Frechet distance of the images of the chosen groups; >= 0."""
        count = self.count(chosen)
        step = torch.stack([self._means[g] * (self._counts[g] / count) for g in chosen]).sum(dim=0)
        between = sum(self._counts[g] * float((self._means[g] - step).square().sum()) for g in chosen)
        trace = (sum(self._squares[g] for g in chosen) + between) / (count - 1)
        total = trace + self._reference_trace
        return max(0.0, float(step @ step) + total - 2.0 * self._root_trace(chosen, count))

    def _root_trace(self, chosen: Sequence[int], count: int) -> float:
        if self._gram is not None:
            rows = torch.cat([self._groups[g] for g in chosen])
            inner = self._gram[rows][:, rows]
            inner = inner - inner.mean(dim=0, keepdim=True)
            inner = inner - inner.mean(dim=1, keepdim=True)
        elif self._moments:
            inner = merge_all([self._moments[g] for g in chosen]).scatter
        else:
            return 0.0  # a reference without spread
        values = torch.linalg.eigvalsh((inner + inner.T) / 2)
        return float((values.clamp_min(0.0) / (count - 1)).sqrt().sum())
