"""Files of torch.save read without running anything of them: the zip format of torch 1.6 on, and the one before it.

Tensors of zip files are views of a private memory map (copy on write): a file larger than the memory can be read, and
what is never touched is never loaded. The reader decides by content, whatever the file is called.
"""

from __future__ import annotations

import io
import math
import mmap
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpc_gen.runtime.errors import DataError
from hpc_gen.runtime.pickle_values import Inert, PickleMachine

ZIP_BEGINS = b"PK\x03\x04"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first value of the format before the zip
_LEGACY_PROTOCOL = 1001
_MAX_DIMS = 32
_BIG_ENDIAN = "{} was written on a big-endian machine; save it again on a little-endian one"

_DTYPES: dict[str, torch.dtype] = {
    str(dtype): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128, torch.complex64),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64),
    )
}
_TYPED_STORAGES: dict[str, torch.dtype] = {
    f"torch.{kind}Storage": dtype
    for kind, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "ComplexDouble": torch.complex128,
        "ComplexFloat": torch.complex64,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}
_UNTYPED_STORAGES = ("torch.UntypedStorage", "torch.storage.UntypedStorage")


@dataclass(frozen=True)
class _Storage:
    """Bytes of one storage (uint8 [n]) and the type that its file gives it; None: the tensor says."""

    raw: Tensor
    dtype: torch.dtype | None


@dataclass(frozen=True)
class _StorageId:
    """A persistent id of torch: which storage, of which type and size."""

    key: str
    dtype: torch.dtype | None
    nbytes: int


def read_zip(path: Path, program: bool = False) -> Any:
    """The object in a file of torch.save. Raises DataError, also where the file is damaged or asks for more.

    With `program` the file must be a TorchScript archive: its modules come as Inerts whose `state` holds their tensors
    and parts by name; the code in it is not looked at.
    """
    with path.open("rb") as stream, zipfile.ZipFile(stream) as archive:
        members = _members(path, archive, program)
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    if program and "constants.pkl" not in members:
        raise DataError(f"{path} is no TorchScript archive; give the file as it was published")
    if "constants.pkl" in members and not program:
        raise DataError(f"{path} is a TorchScript program, not weights; export its state dict with torch.save")
    if "data.pkl" not in members:
        raise DataError(f"{path} is a zip file without data.pkl, so torch.save did not write it; give a weights file")
    if "byteorder" in members and bytes(_content(path, mapped, members["byteorder"])) != b"little":
        raise DataError(_BIG_ENDIAN.format(path))
    storages: dict[str, Tensor] = {}

    def persistent(value: Any) -> _Storage:
        wanted = _storage_id(value, num_parts=5)
        if wanted.key not in storages:
            member = members.get(f"data/{wanted.key}")
            if member is None:
                raise DataError(f"{path} lacks the storage '{wanted.key}' that it names; download it again")
            storages[wanted.key] = _raw(_content(path, mapped, member))
        return _checked(wanted, storages[wanted.key])

    return PickleMachine(_call, persistent).run(io.BytesIO(_content(path, mapped, members["data.pkl"])))


def read_legacy(path: Path) -> Any:
    """The object in a file of torch.save from before torch 1.6; its storages are copied. Raises DataError."""
    size = path.stat().st_size
    storages: dict[str, Tensor] = {}
    itemsizes: dict[str, int] = {}

    def persistent(value: Any) -> _Storage:
        wanted = _storage_id(value, num_parts=6)
        if wanted.key not in storages:
            if wanted.nbytes + sum(raw.numel() for raw in storages.values()) > size:
                raise DataError(f"{path} names storages larger than the file; it is cut off or damaged")
            storages[wanted.key] = torch.empty(wanted.nbytes, dtype=torch.uint8)
            itemsizes[wanted.key] = wanted.dtype.itemsize if wanted.dtype is not None else 1
        return _checked(wanted, storages[wanted.key])

    machine = PickleMachine(_call, persistent)
    # a map, because its read() takes no more memory than there are bytes, whatever length the file claims
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as stream:
        magic, protocol, system = machine.run(stream), machine.run(stream), machine.run(stream)
        if magic != LEGACY_MAGIC or protocol != _LEGACY_PROTOCOL or not isinstance(system, dict):
            raise DataError(f"{path} has an unknown form; load it with the torch that wrote it and save it anew")
        if system.get("little_endian") is not True:
            raise DataError(_BIG_ENDIAN.format(path))
        value, order = machine.run(stream), machine.run(stream)
        if not isinstance(order, list) or sorted(map(str, order)) != sorted(storages):
            raise DataError(f"{path} does not hold the storages that it names; download it again")
        for key in order:
            count, raw = int.from_bytes(stream.read(8), "little"), storages[key]
            content = bytearray(stream.read(raw.numel()))
            if count * itemsizes[key] != raw.numel() or len(content) != raw.numel():
                raise DataError(f"{path} ends within the storage '{key}'; download it again")
            if content:
                raw.copy_(torch.frombuffer(content, dtype=torch.uint8))
    return value


def begins_legacy(head: bytes) -> bool:
    """Whether a file that begins with these bytes has the format of torch.save from before torch 1.6."""
    return LEGACY_MAGIC.to_bytes(10, "little") in head[:16]


def _members(path: Path, archive: zipfile.ZipFile, program: bool) -> dict[str, zipfile.ZipInfo]:
    """Members by name below the archive's one top folder; the code of a program, which is compressed, is not read."""
    found: dict[str, zipfile.ZipInfo] = {}
    tops = set()
    for member in archive.infolist():
        top, _, name = member.filename.partition("/")
        tops.add(top)
        if name in found or len(tops) > 1:
            raise DataError(f"{path} has two top folders or a member twice, so torch.save did not write it")
        if program and name.startswith("code/"):
            continue
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise DataError(f"{path} is compressed or encrypted; unpack it and save it again with torch.save")
        found[name] = member
    return found


