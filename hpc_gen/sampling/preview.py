"""Preview grids during training: a few images on all ranks, equal padded blocks, one picture on rank 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from hpc_gen.data.table import Table
from hpc_gen.methods.protocol import Method
from hpc_gen.runtime.errors import UserError
from hpc_gen.runtime.randomness import Draws
from hpc_gen.sampling.generate import Decoder, generate_batch, sampling_mode
from hpc_gen.sampling.images import grid

PURPOSE = "preview"


class RanksLike(Protocol):
    """What a preview needs of `runtime.ranks.Ranks`."""

    rank: int
    world_size: int

    def gather_objects(self, obj: Any) -> list[Any] | None:
        """Objects of all ranks in order on rank 0, None elsewhere."""
        ...


class _Labels:
    """Conditioning of a preview: label of image i = labels[i % len]; padding images repeat them."""

    def __init__(self, labels: Sequence[int], table: Table | None) -> None:
        self._labels = torch.tensor(list(labels), dtype=torch.int64)
        self._table = table

    def labels(self, ids: Tensor) -> Tensor:
        return self._labels[ids % len(self._labels)]

    def rows(self, ids: Tensor, columns: Sequence[str]) -> dict[str, Tensor]:
        if self._table is None:
            raise UserError(
                f"this preview needs table columns ({', '.join(columns)}), but has no table; set data.table"
            )
        return self._table.read(ids % self._table.rows, columns)


def preview(
    method: Method,
    labels: Sequence[int],
    seed: int,
    settings: Any,
    ranks: RanksLike,
    poll: Callable[[], None],
    *,
    columns: int | None = None,
    table: Table | None = None,
    decoder: Decoder | None = None,
) -> Image.Image | None:
    """A grid of one image per label on rank 0, None on the others; every rank must call it.

    Each rank makes the same number of images (padding ones are dropped), so collectives inside a sharded network match.
    """
    if not labels:
        raise UserError("train.preview.labels is empty; name at least one label")
    share = -(-len(labels) // ranks.world_size)
    ids = torch.arange(ranks.rank * share, (ranks.rank + 1) * share)
    with sampling_mode(method):
        draws = Draws(seed, PURPOSE, ids)
        images = generate_batch(method, _Labels(labels, table), draws, ids, settings, poll, decoder)
    gathered = ranks.gather_objects(images)
    if gathered is None:
        return None
    together = torch.cat(gathered)[: len(labels)]
    scale = max(1, 64 // together.shape[-1])  # small images are enlarged to about 64 pixels
    return grid(together, columns or min(10, len(labels)), scale=scale)
