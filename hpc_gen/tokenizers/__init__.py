"""Tokenizers: maps between pixels and what a table stores (pixels themselves, latents or tokens)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from hpc_gen.runtime.errors import UserError, nearest
from hpc_gen.tokenizers.identity import Identity


class Tokenizer(Protocol):
    """What encoding and sampling need of a tokenizer."""

    name: str
    column: str  # shard column that `encode` fills

    @property
    def identity(self) -> dict[str, Any]:
        """All that determines its output (name, settings, hash of the weights), JSON-ready, free of paths."""
        ...

    def encode(self, pixels: Tensor) -> Tensor:
        """uint8 [N, C, H, W] -> what is stored, [N, ...]."""
        ...

    def decode(self, stored: Tensor) -> Tensor:
        """What is stored, or generated in its place, -> uint8 [N, C, H, W]."""
        ...


TOKENIZERS: Mapping[str, Callable[..., Tokenizer]] = {"identity": Identity}


def build(name: str, **settings: Any) -> Tokenizer:
    """A tokenizer by name. Raises UserError for an unknown name or a setting it does not have."""
    if name not in TOKENIZERS:
        raise UserError(
            f"unknown tokenizer {name!r}{nearest(name, TOKENIZERS)}; known: {', '.join(sorted(TOKENIZERS))}"
        )
    try:
        return TOKENIZERS[name](**settings)
    except TypeError as error:
        raise UserError(f"tokenizer {name!r} does not take these settings: {error}") from error


__all__ = ["TOKENIZERS", "Identity", "Tokenizer", "build"]
