"""Small networks of the tokenizers dinov2 and vqgan in files, with values that leave nothing idle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpc_gen.config.dinov2 import Dinov2Architecture
from hpc_gen.config.vqgan import VqganConfig
from hpc_gen.runtime.tensor_files import write_tensors
from hpc_gen.tokenizers import dinov2, vqgan
from hpc_gen.tokenizers.dinov2_model import Dinov2
from hpc_gen.tokenizers.vqgan_model import VqganModel

DINOV2 = Dinov2Architecture(width=24, depth=4, heads=3, registers=4)
VQGAN = VqganConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=8, codes=16)


def state(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """A state dict of normal values: matrices by their fan-in, vectors around 1 or 0."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        scale = value[0].numel() ** -0.5 if value.ndim > 1 and "embed" not in name else 0.3
        norm = "norm" in name and name.endswith("weight") or "gamma" in name
        found[name] = noise * scale + (1.0 if norm else 0.0)
    return found


def write_dinov2(path: Path, seed: int = 0, sizes: Dinov2Architecture = DINOV2, **changes: Tensor) -> Path:
    """A file of a small DINOv2 that says its sizes; `changes` replace tensors."""
    with torch.device("meta"):
        model = Dinov2(sizes)
    write_tensors(path, state(model, seed) | changes, dinov2.metadata_for(sizes))
    return path


def write_vqgan(path: Path, seed: int = 0, config: VqganConfig = VQGAN) -> Path:
    """A file of a small VQGAN that says its sizes."""
    with torch.device("meta"):
        model = VqganModel(config)
    write_tensors(path, state(model, seed), vqgan.metadata_for(config))
    return path


def pixels(num: int, side: int = 28, seed: int = 3) -> Tensor:
    """uint8 [num, 3, side, side] with structure: noise alone gives one code."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (num, 3, 4, 4), generator=generator).float()
    smooth = nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    noise = torch.randint(-20, 21, smooth.shape, generator=generator)
    return (smooth + noise).clamp(0, 255).to(torch.uint8)


def toy_settings(**changes: Any) -> dict[str, Any]:
    """The section `dinov2` for images of 28 pixels: a grid of 2."""
    return {"grid": 2, "positions": "digit"} | changes
