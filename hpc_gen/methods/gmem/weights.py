"""Official checkpoints of GMem and LightningDiT: key and shape lists, import with strict keys, what a user must know.

Our state-dict keys are the official ones (specs/gmem.md sections 3.1 and 4).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hpc_gen.methods.gmem.config import GmemConfig
from hpc_gen.methods.gmem.model import LightningDiT, rotary_tables
from hpc_gen.methods.official import OfficialList, import_strict
from hpc_gen.nn.embeddings import sincos_positions
from hpc_gen.runtime.errors import DataError

WRAPPER = "module."  # prefix of the keys of "model" in files of multi-process trainings
_TABLE_TOLERANCE = 1e-5  # float32 sines of another library


def official_list(config: GmemConfig, num_classes: int = 0) -> OfficialList:
    """The list for a model of this config (built on the meta device, no memory)."""
    with torch.device("meta"):
        model = LightningDiT(config, num_classes)
    return OfficialList.of(model)


def adapt_official(
    role: str, flat: Mapping[str, Tensor], config: GmemConfig, own: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict without the wrapper's prefix, and a sentence for each silent surprise in it.

    Raises DataError for files of GMem's first version, which are another network.
    """
    if {"network", "memorybank"} <= flat.keys() or any(name.startswith("network.") for name in flat):
        raise DataError(
            "this is a file of GMem's first version (SiT on SD-VAE latents, the opposite direction of time); only the "
            "LightningDiT checkpoints of the later versions are supported"
        )
    plain = {name.removeprefix(WRAPPER): value for name, value in flat.items()}
    notes = []
    for name, expected in _fixed_tables(config).items():
        given = plain.get(name)
        if given is not None and given.shape == expected.shape:
            difference = (given.float() - expected).abs().max().item()
            if not difference <= _TABLE_TOLERANCE:
                notes.append(f"the fixed table '{name}' in the weights differs from ours by up to {difference:g}")
    return plain, notes


def _fixed_tables(config: GmemConfig) -> dict[str, Tensor]:
    grid = config.input_size // config.patch_size
    tables = {"pos_embed": sincos_positions(config.hidden, grid)}
    if config.rope:
        cos_NK, sin_NK = rotary_tables(config.hidden // config.heads, grid)
        tables |= {"feat_rope.freqs_cos": cos_NK, "feat_rope.freqs_sin": sin_NK}
    return tables


def scale_metadata(tokenizer: Mapping[str, Any]) -> dict[str, str]:
    """Scale and shift of the latents for a file's metadata: decoding without them is the commonest mistake of users."""
    known = {key: tokenizer[key] for key in ("scale", "shift") if tokenizer.get(key) is not None}
    return {f"hpc_gen.latent_{key}": json.dumps(value) for key, value in known.items()}


def import_flat(model: nn.Module, flat: Mapping[str, Tensor], source: str = "the weights") -> None:
    """Copy a flat state dict with the official keys into a materialised model; see methods.official.import_strict."""
    import_strict(model, flat, source, "method.depth or a switch of the network differs", _shape_key)


def _shape_key(name: str) -> str:
    """Which config keys decide the shape of a parameter."""
    at_the_ends = name == "pos_embed" or name.startswith(("feat_rope", "x_embedder", "final_layer.linear"))
    return "method.image_size, method.channels, method.patch_size or method.hidden" if at_the_ends else "method.hidden"
