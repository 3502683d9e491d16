"""Stable Diffusion's autoencoder as the library diffusers names it, under the names of its authors (LDM).

The most common copies of that autoencoder (sd-vae-ft-mse and -ema) are in this form. Nothing but names changes, save
that the 1 x 1 convolutions of the attention are stored there as matrices.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import Tensor

_MARKS = ("encoder.down_blocks.", "decoder.up_blocks.")
_RULES: tuple[tuple[str, str], ...] = (
    (r"\.mid_block\.resnets\.0\.", r".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", r".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.group_norm\.", r".mid.attn_1.norm."),
    (r"\.mid_block\.attentions\.0\.(?:to_q|query)\.", r".mid.attn_1.q."),
    (r"\.mid_block\.attentions\.0\.(?:to_k|key)\.", r".mid.attn_1.k."),
    (r"\.mid_block\.attentions\.0\.(?:to_v|value)\.", r".mid.attn_1.v."),
    (r"\.mid_block\.attentions\.0\.(?:to_out\.0|proj_attn)\.", r".mid.attn_1.proj_out."),
    (r"\.down_blocks\.(\d+)\.resnets\.(\d+)\.", r".down.\1.block.\2."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.conv\.", r".down.\1.downsample.conv."),
    (r"\.up_blocks\.(\d+)\.resnets\.(\d+)\.", r".up.\1.block.\2."),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0\.conv\.", r".up.\1.upsample.conv."),
    (r"\.conv_shortcut\.", r".nin_shortcut."),
    (r"\.conv_norm_out\.", r".norm_out."),
)
_LEVEL = re.compile(r"^decoder\.up\.(\d+)\.")
_ATTENTION = re.compile(r"\.mid\.attn_1\.(?:q|k|v|proj_out)\.weight$")


def is_diffusers(keys: Collection[str]) -> bool:
    """Whether a state dict has these names."""
    return all(any(key.startswith(mark) for key in keys) for mark in _MARKS)


def to_ldm(flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under LDM's names; a name that no rule knows stays, and the strict comparison names it.

    diffusers counts the levels of the decoder from the coarsest, LDM from the finest.
    """
    levels = 1 + max(int(match[1]) for key in flat if (match := re.match(r"decoder\.up_blocks\.(\d+)\.", key)))
    found: dict[str, Tensor] = {}
    for key, value in flat.items():
        for pattern, replacement in _RULES:
            key = re.sub(pattern, replacement, key)
        key = _LEVEL.sub(lambda match: f"decoder.up.{levels - 1 - int(match[1])}.", key)
        found[key] = value[:, :, None, None] if _ATTENTION.search(key) and value.ndim == 2 else value
    return found
