"""`pt` and `npz`: one row per file, FOLDER/CLASS/NAME.pt or .npz, as the energy reference caches latents.

Layout of specs/energy.md section 7: a dict or an archive with the keys `moments` and `moments_flip`, each one row
without a leading axis; float16 in pt, float32 in npz. The label is not in the file: it is the place of CLASS in the
table's class names. Nothing is unpickled but tensors: torch.load with weights_only, numpy.load without pickle.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpc_gen.data.index import ColumnInfo, Layout
from hpc_gen.data.ptshard import check_columns, check_size, unreadable
from hpc_gen.runtime.errors import DataError

TELLING = ("data.pkl", "byteorder")  # members of a torch archive that say how its data is to be read
ROW_LAYOUTS: tuple[Layout, ...] = ("pt", "npz")


def stored(layout: Layout, column: Tensor) -> Tensor:
    """A column [N, ...] in the dtype in which this layout keeps it: npz has no halves in the reference's readers."""
    return column.float() if layout == "npz" and column.dtype.is_floating_point else column


def row_bytes(layout: Layout, row: Mapping[str, Tensor]) -> bytes:
    """The file of one row, {column: [...]} in the order of its keys; the bytes depend on the row alone."""
    buffer = io.BytesIO()
    plain = {name: tensor.detach().cpu().clone() for name, tensor in row.items()}  # a view would drag all rows along
    if layout == "npz":
        np.savez(buffer, **{name: tensor.numpy() for name, tensor in plain.items()})  # stored, not compressed
    else:
        torch.save(plain, buffer)
    return buffer.getvalue()


def open_row(
    path: Path,
    layout: Layout,
    columns: Mapping[str, ColumnInfo] | None = None,
    num_bytes: int | None = None,
    says: str = "the index says",
) -> dict[str, Tensor]:
    """The columns of a file as a shard of one row, {column: [1, ...]}; no file stays open.

    Checked against `columns` and `num_bytes` where given; `says` names in errors who does. Raises DataError naming the
    file, and the column where one is at fault. A file that cannot be read is left as it is (the reference deletes it).
    """
    check_size(path, num_bytes, says)
    try:
        row: Any = _load_npz(path) if layout == "npz" else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, numpy and torch raise a dozen kinds for damaged files
        raise unreadable(path, error) from error
    if not isinstance(row, dict) or not row or not all(isinstance(t, Tensor) for t in row.values()):
        raise DataError(f"shard {path} is not a dict of tensors; encode the table again")
    shard = {name: tensor.unsqueeze(0).contiguous() for name, tensor in row.items()}
    check_columns(path, shard, columns or {}, says)
    return shard


def _load_npz(path: Path) -> dict[str, Tensor]:
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: np.asarray(archive[name]) for name in archive.files}
    return {  # torch takes neither foreign byte order nor Fortran order
        name: torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
        for name, array in arrays.items()
    }


@dataclass(frozen=True)
class _Packing:
    """How the files of a table are packed: their members, and where each column's bytes end in its member."""

    members: tuple[tuple[str, int, int], ...]  # inner name, bytes, CRC-32 of the telling ones (else 0)
    columns: Mapping[str, tuple[int, bytes]]  # which member holds a column, and what stands before its data there


class RowReader:
    """Opens the files of one table. All but the first are read raw where they are packed as it is.

    That saves three quarters of the time of a row: torch.load and numpy.load build a reader for each file. The bytes
    of a row are then not checked against the archive's CRC-32, as in a mapped shard; `Table.verify` does. Thread-safe.
    """

    def __init__(self, layout: Layout, columns: Mapping[str, ColumnInfo]) -> None:
        """`columns`: what every file must hold."""
        self._layout, self._columns = layout, columns
        self._packing: _Packing | None = None  # of the first file opened
        self._looked = False

    def open(self, path: Path, num_bytes: int, says: str) -> dict[str, Tensor]:
        """As `open_row`."""
        packing = self._packing
        if packing is not None:
            check_size(path, num_bytes, says)
            row = self._raw(path, packing)
            if row is not None:
                return row
        row = open_row(path, self._layout, self._columns, num_bytes, says)
        if not self._looked:
            self._looked, self._packing = True, self._packing_of(path, row)
        return row

    def _raw(self, path: Path, packing: _Packing) -> dict[str, Tensor] | None:
        """The row, or None when the file is packed otherwise, or damaged: `open_row` then says how."""
        try:
            data = path.read_bytes()
            members, starts = _members(data)
        except Exception:  # zipfile raises a dozen kinds for damaged files, and for compressed ones
            return None
        if members != packing.members:
            return None
        row: dict[str, Tensor] = {}
        for name, (member, before) in packing.columns.items():
            start, end = starts[member], starts[member] + members[member][1]
            if data[start : start + len(before)] != before:
                return None
            held = bytearray(data[start + len(before) : end])
            shape, dtype = self._columns[name].shape, self._dtype(name)
            if len(held) != math.prod(shape) * dtype.itemsize:  # the archive's directory points elsewhere
                return None
            row[name] = torch.frombuffer(held, dtype=dtype).reshape(1, *shape)
        return row

    def _packing_of(self, path: Path, row: Mapping[str, Tensor]) -> _Packing | None:
        """How a file that has been read is packed; None when its columns do not stand in it as they are."""
        data = path.read_bytes()
        try:
            members, starts = _members(data)
        except Exception:  # torch reads archives that zipfile does not
            return None
        places = {name: place for place, (name, _, _) in enumerate(members)}
        columns: dict[str, tuple[int, bytes]] = {}
        for number, (name, tensor) in enumerate(row.items()):
            member = places.get(f"{name}.npy" if self._layout == "npz" else f"data/{number}", -1)
            start, end = (starts[member], starts[member] + members[member][1]) if member >= 0 else (0, 0)
            content = tensor.numpy().tobytes()
            if not content or data[start:end][-len(content) :] != content:
                return None
            columns[name] = (member, data[start : end - len(content)])
        return _Packing(members, columns)

    def _dtype(self, name: str) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self._columns[name].dtype)
        return dtype


def _members(data: bytes) -> tuple[tuple[tuple[str, int, int], ...], list[int]]:
    """Members of an archive (see _Packing) and where the stored bytes of each begin. ValueError for compressed ones."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos = archive.infolist()
    members: list[tuple[str, int, int]] = []
    starts: list[int] = []
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{info.filename} is compressed")
        inner = info.filename.partition("/")[2] or info.filename  # torch puts all below the file's first name
        members.append((inner, info.file_size, info.CRC if inner in TELLING else 0))
        lengths = data[info.header_offset + 26 : info.header_offset + 30]  # of name and extra field, 2 bytes each
        name, extra = int.from_bytes(lengths[:2], "little"), int.from_bytes(lengths[2:], "little")
        starts.append(info.header_offset + 30 + name + extra)
    return tuple(members), starts
