"""Weights of KL autoencoders: official files and our own exports, read with strict keys into one network."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from hpc_gen.config.kl_vae import KlVaeConfig
from hpc_gen.runtime.errors import DataError, UserError

ARCHITECTURE_KEY = "hpc_gen.architecture"
SCALE_KEY = "hpc_gen.scale"
SHIFT_KEY = "hpc_gen.shift"

TRAINING_ONLY = ("loss", "foundation_model", "linear_proj")
"""First parts of keys that official files of LDM and VA-VAE hold for training alone (specs/gmem.md section 3.4)."""

_NAMED = 5  # keys named in an error before "and N more"

# Which key of the architecture decides the shape of a parameter, to say what to change; the first match counts.
_SHAPE_KEYS = {
    "post_quant_conv": "embed_dim or z_channels",
    "quant_conv": "embed_dim or z_channels",
    "encoder.conv_in": "in_channels or ch",
    "encoder.conv_out": "z_channels, ch or ch_mult",
    "decoder.conv_in": "z_channels, ch or ch_mult",
    "decoder.conv_out": "in_channels or ch",
}

PerChannel = float | list[float]


@dataclass(frozen=True)
class FileFacts:
    """What a weights file says of itself (our exports do); None where it is silent."""

    architecture: KlVaeConfig | None = None
    scale: PerChannel | None = None
    shift: PerChannel | None = None


def metadata_for(config: KlVaeConfig, scale: PerChannel | None, shift: PerChannel | None) -> dict[str, str]:
    """Metadata of an export, from which `facts_of` reads the same back; None is left out."""
    found = {ARCHITECTURE_KEY: json.dumps(config.model_dump(mode="json"), sort_keys=True)}
    return found | {
        key: json.dumps(value) for key, value in ((SCALE_KEY, scale), (SHIFT_KEY, shift)) if value is not None
    }


def facts_of(metadata: Mapping[str, str], source: str) -> FileFacts:
    """What the metadata of the file `source` says. Raises DataError when it cannot be understood."""
    try:
        said = {key: json.loads(metadata[key]) for key in (ARCHITECTURE_KEY, SCALE_KEY, SHIFT_KEY) if key in metadata}
        architecture = said.get(ARCHITECTURE_KEY)
        return FileFacts(
            architecture=None if architecture is None else KlVaeConfig.model_validate(architecture),
            scale=_per_channel(said.get(SCALE_KEY)),
            shift=_per_channel(said.get(SHIFT_KEY)),
        )
    except (ValueError, TypeError) as error:  # pydantic's errors are ValueErrors
        first = str(error).splitlines()[0]
        raise DataError(
            f"{source} says of itself what cannot be understood ({first}); export the weights again"
        ) from error


def _per_channel(value: Any) -> PerChannel | None:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value if value is None else float(value)
    if isinstance(value, list) and value and all(isinstance(one, int | float) for one in value):
        return [float(one) for one in value]
    raise ValueError(f"{value!r} is neither a number nor a list of numbers")


def typed_architecture(given: KlVaeConfig | Mapping[str, Any]) -> KlVaeConfig:
    """The architecture of a mapping as the config spells it; UserError with the first mistake."""
    if isinstance(given, KlVaeConfig):
        return given
    try:
        return KlVaeConfig.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["architecture", *map(str, first["loc"])])
        raise UserError(
            f"tokenizer.{where} is refused: {first['msg']}; see docs/methods/kl_vae.md for its keys"
        ) from error


@torch.no_grad()
def import_flat(model: nn.Module, flat: Mapping[str, Tensor], source: str = "the weights") -> dict[str, int]:
    """Copy a flat state dict with the official keys into a materialised model, values cast to the model's dtypes.

    Keys that belong to the training of an official file (TRAINING_ONLY) are left out; returns their number by first
    part. All or nothing: every other key must be there and no more, in the right shape, with finite values; else
    DataError naming `source`, the keys and the key of the architecture to look at.
    """
    used = {name: value for name, value in flat.items() if name.split(".", 1)[0] not in TRAINING_ONLY}
    own = model.state_dict()
    missing = [name for name in own if name not in used]
    unexpected = [name for name in used if name not in own]
    if missing or unexpected:
        parts = [f"lacks {_some(missing)}"] if missing else []
        parts += [f"has unknown {_some(unexpected)}"] if unexpected else []
        raise DataError(
            f"{source} {' and '.join(parts)}; ch_mult, num_res_blocks, attn_resolutions or decoder_attention of the "
            "architecture differ, or these are not the weights of a KL autoencoder"
        )
    for name, value in own.items():
        if used[name].shape != value.shape:
            raise DataError(
                f"{source} holds '{name}' as {list(used[name].shape)}, but the network needs {list(value.shape)}; "
                f"change {_shape_key(name)} of the architecture"
            )
        if not bool(torch.isfinite(used[name]).all()):
            raise DataError(f"{source} holds values in '{name}' that are not finite; get the file anew")
    for name, value in own.items():
        value.copy_(used[name])
    return dict(Counter(name.split(".", 1)[0] for name in flat if name not in used))


def _some(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:_NAMED])
    return shown + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _shape_key(name: str) -> str:
    return next((keys for part, keys in _SHAPE_KEYS.items() if name.startswith(part)), "ch or ch_mult")
