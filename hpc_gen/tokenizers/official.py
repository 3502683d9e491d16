"""Weights files of others: what a state dict is, by its keys, and reading one strictly into a network.

A wrong file is refused by what it is ("the generator LightningDiT, not the tokenizer"), for that is the mistake people
make: the reference of GMem itself links a generator as its tokenizer and loads it without a word (specs/gmem.md 8).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpc_gen.runtime import tensor_files
from hpc_gen.runtime.errors import DataError
from hpc_gen.tokenizers.diffusers_names import is_diffusers, to_ldm

KL_VAE, DINOV2, VQGAN = "kl_vae", "dinov2", "vqgan"

_NAMED = 5  # keys named in an error before "and N more"

PREFIXES = ("module.", "first_stage_model.", "pretrained_encoder.", "vqgan.")
"""First parts below which a network lies in a file of something larger: wrapped twice, Stable Diffusion, DiGIT."""


@dataclass(frozen=True)
class Kind:
    """What a state dict may be: `name` of the tokenizer that reads it ("" = none does), and the words for it."""

    name: str
    words: str
    has: Callable[[Collection[str]], bool]


def _all(*keys: str) -> Callable[[Collection[str]], bool]:
    return lambda found: all(key in found for key in keys)


def _begins(*starts: str) -> Callable[[Collection[str]], bool]:
    return lambda found: all(any(key.startswith(start) for key in found) for start in starts)


def _kl_vae(found: Collection[str]) -> bool:
    return _all("encoder.conv_in.weight", "quant_conv.weight", "post_quant_conv.weight")(found) and not _begins(
        "quantize."
    )(found)


def _vqgan(found: Collection[str]) -> bool:
    return "quantize.embedding.weight" in found and "quant_conv.weight" not in found


# The first that fits counts; what we can read stands before the generators, which may hold a tokenizer inside.
KINDS: tuple[Kind, ...] = (
    Kind(KL_VAE, "a KL autoencoder", _kl_vae),
    Kind(VQGAN, "a VQGAN of the MAGE family", _vqgan),
    Kind(DINOV2, "a DINOv2 network", _all("patch_embed.proj.weight", "cls_token", "blocks.0.ls1.gamma")),
    Kind("", "the generator LightningDiT or GMem", _all("x_embedder.proj.weight", "feat_rope.freqs_cos")),
    Kind("", "a generator of the DiT family", _all("x_embedder.proj.weight", "final_layer.linear.weight")),
    Kind("", "a generator of energy diffusion", _all("dit.x_embedder.proj.weight")),
    Kind("", "a generator of the MAR family", _all("z_proj.weight", "encoder_blocks.0.attn.qkv.weight")),
    Kind("", "the generator DiM", _begins("transformer_blocks.0.scale_shift_table")),
    Kind("", "a generator of DiGIT (with its tokenizer inside)", _all("decoder.embed_tokens.weight")),
    Kind("", "a generator of EDM or GDD", _all("model.map_layer0.weight")),
    Kind("", "a discriminator of GDD", _begins("discriminators.")),
    Kind("", "a VQGAN of taming-transformers, another network than MAGE's", _begins("quantize.", "quant_conv.")),
    Kind("", "an autoencoder under the names of diffusers", _begins("encoder.down_blocks.")),
    Kind("", "a text-to-image model of Stable Diffusion", _begins("model.diffusion_model.")),
    Kind("", "a vision transformer without DINOv2's layer scale", _all("patch_embed.proj.weight", "cls_token")),
    Kind("", "an Inception network", _begins("Mixed_7c.")),
)
WORDS = {KL_VAE: "a KL autoencoder", DINOV2: "a DINOv2 network", VQGAN: "a VQGAN of the MAGE family"}


def recognise(keys: Collection[str]) -> Kind | None:
    """What a state dict with these keys is, None when nobody knows."""
    return next((kind for kind in KINDS if kind.has(keys)), None)


def read_official(path: Path, wanted: str, sha256: str | None = None) -> dict[str, Tensor]:
    """The state dict of the tokenizer `wanted` (kl_vae, dinov2, vqgan) in a file, under its own keys.

    Looked for in the file itself, in each of its entries, and below the PREFIXES of something larger; an autoencoder
    under the names of diffusers gets those of its authors. Raises UserError
    where there is no file; DataError for one that is damaged or holds something else, which is named, or several.
    """
    nested = tensor_files.read_nested(path, sha256)
    entries = tensor_files.state_dicts(nested)
    found: dict[str, dict[str, Tensor]] = {}
    others: list[Kind] = []
    for entry in entries:
        flat = tensor_files.select(path, nested, entry)
        for prefix in ("", *PREFIXES):
            inner = {name.removeprefix(prefix): value for name, value in flat.items() if name.startswith(prefix)}
            if wanted == KL_VAE and is_diffusers(inner):
                inner = to_ldm(inner)
            kind = recognise(inner)
            if kind is not None and kind.name == wanted:
                found[f"{entry}/{prefix}"] = inner
                break
            if kind is not None:
                others.append(kind)
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise DataError(
            f"{path} holds {WORDS[wanted]} in several places ({', '.join(found)}); give a file that has one"
        )
    if others:
        raise DataError(refusal(path, others[0], wanted))
    return tensor_files.read_tensors(path)  # nobody knows it: the strict comparison of keys says what differs


def refusal(source: Any, kind: Kind, wanted: str) -> str:
    """The sentence for a file that is something else than the tokenizer `wanted`."""
    where = "" if kind.name else ": this is not the tokenizer"
    other = f"; it is read by tokenizer.name={kind.name}" if kind.name else "; download the tokenizer's own file"
    return f"{source} holds {kind.words}, not {WORDS[wanted]}{where}{other}"


@torch.no_grad()
def load_strict(model: nn.Module, flat: Mapping[str, Tensor], source: Any, wanted: str, advice: str) -> None:
    """Copy a state dict into a materialised network, all or nothing, values cast to the network's dtypes.

    Raises DataError as `check_strict`.
    """
    own = model.state_dict()
    check_strict(own, flat, source, wanted, advice)
    for name, value in own.items():
        value.copy_(flat[name])


def check_strict(own: Mapping[str, Tensor], flat: Mapping[str, Tensor], source: Any, wanted: str, advice: str) -> None:
    """Raise DataError naming `source`, the keys, and `advice` (what to change) unless `flat` fits a network's `own`.

    Every key must be there and no more, in the right shape, with finite values. `own` may lie on the meta device.
    """
    missing = [name for name in own if name not in flat]
    unexpected = [name for name in flat if name not in own]
    if missing or unexpected:
        kind = recognise(flat)
        if kind is not None and kind.name != wanted:
            raise DataError(refusal(source, kind, wanted))
        parts = [f"lacks {some(missing)}"] if missing else []
        parts += [f"has unknown {some(unexpected)}"] if unexpected else []
        raise DataError(f"{source} {' and '.join(parts)}; {advice}, or these are not the weights of {WORDS[wanted]}")
    for name, value in own.items():
        if flat[name].shape != value.shape:
            raise DataError(
                f"{source} holds '{name}' as {list(flat[name].shape)}, but the network needs {list(value.shape)}; "
                f"{advice}"
            )
        if not bool(torch.isfinite(flat[name]).all()):
            raise DataError(f"{source} holds values in '{name}' that are not finite; get the file anew")


def some(names: list[str]) -> str:
    """The first names of a list, in quotes, and how many more there are."""
    shown = ", ".join(f"'{name}'" for name in names[:_NAMED])
    return shown + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
