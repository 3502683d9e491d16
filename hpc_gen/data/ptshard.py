"""`ptshard`: one shard = one `.pt` file, a plain dict of column tensors [N, ...], read through mmap.

Pixels: {'pixels': uint8 (N, C, H, W), 'labels': int64 (N,)}. Latents (the layout of specs/energy.md section 7):
{'moments': float16 (N, 32, h, h), 'moments_flip': the same, 'labels': int64 (N,)}. Nothing is unpickled but tensors:
files are loaded with weights_only=True.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hpc_gen.data.index import ColumnInfo
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError, reason


class ByteSink(Protocol):
    """A binary stream written from front to back: an open file, io.BytesIO, a CommitStream."""

    def write(self, data: Any, /) -> int:
        """Append a buffer."""
        ...

    def flush(self) -> None:
        """Hand on what is buffered."""
        ...


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float16` -> `float16`: how dtypes are written in index.json."""
    return str(dtype).removeprefix("torch.")


def columns_of(columns: Mapping[str, Tensor]) -> dict[str, ColumnInfo]:
    """Dtype and row shape of every column."""
    return {name: ColumnInfo(dtype_name(t.dtype), tuple(t.shape[1:])) for name, t in columns.items()}


def num_rows(columns: Mapping[str, Tensor], where: str) -> int:
    """Rows of a shard; raises DataError when the columns disagree or there are none. `where` names it in errors."""
    counts = {name: (t.shape[0] if t.ndim else 0) for name, t in columns.items()}
    if not counts or min(counts.values()) < 1 or len(set(counts.values())) != 1:
        raise DataError(f"{where}: columns must have one and the same number of rows, at least 1, got {counts}")
    return next(iter(counts.values()))


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor [N, ...] of any dtype as its bytes, uint8 [N, bytes per row], without a copy."""
    return tensor.reshape(tensor.shape[0], -1).view(torch.uint8)


def content_sha256(columns: Mapping[str, Tensor]) -> str:
    """SHA-256 of the columns (name, dtype, shape, bytes) in the order of their names, whatever file holds them."""
    digest = hashlib.sha256()
    for name in sorted(columns):
        tensor = columns[name].contiguous()
        digest.update(f"{name} {dtype_name(tensor.dtype)} {list(tensor.shape)}\n".encode())
        digest.update(as_bytes(tensor).numpy().data)
    return digest.hexdigest()


def write_shard(target: ByteSink | Path, columns: Mapping[str, Tensor]) -> None:
    """Write columns (each [N, ...], same N) to a binary stream or, committed, to a path.

    The bytes depend on the columns alone: they go through a stream, so the archive inside carries no file name.
    Raises DataError when the columns disagree about N.
    """
    num_rows(columns, "a shard to be written")
    plain = {name: _alone(tensor.detach().cpu().contiguous()) for name, tensor in columns.items()}
    if isinstance(target, str | Path):
        buffer = io.BytesIO()
        torch.save(plain, buffer)
        commit.write_bytes(Path(target), buffer.getvalue())
    else:
        sink: Any = target  # torch.save needs write and flush only
        torch.save(plain, sink)


def _alone(tensor: Tensor) -> Tensor:
    """The tensor, copied when it is a view: torch.save would store all of the memory behind it."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def open_shard(
    path: Path,
    columns: Mapping[str, ColumnInfo] | None = None,
    rows: int | None = None,
    num_bytes: int | None = None,
    says: str = "the index says",
) -> dict[str, Tensor]:
    """Map a shard into memory: {column: Tensor [N, ...]}, nothing read until it is touched.

    Checked against `columns`, `rows` and `num_bytes` where given; `says` names in errors who does. Raises DataError
    naming the shard, and the column where one is at fault: missing or truncated file, missing column, wrong dtype,
    shape or row count.
    """
    path = Path(path)
    check_size(path, num_bytes, says)
    try:
        shard: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError and OSError for damaged files
        raise unreadable(path, error) from error
    if not isinstance(shard, dict) or not all(isinstance(t, Tensor) for t in shard.values()):
        raise DataError(f"shard {path} is not a dict of tensors; encode the table again")
    check_columns(path, shard, columns or {}, says)
    found = num_rows(shard, f"shard {path}")
    if rows is not None and found != rows:
        raise DataError(f"shard {path} has {found} rows, {says} {rows}; restore it or encode the table again")
    return shard


def check_size(path: Path, num_bytes: int | None, says: str = "the index says") -> None:
    """Raise DataError when a file is not there, or has another size than `num_bytes` where that is given."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(
            f"shard {path} cannot be opened ({error.strerror}); restore it or encode the table again"
        ) from error
    if num_bytes is not None and size != num_bytes:
        raise DataError(f"shard {path} has {size} bytes, {says} {num_bytes}; restore it or encode the table again")


def unreadable(path: Path, error: Exception) -> DataError:
    """What to raise for a file that a library could not read."""
    return DataError(f"shard {path} cannot be read ({reason(error)}); restore it or encode the table again")


def check_columns(path: Path, shard: Mapping[str, Tensor], columns: Mapping[str, ColumnInfo], says: str) -> None:
    """Raise DataError when a column of `columns` is missing in a shard, or of another dtype or shape than `says`."""
    for name, expected in columns.items():
        if name not in shard:
            raise DataError(f"shard {path} has no column {name!r} (it has {sorted(shard)}); encode the table again")
        tensor = shard[name]
        found = ColumnInfo(dtype_name(tensor.dtype), tuple(tensor.shape[1:]))
        if found != expected:
            raise DataError(
                f"shard {path}, column {name!r}: rows are {found.dtype} {list(found.shape)}, {says} "
                f"{expected.dtype} {list(expected.shape)}; restore it or encode the table again"
            )
        if len(tensor) and not tensor[0].is_contiguous():  # rows may lie apart, as in a tar
            raise DataError(f"shard {path}, column {name!r} is not contiguous; encode the table again")
