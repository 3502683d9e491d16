"""Images for the report, as data URIs: the page is one file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.sampling.images import grid, png_bytes
from hpc_gen.sampling.index import SampleIndex, read_some

GRID_IMAGES = 80
GRID_COLUMNS = 10
MAX_CLASSES = 8
CLASS_IMAGES = 8
MAX_PREVIEWS = 8


@dataclass(frozen=True)
class Picture:
    """An image for the page: a data URI, its size in pixels, what it shows."""

    uri: str
    width: int
    height: int
    alt: str
    caption: str


def picture_of(index: SampleIndex, count: int = GRID_IMAGES, of: str = "") -> Picture:
    """The first images of a set of samples as a grid, a column per class where that fits; `of` names the set."""
    plan = index.plan
    by_class = 2 <= plan.num_classes <= 16 and plan.classes == "balanced"
    columns = plan.num_classes if by_class else GRID_COLUMNS
    count = min(index.num_images, max(1, count // columns) * columns)
    side = index.image_shape[-1]
    made = grid(index.read(range(count)), columns, gap=max(1, side // 16), scale=max(1, 64 // side))
    told = f"; each column is one of the {columns} classes" if by_class else ""
    caption = f"Images 0 to {count - 1} of {index.num_images:,}{told}"
    alt = f"Grid of {count} generated images{f' of {of}' if of else ''}"
    return Picture(_data_uri(png_bytes(made)), made.width, made.height, alt, caption)


def strip(images: Tensor, alt: str, caption: str = "") -> Picture:
    """A few images uint8 [N, 3, H, W] side by side in one row."""
    side = images.shape[-1]
    made = grid(images, len(images), gap=4, scale=max(1, 64 // side))
    return Picture(_data_uri(png_bytes(made)), made.width, made.height, alt, caption)


@dataclass(frozen=True)
class ClassRow:
    """Images of one class, by their numbers."""

    name: str
    picture: Picture


def by_class(index: SampleIndex, of: str, names: Sequence[str] = ()) -> list[ClassRow]:
    """A row of images per class: the first CLASS_IMAGES numbers of each of the first MAX_CLASSES classes.

    Sets of one seed and class plan have the same noise in the same place. Without classes: rows by number.
    """
    plan = index.plan
    ids = torch.arange(index.num_images)
    rows = []
    if plan.num_classes:
        labels = plan.labels(ids)
        for label in sorted(set(labels.tolist()))[:MAX_CLASSES]:
            name = names[label] if label < len(names) and names[label] else f"class {label}"
            rows.append((name, ids[labels == label][:CLASS_IMAGES].tolist()))
    else:
        starts = range(0, min(index.num_images, MAX_CLASSES * CLASS_IMAGES), CLASS_IMAGES)
        rows = [(f"from {i}", list(range(i, min(i + CLASS_IMAGES, index.num_images)))) for i in starts]
    found = []
    images = read_some(index, [i for _, chosen in rows for i in chosen])
    for (name, chosen), part in zip(rows, images.split([len(chosen) for _, chosen in rows]), strict=True):
        numbers = ", ".join(map(str, chosen))
        found.append(ClassRow(name, strip(part, f"Images {numbers} of {of}, {name}")))
    return found


def preview_pictures(run: RunFolder) -> list[Picture]:
    """Previews during training, evenly chosen from the first to the last."""
    paths = sorted(path for path in run.previews.glob("*.png") if path.stem.isdigit())
    if len(paths) > MAX_PREVIEWS:
        paths = [paths[round(i * (len(paths) - 1) / (MAX_PREVIEWS - 1))] for i in range(MAX_PREVIEWS)]
    found = []
    for path in paths:
        content = path.read_bytes()
        width, height = int.from_bytes(content[16:20]), int.from_bytes(content[20:24])  # of the PNG header
        seen = f"{int(path.stem):,} images"
        found.append(Picture(_data_uri(content), width, height, f"Samples after {seen}", seen))
    return found


def _data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()
