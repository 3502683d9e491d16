"""The metadata file of a checkpoint: canonical bytes when it is written, plain data only when it is read.

It is a pickle by torch's design; ours is written without memo references (same content, same bytes, whatever process
wrote it) and read by an unpickler that knows only the dozen plain classes it is made of.
"""

from __future__ import annotations

import io
import pickle
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from hpc_gen.runtime.errors import CheckpointError

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


class _CanonicalPickler(pickle.Pickler):
    """Members of an enum by class and value, as Python 3.11.4 and newer write them: older ones go through getattr."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Enum):
            return type(obj), (obj.value,)
        return NotImplemented


def dumped(metadata: Metadata, results: list[list[Any]]) -> bytes:
    """The bytes of the metadata file, from the write results of all ranks: in key order, without memo references."""
    merged = {result.index: result.storage_data for part in results for result in part}
    metadata.storage_data = dict(sorted(merged.items(), key=lambda item: (item[0].fqn, str(item[0].offset))))
    metadata.state_dict_metadata = dict(sorted(metadata.state_dict_metadata.items()))
    metadata.planner_data = None  # names are flat already; the default planner would repeat them here
    metadata.storage_meta = StorageMeta()  # no path and no random id: both would make equal checkpoints differ
    buffer = io.BytesIO()
    pickler = _CanonicalPickler(buffer, protocol=4)
    pickler.fast = True
    pickler.dump(metadata)
    return buffer.getvalue()


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