def _content(path: Path, mapped: mmap.mmap, member: zipfile.ZipInfo) -> memoryview:
    """Bytes of a member, within the map; its checksum is compared."""
    head = mapped[member.header_offset : member.header_offset + 30]
    if len(head) < 30 or head[:4] != ZIP_BEGINS:
        raise DataError(f"{path}: '{member.filename}' does not begin where the zip file says; download it again")
    name_bytes, extra_bytes = struct.unpack("<HH", head[26:30])
    begin = member.header_offset + 30 + name_bytes + extra_bytes
    content = memoryview(mapped)[begin : begin + member.file_size]
    # a checksum of 0 is what torch writes where the user has switched checksums off
    if len(content) != member.file_size or (member.CRC and zlib.crc32(content) != member.CRC):
        raise DataError(f"{path}: '{member.filename}' is cut off or damaged; download the file again")
    return content


def _raw(content: memoryview) -> Tensor:
    """uint8 [n] over the bytes; copied where they do not begin at a multiple of 16 (torch aligns to 64)."""
    if not len(content):
        return torch.empty(0, dtype=torch.uint8)
    raw = torch.frombuffer(content, dtype=torch.uint8)
    return raw if raw.data_ptr() % 16 == 0 else raw.clone()


def _storage_id(value: Any, num_parts: int) -> _StorageId:
    if not isinstance(value, tuple) or len(value) != num_parts or value[0] != "storage":
        raise DataError("the pickle refers to something that is not a storage of this file")
    _, kind, key, _, count, *view = value
    if not isinstance(kind, Inert) or not isinstance(key, str) or not _is_count(count) or any(view):
        raise DataError("the pickle refers to a storage in a way that torch does not")
    if kind.name in _UNTYPED_STORAGES:
        return _StorageId(key, None, count)
    if kind.name not in _TYPED_STORAGES:
        raise DataError(f"the file holds a storage of the type {kind.name}, which this program does not read")
    dtype = _TYPED_STORAGES[kind.name]
    return _StorageId(key, dtype, count * dtype.itemsize)


def _checked(wanted: _StorageId, raw: Tensor) -> _Storage:
    if raw.numel() != wanted.nbytes:
        raise DataError(f"storage '{wanted.key}' has {raw.numel()} bytes, but the file says {wanted.nbytes}")
    return _Storage(raw, wanted.dtype)


# -- calls that a weights file makes ------------------------------------------------------------------------------


def _tensor(args: tuple[Any, ...]) -> Tensor:
    storage, offset, size, stride, *rest = args
    return _view(storage, getattr(storage, "dtype", None), offset, size, stride, rest[2:])


def _tensor_v3(args: tuple[Any, ...]) -> Tensor:
    storage, offset, size, stride, _, _, named, *rest = args
    if not isinstance(named, Inert) or named.name not in _DTYPES:
        raise DataError("the file holds a tensor of a type that this program does not read")
    return _view(storage, _DTYPES[named.name], offset, size, stride, rest)


def _view(storage: Any, dtype: Any, offset: Any, size: Any, stride: Any, metadata: list[Any]) -> Tensor:
    """A tensor over a storage; every number is checked, for views of torch do not all check theirs."""
    if not isinstance(storage, _Storage) or dtype is None or any(metadata):
        raise DataError("the pickle builds a tensor in a way that torch.save does not")
    proper = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride)
    if not proper or len(size) > _MAX_DIMS:
        raise DataError("the pickle builds a tensor without a proper shape")
    if not all(_is_count(number) for number in (offset, *size, *stride)):
        raise DataError("the pickle builds a tensor whose shape is not made of counts")
    if 0 in size:
        return torch.empty(size, dtype=dtype)
    available = storage.raw.numel() // dtype.itemsize
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if last >= available or math.prod(size) > available:
        raise DataError(f"a tensor of shape {list(size)[:8]} reaches beyond its storage of {available} values")
    return storage.raw[: available * dtype.itemsize].view(dtype).as_strided(size, stride, offset)


def _parameter(args: tuple[Any, ...]) -> Tensor:
    if not isinstance(args[0], Tensor):
        raise DataError("the pickle builds a parameter from something that is not a tensor")
    return args[0]


def _subclass(args: tuple[Any, ...]) -> Any:
    """A tensor with attributes or of a class of its own: the plain tensor, without them."""
    function, _, inner, *_ = args
    if not isinstance(function, Inert) or not isinstance(inner, tuple):
        raise DataError("the pickle builds a tensor in a way that torch.save does not")
    return _call(function.name, inner)


def _ordered(args: tuple[Any, ...]) -> dict[Any, Any]:
    pairs = args[0] if args else []
    return {_text(key): value for key, value in pairs}


def _text(key: Any) -> str | int:
    if not isinstance(key, str | int):
        raise DataError("the pickle has a key that is neither text nor a number")
    return key


def _flat_set(args: tuple[Any, ...]) -> set[Any]:
    return {_text(value) for value in (args[0] if args else [])}


def _size(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(args[0]) if args else ()


_CALLS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "collections.OrderedDict": _ordered,
    "torch.Size": _size,
    "builtins.set": _flat_set,
    "__builtin__.set": _flat_set,
}


def _call(name: str, args: tuple[Any, ...]) -> Any:
    """What a call in the pickle gives: a tensor or container of ours for the names above, else an Inert."""
    action = _CALLS.get(name)
    return action(args) if action is not None else Inert(name, args)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62
