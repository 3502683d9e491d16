"""Words of the report that several of its parts use."""

from __future__ import annotations

from typing import Any

METRIC_TITLES = {
    "fid": ("Frechet distance (FID)", "lower is better"),
    "kid": ("Kernel distance (KID)", "lower is better"),
    "precision": ("Precision", "higher is better"),
    "recall": ("Recall", "higher is better"),
    "isc": ("Inception score", "higher is better"),
}


def plain(value: Any) -> str:
    """A setting as text."""
    return "default" if value is None else str(value)
