"""The crops of the published preparations, by name: from an image of any size to the square that is stored.

`adm` is the crop of ADM and of all who follow it (specs/energy.md section 7, gmem.md section 6, dim.md section 7);
`short_bicubic` and `short_bilinear` scale the shorter side and cut the middle, as torchvision's Resize and CenterCrop
do (specs/digit.md section 4, gmem.md section 5); `edm_center` and `edm_stretch` are those of EDM's dataset tool
(specs/gdd.md section 7). Golden cases crop_resize, center_crop, image_ops and image_prep hold them to the byte.
"""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image

from hpc_gen.data.images import center_crop
from hpc_gen.runtime.errors import UserError, nearest

Filter = Image.Resampling


def short_side(image: Image.Image, size: int, resample: Filter) -> Image.Image:
    """The image scaled so that its shorter side is `size`; the longer becomes floor(size * longer / shorter)."""
    width, height = image.size
    if width <= height:
        return image.resize((size, int(size * height / width)), resample)
    return image.resize((int(size * width / height), size), resample)


def middle(image: Image.Image, size: int) -> Image.Image:
    """The middle `size` x `size` pixels; offsets are halves rounded to even, as torchvision has them."""
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def _short(resample: Filter) -> Callable[[Image.Image, int, int], Image.Image]:
    return lambda image, size, short: middle(short_side(image, short, resample), size)


def _edm_center(image: Image.Image, size: int, short: int) -> Image.Image:
    """The largest square in the middle (floor offsets), then Lanczos."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((size, size), Filter.LANCZOS)


def _edm_stretch(image: Image.Image, size: int, short: int) -> Image.Image:
    """The whole image, squeezed to a square by Lanczos."""
    return image if image.size == (size, size) else image.resize((size, size), Filter.LANCZOS)


CROPS: dict[str, Callable[[Image.Image, int, int], Image.Image]] = {
    "adm": lambda image, size, short: center_crop(image, size),
    "short_bicubic": _short(Filter.BICUBIC),
    "short_bilinear": _short(Filter.BILINEAR),
    "edm_center": _edm_center,
    "edm_stretch": _edm_stretch,
}
SCALED = ("short_bicubic", "short_bilinear")  # these alone look at the scaled shorter side


def crop(name: str, image: Image.Image, size: int, short: int | None = None) -> Image.Image:
    """The crop `name` of an RGB image, `size` x `size`; `short`: what the shorter side is scaled to first [`size`].

    Raises UserError for an unknown name.
    """
    if name not in CROPS:
        raise UserError(f"unknown crop {name!r}{nearest(name, CROPS)}; known: {', '.join(CROPS)}")
    return CROPS[name](image, size, short or size)
