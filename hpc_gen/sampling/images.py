"""Image files: PNG with the same bytes for the same pixels, and grids for people to look at."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError

COMPRESSION = 6  # fixed, so that a PNG's bytes depend on the pixels (and the zlib) alone


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
