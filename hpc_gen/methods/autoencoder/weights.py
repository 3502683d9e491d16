"""Export of a trained autoencoder as the file that the tokenizer `kl_vae` reads, with the scale of its latents."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from hpc_gen.data.images import normalize
from hpc_gen.data.table import Table
from hpc_gen.methods.autoencoder.config import AutoencoderConfig
from hpc_gen.methods.autoencoder.objective import ROLE
from hpc_gen.nn.posterior import mean_and_std
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.tokenizers.kl_vae_model import KlAutoencoder
from hpc_gen.tokenizers.kl_vae_weights import import_flat, metadata_for

SCALE_ROWS = 1024
"""Rows, evenly spaced in the training table, over which the scale is measured."""
SCALE_ROWS_KEY = "hpc_gen.scale_rows"
_BATCH = 32


@torch.no_grad()
def measure_scale(model: KlAutoencoder, batches: Iterable[Tensor]) -> float:
    """1 / std over all values of the latents of some images, in batches of pixels uint8 [N, C, H, W].

    One number for all channels, as LDM, SD f8 and KL16 have it; the mean is left alone (shift 0). The posterior's own
    spread counts, without drawing from it: var z = var(mean) + mean(std^2), in float64. Raises DataError when the
    latents do not vary or are not finite.
    """
    count, total, squares = 0, 0.0, 0.0
    for pixels in batches:
        mean, std = mean_and_std(model.encode(normalize(pixels.to(model.quant_conv.weight.device))).double())
        count += mean.numel()
        total += mean.sum().item()
        squares += (mean.square() + std.square()).sum().item()
    variance = squares / count - (total / count) ** 2 if count else 0.0
    if not (math.isfinite(variance) and variance > 0):
        raise DataError(
            f"the latents of {count} values have the variance {variance:g}, so they have no scale; train the "
            "autoencoder longer, or export an earlier checkpoint"
        )
    return 1 / math.sqrt(variance)


def export_role(
    role: str, state: Mapping[str, Tensor], config: AutoencoderConfig, table: Table | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors under the official keys and the metadata from which `KlVae` knows architecture and scale.

    The scale is measured on up to SCALE_ROWS rows of the training table; without a table it is left out, and the
    tokenizer will ask for `encode.tokenizer.scale`. Raises UserError for another role, DataError for weights that do
    not fit the config.
    """
    if role != ROLE:
        raise UserError(f"the autoencoder has no role '{role}'; export the role '{ROLE}'")
    with torch.device("meta"):
        model = KlAutoencoder(config.architecture)
    model.to_empty(device="cpu")
    import_flat(model, state, f"role '{role}'")
    model.eval()
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    if table is None:
        return tensors, metadata_for(config.architecture, None, None)
    rows = np.unique(np.linspace(0, table.rows - 1, min(SCALE_ROWS, table.rows)).astype(np.int64))
    metadata = metadata_for(config.architecture, measure_scale(model, _pixels(table, rows)), 0.0)
    return tensors, metadata | {SCALE_ROWS_KEY: str(len(rows))}


def _pixels(table: Table, rows: np.ndarray) -> Iterator[Tensor]:
    for start in range(0, len(rows), _BATCH):
        yield table.read(rows[start : start + _BATCH], ("pixels",))["pixels"]
