"""Images made during training: equal padded batches on all ranks, the same images from any number of ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hpc_gen.data.table import Table
from hpc_gen.methods.protocol import Method
from hpc_gen.runtime.errors import UserError, nearest
from hpc_gen.runtime.randomness import Draws
from hpc_gen.sampling.generate import Decoder, generate_batch, sampling_mode

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


def share_of(num_images: int, batch: int, rank: int, world_size: int) -> list[range]:
    """Image ids of each batch of one rank: every rank has the same number of full batches, dealt in turn.

    Ids at or above `num_images` are padding, to be thrown away. The cut depends on `batch` alone, so an image has the
    same neighbours, and the same bits, on any number of ranks.
    """
    turns = -(-num_images // (batch * world_size))
    return [range(n * batch, (n + 1) * batch) for n in range(rank, turns * world_size, world_size)]


def in_order(parts: Sequence[Sequence[Tensor]], num_images: int) -> Tensor:
    """[num_images, ...] by id, from the batches of every rank (`parts[rank][turn]`), as `share_of` dealt them."""
    turns = range(len(parts[0]))
    return torch.cat([parts[rank][turn] for turn in turns for rank in range(len(parts))])[:num_images]


def preview(
    method: Method,
    labels: Sequence[int],
    seed: int,
    settings: Any,
    ranks: RanksLike,
    poll: Callable[[], None],
    *,
    batch: int | None = None,
    table: Table | None = None,
    decoder: Decoder | None = None,
) -> list[Tensor]:
    """This rank's batches of images, each uint8 [B, 3, H, W], for `in_order`: image i has label i and the draws of i.

    Every rank must call it, and makes the same number of images. `batch` None: each rank's whole share. `poll` may
    raise StopRequested, on all ranks at once. Raises DivergedError for latents that are not finite.
    """
    if not labels:
        raise UserError("train.preview.labels is empty; name at least one label")
    batch = batch or -(-len(labels) // ranks.world_size)
    found: list[Tensor] = []
    with sampling_mode(method):
        for share in share_of(len(labels), batch, ranks.rank, ranks.world_size):
            ids = torch.tensor(list(share), dtype=torch.int64)
            draws = Draws(seed, PURPOSE, ids)
            found.append(generate_batch(method, _Labels(labels, table), draws, ids, settings, poll, decoder))
    return found


def numbered(labels: Sequence[int | str], num_classes: int, names: Sequence[str]) -> list[int]:
    """Labels as class numbers, given by number or by name. Raises UserError for one that the table does not have."""
    found: list[int] = []
    for label in labels:
        if isinstance(label, str):
            if label not in names:
                known = f"{len(names)} names, as '{names[0]}'" if names else "no class names"
                raise UserError(
                    f"train.preview.labels names class '{label}'{nearest(label, names)}, but there are {known}; "
                    "give one of these, or a number"
                )
            found.append(list(names).index(label))
        elif not 0 <= label < max(num_classes, 1):
            raise UserError(
                f"train.preview.labels has class {label}, but the table has {num_classes} classes; "
                f"use 0 to {max(num_classes, 1) - 1}"
            )
        else:
            found.append(label)
    return found


def caption(label: int, num_classes: int, names: Sequence[str]) -> str:
    """What stands below a picture: "class 3: cat", "class 3" without names, nothing without classes."""
    if num_classes == 0:
        return ""
    return f"class {label}: {names[label]}" if label < len(names) and names[label] else f"class {label}"


def file_names(labels: Sequence[int]) -> list[str]:
    """`class_LABEL.png` per picture; the second of a label is `class_LABEL_2.png`."""
    seen: Counter[int] = Counter()
    names: list[str] = []
    for label in labels:
        seen[label] += 1
        names.append(f"class_{label}.png" if seen[label] == 1 else f"class_{label}_{seen[label]}.png")
    return names
