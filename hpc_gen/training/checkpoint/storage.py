"""torch.distributed.checkpoint through our own door: counted and synced writes, canonical metadata, no open pickle.

Every write goes through `runtime.commit`, so a test can kill the process at each of them. What is written is read by
`stored.py`, one tensor at a time.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import _create_write_items

from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import CheckpointError, HpcGenError
from hpc_gen.training.checkpoint.metadata import METADATA, dumped, read_metadata
from hpc_gen.training.checkpoint.pieces import Pieces
from hpc_gen.training.checkpoint.stored import StoredTensors

__all__ = ["METADATA", "StoredTensors", "Writer", "keys", "load", "read_metadata", "rewrite", "save"]


class _CommittedFileSystem(FileSystem):
    """Streams of the commit door; remembers name, size and hash of what was written."""

    def __init__(self) -> None:
        self.written: dict[str, dict[str, Any]] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        if mode == "rb":
            with Path(path).open("rb") as source:
                yield cast(io.IOBase, source)
            return
        with commit.CommitStream(Path(path)) as stream:  # left by an exception, it does not call the file durable
            yield cast(io.IOBase, stream)
        self.written[Path(path).name] = {"bytes": stream.bytes, "sha256": stream.sha256}

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        commit.ops.rename(Path(path), Path(new_path))
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        if not Path(path).is_dir():
            Path(path).mkdir(parents=True, exist_ok=True)


class Writer(FileSystemWriter):
    """DCP's writer for one staging folder. `written`: files of this rank -> {bytes, sha256}."""

    def __init__(self, folder: Path) -> None:
        # our streams are synced when they close, so torch's own fsync (which bypasses the door) is off
        super().__init__(folder, single_file_per_rank=True, sync_files=False, thread_count=1, overwrite=False)
        self.fs = _CommittedFileSystem()

    @property
    def written(self) -> dict[str, dict[str, Any]]:
        """Files that this rank wrote."""
        return cast(_CommittedFileSystem, self.fs).written

    def storage_meta(self) -> StorageMeta | None:
        """No path and no random id: both would make equal checkpoints differ."""
        return StorageMeta()

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        """Write the metadata file."""
        content = dumped(metadata, results)
        with self.fs.create_stream(Path(self.path) / METADATA, "wb") as stream:
            stream.write(content)  # type: ignore[attr-defined]


class _Planner(dcp.DefaultSavePlanner):
    """Names are flat already; writes every tensor and every box where it is given, by whoever passes it."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._boxes: dict[tuple[str, torch.Size], Tensor] = {}

    def create_local_plan(self) -> SavePlan:
        """One item per tensor of this rank, and one per box."""
        items: list[WriteItem] = []
        for name, value in self.state_dict.items():
            items += self._items_of(name, value) if isinstance(value, Pieces) else _create_write_items(name, value)
        for item in items:
            if item.tensor_data is not None:  # which memory the host copy was in is no fact of the state
                item.tensor_data.properties.pin_memory = False
        self.plan = SavePlan(items)
        return self.plan

    def _items_of(self, name: str, pieces: Pieces) -> list[WriteItem]:
        items = []
        for box in pieces.boxes:
            offsets = torch.Size(box.offsets)
            self._boxes[name, offsets] = box.tensor
            data = TensorWriteData(
                chunk=ChunkStorageMetadata(offsets=offsets, sizes=box.tensor.shape),
                properties=TensorProperties.create_from_tensor(box.tensor),
                size=torch.Size(pieces.shape),
            )
            items.append(WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data))
        return items

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Rank 0's plan of all ranks; torch refuses overlaps, and holes only where there are several ranks."""
        plans, metadata = super().create_global_plan(all_plans)
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                continue  # resolve_data refuses it
            held = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
            if held != math.prod(entry.size):
                raise CheckpointError(f"the ranks hold {held} of the {math.prod(entry.size)} elements of '{name}'")
        return plans, metadata

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The tensor or box that an item stands for."""
        if index.offset is not None and (index.fqn, index.offset) in self._boxes:
            return self._boxes[index.fqn, index.offset]
        return super().lookup_object(index)

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """Called when the item is written."""
        data = super().resolve_data(write_item)
        if not isinstance(data, Tensor):
            raise CheckpointError(f"checkpoint entry '{write_item.index.fqn}' is not a tensor")
        return data


class _Rewriting(_Planner):
    """Plans by tensors without memory, and reads each from another checkpoint when it is written."""

    def __init__(self, source: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._source = source

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        return self._source[write_item.index.fqn]


def save(state: Mapping[str, Tensor | Pieces], folder: Path, group: Any) -> dict[str, dict[str, Any]]:
    """Write `state` (this rank's share, on the CPU) below `folder`; collective over `group` (None: one rank).

    A tensor is written whole by the one rank that passes it; the boxes of all ranks must cover a sharded one once.
    Returns this rank's files -> {bytes, sha256}; rank 0's include the metadata file. What went wrong on any rank is
    raised on all of them: HpcGenErrors as they are (UserError for a full disk), the rest as CheckpointError.
    """
    return _save(state, folder, group, _Planner())


def rewrite(source: StoredTensors, folder: Path) -> dict[str, dict[str, Any]]:
    """Write every tensor of a verified checkpoint whole into one data file below `folder`; one at a time is in memory.

    The same files as if one rank had saved that state. Returns and raises as `save` does.
    """
    return _save(source.described(), folder, None, _Rewriting(source))


def _save(
    state: Mapping[str, Tensor | Pieces], folder: Path, group: Any, planner: _Planner
) -> dict[str, dict[str, Any]]:
    writer = Writer(folder)
    try:
        with warnings.catch_warnings():
            # one rank on purpose; torch would say so at every save
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(dict(state), storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
    except CheckpointException as error:  # a BaseException of torch's, which nobody above would expect
        rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
        if isinstance(cause, HpcGenError):
            raise cause from error
        raise CheckpointError(f"rank {rank} could not write its part of {folder}: {cause!r}") from error
    return writer.written


def keys(folder: Path) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Every tensor of a verified checkpoint: name -> (dtype, shape)."""
    entries = cast(dict[str, TensorStorageMetadata], read_metadata(folder).state_dict_metadata)
    return {name: (entry.properties.dtype, entry.size) for name, entry in entries.items()}


def load(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """Tensors of a verified checkpoint whose names start with `prefix`, whole, on the CPU, read by this process alone.

    Raises CheckpointError when its parts do not fit together.
    """
    return dict(StoredTensors(folder, prefix))
