"""Opening the many ptshards of one table: all but the first are mapped without being parsed.

torch.load builds a reader and runs an unpickler for each file, a millisecond that shards of 64 rows pay 16 times as
often as those of 1,024. Shards of the same size, with the same directory of their archive, hold their columns at the
same places: then the first one, opened by torch, says where.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hpc_gen.data.index import ColumnInfo
from hpc_gen.data.ptshard import check_size, open_shard
from hpc_gen.data.row_files import TELLING

ENTRY_BYTES = 46  # of a member in a zip directory, before its name
CRC_AT = 16  # and where in it the CRC-32 stands, 4 bytes


@dataclass(frozen=True)
class _Packing:
    """Where the columns of a shard lie, and the directory that says so.

    `directory`: the bytes from `at` to the end of the file with the checksums of the arrays set to 0 (`blank`: where
    they stand); those of the pickle and of the byte order are compared too.
    """

    size: int
    at: int
    directory: bytes
    blank: tuple[int, ...]
    columns: Mapping[str, tuple[int, torch.dtype, tuple[int, ...]]]  # offset in the file, dtype, shape

    def matches(self, tail: bytes) -> bool:
        """Whether another file of the same size ends with this directory."""
        return self._blanked(tail) == self.directory

    def _blanked(self, tail: bytes) -> bytes:
        found = bytearray(tail)
        for place in self.blank:
            found[place : place + 4] = bytes(4)
        return bytes(found)


class ShardOpener:
    """Opens the shards of one table. Safe to share between threads."""

    def __init__(self, columns: Mapping[str, ColumnInfo]) -> None:
        """`columns`: what every shard must hold."""
        self._columns = columns
        self._packings: dict[int, _Packing | None] = {}  # by file size: the last shard of a table is often shorter

    def open(self, path: Path, rows: int, num_bytes: int, says: str) -> dict[str, Tensor]:
        """As `ptshard.open_shard`."""
        packing = self._packings.get(num_bytes)
        if packing is not None:
            check_size(path, num_bytes, says)
            shard = _mapped(path, packing)
            if shard is not None and len(next(iter(shard.values()))) == rows:
                return shard
        shard = open_shard(path, self._columns, rows, num_bytes, says)
        if num_bytes not in self._packings:
            self._packings[num_bytes] = _packing_of(path, shard)
        return shard


def _mapped(path: Path, packing: _Packing) -> dict[str, Tensor] | None:
    """The columns of a shard that is packed as another one; None when it is not."""
    try:
        with path.open("rb") as stream:
            stream.seek(packing.at)
            if not packing.matches(stream.read()):
                return None
        storage = torch.UntypedStorage.from_file(str(path), False, packing.size)
    except (OSError, RuntimeError):
        return None
    data = torch.empty(0, dtype=torch.uint8).set_(storage)
    shard: dict[str, Tensor] = {}
    for name, (offset, dtype, shape) in packing.columns.items():
        count = torch.Size(shape).numel() * dtype.itemsize
        shard[name] = data[offset : offset + count].view(dtype).view(shape)
    return shard


def _packing_of(path: Path, shard: Mapping[str, Tensor]) -> _Packing | None:
    """How a shard that torch has opened is packed; None when its columns do not stand there as they are.

    A shared or permuted array, a compressed member or an offset that no view of bytes can have: torch opens those.
    """
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as stream:
            at = archive.start_dir
            stream.seek(at)
            tail = stream.read()
            members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            blank = tuple(
                place for name, place in _checksums(tail, len(members)) if name.partition("/")[2] not in TELLING
            )
            columns: dict[str, tuple[int, torch.dtype, tuple[int, ...]]] = {}
            for number, (name, tensor) in enumerate(shard.items()):
                info = members[f"data/{number}"]
                stream.seek(info.header_offset + 26)
                lengths = stream.read(4)
                offset = info.header_offset + 30 + int.from_bytes(lengths[:2], "little")
                offset += int.from_bytes(lengths[2:], "little")
                plain = info.compress_type == zipfile.ZIP_STORED and info.file_size == tensor.nbytes
                if not plain or not tensor.is_contiguous() or offset % tensor.element_size():
                    return None
                columns[name] = (offset, tensor.dtype, tuple(tensor.shape))
            # torch has mapped the file as a whole: one place and the distances from it say all, and no data is read
            begins = {shard[name].data_ptr() - offset for name, (offset, _, _) in columns.items()}
            name, (offset, _, _) = next(iter(columns.items()))
            stream.seek(offset)
            head = shard[name][:1].reshape(-1).view(torch.uint8).numpy().tobytes()
            if len(begins) != 1 or stream.read(len(head)) != head:
                return None
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return None
    packing = _Packing(size, at, b"", blank, columns)
    return _Packing(size, at, packing._blanked(tail), blank, columns)


def _checksums(tail: bytes, members: int) -> list[tuple[str, int]]:
    """(name, place of its CRC-32) of each member in a zip directory."""
    found: list[tuple[str, int]] = []
    place = 0
    for _ in range(members):
        name, extra, comment = (int.from_bytes(tail[place + n : place + n + 2], "little") for n in (28, 30, 32))
        begin = place + ENTRY_BYTES
        found.append((tail[begin : begin + name].decode("utf-8", "replace"), place + CRC_AT))
        place = begin + name + extra + comment
    return found
