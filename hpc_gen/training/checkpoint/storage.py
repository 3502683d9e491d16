"""torch.distributed.checkpoint through our own door: counted and synced writes, canonical metadata, no open pickle.

Every write goes through `runtime.commit`, so a test can kill the process at each of them. The metadata file is a pickle
by torch's design; ours is written without memo references (same content, same bytes, whatever process wrote it) and
read by an unpickler that knows only the dozen plain classes it is made of.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import warnings
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter, _StorageInfo
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
from hpc_gen.training.checkpoint.pieces import Pieces

METADATA = ".metadata"

_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size", "float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool"},
    "torch.serialization": {"_get_layout"},
}


class _MetadataUnpickler(pickle.Unpickler):
    """Resolves only the names that a checkpoint's metadata is made of."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise CheckpointError(f"checkpoint metadata asks for {module}.{name}, which is not allowed; do not use it")
        return super().find_class(module, name)


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
        """Write the metadata file without memo references, in key order."""
        merged = {result.index: result.storage_data for part in results for result in part}
        metadata.storage_data = dict(sorted(merged.items(), key=lambda item: (item[0].fqn, str(item[0].offset))))
        metadata.state_dict_metadata = dict(sorted(metadata.state_dict_metadata.items()))
        metadata.planner_data = None  # names are flat already; the default planner would repeat them here
        metadata.storage_meta = self.storage_meta()
        buffer = io.BytesIO()
        pickler = pickle.Pickler(buffer, protocol=4)
        pickler.fast = True
        pickler.dump(metadata)
        with self.fs.create_stream(Path(self.path) / METADATA, "wb") as stream:
            stream.write(buffer.getvalue())  # type: ignore[attr-defined]


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
        data = super().resolve_data(write_item)
        if not isinstance(data, Tensor):
            raise CheckpointError(f"checkpoint entry '{write_item.index.fqn}' is not a tensor")
        return data


def save(state: Mapping[str, Tensor | Pieces], folder: Path, group: Any) -> dict[str, dict[str, Any]]:
    """Write `state` (this rank's share, on the CPU) below `folder`; collective over `group` (None: one rank).

    A tensor is written whole by the one rank that passes it; the boxes of all ranks must cover a sharded one once.
    Returns this rank's files -> {bytes, sha256}; rank 0's include the metadata file. What went wrong on any rank is
    raised on all of them: HpcGenErrors as they are (UserError for a full disk), the rest as CheckpointError.
    """
    writer = Writer(folder)
    try:
        with warnings.catch_warnings():
            # one rank on purpose; torch would say so at every save
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(dict(state), storage_writer=writer, planner=_Planner(), process_group=group, no_dist=group is None)
    except CheckpointException as error:  # a BaseException of torch's, which nobody above would expect
        rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
        if isinstance(cause, HpcGenError):
            raise cause from error
        raise CheckpointError(f"rank {rank} could not write its part of {folder}: {cause!r}") from error
    return writer.written


def read_metadata(folder: Path) -> Metadata:
    """The parsed metadata of a verified checkpoint folder: tensors by name. Raises CheckpointError on anything else."""
    try:
        metadata = _MetadataUnpickler(io.BytesIO((folder / METADATA).read_bytes())).load()
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{folder / METADATA} holds a {type(metadata).__name__}, not checkpoint metadata")
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise CheckpointError(f"{folder}: entry '{name}' is not a tensor; do not use this checkpoint")
            if not isinstance(entry.properties.dtype, torch.dtype) or not isinstance(entry.size, torch.Size):
                raise CheckpointError(f"{folder}: entry '{name}' has no type or shape; do not use this checkpoint")
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"{folder / METADATA} cannot be read ({error!r})") from error
    return metadata


def keys(folder: Path) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Every tensor of a verified checkpoint: name -> (dtype, shape)."""
    entries = cast(dict[str, TensorStorageMetadata], read_metadata(folder).state_dict_metadata)
    return {name: (entry.properties.dtype, entry.size) for name, entry in entries.items()}


def load(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """Tensors of a verified checkpoint whose names start with `prefix`, whole, on the CPU, read by this process alone.

    Raises CheckpointError when its parts do not fit together.
    """
    return dict(StoredTensors(folder, prefix))


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a verified checkpoint by name, each read when it is asked for: whole, fresh, on the CPU.

    However the ranks that wrote it had cut a tensor, it is put together here. Only the metadata is held, so a state of
    any size is taken over within the memory of its largest tensor.
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        """`prefix`: only names that start with it are seen. Raises CheckpointError when the metadata cannot be read."""
        self.folder = folder
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

    def dtype_and_shape(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """What a tensor is, without reading it."""
        return self._entries[name].properties.dtype, tuple(self._entries[name].size)

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
            part = self._chunk(name, chunk, dtype)
            if tuple(chunk.offsets) == offsets and tuple(chunk.sizes) == sizes and len(entry.chunks) == 1:
                return part
            whole = torch.empty(sizes, dtype=dtype) if whole is None else whole
            there = tuple(slice(b - o, e - o) for b, e, o in zip(begins, ends, offsets, strict=True))
            here = tuple(slice(b - c, e - c) for b, e, c in zip(begins, ends, chunk.offsets, strict=True))
            whole[there] = part[here]
            filled += math.prod(e - b for b, e in zip(begins, ends, strict=True))
        # parts that overlap would need a hole elsewhere to add up; the writer's plan was checked for both
        if whole is None or filled != math.prod(sizes):
            raise CheckpointError(f"{self.folder}: the parts of '{name}' do not cover it; choose another checkpoint")
        return whole

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
