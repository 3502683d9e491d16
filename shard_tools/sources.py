"""Where images come from: each source lists its splits and classes, and loads one image at a time.

A source is opened from a folder; nothing but listings and labels is read until an image is asked for.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from hpc_gen.data.images import IMAGE_SUFFIXES, WHITE, decode_image
from hpc_gen.runtime.errors import DataError, UserError, nearest
from shard_tools.archives import open_edm_zip, open_tar
from shard_tools.parquet import open_parquet
from shard_tools.split import TRAIN, VALIDATION, Source, Split

MNIST_FILES = {
    TRAIN: ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    VALIDATION: ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
EMOJI_SETS = ("google", "twitter")
EMOJI_LEFT_OUT = "Component"  # five bare skin tones: no class of its own
EMOJI_HELD_OUT = 10  # one base emoji in ten is for validation
CIFAR_BYTES = 3 * 32 * 32

UInt8Array = npt.NDArray[np.uint8]


def open_source(name: str, folder: Path, background: Sequence[int] = WHITE) -> Source:
    """Open a source by name. Raises UserError when it is unknown or not there, DataError when it is damaged."""
    if name not in SOURCES:
        raise UserError(f"unknown source {name!r}{nearest(name, SOURCES)}; known: {', '.join(sorted(SOURCES))}")
    if not (folder.is_dir() or (name in ARCHIVES and folder.is_file())):
        fix = f"run: hpc-gen shards fetch {name}" if name in FETCHED else "check encode.source_path"
        raise UserError(f"source {name!r}: there is no {'file or ' if name in ARCHIVES else ''}folder {folder}; {fix}")
    source = SOURCES[name](folder, background)
    for split_name, split in source.splits.items():
        if not len(split):
            raise UserError(f"source {name!r}: {folder} has no images for the split {split_name!r}; check the folder")
        low, high = int(split.labels.min()), int(split.labels.max())
        if low < 0 or high >= source.num_classes:
            raise DataError(
                f"source {name!r} in {folder}: labels of split {split_name!r} run from {low} to {high}, "
                f"it has {source.num_classes} classes; fetch it again"
            )
    return source


# --- MNIST ------------------------------------------------------------------------------------------------------


def read_idx(path: Path) -> UInt8Array:
    """An idx file of unsigned bytes, plain or gzipped (`path` or `path`.gz): magic 0x0000080N, N sizes, the data."""
    zipped = path.with_name(path.name + ".gz")
    try:
        data = path.read_bytes() if path.is_file() else gzip.decompress(zipped.read_bytes())
    except FileNotFoundError:
        raise UserError(f"there is no {path} (nor {zipped.name}); run: hpc-gen shards fetch mnist") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{zipped} cannot be unpacked ({error}); fetch it again") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise DataError(f"{path} is not an idx file of bytes; fetch it again")
    axes = data[3]
    sizes = struct.unpack(f">{axes}I", data[4 : 4 + 4 * axes]) if len(data) >= 4 + 4 * axes else ()
    array = np.frombuffer(data, np.uint8, offset=min(len(data), 4 + 4 * axes))
    if not sizes or array.size != int(np.prod(sizes, dtype=np.int64)):
        raise DataError(f"{path} has {array.size} bytes of data for the shape {sizes}; it is cut short: fetch it again")
    return array.reshape(sizes)


def _open_mnist(folder: Path, background: Sequence[int]) -> Source:
    splits: dict[str, Split] = {}
    content = hashlib.sha256()
    for name, (image_file, label_file) in MNIST_FILES.items():
        images, labels = read_idx(folder / image_file), read_idx(folder / label_file)
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise DataError(
                f"{folder}: {image_file} has shape {images.shape} and {label_file} {labels.shape}; fetch mnist again"
            )
        content.update(f"{images.shape}".encode() + images.tobytes() + labels.tobytes())
        splits[name] = _array_split(f"mnist/{name}", images, labels)
    return Source("mnist", tuple(str(digit) for digit in range(10)), splits, content.hexdigest())


def _array_split(prefix: str, images: UInt8Array, labels: UInt8Array) -> Split:
    """Images [N, H, W] or [N, H, W, 3] held in memory."""
    ids = [f"{prefix}/{i:05d}" for i in range(len(images))]
    return Split(ids, labels.astype(np.int64), lambda i: Image.fromarray(np.ascontiguousarray(images[i])))


# --- CIFAR-10 ---------------------------------------------------------------------------------------------------


def _open_cifar10(folder: Path, background: Sequence[int]) -> Source:
    """The binary version: records of one label byte and 3072 bytes of red, green and blue planes."""
    names_file = folder / "batches.meta.txt"
    files = {TRAIN: [f"data_batch_{i}.bin" for i in range(1, 6)], VALIDATION: ["test_batch.bin"]}
    for name in [names_file.name, *(file for group in files.values() for file in group)]:
        if not (folder / name).is_file():
            raise UserError(f"there is no {folder / name}; run: hpc-gen shards fetch cifar10")
    splits: dict[str, Split] = {}
    content = hashlib.sha256()
    for split, group in files.items():
        parts = []
        for name in group:
            data = np.fromfile(folder / name, np.uint8)
            if not data.size or data.size % (1 + CIFAR_BYTES):
                raise DataError(f"{folder / name} has {data.size} bytes, not a multiple of 3073; fetch cifar10 again")
            parts.append(data.reshape(-1, 1 + CIFAR_BYTES))
        records = np.concatenate(parts)
        content.update(records.tobytes())
        images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        splits[split] = _array_split(f"cifar10/{split}", images, records[:, 0])
    return Source("cifar10", tuple(names_file.read_text().split()), splits, content.hexdigest())


# --- emoji ------------------------------------------------------------------------------------------------------


def _open_emoji(folder: Path, background: Sequence[int]) -> Source:
    """Google's and Twitter's drawings at 64 pixels, labelled by category.

    Skin-tone variants are near duplicates of their base emoji, and both sets draw the same subjects, so the split is
    by base emoji: all drawings of a base lie on one side.
    """
    listing = folder / "emoji.json"
    try:
        entries: list[dict[str, Any]] = json.loads(listing.read_text())
        class_names = tuple(sorted({entry["category"] for entry in entries} - {EMOJI_LEFT_OUT}))
        found: dict[str, list[tuple[str, str, int]]] = {TRAIN: [], VALIDATION: []}
        left_out = 0
        for entry in entries:
            drawings = [entry, *entry.get("skin_variations", {}).values()]
            members = [(s, d["image"]) for s in EMOJI_SETS for d in drawings if d[f"has_img_{s}"]]
            if entry["category"] == EMOJI_LEFT_OUT:
                left_out += len(members)
                continue
            label = class_names.index(entry["category"])
            split = VALIDATION if _held_out(entry["unified"]) else TRAIN
            found[split] += [(drawing_set, image, label) for drawing_set, image in members]
    except FileNotFoundError:
        raise UserError(f"there is no {listing}; run: hpc-gen shards fetch emoji") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{listing} is not the emoji listing ({error!r}); fetch emoji again") from error
    archives = _Archives(folder, background)
    splits = {name: _emoji_split(rows, archives) for name, rows in found.items()}
    content = hashlib.sha256(listing.read_bytes())
    for drawing_set in EMOJI_SETS:
        content.update(archives.listing(drawing_set).encode())
    return Source("emoji", class_names, splits, content.hexdigest(), {f"category {EMOJI_LEFT_OUT}": left_out})


def _held_out(base: str) -> bool:
    return int.from_bytes(hashlib.sha256(base.encode()).digest()[:8], "big") % EMOJI_HELD_OUT == 0


def _emoji_split(rows: list[tuple[str, str, int]], archives: _Archives) -> Split:
    rows = sorted(rows)
    ids = [f"emoji/{drawing_set}/{image}" for drawing_set, image, _ in rows]
    labels = np.array([label for _, _, label in rows], dtype=np.int64)
    return Split(ids, labels, lambda i: archives.image(rows[i][0], rows[i][1]))


class _Archives:
    """The zip files of a folder, opened when first needed (7,572 small files would burden a shared file system)."""

    def __init__(self, folder: Path, background: Sequence[int]) -> None:
        self.folder = folder
        self.background = background
        self._open: dict[str, zipfile.ZipFile] = {}

    def _archive(self, name: str) -> zipfile.ZipFile:
        if name not in self._open:
            path = self.folder / f"{name}.zip"
            try:
                self._open[name] = zipfile.ZipFile(path)
            except FileNotFoundError:
                raise UserError(f"there is no {path}; run: hpc-gen shards fetch emoji") from None
            except (OSError, zipfile.BadZipFile) as error:
                raise DataError(f"{path} cannot be read ({error}); fetch emoji again") from error
        return self._open[name]

    def listing(self, name: str) -> str:
        """Names and checksums of all members, one per line."""
        members = sorted(self._archive(name).infolist(), key=lambda info: info.filename)
        return "".join(f"{name}/{info.filename} {info.CRC:08x}\n" for info in members)

    def image(self, name: str, member: str) -> Image.Image:
        """One decoded member."""
        try:
            data = self._archive(name).read(member)
        except (KeyError, OSError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{self.folder / name}.zip: {member} cannot be read ({error}); fetch emoji again"
            ) from error
        return decode_image(data, self.background)


# --- a folder of class folders ----------------------------------------------------------------------------------


def _open_folder(folder: Path, background: Sequence[int]) -> Source:
    """`folder/CLASS/*.png`, or `folder/train/CLASS/...` with `folder/validation/CLASS/...` (also `val`).

    Classes are numbered in the sorted order of their names, over both splits.
    """
    validation = next((folder / name for name in (VALIDATION, "val") if (folder / name).is_dir()), None)
    if (folder / TRAIN).is_dir():
        roots = {TRAIN: folder / TRAIN} | ({VALIDATION: validation} if validation else {})
    else:
        roots = {TRAIN: folder}
    entries = [path for root in roots.values() for path in root.iterdir() if not path.name.startswith(".")]
    class_names = tuple(sorted({path.name for path in entries if path.is_dir()}))
    if not class_names:
        raise UserError(
            f"{folder} has no class folders; put the images into {folder}/CLASS/ (or {folder}/train/CLASS/)"
        )
    splits: dict[str, Split] = {}
    content = hashlib.sha256()
    outside = sum(path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES for path in entries)
    not_images = 0
    for split, root in roots.items():
        files: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(class_names):
            listed = sorted(path for path in (root / name).rglob("*") if path.is_file())
            images = [path for path in listed if path.suffix.lower() in IMAGE_SUFFIXES]
            not_images += len(listed) - len(images)
            files += images
            labels += [label] * len(images)
        ids = [f"{split}/{path.relative_to(root).as_posix()}" for path in files]
        for path, name in zip(files, ids, strict=True):
            content.update(f"{name} {path.stat().st_size}\n".encode())
        splits[split] = Split.of_files(ids, labels, _file_reader(files), background)
    counts = {"not an image file": not_images, "image outside a class folder": outside}
    skipped = {reason: count for reason, count in counts.items() if count}
    return Source("folder", class_names, splits, content.hexdigest(), skipped)


def _file_reader(files: list[Path]) -> Callable[[int], bytes]:
    def read(i: int) -> bytes:
        try:
            return files[i].read_bytes()
        except OSError as error:
            raise DataError(f"{files[i]} cannot be read ({error.strerror})") from error

    return read


FETCHED = ("mnist", "emoji", "cifar10")  # by `hpc-gen shards fetch`; the others are the user's own
ARCHIVES = ("tar", "edm_zip", "parquet")  # a file, or a folder of files
SOURCES: dict[str, Callable[[Path, Sequence[int]], Source]] = {
    "mnist": _open_mnist,
    "emoji": _open_emoji,
    "cifar10": _open_cifar10,
    "folder": _open_folder,
    "tar": open_tar,
    "edm_zip": open_edm_zip,
    "parquet": open_parquet,
}
