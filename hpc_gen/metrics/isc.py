"""Inception score (Salimans et al. 2016), by torch-fidelity's function on unbiased logits."""

from __future__ import annotations

from torch import Tensor

from hpc_gen.metrics import fidelity
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
    return fidelity.inception_score(logits.double(), splits, seed)
