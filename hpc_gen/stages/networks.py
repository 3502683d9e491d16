"""Feature networks for the metrics by name: those of `metrics`, and those whose model is a tokenizer's."""

from __future__ import annotations

from pathlib import Path

from hpc_gen.metrics import extractors
from hpc_gen.metrics.extractors import ExtractorSpec


def extractor_spec(name: str, weights: str | None, sha256: str | None, workspace: Path) -> ExtractorSpec:
    """The extractor of that name; its weights file is hashed, not yet parsed. Raises UserError or DataError."""
    return extractors.spec(name, weights, sha256, workspace)
