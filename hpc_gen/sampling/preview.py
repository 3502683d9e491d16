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


class Chosen:
    """Conditioning of a preview: image i has labels[i], or row rows[i] of a table; padding images repeat them.

    With labels alone it has row i. Raises UserError for a method that asks what was not chosen.
    """

    def __init__(self, labels: Sequence[int], rows: Sequence[int], table: Table | None) -> None:
        """One of `labels` and `rows` is empty; `table`: of the rows."""
        self._labels = torch.tensor(list(labels), dtype=torch.int64)
        self._rows = torch.tensor(list(rows), dtype=torch.int64)
        self._table = table

    def __len__(self) -> int:
        """Images of the preview."""
        return max(len(self._labels), len(self._rows))

    def labels(self, ids: Tensor) -> Tensor:
        """Class of each image, int64 [N]."""
        if not len(self._labels):
            raise UserError("this method is conditioned on classes; give train.preview.labels in place of rows")
        return self._labels[ids % len(self._labels)]

    def rows(self, ids: Tensor, columns: Sequence[str]) -> dict[str, Tensor]:
        """Columns of each image's row, [N, ...]."""
        if self._table is None:
            raise UserError(
                f"this preview needs table columns ({', '.join(columns)}), but has no table; set data.table"
            )
        rows = self._rows[ids % len(self._rows)] if len(self._rows) else ids % self._table.rows
        return self._table.read(rows, columns)


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
    chosen: Chosen,
    seed: int,
    settings: Any,
    ranks: RanksLike,
    poll: Callable[[], None],
    *,
    batch: int | None = None,
    decoder: Decoder | None = None,
) -> list[Tensor]:
    """This rank's batches of images, each uint8 [B, 3, H, W], for `in_order`: image i as chosen, with the draws of i.

    Every rank must call it, and makes the same number of images. `batch` None: each rank's whole share. `poll` may
    raise StopRequested, on all ranks at once. Raises DivergedError for latents that are not finite.
    """
    if not len(chosen):
        raise UserError("train.preview names no image; give at least one label or row")
    batch = batch or -(-len(chosen) // ranks.world_size)
    found: list[Tensor] = []
    with sampling_mode(method):
        for share in share_of(len(chosen), batch, ranks.rank, ranks.world_size):
            ids = torch.tensor(list(share), dtype=torch.int64)
            draws = Draws(seed, PURPOSE, ids)
            found.append(generate_batch(method, chosen, draws, ids, settings, poll, decoder))
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


def file_names(numbers: Sequence[int], what: str = "class") -> list[str]:
    """`class_LABEL.png` per picture; the second of a label is `class_LABEL_2.png`."""
    seen: Counter[int] = Counter()
    names: list[str] = []
    for number in numbers:
        seen[number] += 1
        names.append(f"{what}_{number}.png" if seen[number] == 1 else f"{what}_{number}_{seen[number]}.png")
    return names
