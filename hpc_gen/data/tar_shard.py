"""`webdataset`: one shard = one plain tar of samples, as the package webdataset writes and reads them.

Sample KEY has a file KEY.COLUMN.npy for each column, and KEY.cls with the class number as text. In the shards that we
write all samples take the same number of bytes, so a column of the shard is an array with a stride inside the mapped
file: rows are gathered as fast as from any other format, in any order, and nothing is read through on a resume.
Tars of other programs are read the same way where their samples are alike, else copied into memory when opened.
"""

from __future__ import annotations

import io
import math
import re
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpc_gen.data.archive_ends import first_byte_after_tar
from hpc_gen.data.index import LABELS
from hpc_gen.runtime.errors import DataError, UserError

BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)  # what a tar ends with
CLASS = "cls"
HEADER = re.compile(
    r"\{'descr': '(?P<dtype>[<|][biuf][0-9]+)', 'fortran_order': False, 'shape': \((?P<shape>[0-9, ]*)\), \}"
)  # of a .npy as numpy writes it on a little-endian machine, in C order
ARRAYS = ("npy", "pth", "pt")


@dataclass(frozen=True)
class _Member:
    """A file of a sample: its key, the rest of its name, where its bytes begin and how many they are."""

    key: str
    kind: str
    offset: int
    size: int

    @property
    def end(self) -> int:
        """Where the next header begins."""
        return self.offset + -(-self.size // BLOCK) * BLOCK


def tar_bytes(columns: Mapping[str, Tensor], first_row: int) -> bytes:
    """A shard of columns [N, ...] as a tar; keys are the numbers of the table's rows from `first_row` on.

    The bytes depend on rows and number alone. Raises UserError for a dtype that numpy's files do not have.
    """
    parts: list[bytes] = []
    arrays: dict[str, Any] = {}
    for name, column in columns.items():
        if name == LABELS:
            continue
        try:
            arrays[name] = column.detach().cpu().contiguous().numpy()
        except TypeError as error:
            raise UserError(
                f"column {name!r} is {column.dtype}, which the .npy files of a tar do not have; choose ptshard"
            ) from error
    labels = columns[LABELS].tolist() if LABELS in columns else None
    for row in range(len(next(iter(columns.values())))):
        key = f"{first_row + row:09d}"
        if labels is not None:
            parts += _entry(f"{key}.{CLASS}", str(labels[row]).encode())
        for name, array in arrays.items():
            parts += _entry(f"{key}.{name}.npy", _npy(array[row]))
    return b"".join([*parts, END])


def _npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(array, order="C"), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _entry(name: str, data: bytes) -> list[bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return [info.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % BLOCK)]


def open_tar_shard(path: Path, rows: int | None = None) -> dict[str, Tensor]:
    """Columns [N, ...] of a tar, `labels` from .cls; mapped with a stride where all samples are alike.

    `rows`: as many as the index says there are; then only the first and the last sample's headers are looked at. Raises
    DataError for files that are no arrays, and what tarfile, numpy and torch raise for damaged ones.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        first = _first_sample(stream, size, path)
        stride = first[-1].end if first else 0
        if rows is not None and first and _same_sample(stream, first, stride * (rows - 1)):
            stream.seek(stride * rows)
            if stream.read(BLOCK) == bytes(BLOCK):
                try:
                    return _mapped(path, size, first, stride, rows)
                except ValueError:
                    pass  # arrays of another memory order, or none at all
    return _walked(path, size)


def _first_sample(stream: Any, size: int, path: Path) -> list[_Member]:
    """Files of the first sample; [] when it begins with something else (long names, folders)."""
    members: list[_Member] = []
    offset = 0
    while offset + BLOCK <= size:
        member = _header(stream, offset)
        if member is None or (members and member.key != members[0].key):
            break
        members.append(member)
        offset = member.end
    return members


def _header(stream: Any, offset: int) -> _Member | None:
    """The plain file whose header stands at `offset`, or None."""
    stream.seek(offset)
    try:
        info = tarfile.TarInfo.frombuf(stream.read(BLOCK), "utf-8", "surrogateescape")
    except tarfile.TarError:
        return None
    if not info.isreg():
        return None
    return _Member(*_split_name(info.name), offset + BLOCK, info.size)


def _split_name(name: str) -> tuple[str, str]:
    """(key, kind): the name up to the first dot after the last slash, and the rest, as webdataset splits it."""
    folder, slash, file = name.rpartition("/")
    key, _, kind = file.partition(".")
    return folder + slash + key, kind


def _same_sample(stream: Any, first: list[_Member], begin: int) -> bool:
    """Whether a sample like the first begins at `begin`."""
    for member in first:
        found = _header(stream, begin + member.offset - BLOCK)
        alike = found is not None and (found.kind, found.end) == (member.kind, begin + member.end)
        if not alike or (member.kind != CLASS and found.size != member.size):
            return False
    return True


def _mapped(path: Path, size: int, first: list[_Member], stride: int, rows: int) -> dict[str, Tensor]:
    """Columns as arrays with a stride in the mapped file."""
    data = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage.from_file(str(path), False, size))
    found: dict[str, Tensor] = {}
    for member in first:
        if member.kind == CLASS:
            texts = data.as_strided((rows, BLOCK), (stride, 1), member.offset)[:, :24].contiguous().numpy()
            found[LABELS] = torch.tensor([_class_number(text.tobytes(), path) for text in texts], dtype=torch.int64)
            continue
        header = io.BytesIO(data[member.offset : member.offset + member.size].numpy().tobytes())
        shape, dtype, before = _npy_header(header, member.kind, path)
        if before + math.prod(shape) * dtype.itemsize != member.size:
            raise DataError(f"shard {path}: {member.key}.{member.kind} is cut short; restore it or convert it again")
        stored = torch.from_numpy(np.empty(0, dtype)).dtype
        flat = data.as_strided((rows, math.prod(shape) * dtype.itemsize), (stride, 1), member.offset + before)
        found[_column(member.kind)] = flat.view(stored).unflatten(1, shape) if shape else flat.view(stored)[:, 0]
    return found


def _npy_header(stream: io.BytesIO, kind: str, path: Path) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """(shape, dtype, bytes before the data) of an array as we write it. Raises ValueError for any other.

    Not by numpy, which parses the header with `ast`: in Python 3.11 that fails now and then beside another thread's.
    """
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError(f"{kind} is no array of numpy's version 1.0")
    length = int.from_bytes(stream.read(2), "little")
    found = HEADER.fullmatch(stream.read(length).decode("latin1").strip())
    if found is None:
        raise ValueError(f"{kind} is an array of another memory order or of objects")
    shape = tuple(int(size) for size in found["shape"].split(",") if size.strip())
    return shape, np.dtype(found["dtype"]), stream.tell()


def _walked(path: Path, size: int) -> dict[str, Tensor]:
    """Columns of any tar of arrays: mapped when its samples turn out alike, else copied sample by sample."""
    members: list[_Member] = []
    with tarfile.open(path, "r:") as archive:
        for info in archive:
            if info.isreg():
                members.append(_Member(*_split_name(info.name), info.offset_data, info.size))
        end = archive.offset
    with path.open("rb") as stream:
        stream.seek(end)
        if not members or stream.read(BLOCK) != bytes(BLOCK):  # tarfile takes a damaged header for the end
            raise DataError(f"shard {path} has no end mark at byte {end:,}; restore it or convert it again")
        more = first_byte_after_tar(stream, end)
        if more is not None:
            raise DataError(
                f"shard {path} has its end mark at byte {end:,} and more at byte {more:,}; restore it or convert it "
                "again"
            )
        samples: dict[str, dict[str, _Member]] = {}
        for member in members:
            samples.setdefault(member.key, {})[member.kind] = member
        first = list(next(iter(samples.values())).values())
        stride = first[-1].end
        alike = all(
            [(m.kind, m.offset, m.end) for m in first]
            == [(m.kind, m.offset - number * stride, m.end - number * stride) for m in sample.values()]
            for number, sample in enumerate(samples.values())
        )
        arrays = [m for m in first if m.kind != CLASS]
        npy = all(m.kind.rpartition(".")[2] == "npy" for m in arrays)
        if alike and npy and all(m.size == sample[m.kind].size for sample in samples.values() for m in arrays):
            try:
                return _mapped(path, size, first, stride, len(samples))
            except ValueError:
                pass  # arrays of another memory order: copied below
        return _copied(path, stream, samples)


def _copied(path: Path, stream: Any, samples: Mapping[str, Mapping[str, _Member]]) -> dict[str, Tensor]:
    kinds = list(next(iter(samples.values())))
    found: dict[str, list[Tensor]] = {_column(kind): [] for kind in kinds}
    for key, sample in samples.items():
        if sorted(sample) != sorted(kinds):
            raise DataError(
                f"shard {path}: sample {key} has the files {sorted(sample)}, the first one {sorted(kinds)}; make it "
                "again"
            )
        for kind, member in sample.items():
            stream.seek(member.offset)
            found[_column(kind)].append(_value(stream.read(member.size), kind, path))
    return {name: torch.stack(rows) for name, rows in found.items()}


def _value(data: bytes, kind: str, path: Path) -> Tensor:
    last = kind.rpartition(".")[2]
    if kind == CLASS:
        return torch.tensor(_class_number(data, path))
    if last == "npy":
        array = np.load(io.BytesIO(data), allow_pickle=False)
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
    if last in ARRAYS:
        value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if isinstance(value, Tensor):
            return value
    raise DataError(
        f"shard {path} holds files .{kind}, which are no arrays; of images make a table with encode.source=tar"
    )


def _column(kind: str) -> str:
    """`labels` of cls, COLUMN of COLUMN.npy, npy of npy."""
    name, _, _ = kind.rpartition(".")
    return LABELS if kind == CLASS else name or kind


def _class_number(text: bytes, path: Path) -> int:
    number = text.strip(b"\0 \n")
    if not number.isdigit():
        raise DataError(f"shard {path} has a class {number[:20]!r} that is no number; restore it or convert it again")
    return int(number)
