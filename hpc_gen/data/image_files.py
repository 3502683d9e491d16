"""Sets of images that are not tables: a folder of image files, or an .npz with arr_0 as ADM's evaluator reads it.

Images are uint8 [3, H, W] of one size; a set is identified by a hash of its content, whatever it is called.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hpc_gen.runtime.commit import sha256_file
from hpc_gen.runtime.errors import DataError, UserError

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
KEY = "arr_0"


class ImageSet(Protocol):
    """Images by number; `identity` is a hash of all of them."""

    @property
    def rows(self) -> int:
        """How many."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """[3, H, W]."""
        ...

    @property
    def identity(self) -> str:
        """Hash of the content."""
        ...

    def read(self, ids: Sequence[int]) -> Tensor:
        """Images uint8 [n, 3, H, W]."""
        ...

    def name(self, row: int) -> str:
        """One image, for messages."""
        ...


class FolderImages:
    """Image files below a folder, in the order of their paths; all of one size."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError where there is no image."""
        self._folder = folder
        self._paths = sorted(
            path
            for path in folder.rglob("*")
            if path.suffix.lower() in EXTENSIONS and not any(part.startswith(".") for part in path.parts[-3:])
        )
        if not self._paths:
            raise UserError(f"{folder} holds no image files ({', '.join(sorted(EXTENSIONS))}); name a folder of images")
        self._shape = tuple(_pixels(self._paths[0]).shape)
        self._identity: str | None = None

    @property
    def rows(self) -> int:
        """How many files."""
        return len(self._paths)

    @property
    def shape(self) -> tuple[int, ...]:
        """[3, H, W] of the first; the others are checked when they are read."""
        return self._shape

    @property
    def identity(self) -> str:
        """SHA-256 over the names and contents of the files."""
        if self._identity is None:
            digest = hashlib.sha256()
            for path in self._paths:
                digest.update(f"{path.relative_to(self._folder).as_posix()} {sha256_file(path)}\n".encode())
            self._identity = digest.hexdigest()
        return self._identity

    def read(self, ids: Sequence[int]) -> Tensor:
        """Images uint8 [n, 3, H, W]. Raises DataError naming a file that is damaged or of another size."""
        return torch.stack([self._one(self._paths[i]) for i in ids])

    def name(self, row: int) -> str:
        """Path of a file."""
        return str(self._paths[row])

    def _one(self, path: Path) -> Tensor:
        pixels = _pixels(path)
        if tuple(pixels.shape) != self._shape:
            raise DataError(
                f"{path} is {pixels.shape[2]} x {pixels.shape[1]} pixels, {self._paths[0]} "
                f"{self._shape[2]} x {self._shape[1]}; bring all images to one size"
            )
        return pixels


class NpzImages:
    """Images of an .npz file: arr_0 uint8 [N, H, W, 3], mapped where the file is not compressed."""

    def __init__(self, path: Path) -> None:
        """Raises DataError where the file has no such array."""
        self._path = path
        self._images = _mapped(path)
        if self._images.dtype != np.uint8 or self._images.ndim != 4 or self._images.shape[3] not in (1, 3):
            raise DataError(
                f"{path}: '{KEY}' is {self._images.dtype} {list(self._images.shape)}, not uint8 images [N, H, W, 3]"
            )
        self._identity: str | None = None

    @property
    def rows(self) -> int:
        """How many images."""
        return len(self._images)

    @property
    def shape(self) -> tuple[int, ...]:
        """[3, H, W]."""
        return (3, *self._images.shape[1:3])

    @property
    def identity(self) -> str:
        """SHA-256 of the file."""
        if self._identity is None:
            self._identity = sha256_file(self._path)
        return self._identity

    def read(self, ids: Sequence[int]) -> Tensor:
        """Images uint8 [n, 3, H, W]."""
        pixels = torch.from_numpy(np.ascontiguousarray(self._images[list(ids)]))
        return pixels.permute(0, 3, 1, 2).expand(-1, 3, -1, -1).contiguous()

    def name(self, row: int) -> str:
        """One image."""
        return f"image {row} of {self._path}"


def open_images(path: Path) -> FolderImages | NpzImages:
    """The images at a path. Raises UserError where there are none, DataError where the file is damaged."""
    if path.is_dir():
        return FolderImages(path)
    if path.suffix == ".npz" and path.is_file():
        return NpzImages(path)
    raise UserError(f"{path} is neither a folder of images nor an .npz file; name one that is")


def shape_of(path: Path) -> tuple[int, ...]:
    """[3, H, W] of the images at a path, by the first that is found: a long folder is not listed. Raises as
    `open_images`."""
    for each in path.rglob("*") if path.is_dir() else ():
        if each.suffix.lower() in EXTENSIONS and not any(part.startswith(".") for part in each.parts[-3:]):
            return tuple(_pixels(each).shape)
    return open_images(path).shape


def _pixels(path: Path) -> Tensor:
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises SyntaxError for broken PNG chunks
        raise DataError(f"{path} cannot be read as an image ({error}); get it again, or remove it") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _mapped(path: Path) -> np.ndarray[Any, Any]:
    """The array of an .npz: a map of the file where it is stored as it is, else read whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if f"{KEY}.npy" not in names:
                have = ", ".join(name.removesuffix(".npy") for name in names) or "nothing"
                raise DataError(f"{path} has no '{KEY}' (it has: {have}); name a file of images")
            member = archive.getinfo(f"{KEY}.npy")
            if member.compress_type == zipfile.ZIP_STORED:
                with archive.open(member) as stream:
                    version = np.lib.format.read_magic(stream)
                    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else _header_2
                    shape, fortran, dtype = read(stream)
                    begin = stream.tell()
                if not fortran and not dtype.hasobject:
                    return np.memmap(path, dtype, "r", _data_offset(path, member) + begin, shape)
        with np.load(path, allow_pickle=False) as arrays:
            return np.asarray(arrays[KEY])
    except DataError:
        raise
    except Exception as error:  # zipfile, zlib and numpy each have errors of their own for a torn file
        raise DataError(f"{path} cannot be read as .npz ({error}); get or make it again") from error


def _header_2(stream: Any) -> Any:
    return np.lib.format.read_array_header_2_0(stream)


def _data_offset(path: Path, member: zipfile.ZipInfo) -> int:
    """Where the bytes of a stored member begin: after its local header, whose extra field is of its own length."""
    with path.open("rb") as stream:
        stream.seek(member.header_offset)
        head = stream.read(30)
    return member.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
