"""Latents that other programs left as numbered files, a row per file: the features of U-ViT and DiM.

Their extraction goes through the images in batches and stores a batch's moments, then those of the mirrored batch
(specs/dim.md section 7): with batches of 256, files 0 to 255 are images and 256 to 511 the same mirrored. DiM writes
`N.npy.npz` with z and label; U-ViT writes `N.npy`, an object array of (moments, label), which is a pickle: it is read
by our machine for values (runtime/pickle_values.py) that runs nothing of it.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpc_gen.data.archive_ends import bytes_after_zip
from hpc_gen.data.index import LABELS, ColumnInfo, ShardInfo, TableIndex
from hpc_gen.data.mapped import Int64Array
from hpc_gen.data.ptshard import dtype_name
from hpc_gen.data.row_names import Name
from hpc_gen.runtime.errors import DataError, reason
from hpc_gen.runtime.pickle_values import Inert, PickleMachine

ENDINGS = (".npy.npz", ".npy")  # of DiM, of U-ViT
READERS = 16  # threads: on a shared file system each file waits for the network
Array = np.ndarray[Any, Any]


def looks_like_features(folder: Path) -> bool:
    """Whether a folder holds such files."""
    return any((folder / f"0{ending}").is_file() for ending in ENDINGS)


@dataclass(frozen=True)
class FeatureFiles:
    """A folder of numbered files as rows with `moments`, `moments_flip` and `labels`."""

    folder: Path
    ending: str
    batch: int
    index: TableIndex

    @classmethod
    def open(cls, folder: Path, batch: int) -> FeatureFiles:
        """Raises DataError when a number is missing or the last batch is not mirrored."""
        ending = next(ending for ending in ENDINGS if (folder / f"0{ending}").is_file())
        names = [path.name.removesuffix(ending) for path in folder.iterdir() if path.name.endswith(ending)]
        numbers = sorted(int(name) for name in names if name.isdecimal())
        missing = next((n for n, number in enumerate(numbers) if n != number), len(numbers))
        if missing != len(numbers):
            raise DataError(f"{folder} has no file {missing}{ending}, of {numbers[-1] + 1:,}; extract them again")
        if len(numbers) % 2:
            raise DataError(
                f"{folder} has {len(numbers):,} files, an odd number: the last mirrored image is missing; extract the "
                "features again"
            )
        rows = len(numbers) // 2
        files = cls(folder, ending, batch, TableIndex({}, (ShardInfo("0", rows, 1, "", ""),)))
        z, label = files._parsed(0, files._bytes(0))
        column = ColumnInfo(dtype_name(torch.from_numpy(z).dtype), z.shape)
        columns = {"moments": column, "moments_flip": column}
        if label is not None:
            columns[LABELS] = ColumnInfo("int64", ())
        return cls(folder, ending, batch, TableIndex(columns, files.index.shards))

    @property
    def rows(self) -> int:
        """Images."""
        return self.index.rows

    def names(self, rows: Int64Array) -> list[Name] | None:
        """Unknown: the extraction numbered its images."""
        return None

    def read(self, rows: Int64Array | Sequence[int], columns: Sequence[str]) -> dict[str, Tensor]:
        """Rows [n] of the named columns. Raises DataError when the pair of a row does not have one label."""
        wanted = np.asarray(rows, dtype=np.int64)
        batches = wanted // self.batch
        sizes = np.minimum(self.batch, self.rows - batches * self.batch)
        plain = batches * self.batch + wanted
        with ThreadPoolExecutor(READERS) as pool:
            data = list(pool.map(self._bytes, [*plain.tolist(), *(plain + sizes).tolist()]))
        # One after the other: numpy parses headers by `ast`, which Python 3.11 does not allow in two threads at once.
        both = [self._parsed(number, each) for number, each in zip([*plain, *(plain + sizes)], data, strict=True)]
        one, two = both[: len(wanted)], both[len(wanted) :]
        for number, other, (_, label), (_, mirrored) in zip(plain, plain + sizes, one, two, strict=True):
            if label != mirrored:
                raise DataError(
                    f"{self.folder}: file {number} has the label {label}, its mirror image {other} has {mirrored}; "
                    f"they were not extracted in batches of {self.batch}: say --feature-batch"
                )
        found = {"moments": [z for z, _ in one], "moments_flip": [z for z, _ in two]}
        read: dict[str, Tensor] = {}
        for name in columns:
            read[name] = (
                torch.tensor([label for _, label in one], dtype=torch.int64)
                if name == LABELS
                else torch.from_numpy(np.stack(found[name]))
            )
        return read

    def _bytes(self, number: int) -> bytes:
        """All of one file."""
        path = self.folder / f"{number}{self.ending}"
        try:
            return path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}); extract it again") from error

    def _parsed(self, number: int, data: bytes) -> tuple[Array, int | None]:
        """(moments, label) of one file."""
        path = self.folder / f"{number}{self.ending}"
        try:
            z, label = _dim_file(data) if self.ending == ".npy.npz" else _uvit_file(data)
        except Exception as error:  # zip, numpy and the pickle machine raise a dozen kinds for damaged files
            raise DataError(f"{path} cannot be read as features ({reason(error)}); extract it again") from error
        if label is not None and label < 0:
            raise DataError(f"{path} has the label {label}; class numbers begin at 0: extract it again")
        expected = self.index.columns.get("moments")
        if expected is not None and z.shape != expected.shape:
            raise DataError(
                f"{path} has moments of {list(z.shape)}, file 0 of {list(expected.shape)}; extract it again"
            )
        return z, label


def _dim_file(data: bytes) -> tuple[Array, int | None]:
    more = bytes_after_zip(io.BytesIO(data))
    if more:
        raise DataError(f"{more:,} bytes follow the end of the archive")
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        return np.ascontiguousarray(archive["z"]), int(archive["label"])


def _uvit_file(data: bytes) -> tuple[Array, int | None]:
    """A plain array (moments alone), or an object array of (moments, label)."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = header(stream)
    if not dtype.hasobject:
        stream.seek(0)
        array = np.ascontiguousarray(np.lib.format.read_array(stream, allow_pickle=False))
        _at_the_end(stream)
        return array, None
    value = PickleMachine(Inert, _no_persistent).run(stream)
    _at_the_end(stream)
    cells = _cells(value)
    if shape != (2,) or not isinstance(cells, list) or len(cells) != 2:
        raise DataError(f"it holds objects of shape {shape}, not (moments, label)")
    return _array(cells[0]), _number(cells[1])


