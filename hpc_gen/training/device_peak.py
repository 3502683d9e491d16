"""Peak of a device in matrix products, for MFU: the share of it that a training's own arithmetic makes use of."""

from __future__ import annotations

# Dense bf16 TFLOP/s by the vendor's data sheets (SXM and module forms unless said); the first name that fits counts.
PEAK_TFLOPS = (
    ("GH200", 989.4),
    ("H200", 989.4),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.4),
    ("H800", 989.4),
    ("A100", 311.8),
    ("A800", 311.8),
    ("A40", 149.7),
    ("A10", 125.0),
    ("L40S", 362.1),
    ("L4", 121.0),
    ("V100", 125.0),
)


def peak_of(name: str) -> float | None:
    """TFLOP/s of a GPU by the name that torch gives, None for one that is not known."""
    return next((peak for part, peak in PEAK_TFLOPS if part.lower() in name.lower()), None)


def mfu(flops_per_image: float, images: int, seconds: float, devices: int, peak_tflops: float) -> float:
    """Share of the devices' peak in [0, 1] (above 1: the peak is not that of the number format)."""
    return flops_per_image * images / (seconds * devices * peak_tflops * 1e12) if seconds > 0 else 0.0
