"""Tensors that are written without ever being in memory as a whole: into safetensors files, and files of torch.save.

A file of torch.save is a zip of uncompressed members: a pickle that says how tensors lie in storages, and the bytes of
each storage. torch's own writer wants the storages in memory; here they come in pieces. What reads the file is torch.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor

from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError

ALIGNED = 64  # where torch's own files begin a storage, so that it can be mapped
_PADDING_ID = b"FB"  # of the zip's extra field by which torch shifts a storage
_LOCAL_HEADER, _ZIP64_FIELD = 30, 20
_STORAGES = {
    torch.float64: "DoubleStorage",
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.int64: "LongStorage",
}


@dataclass(frozen=True)
class Pieces:
    """A tensor by its shape and type, and what gives its rows from the first on: tensors [n, *shape[1:]]."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Iterable[Tensor]]

    def numel(self) -> int:
        """Elements of the whole."""
        return math.prod(self.shape)


def pieces_of(tensor: Tensor | Pieces) -> Iterator[memoryview]:
    """Bytes of a tensor from front to back. Raises DataError when the pieces are not the tensor that was announced."""
    if isinstance(tensor, Tensor):
        yield _flat(tensor)
        return
    rows = 0
    for piece in tensor.make():
        rows += len(piece)
        if piece.dtype != tensor.dtype or piece.shape[1:] != tensor.shape[1:] or rows > tensor.shape[0]:
            raise DataError(
                f"a piece of {piece.dtype} {list(piece.shape)} does not belong to a tensor of {tensor.dtype} "
                f"{list(tensor.shape)}; what it was read from has changed"
            )
        yield _flat(piece)
    if rows != tensor.shape[0]:
        raise DataError(f"{rows} rows came of a tensor of {tensor.shape[0]}; what it was read from has changed")


def _flat(tensor: Tensor) -> memoryview:
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_torch(path: str | Path, value: Tensor | Pieces | Mapping[str, Tensor | Pieces | int]) -> str:
    """Write what torch.load gives back as a tensor, or as a dict of tensors and numbers; returns the file's SHA-256.

    Whole or not at all; equal content gives equal bytes. Raises UserError (disk full), DataError as `pieces_of` and
    for a type of which no storage is known here.
    """
    final = Path(path)
    storages: list[Tensor | Pieces] = []
    plan = _pickled(value, storages)
    commit.make_folder(final.parent)
    staged = commit.staging_path(final)
    try:
        with (
            commit.CommitStream(staged) as stream,
            zipfile.ZipFile(cast(IO[bytes], _Forward(stream)), "w") as archive,
        ):
            _write_member(archive, stream, "data.pkl", [memoryview(plan)])
            _write_member(archive, stream, "byteorder", [memoryview(b"little")])
            for number, tensor in enumerate(storages):
                _write_member(archive, stream, f"data/{number}", pieces_of(tensor))
            _write_member(archive, stream, "version", [memoryview(b"3\n")])
        commit.commit_file(staged, final)
    except Exception:  # not BaseException: a simulated kill must leave what a kill leaves
        commit.remove_tree(staged)
        raise
    return stream.sha256


class _Forward:
    """A stream without positions: zipfile then puts sizes and checksums behind a member, not back into its header."""

    def __init__(self, stream: commit.CommitStream) -> None:
        self.write = stream.write
        self.flush = stream.flush


def _write_member(
    archive: zipfile.ZipFile, stream: commit.CommitStream, name: str, parts: Iterable[memoryview]
) -> None:
    member = zipfile.ZipInfo(f"archive/{name}")  # its date is that of 1980, the same in each file
    header = _LOCAL_HEADER + len(member.filename) + _ZIP64_FIELD + 4
    padding = -(stream.tell() + header) % ALIGNED
    member.extra = _PADDING_ID + padding.to_bytes(2, "little") + b"\0" * padding
    with archive.open(member, "w", force_zip64=True) as sink:
        for part in parts:
            sink.write(part)


# -- the pickle of tensors and numbers, by its opcodes (protocol 2): what torch writes, and no more --------------------


def _pickled(value: Tensor | Pieces | Mapping[str, Tensor | Pieces | int], storages: list[Tensor | Pieces]) -> bytes:
    """The pickle of a value; its tensors are appended to `storages`, each a storage of its own."""
    if isinstance(value, Tensor | Pieces):
        return b"\x80\x02" + _tensor(value, storages) + b"."
    entries = [_text(k) + (_int(v) if isinstance(v, int) else _tensor(v, storages)) for k, v in value.items()]
    return b"\x80\x02}(" + b"".join(entries) + b"u."


def _tensor(tensor: Tensor | Pieces, storages: list[Tensor | Pieces]) -> bytes:
    """torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, needs gradient, hooks)."""
    kind = _STORAGES.get(tensor.dtype)
    if kind is None:
        raise DataError(f"cannot write a tensor of {tensor.dtype} in pieces; convert it to a float type")
    key, shape = str(len(storages)), tuple(tensor.shape)
    storages.append(tensor)
    strides = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
    stored = _tuple(_text("storage"), _name("torch", kind), _text(key), _text("cpu"), _int(tensor.numel())) + b"Q"
    hooks = _name("collections", "OrderedDict") + b")R"
    facts = _tuple(stored, _int(0), _tuple(*map(_int, shape)), _tuple(*map(_int, strides)), b"\x89", hooks)
    return _name("torch._utils", "_rebuild_tensor_v2") + facts + b"R"


def _name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _tuple(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def _int(number: int) -> bytes:
    size = number.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + number.to_bytes(size, "little", signed=True)
