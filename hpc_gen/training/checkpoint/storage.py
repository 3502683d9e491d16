"""torch.distributed.checkpoint through our own door: counted and synced writes, canonical metadata, no open pickle.

Every write goes through `runtime.commit`, so a test can kill the process at each of them. The metadata file is a pickle
by torch's design; ours is written without memo references (same content, same bytes, whatever process wrote it) and
read by an unpickler that knows only the dozen plain classes it is made of.
"""

from __future__ import annotations

import io
import os
import pickle
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem

from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import CheckpointError, HpcGenError

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


class Reader(FileSystemReader):
    """DCP's reader with the restricted unpickler. The caller has verified the manifest."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Metadata of the checkpoint. Raises CheckpointError on anything that is not plain metadata."""
        return read_metadata(Path(self.path))


class _Planner(dcp.DefaultSavePlanner):
    """Names are flat already; keeps every tensor where it is given (each rank passes only what it owns)."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        data = super().resolve_data(write_item)
        if not isinstance(data, Tensor):
            raise CheckpointError(f"checkpoint entry '{write_item.index.fqn}' is not a tensor")
        return data


def save(state: Mapping[str, Tensor], folder: Path, group: Any) -> dict[str, dict[str, Any]]:
    """Write `state` (this rank's share, CPU tensors) below `folder`; collective over `group` (None: one rank).

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
    """Tensors of a verified checkpoint whose names start with `prefix`, on the CPU, read by this process alone.

    Raises CheckpointError when its parts do not fit together.
    """
    wanted = {name: facts for name, facts in keys(folder).items() if name.startswith(prefix)}
    state: dict[str, Tensor] = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in wanted.items()}
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    if state:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.load(cast(dict[str, Any], state), storage_reader=Reader(folder), planner=planner, no_dist=True)
        except CheckpointException as error:  # a BaseException of torch's, which nobody above would expect
            cause = error.failures[min(error.failures)][0]
            raise CheckpointError(f"{folder} cannot be loaded ({cause!r}); choose another checkpoint") from error
    return state
