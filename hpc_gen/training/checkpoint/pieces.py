"""One logical tensor that lies over ranks: the rectangular boxes of it that this rank holds.

Engines describe their state with it, the chain writes and reads it; nobody else needs to know how an engine cuts its
tensors. The boxes of all ranks are disjoint and cover the tensor exactly once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hpc_gen.runtime.errors import CheckpointError


@dataclass(frozen=True, eq=False)
class Box:
    """A rectangle of a logical tensor: where it begins, and the live values in it (they may be a view)."""

    offsets: tuple[int, ...]
    tensor: Tensor

    @property
    def slices(self) -> tuple[slice, ...]:
        """The place of the box as an index of the logical tensor."""
        return tuple(slice(o, o + size) for o, size in zip(self.offsets, self.tensor.shape, strict=True))


@dataclass(frozen=True, eq=False)
class Pieces:
    """What this rank holds of one logical tensor of `shape` and `dtype`; a rank may hold none of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[Box, ...]

    def __post_init__(self) -> None:
        for box in self.boxes:
            assert box.tensor.dtype == self.dtype, (box.tensor.dtype, self.dtype)
            assert len(box.offsets) == len(self.shape) == box.tensor.dim(), (box.offsets, self.shape)
            ends = [offset + size for offset, size in zip(box.offsets, box.tensor.shape, strict=True)]
            assert min(box.offsets, default=0) >= 0 and all(e <= n for e, n in zip(ends, self.shape, strict=True)), (
                box.offsets,
                tuple(box.tensor.shape),
                self.shape,
            )

    @property
    def nbytes(self) -> int:
        """Bytes that this rank holds."""
        return sum(box.tensor.nbytes for box in self.boxes)


def of_flat_slice(shape: tuple[int, ...], start: int, flat: Tensor) -> Pieces:
    """A contiguous stretch of the row-major flattened tensor, as flat partitions hold it, cut into few boxes.

    `flat`: 1-d, the elements `start` to `start + len(flat)` of a tensor of `shape`; the boxes are views of it. At most
    2 * len(shape) - 1 boxes are needed: a partial row before, whole rows, a partial row after, at each level.
    """
    assert flat.dim() == 1 and start >= 0 and start + flat.numel() <= math.prod(shape), (shape, start, flat.shape)
    boxes: list[Box] = []
    _cut(shape, start, flat, (), boxes)
    return Pieces(shape, flat.dtype, tuple(boxes))


def _cut(shape: tuple[int, ...], start: int, flat: Tensor, outer: tuple[int, ...], boxes: list[Box]) -> None:
    """Boxes of a stretch within the sub-tensor at `outer`, whose own shape is `shape`."""
    if flat.numel() == 0:
        return
    ones = (1,) * len(outer)
    if not shape:
        boxes.append(Box(outer, flat.view(ones)))
        return
    row = math.prod(shape[1:])
    end = start + flat.numel()
    first, last = -(-start // row), end // row  # whole rows are first <= row < last
    if first > last:  # inside one row
        _cut(shape[1:], start - last * row, flat, (*outer, last), boxes)
        return
    head, tail = first * row - start, end - last * row
    if head:
        _cut(shape[1:], row - head, flat[:head], (*outer, first - 1), boxes)
    if last > first:
        rows = flat[head : head + (last - first) * row]
        offsets = (*outer, first, *(0 for _ in shape[1:]))
        boxes.append(Box(offsets, rows.view(*ones, last - first, *shape[1:])))
    if tail:
        _cut(shape[1:], 0, flat[flat.numel() - tail :], (*outer, last), boxes)


def whole(tensor: Tensor) -> Pieces:
    """A full tensor as pieces: one box, as where one rank holds it alone."""
    shape = tuple(tensor.shape)
    return Pieces(shape, tensor.dtype, (Box((0,) * len(shape), tensor.detach()),) if tensor.numel() else ())


@torch.no_grad()
def copy_from(target: Pieces, full: Tensor) -> None:
    """Fill this rank's boxes from the whole tensor, on any device and of any dtype.

    Raises CheckpointError when the shapes differ.
    """
    if tuple(full.shape) != target.shape:
        raise CheckpointError(f"a tensor of shape {tuple(full.shape)} does not fit one of shape {target.shape}")
    for box in target.boxes:
        box.tensor.copy_(full[box.slices])


class Parts(Mapping[str, Tensor]):
    """Tensors by name of which a rectangle may be had without the rest, and the kind without any of it."""

    def kind(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Type and shape of a tensor."""
        raise NotImplementedError

    def box(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """One rectangle of a tensor."""
        raise NotImplementedError


class Below(Parts):
    """The entries whose names start with a prefix, named without it; values are read only when they are asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        self._tensors, self._prefix = tensors, prefix
        self._names = [name[len(prefix) :] for name in tensors if name.startswith(prefix)]
        self._known = set(self._names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._prefix + name]

    def kind(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Type and shape of a tensor."""
        return kind_of(self._tensors, self._prefix + name)

    def box(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """One rectangle of a tensor."""
        return box_of(self._tensors, self._prefix + name, offsets, sizes)


def kind_of(tensors: Mapping[str, Tensor], name: str) -> tuple[torch.dtype, tuple[int, ...]]:
    """Type and shape of one of the tensors; nothing is read where that is possible."""
    if isinstance(tensors, Parts):
        return tensors.kind(name)
    return tensors[name].dtype, tuple(tensors[name].shape)


def box_of(tensors: Mapping[str, Tensor], name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    """A rectangle of one of the tensors; nothing else is read where that is possible."""
    if isinstance(tensors, Parts):
        return tensors.box(name, offsets, sizes)
    return tensors[name][tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))]


@torch.no_grad()
def read_into(target: Pieces, tensors: Mapping[str, Tensor], name: str) -> None:
    """Fill this rank's boxes from one of the tensors; of a checkpoint only the stored parts that they touch are read.

    Raises CheckpointError when the shapes differ.
    """
    shape = kind_of(tensors, name)[1]
    if shape != target.shape:
        raise CheckpointError(f"'{name}' has shape {shape} and does not fit one of shape {target.shape}")
    for box in target.boxes:
        box.tensor.copy_(box_of(tensors, name, box.offsets, tuple(box.tensor.shape)))
