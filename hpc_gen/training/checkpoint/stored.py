"""The tensors of a verified checkpoint, each put together from the parts that ranks wrote when it is asked for."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from hpc_gen.runtime.errors import CheckpointError
from hpc_gen.training.checkpoint.metadata import read_metadata
from hpc_gen.training.checkpoint.pieces import Parts


class StoredTensors(Parts):
    """The tensors of a verified checkpoint by name, each read when it is asked for: whole, fresh, on the CPU.

    However the ranks that wrote it had cut a tensor, it is put together here. Only the metadata is held, so a state of
    any size is taken over within the memory of its largest tensor.
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        """`prefix`: only names that start with it are seen. Raises CheckpointError when the metadata cannot be read."""
        self.folder = folder
        self._last: tuple[tuple[str, tuple[int, ...]], Tensor] | None = None
        metadata = read_metadata(folder)
        self._places = cast(dict[MetadataIndex, _StorageInfo], metadata.storage_data)
        entries = cast(dict[str, TensorStorageMetadata], metadata.state_dict_metadata)
        self._entries = {name: entry for name, entry in entries.items() if name.startswith(prefix)}

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries  # without reading it

    def __getitem__(self, name: str) -> Tensor:
        shape = self._entries[name].size
        return self.box(name, (0,) * len(shape), tuple(shape))

    def kind(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """What a tensor is, without reading it."""
        return self._entries[name].properties.dtype, tuple(self._entries[name].size)

    def described(self) -> dict[str, Tensor]:
        """Every tensor without its memory: type and shape, on the meta device, in order of their names."""
        return {
            name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            for name, entry in sorted(self._entries.items())
        }

    def box(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """One rectangle of a tensor; only the stored parts that it touches are read.

        Raises CheckpointError when the stored parts do not cover it exactly once, or are not what the metadata says.
        """
        try:
            found = self._box(name, offsets, sizes)
        except CheckpointError:
            raise
        except Exception as error:  # a damaged file may raise anything
            raise CheckpointError(f"{self.folder} cannot be loaded ({error!r}); choose another checkpoint") from error
        return found

    def _box(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        entry = self._entries[name]
        dtype = entry.properties.dtype
        whole: Tensor | None = None
        filled = 0
        for chunk in entry.chunks:
            begins = [max(o, c) for o, c in zip(offsets, chunk.offsets, strict=True)]
            ends = [min(o + n, c + m) for o, n, c, m in zip(offsets, sizes, chunk.offsets, chunk.sizes, strict=True)]
            if any(end <= begin for begin, end in zip(begins, ends, strict=True)) and math.prod(sizes):
                continue
            if tuple(chunk.offsets) == offsets and tuple(chunk.sizes) == sizes:
                return self._chunk(name, chunk, dtype)
            part = self._kept(name, chunk, dtype)
            whole = torch.empty(sizes, dtype=dtype) if whole is None else whole
            there = tuple(slice(b - o, e - o) for b, e, o in zip(begins, ends, offsets, strict=True))
            here = tuple(slice(b - c, e - c) for b, e, c in zip(begins, ends, chunk.offsets, strict=True))
            whole[there] = part[here]
            filled += math.prod(e - b for b, e in zip(begins, ends, strict=True))
        # parts that overlap would need a hole elsewhere to add up; the writer's plan was checked for both
        if whole is None or filled != math.prod(sizes):
            raise CheckpointError(f"{self.folder}: the parts of '{name}' do not cover it; choose another checkpoint")
        return whole

    def _kept(self, name: str, chunk: ChunkStorageMetadata, dtype: torch.dtype) -> Tensor:
        """A stored part; the last one is kept, for the next rectangle often touches it, too."""
        key = (name, tuple(chunk.offsets))
        if self._last is None or self._last[0] != key:
            self._last = None
            self._last = (key, self._chunk(name, chunk, dtype))
        return self._last[1]

    def _chunk(self, name: str, chunk: ChunkStorageMetadata, dtype: torch.dtype) -> Tensor:
        place = self._places[MetadataIndex(name, chunk.offsets)]
        path = self.folder / place.relative_path
        if path.parent != self.folder:
            raise CheckpointError(f"{self.folder}: '{name}' lies outside the checkpoint; do not use it")
        with path.open("rb") as source:
            source.seek(place.offset)
            content = source.read(place.length)
        part = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not isinstance(part, Tensor) or part.shape != chunk.sizes or part.dtype != dtype:
            raise CheckpointError(f"{path}: a part of '{name}' is not as the metadata says; choose another checkpoint")
        return part
