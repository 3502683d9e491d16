"""Several tokenizers in one pass over the images: their columns side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hpc_gen.runtime.errors import UserError
from hpc_gen.tokenizers import Tokenizer


class Several:
    """The columns of a tokenizer and of others; the first one names the table, and decodes."""

    def __init__(self, first: Tokenizer, others: Mapping[str, Tokenizer]) -> None:
        """`others` by the names that the experiment gives them. Raises UserError when two make the same column."""
        self._first = first
        self._others = {name: others[name] for name in sorted(others)}
        makers: dict[str, str] = {}
        for key, each in (("tokenizer", first), *((f"also.{name}", other) for name, other in self._others.items())):
            for column in each.columns:
                if column in makers:
                    raise UserError(
                        f"encode.{makers[column]} and encode.{key} both make the column '{column}'; remove it from one"
                    )
                makers[column] = key

    @property
    def name(self) -> str:
        """The first one's."""
        return self._first.name

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns, the first one's first."""
        return tuple(column for each in (self._first, *self._others.values()) for column in each.columns)

    @property
    def identity(self) -> dict[str, Any]:
        """The first one's: what decodes the table. That of the others is `others`, kept in the table's recipe."""
        return self._first.identity

    @property
    def others(self) -> dict[str, dict[str, Any]]:
        """Identities of the others by name."""
        return {name: each.identity for name, each in self._others.items()}

    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        """uint8 [N, C, H, W] -> all columns, each as its own tokenizer makes it."""
        columns = self._first.encode(pixels)
        for each in self._others.values():
            columns = columns | each.encode(pixels)
        return columns

    def decode(self, latents: Tensor) -> Tensor:
        """As the first one decodes."""
        return self._first.decode(latents)
