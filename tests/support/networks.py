"""Feature networks with random weights in files of the published forms: what can be had without the real ones."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import torch
from torch import nn

from hpc_gen.metrics import fidelity
from hpc_gen.runtime.commit import sha256_file


def write_inception(path: Path) -> str:
    """torch-fidelity's Inception with its classifier, random but with features of ordinary size; returns the hash."""
    module = fidelity._module("feature_extractor_inceptionv3")
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    network = fidelity._unfilled_inception()("inception", ["2048"], feature_extractor_weights_path=empty)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in network.modules():
            if isinstance(part, module.BasicConv2d):
                weight = part.conv.weight
                weight.copy_(torch.randn(weight.shape, generator=generator) * (2 / weight[0].numel()) ** 0.5)
                part.bn.bias.copy_(torch.randn(part.bn.bias.shape, generator=generator) * 0.1)
        network.fc.weight.copy_(torch.randn(network.fc.weight.shape, generator=generator) * 0.5)
        network.fc.bias.zero_()
    torch.save(network.state_dict(), path)
    return sha256_file(path)


def write_clip(path: Path) -> str:
    """A tiny CLIP image tower as a TorchScript archive, the form in which OpenAI publishes it; returns the hash."""
    return _write_clip(path, embed=24, resolution=64, layers=2, width=64)


def write_whole_clip(path: Path) -> str:
    """The same at the size of ViT-B/32."""
    return _write_clip(path, embed=512, resolution=224, layers=12, width=768)


def _write_clip(path: Path, embed: int, resolution: int, layers: int, width: int) -> str:
    torch.manual_seed(0)
    tower = fidelity._module("feature_extractor_clip").CLIPVisual(embed, resolution, layers, width, 32).visual

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = tower
            self.text_projection = nn.Parameter(torch.zeros(8, embed))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the form is OpenAI's, whatever torch thinks of it now
        torch.jit.trace(Whole(), torch.zeros(1)).save(str(path))
    return sha256_file(path)


def write_dinov2(path: Path) -> str:
    """DINOv2 ViT-S/14 with random weights as a state dict of torch.save; returns the hash."""
    from hpc_gen.tokenizers import dinov2
    from hpc_gen.tokenizers.dinov2_model import Dinov2

    torch.manual_seed(0)
    model = Dinov2(dinov2.PRESETS["vits14"])
    with torch.no_grad():
        for name in ("cls_token", "pos_embed"):
            getattr(model, name).normal_(std=0.5)
    torch.save(model.state_dict(), path)
    return sha256_file(path)