def _at_the_end(stream: io.BytesIO) -> None:
    more = len(stream.read())
    if more:
        raise DataError(f"{more:,} bytes follow the end of the array")


def _no_persistent(value: Any) -> Any:
    raise DataError("its pickle refers to something outside")


def _cells(value: Any) -> Any:
    """The list inside an object array, whose state is (version, shape, dtype, order, cells)."""
    if not isinstance(value, Inert) or not value.name.endswith("multiarray._reconstruct"):
        raise DataError("its pickle is not that of an array")
    return value.state[4]


def _array(value: Any) -> Array:
    """A numeric array inside a pickle, from its bytes."""
    if not isinstance(value, Inert) or not value.name.endswith("multiarray._reconstruct"):
        raise DataError("the first object is not an array")
    _, shape, dtype, fortran, data = value.state
    data = data.encode("latin1") if isinstance(data, str) else data
    array = np.frombuffer(data, _dtype(dtype)).reshape(shape, order="F" if fortran else "C")
    return np.array(array, dtype=array.dtype.newbyteorder("="), order="C")


def _number(value: Any) -> int:
    """A class number: an int, a numpy scalar or an array of one."""
    if isinstance(value, int):
        return value
    if isinstance(value, Inert) and value.name.endswith("multiarray.scalar"):
        dtype, data = value.args
        return int(np.frombuffer(data.encode("latin1") if isinstance(data, str) else data, _dtype(dtype))[0])
    return int(_array(value).reshape(-1)[0])


def _dtype(value: Any) -> np.dtype[Any]:
    if not isinstance(value, Inert) or value.name != "numpy.dtype":
        raise DataError("its pickle names a dtype that is none of numpy's")
    code, order = str(value.args[0]), str(value.state[1])
    dtype = np.dtype(code).newbyteorder(order if order in "<>" else "=")
    if dtype.hasobject:
        raise DataError("its pickle holds objects inside objects")
    return dtype
