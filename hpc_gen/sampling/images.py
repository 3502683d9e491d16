"""Image files: PNG with the same bytes for the same pixels, and grids for people to look at."""

from __future__ import annotations

import hashlib
import io
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError

COMPRESSION = 6  # fixed, so that a PNG's bytes depend on the pixels (and the zlib) alone
FONT_SIZE = 12  # of captions, in pixels; Pillow's own font, so that no file of the machine is needed
LINE_HEIGHT = 15
CAPTION_LINES = 3


def png_bytes(image: Tensor | Image.Image) -> bytes:
    """An image uint8 [3, H, W], or one of Pillow's, as PNG without any metadata."""
    if isinstance(image, Tensor):
        assert image.dtype == torch.uint8 and image.dim() == 3 and image.shape[0] == 3, f"{image.dtype} {image.shape}"
        image = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    stream = io.BytesIO()
    image.save(stream, format="PNG", compress_level=COMPRESSION)
    return stream.getvalue()


def write_png(path: Path, image: Tensor) -> None:
    """Write an image uint8 [3, H, W], whole or not at all."""
    commit.write_bytes(path, png_bytes(image))


def read_png(path: Path) -> Tensor:
    """An image file as uint8 [3, H, W]. Raises DataError when it is missing, truncated or not an image."""
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises SyntaxError for broken PNG chunks
        raise DataError(f"{path} cannot be read as an image ({error}); have its block sampled again") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def pixel_sha256(images: Tensor) -> str:
    """SHA-256 of the pixels of images uint8 [N, 3, H, W] and their shape; independent of the file format."""
    digest = hashlib.sha256(str(list(images.shape)).encode())
    digest.update(images.contiguous().numpy().tobytes())
    return digest.hexdigest()


def grid(images: Tensor, columns: int, gap: int = 2, scale: int = 1, background: int = 255) -> Image.Image:
    """Images uint8 [N, 3, H, W] in rows of `columns`, `gap` pixels apart, each pixel enlarged `scale` times.

    Raises ValueError for no images.
    """
    if len(images) == 0 or columns < 1 or scale < 1:
        raise ValueError(f"a grid needs images, columns and a scale, not {len(images)}, {columns} and {scale}")
    num_images, channels, height, width = images.shape
    columns = min(columns, num_images)
    num_rows = -(-num_images // columns)
    tall, wide = height * scale, width * scale
    canvas = np.full(
        (num_rows * (tall + gap) + gap, columns * (wide + gap) + gap, channels), background, dtype=np.uint8
    )
    pixels = images.permute(0, 2, 3, 1).cpu().numpy().repeat(scale, axis=1).repeat(scale, axis=2)
    for i in range(num_images):
        top, left = gap + (i // columns) * (tall + gap), gap + (i % columns) * (wide + gap)
        canvas[top : top + tall, left : left + wide] = pixels[i]
    return Image.fromarray(canvas)


def captioned_grid(
    images: Tensor, captions: Sequence[str], columns: int, *, scale: int = 1, gap: int = 8, cell_width: int = 96
) -> Image.Image:
    """Images uint8 [N, 3, H, W] in rows of `columns`, each enlarged `scale` times with its caption below.

    A cell is at least `cell_width` pixels wide; captions are cut into at most `CAPTION_LINES` lines that fit. Without
    any caption it is `grid`. Raises ValueError for no images, or captions of another number.
    """
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images have {len(captions)} captions; give one each")
    if not any(captions):
        return grid(images, columns, scale=scale)
    if len(images) == 0 or columns < 1 or scale < 1:
        raise ValueError(f"a grid needs images, columns and a scale, not {len(images)}, {columns} and {scale}")
    font = ImageFont.load_default(size=FONT_SIZE)
    tall, wide = images.shape[2] * scale, images.shape[3] * scale
    cell = max(wide, cell_width)
    texts = [_lines(_plain(text), cell, font) for text in captions]
    text_height = max(len(lines) for lines in texts) * LINE_HEIGHT
    columns = min(columns, len(images))
    num_rows = -(-len(images) // columns)
    canvas = Image.new(
        "RGB", (columns * (cell + gap) + gap, num_rows * (tall + text_height + 2 * gap) + gap), (255, 255, 255)
    )
    pen = ImageDraw.Draw(canvas)
    for i, (image, lines) in enumerate(zip(images, texts, strict=True)):
        left, top = gap + (i % columns) * (cell + gap), gap + (i // columns) * (tall + text_height + 2 * gap)
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
        canvas.paste(picture.resize((wide, tall), Image.Resampling.NEAREST), (left + (cell - wide) // 2, top))
        for number, line in enumerate(lines):
            start = left + (cell - pen.textlength(line, font=font)) / 2
            pen.text((start, top + tall + gap // 2 + number * LINE_HEIGHT), line, fill=(0, 0, 0), font=font)
    return canvas


def _plain(text: str) -> str:
    """The letters that Pillow's own font has: accents are dropped, what is left over becomes '?'."""
    letters = "".join(each for each in unicodedata.normalize("NFKD", text) if not unicodedata.combining(each))
    return letters.encode("ascii", "replace").decode()


def _lines(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Words filled into lines of at most `width` pixels; what does not fit into the last line ends in '...'."""
    found: list[str] = []
    for word in text.split():
        if found and font.getlength(f"{found[-1]} {word}") <= width:
            found[-1] += f" {word}"
        else:
            found.append(word)
    kept = found[:CAPTION_LINES]
    if len(found) > CAPTION_LINES:
        kept[-1] = " ".join(found[CAPTION_LINES - 1 :])
    return [_cut(line, width, font) for line in kept]


def _cut(line: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(f"{line}...") > width:
        line = line[:-1]
    return f"{line.rstrip()}..."
