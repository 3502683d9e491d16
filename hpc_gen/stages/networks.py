"""Feature networks for the metrics by name: those of `metrics`, and those whose model is a tokenizer's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpc_gen.metrics import extractors, fidelity
from hpc_gen.metrics.extractors import Extractor, ExtractorSpec, NetworkExtractor, weights_sha256
from hpc_gen.runtime.errors import DataError, UserError

# torch-fidelity's names -> presets of the tokenizer; it has those without registers
DINOV2 = {f"dinov2-vit-{size}-14": f"vit{size}14" for size in "sblg"}
GRID = 16  # tokens per side of the 224 pixels that torch-fidelity resizes to


def extractor_spec(name: str, weights: str | None, sha256: str | None, workspace: Path) -> ExtractorSpec:
    """The extractor of that name; its weights file is hashed, not yet parsed. Raises UserError or DataError."""
    if name in DINOV2:
        return _dinov2(name, weights, sha256, workspace)
    return extractors.spec(name, weights, sha256, workspace, also=DINOV2)


def _dinov2(name: str, weights: str | None, sha256: str | None, workspace: Path) -> ExtractorSpec:
    """torch-fidelity's pixels through our DINOv2, filled from an official file."""
    if weights is None:
        raise UserError(f"extractor '{name}' has no weights; set 'weights' beside its name to the official .pth file")
    path = (workspace / weights).resolve()
    found = weights_sha256(path, name, "get the official .pth file of this network")
    if sha256 not in (None, found):
        raise DataError(
            f"{path} has SHA-256 {found}, not {sha256}; set 'sha256' beside its name to the hash of the file you mean, "
            "or get the right file"
        )

    def build() -> Extractor:
        from hpc_gen.tokenizers import dinov2, official
        from hpc_gen.tokenizers.dinov2_model import Dinov2

        sizes = dinov2.PRESETS[DINOV2[name]]
        flat = official.read_official(path, official.DINOV2, found)
        with torch.device("meta"):
            model = Dinov2(sizes)
        model.to_empty(device="cpu")
        official.load_strict(model, flat, path, official.DINOV2, f"give the file of {name}")
        return NetworkExtractor(name, fidelity.dinov2(name, ClassToken(model)), description, has_logits=False)

    description: dict[str, Any] = {
        "name": name,
        "network": f"torch-fidelity {name}",
        "layer": "dinov2",
        "weights_sha256": found,
        "resize": "bilinear as TensorFlow 1, to 224",
        "dtype": "float32",
    }
    return ExtractorSpec(name, description, False, build)


class ClassToken(nn.Module):
    """The class token after the last block and the final norm, float32 [N, D], of normalised images [N, 3, 224, 224].

    Positions by DINO's rule, as the public hub entry without registers has them.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        from hpc_gen.tokenizers.dinov2_model import positions_of

        self.model = model
        self.positions = nn.Buffer(positions_of(model.pos_embed.detach(), GRID, "digit"), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """[N, D]."""
        depth = len(self.model.blocks)
        found: Tensor = self.model(images, self.positions, [depth])[depth]
        return found[:, 0]
