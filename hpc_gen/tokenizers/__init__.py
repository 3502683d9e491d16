"""Tokenizers: maps between pixels and what a table stores (pixels themselves, latents or tokens)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from hpc_gen.runtime.errors import UserError, nearest
from hpc_gen.tokenizers.identity import Identity

CPU = torch.device("cpu")


class Tokenizer(Protocol):
    """What encoding and sampling need of a tokenizer."""

    name: str

    @property
    def columns(self) -> tuple[str, ...]:
        """Shard columns that `encode` fills."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """All that determines its output (name, settings, hash of the weights), JSON-ready, free of paths."""
        ...

    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        """uint8 [N, C, H, W] on the CPU -> what is stored, on the CPU: {column: [N, ...]}, its keys are `columns`."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """What a method makes in place of what is stored, -> uint8 [N, C, H, W] on the same device."""
        ...


@runtime_checkable
class FullPrecision(Protocol):
    """A tokenizer that can hand over more digits than tables of halves keep (the npz of the seed holds float32)."""

    def encode_float32(self, pixels: Tensor) -> dict[str, Tensor]:
        """As `encode`, in float32: rounded to half precision it is what `encode` gives."""
        ...


@runtime_checkable
class OnDevice(Protocol):
    """A tokenizer that training can ask, as a frozen network."""

    def on_device(self, pixels: Tensor) -> dict[str, Tensor]:
        """As `encode`, of the images as they are (no mirror images), left on the device of its network."""
        ...


def _identity(workspace: Path, device: torch.device) -> Tokenizer:
    return Identity()


def _kl_vae(
    workspace: Path,
    device: torch.device,
    weights: str,
    sha256: str | None = None,
    preset: str | None = None,
    architecture: Mapping[str, Any] | None = None,
    scale: float | Sequence[float] | None = None,
    shift: float | Sequence[float] | None = None,
    statistics: str | None = None,
) -> Tokenizer:
    from hpc_gen.tokenizers.kl_vae import KlVae

    return KlVae(
        workspace=workspace,
        device=device,
        weights=weights,
        sha256=sha256,
        preset=preset,
        architecture=architecture,
        scale=scale,
        shift=shift,
        statistics=statistics,
    )


def _dinov2(
    workspace: Path,
    device: torch.device,
    weights: str,
    sha256: str | None = None,
    preset: str | None = None,
    dinov2: Mapping[str, Any] | None = None,
) -> Tokenizer:
    from hpc_gen.tokenizers.dinov2 import Dinov2Tokenizer

    return Dinov2Tokenizer(
        workspace=workspace, device=device, weights=weights, sha256=sha256, preset=preset, dinov2=dinov2
    )


def _vqgan(
    workspace: Path,
    device: torch.device,
    weights: str,
    sha256: str | None = None,
    preset: str | None = None,
    vqgan: Mapping[str, Any] | None = None,
) -> Tokenizer:
    from hpc_gen.tokenizers.vqgan import Vqgan

    return Vqgan(workspace=workspace, device=device, weights=weights, sha256=sha256, preset=preset, vqgan=vqgan)


TOKENIZERS: dict[str, Callable[..., Tokenizer]] = {
    "identity": _identity,
    "kl_vae": _kl_vae,
    "dinov2": _dinov2,
    "vqgan": _vqgan,
}
"""Factories by name, called with (workspace, device, **settings): what they import is needed by nobody else."""


def build(name: str, *, workspace: Path, device: torch.device = CPU, **settings: Any) -> Tokenizer:
    """A tokenizer by name; paths among its settings are relative to `workspace`, its networks lie on `device`.

    Raises UserError for an unknown name, a setting it does not have or one that it needs, DataError for weights that
    are not what they claim to be.
    """
    if name not in TOKENIZERS:
        raise UserError(
            f"unknown tokenizer {name!r}{nearest(name, TOKENIZERS)}; known: {', '.join(sorted(TOKENIZERS))}"
        )
    try:
        inspect.signature(TOKENIZERS[name]).bind(workspace=workspace, device=device, **settings)
    except TypeError as error:
        raise UserError(f"tokenizer {name!r} does not take these settings: {error}; see config schema") from error
    return TOKENIZERS[name](workspace=workspace, device=device, **settings)


__all__ = ["TOKENIZERS", "FullPrecision", "Identity", "OnDevice", "Tokenizer", "build"]
