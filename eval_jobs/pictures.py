"""Images for the report, as data URIs: the page is one file."""

from __future__ import annotations

import base64
from dataclasses import dataclass

from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.sampling.images import grid, png_bytes
from hpc_gen.sampling.index import SampleIndex

GRID_IMAGES = 80
GRID_COLUMNS = 10
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
