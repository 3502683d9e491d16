"""Which part of a parameter this rank holds, whatever engine cut it: rectangles of the tensor, one after the other.

Masters, moments and averages of one parameter share its layout, so one description serves optimizer, averages and
checkpoints of every engine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpc_gen.training.checkpoint.pieces import Box, Pieces, copy_from, kind_of, of_flat_slice, read_into

Region = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes of a rectangle


@dataclass(frozen=True)
class Layout:
    """A part is the rectangles `regions` of a tensor of `shape`, each flattened row-major, joined in this order.

    `owner` False: another rank holds the same part and is the one that gives it to checkpoints and gathers.
    `replicated`: every rank holds all of it.
    """

    shape: tuple[int, ...]
    regions: tuple[Region, ...]
    owner: bool = True
    replicated: bool = False

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Layout:
        """The whole tensor on every rank."""
        size = tuple(shape)
        return cls(size, (((0,) * len(size), size),), replicated=True)

    @classmethod
    def stretches(cls, shape: Sequence[int], dim: int, ranges: Sequence[tuple[int, int]], owner: bool = True) -> Layout:
        """Ranges (start, length) along one dimension, in their order; lengths of 0 hold nothing."""
        size = tuple(shape)
        regions = [
            ((0,) * dim + (start,) + (0,) * (len(size) - dim - 1), (*size[:dim], length, *size[dim + 1 :]))
            for start, length in ranges
            if length
        ]
        return cls(size, tuple(regions), owner)

    @classmethod
    def flat(cls, shape: Sequence[int], start: int, count: int, owner: bool = True) -> Layout:
        """`count` elements of the row-major flattened tensor from `start` on."""
        boxes = of_flat_slice(tuple(shape), start, torch.empty(count, device="meta")).boxes
        return cls(tuple(shape), tuple((box.offsets, tuple(box.tensor.shape)) for box in boxes), owner)

    @property
    def numel(self) -> int:
        """Elements that this rank holds."""
        return sum(math.prod(sizes) for _, sizes in self.regions)

    def state(self, part: Tensor) -> Tensor | Pieces:
        """The part as engines and averages give it to a checkpoint: views, no copies."""
        if self.replicated:
            return part.view(self.shape)
        return self._pieces(part) if self.owner else Pieces(self.shape, part.dtype, ())

    def fill(self, part: Tensor, full: Tensor) -> None:
        """Copy this rank's share of the whole tensor into `part`."""
        assert tuple(full.shape) == self.shape, (tuple(full.shape), self.shape)
        if self.replicated:
            part.view(self.shape).copy_(full)
        else:
            copy_from(self._pieces(part), full)

    def read(self, part: Tensor, tensors: Mapping[str, Tensor], name: str) -> None:
        """`fill` from a tensor of a checkpoint, of which only what touches this rank's share is read."""
        if self.replicated:
            self.fill(part, tensors[name])
        else:
            read_into(self._pieces(part), tensors, name)

    def cut(self, tensors: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
        """A new tensor with this rank's share of the named one, shaped and placed like the part `like`; see `read`."""
        part = torch.empty_like(like, dtype=kind_of(tensors, name)[0], memory_format=torch.preserve_format)
        self.read(part, tensors, name)
        return part

    def put(self, part: Tensor, full: Tensor) -> None:
        """Copy the part to its place in the whole tensor."""
        for box in self._pieces(part).boxes:
            full[box.slices].copy_(box.tensor)

    def _pieces(self, part: Tensor) -> Pieces:
        flat, boxes, offset = part.view(-1), [], 0
        for offsets, sizes in self.regions:
            count = math.prod(sizes)
            boxes.append(Box(offsets, flat[offset : offset + count].view(sizes)))
            offset += count
        assert offset == flat.numel(), (offset, flat.numel())
        return Pieces(self.shape, part.dtype, tuple(boxes))
