"""Images from bytes to pixels: decode, composite, centre crop, resize. Pillow only, and below 13 for byte parity.

The crop and the resize are those of specs/energy.md section 7 (the ADM centre crop); golden `crop_resize` holds them
to the byte. EXIF orientation is ignored, as the reference does.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from hpc_gen.runtime.errors import DataError, UserError

WHITE = (255, 255, 255)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_DEEP_MODES = (
    "I",
    "F",
    "I;16",
    "I;16L",
    "I;16B",
    "I;16N",
)  # more than 8 bits: Pillow would clip them in silence


def decode_image(data: bytes, background: Sequence[int] = WHITE) -> Image.Image:
    """Encoded bytes -> an RGB image; transparency is composited on `background` (red, green, blue of 0..255).

    Raises DataError when the bytes are not an 8-bit image that Pillow can read to its end.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return to_rgb(image, background)
    except DataError:
        raise
    except UnidentifiedImageError as error:  # its text names an address in memory, another one every time
        raise DataError("not a readable image (of no known format); replace the file or remove it") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, bomb errors
        raise DataError(f"not a readable image ({error}); replace the file or remove it") from error


def images_below(folder: Path, *, deep: bool = False) -> list[Path]:
    """Image files in a folder, with `deep` also in those below it, sorted. Raises UserError where there are none."""
    listed = folder.rglob("*") if deep else folder.glob("*")
    found = sorted(path for path in listed if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not found:
        raise UserError(f"{folder} holds no image ({', '.join(IMAGE_SUFFIXES)}); name a folder of images")
    return found


def to_rgb(image: Image.Image, background: Sequence[int] = WHITE) -> Image.Image:
    """Any 8-bit image as RGB, transparency composited on `background`. Raises DataError for deeper ones.

    Colour files of 16 bits come from Pillow as 8 bits already, by their high byte; grey ones would be clipped.
    """
    if image.mode in _DEEP_MODES:
        raise DataError(f"image mode {image.mode!r} has more than 8 bits per channel; convert it to 8 bits first")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        red, green, blue = background
        canvas = Image.new("RGBA", image.size, (red, green, blue, 255))
        canvas.alpha_composite(image.convert("RGBA"))
        return canvas.convert("RGB")
    return image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle `size` x `size` pixels of the image scaled so that its shorter side is `size`.

    Halves with a box filter while the shorter side is at least 2 * size, then scales bicubically; the crop starts at
    floor((side - size) / 2).
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def resize(image: Image.Image, size: int) -> Image.Image:
    """`size` x `size` pixels, bilinear with antialiasing (what torchvision's Resize does to a PIL image)."""
    return image.resize((size, size), Image.Resampling.BILINEAR)


def to_pixels(image: Image.Image, channels: int = 3) -> Tensor:
    """An image as uint8 [C, H, W] with 1 (luma) or 3 (RGB) channels."""
    array = np.array(image.convert("RGB" if channels == 3 else "L"))
    return torch.from_numpy(array[None] if channels == 1 else array.transpose(2, 0, 1).copy())


def normalize(pixels: Tensor) -> Tensor:
    """uint8 0..255 -> float32 -1..1, in the reference's two steps: /255, then (x - 0.5) / 0.5."""
    return (pixels.to(torch.float32) / 255.0 - 0.5) / 0.5


def to_tensor_normalized(image: Image.Image) -> Tensor:
    """An RGB image as float32 [3, H, W] in -1..1."""
    return normalize(to_pixels(image))


def truncated_pixels(images: Tensor) -> Tensor:
    """Decoded images in -1..1, any float [N, C, H, W], to uint8: 127.5 x + 128 clipped and cut off, not rounded.

    As GMem's decoder ends (specs/gmem.md section 4); golden `image_ops`.
    """
    return (127.5 * images.float() + 128.0).clamp(0, 255).to(torch.uint8)
