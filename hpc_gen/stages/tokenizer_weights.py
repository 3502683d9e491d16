"""Official tokenizer files, imported into the workspace as safetensors: strict keys and shapes, hashes recorded.

A file is named by the preset that it is meant to be (`sd_f8`, `kl16`, `va_vae`, `mage`, `vitb14_reg4` ...). Nothing of
it is executed (runtime/torch_files.py); a generator, a discriminator or another tokenizer is refused by what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpc_gen.config.kl_vae import KlVaeConfig
from hpc_gen.config.tokenizer import PRESETS_OF
from hpc_gen.runtime import commit, tensor_files
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.runtime.progress import format_bytes
from hpc_gen.stages.weights import counts, differences
from hpc_gen.tokenizers import dinov2, vqgan
from hpc_gen.tokenizers.dinov2_model import Dinov2
from hpc_gen.tokenizers.kl_vae import PRESETS as KL_PRESETS
from hpc_gen.tokenizers.kl_vae_model import KlAutoencoder
from hpc_gen.tokenizers.kl_vae_weights import TRAINING_ONLY, PerChannel
from hpc_gen.tokenizers.kl_vae_weights import metadata_for as kl_metadata
from hpc_gen.tokenizers.official import DINOV2, KL_VAE, VQGAN, check_strict, read_official
from hpc_gen.tokenizers.vqgan_model import VqganModel

FOLDER = Path("downloads") / "tokenizers"  # below the workspace
PRESET_KEY, SOURCE_KEY, SOURCE_SHA256_KEY = "hpc_gen.tokenizer", "hpc_gen.source", "hpc_gen.source_sha256"
_NAMED = 20  # differences that are listed before "and N more"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Statistics:
    """Scale and shift in which diffusion sees latents, one number per channel; None = as the preset says."""

    scale: PerChannel | None
    shift: PerChannel | None


@dataclass(frozen=True)
class _Known:
    """A published tokenizer: `kind` reads it, `model` is its network on the meta device."""

    kind: str
    model: nn.Module
    metadata: Callable[[Statistics], dict[str, str]]


def known(name: str) -> _Known:
    """The published tokenizer of this name, one of PRESETS_OF in config/tokenizer.py."""
    with torch.device("meta"):
        if name in KL_PRESETS:
            preset = KL_PRESETS[name]

            def metadata(given: Statistics) -> dict[str, str]:
                scale = given.scale if given.scale is not None else preset.scale
                shift = given.shift if given.shift is not None else preset.shift
                return kl_metadata(preset.architecture, scale, shift)

            return _Known(KL_VAE, KlAutoencoder(preset.architecture), metadata)
        if name in dinov2.PRESETS:
            sizes = dinov2.PRESETS[name]
            return _Known(DINOV2, Dinov2(sizes), lambda given: dinov2.metadata_for(sizes))
        config = vqgan.PRESETS[name]
        return _Known(VQGAN, VqganModel(config), lambda given: vqgan.metadata_for(config))


def import_tokenizer(
    name: str,
    path: Path,
    workspace: Path,
    say: Say,
    *,
    sha256: str | None = None,
    statistics: Path | None = None,
    dry_run: bool = False,
) -> Path:
    """Write WORKSPACE/downloads/tokenizers/NAME.safetensors from an official file; the same import again does nothing.

    `statistics`: VA-VAE's `latents_stats.pt`, whose mean and std become shift and scale. What the file says of itself
    afterwards: its architecture, scale, and name and SHA-256 of the file it comes from; so an experiment needs no more
    than `tokenizer.weights`. Raises DataError for a file that does not fit exactly, naming what it is; UserError where
    other weights are there under this name.
    """
    tokenizer = known(name)
    given = _statistics(statistics, tokenizer.model, name) if statistics is not None else Statistics(None, None)
    flat, left_out = _used(tokenizer, path, sha256)
    _check(tokenizer, flat, path, name)
    own = tokenizer.model.state_dict()
    tensors = {key: flat[key].to(value.dtype) for key, value in own.items()}
    source = commit.sha256_file(path)
    metadata = {
        "format": "pt",
        PRESET_KEY: name,
        SOURCE_KEY: path.name,
        SOURCE_SHA256_KEY: source,
        **tokenizer.metadata(given),
    }
    target = workspace / FOLDER / f"{name}.safetensors"
    size = format_bytes(path.stat().st_size)
    say(f"{path}: {size}, SHA-256 {source}; {name}, {counts(tokenizer.model)}")
    if left_out:
        say(f"left out, for training alone needs it: {left_out} tensors")
    if target.exists():
        _same_or_refused(target, metadata, name)
        say(f"{target} holds these weights already")
    elif dry_run:
        say(f"would write {target}")
    else:
        digest = tensor_files.write_tensors(target, tensors, metadata)
        say(f"{target}: SHA-256 {digest}; use it with tokenizer.weights={FOLDER / target.name}")
    return target


def verify_tokenizer(name: str, path: Path, say: Say, sha256: str | None = None) -> int:
    """Compare a file with a published tokenizer, saying all there is to say; returns the number of differences.

    Raises DataError for a file that is something else altogether.
    """
    tokenizer = known(name)
    flat, left_out = _used(tokenizer, path, sha256)
    say(f"{path}: {format_bytes(path.stat().st_size)}, SHA-256 {commit.sha256_file(path)}")
    say(f"{name}: {counts(tokenizer.model)}")
    if left_out:
        say(f"left out, for training alone needs it: {left_out} tensors")
    found = differences(tokenizer.model.state_dict(), flat)
    for line in found[:_NAMED]:
        say(f"  {line}")
    if len(found) > _NAMED:
        say(f"  and {len(found) - _NAMED} more")
    if found and (other := _fits(tokenizer.kind, flat, name)) is not None:
        say(f"  it fits {other}")
    return len(found)


def list_tokenizer(name: str) -> Iterator[str]:
    """Every key of a published tokenizer with its shape, then the counts."""
    model = known(name).model
    for key, value in model.state_dict().items():
        yield f"{key}  {list(value.shape)}"
    yield f"{name}: {counts(model)}"


def list_imported(workspace: Path) -> Iterator[str]:
    """What lies in the workspace, with where it comes from; then the names that can be imported."""
    for path in sorted((workspace / FOLDER).glob("*.safetensors")):
        metadata = tensor_files.metadata_of(path)
        origin = f"from {metadata.get(SOURCE_KEY, 'an unknown file')}, SHA-256 {metadata.get(SOURCE_SHA256_KEY, '?')}"
        yield f"{metadata.get(PRESET_KEY, '?')}  {path}  SHA-256 {commit.sha256_file(path)}  {origin}"
    for kind, names in PRESETS_OF.items():
        if names:
            yield f"tokenizers of {kind} that `hpc-gen weights import NAME FILE` takes: {', '.join(names)}"


def _used(tokenizer: _Known, path: Path, sha256: str | None) -> tuple[dict[str, Tensor], int]:
    """The tensors of a file that the tokenizer needs, and how many of its training were left out."""
    flat = read_official(path, tokenizer.kind, sha256)
    if tokenizer.kind != KL_VAE:
        return flat, 0
    used = {key: value for key, value in flat.items() if key.split(".", 1)[0] not in TRAINING_ONLY}
    return used, len(flat) - len(used)


def _check(tokenizer: _Known, flat: Mapping[str, Tensor], path: Path, name: str) -> None:
    """Raise DataError unless the tensors are those of the tokenizer, naming which other one they are."""
    own = tokenizer.model.state_dict()
    shapes = {key: tuple(value.shape) for key, value in flat.items()}
    if shapes != {key: tuple(value.shape) for key, value in own.items()}:
        other = _fits(tokenizer.kind, flat, name)
        if other is not None:
            raise DataError(f"{path} holds {other}, not {name}; import it under that name, or give the right file")
    check_strict(own, flat, path, tokenizer.kind, f"it is not {name} as published")


def _fits(kind: str, flat: Mapping[str, Tensor], but: str) -> str | None:
    """The published tokenizer of this kind whose keys and shapes these are."""
    shapes = {key: tuple(value.shape) for key, value in flat.items()}
    for name in PRESETS_OF[kind]:
        if name != but:
            own = known(name).model.state_dict()
            if shapes == {key: tuple(value.shape) for key, value in own.items()}:
                return name
    return None


def _same_or_refused(target: Path, metadata: Mapping[str, str], name: str) -> None:
    there = tensor_files.metadata_of(target)
    if there != dict(metadata):
        origin = f"{there.get(SOURCE_KEY, 'an unknown file')} (SHA-256 {there.get(SOURCE_SHA256_KEY, 'unknown')})"
        raise UserError(f"{target} holds other weights or another scale of {name}, from {origin}; move it away first")


def _statistics(path: Path, model: Any, name: str) -> Statistics:
    """Scale = 1 / std and shift = mean of a file {mean, std} of [1, C, 1, 1], as LightningDiT writes it."""
    config = getattr(model, "config", None)
    if not isinstance(config, KlVaeConfig):
        raise UserError(f"--statistics are those of latents, which {name} does not make; leave it out")
    nested = tensor_files.read_nested(path)
    found: dict[str, Tensor] = {}
    for key in ("mean", "std"):
        value = nested.get(key) if isinstance(nested, Mapping) else None
        if not isinstance(value, Tensor) or value.numel() != config.embed_dim or not bool(torch.isfinite(value).all()):
            number = config.embed_dim
            raise DataError(f"{path} holds no '{key}' of {number} finite numbers; give latents_stats.pt of {name}")
        found[key] = value.double().flatten()
    if not bool((found["std"] > 0).all()):
        raise DataError(f"{path} holds a std that is not above 0; give latents_stats.pt of {name}")
    return Statistics((1 / found["std"]).tolist(), found["mean"].tolist())
