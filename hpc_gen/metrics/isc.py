"""Inception score (Salimans et al. 2016) in float64: exp of the mean divergence of each image's classes from all.

Two protocols: torch-fidelity's (ten splits of the shuffled images) and that of ADM's evaluator (runs of 5000 images in
their order, of which a shorter last one counts in full). The logits are those without the bias in both.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hpc_gen.metrics.moments import check_finite
from hpc_gen.runtime.errors import UserError

SPLITS = 10
SEED = 2020  # torch-fidelity's default
NO_LOGITS = "not available: extractor has no logits"


def inception_score(logits: Tensor, splits: int = SPLITS, seed: int = SEED) -> tuple[float, float]:
    """Mean and standard deviation over splits of logits [N, classes]. Raises UserError for fewer images than splits."""
    if len(logits) < splits:
        raise UserError(f"the inception score needs at least {splits} images, not {len(logits)}; sample more images")
    check_finite(logits)
    count = len(logits)
    order = torch.from_numpy(np.random.RandomState(seed).permutation(count)).to(logits.device)
    probabilities = logits[order].double().softmax(dim=1)
    return _over([probabilities[i * count // splits : (i + 1) * count // splits] for i in range(splits)])


def inception_score_in_order(logits: Tensor, split_images: int) -> tuple[float, float]:
    """Mean and standard deviation over runs of `split_images` images in their order. Raises as inception_score."""
    if len(logits) < 2:
        raise UserError(f"the inception score needs at least 2 images, not {len(logits)}; sample more images")
    check_finite(logits)
    return score_in_order(logits.double().softmax(dim=1), split_images)


def score_in_order(probabilities: Tensor, split_images: int) -> tuple[float, float]:
    """As `inception_score_in_order`, from class probabilities [N, classes]."""
    return _over(list(probabilities.double().split(split_images)))


def _over(parts: list[Tensor]) -> tuple[float, float]:
    """Mean and standard deviation of the scores of probabilities, each [n, classes]; 0 log 0 = 0."""
    scores = []
    for part in parts:
        whole = part.mean(dim=0, keepdim=True)
        divergence = (torch.xlogy(part, part) - torch.xlogy(part, whole)).sum(dim=1)
        scores.append(float(divergence.mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))
