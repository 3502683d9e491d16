"""Words of the report that several of its parts use."""

from __future__ import annotations

from typing import Any

METRIC_TITLES = {
    "fid": ("Frechet distance (FID)", "lower is better"),
    "fid_infinity": ("FID of infinitely many samples", "lower is better"),
    "sfid": ("Spatial Frechet distance (sFID)", "lower is better"),
    "sfid_infinity": ("sFID of infinitely many samples", "lower is better"),
    "clip_fid": ("Frechet distance of CLIP features", "lower is better"),
    "clip_fid_infinity": ("The same of infinitely many samples", "lower is better"),
    "fd_dinov2": ("Frechet distance of DINOv2 features", "lower is better"),
    "fd_dinov2_infinity": ("The same of infinitely many samples", "lower is better"),
    "density": ("Density", "higher is better"),
    "coverage": ("Coverage", "higher is better"),
    "kid": ("Kernel distance (KID)", "lower is better"),
    "precision": ("Precision", "higher is better"),
    "recall": ("Recall", "higher is better"),
    "isc": ("Inception score", "higher is better"),
}


def plain(value: Any) -> str:
    """A setting as text."""
    return "default" if value is None else str(value)
