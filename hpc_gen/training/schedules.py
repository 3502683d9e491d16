"""Learning rate as a function of progress, in images (specs/energy.md section 5.3)."""

from __future__ import annotations

import math


def learning_rate(
    progress_images: float,
    *,
    peak: float,
    warmup_images: float,
    total_images: float,
    kind: str,
    min_lr: float = 0.0,
) -> float:
    """Learning rate at `progress_images`, evaluated before the step (so exactly 0 at the first step of a warm-up).

    Linear from 0 to `peak` over `warmup_images`, then `constant`, or `cosine` from `peak` down to `min_lr` at
    `total_images`. Only ratios matter: progress may be counted in any unit that all three share (the reference uses
    fractional epochs). Past `total_images` a cosine stays at `min_lr`. Raises ValueError for an unknown kind.
    """
    if kind not in ("constant", "cosine"):
        raise ValueError(f"unknown schedule '{kind}'; use 'constant' or 'cosine'")
    if progress_images < warmup_images:
        return peak * progress_images / warmup_images
    if kind == "constant" or total_images <= warmup_images:
        return peak
    fraction = min(1.0, (progress_images - warmup_images) / (total_images - warmup_images))
    return min_lr + (peak - min_lr) * 0.5 * (1.0 + math.cos(math.pi * fraction))


def peak_learning_rate(*, lr: float | None, blr: float | None, global_batch: int) -> float:
    """The peak rate: `lr` as given, or `blr` scaled linearly by the global batch over 256."""
    if lr is not None:
        return lr
    if blr is None:
        raise ValueError("one of optimizer.lr and optimizer.blr must be given")
    return blr * global_batch / 256
