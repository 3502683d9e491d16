"""Decode, composite, crop and resize. Byte parity with the reference is golden `crop_resize`, in tests/parity."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from hpc_gen.data.images import (
    center_crop,
    decode_image,
    images_below,
    normalize,
    resize,
    to_pixels,
    to_tensor_normalized,
)
from hpc_gen.data.statistics import ChannelSums
from hpc_gen.runtime.errors import DataError, UserError

PINNED = "d9e4584f441dc7d51e0b0f16a7ea9ddf3f89cf49f2d287ce5ba1a3321514b7bd"


def pattern(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 7 + y * 3, x * y, (x - y) ** 2], -1).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_pillow_is_below_13() -> None:
    assert int(PIL.__version__.split(".")[0]) < 13, "byte parity of crops needs Pillow < 13 (specs/energy.md section 7)"


@pytest.mark.parametrize("size", [(100, 75), (64, 64), (67, 150), (131, 132), (33, 40), (20, 9), (32, 32)])
def test_crop_has_the_size_asked(size: tuple[int, int]) -> None:
    assert center_crop(pattern(*size), 32).size == (32, 32)
    assert resize(center_crop(pattern(*size), 32), 8).size == (8, 8)


def test_an_image_of_the_right_size_is_left_alone() -> None:
    image = pattern(32, 32)
    assert center_crop(image, 32).tobytes() == image.tobytes()


def test_exact_double_is_a_box_average() -> None:
    image = pattern(64, 64)
    blocks = np.asarray(image).astype(np.float64).reshape(32, 2, 32, 2, 3).mean((1, 3))
    # Pillow rounds after each of its two passes, so half a level twice
    assert np.abs(np.asarray(center_crop(image, 32)) - blocks).max() <= 1.0


def test_the_middle_is_kept_and_odd_margins_round_down() -> None:
    image = Image.new("RGB", (37, 32))
    for x in range(37):
        image.paste((x, 0, 0), (x, 0, x + 1, 32))
    assert np.asarray(center_crop(image, 32))[0, :, 0].tolist() == list(range(2, 34))


def test_pinned_bytes() -> None:
    images = [center_crop(pattern(*size), 32) for size in [(100, 75), (67, 150), (33, 40)]]
    images += [resize(image, 8) for image in images]
    assert hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest() == PINNED


def test_pixels_and_normalisation() -> None:
    image = pattern(5, 3)
    pixels = to_pixels(image)
    assert pixels.shape == (3, 3, 5) and pixels.dtype == torch.uint8
    assert torch.equal(pixels.permute(1, 2, 0), torch.from_numpy(np.array(image)))
    assert to_pixels(image, 1).shape == (1, 3, 5)
    assert np.array_equal(to_pixels(image, 1)[0].numpy(), np.asarray(image.convert("L")))
    assert normalize(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]
    assert to_tensor_normalized(image).dtype == torch.float32
    assert torch.equal(to_tensor_normalized(image), normalize(pixels))
    grey = Image.new("L", (4, 4), 9)
    assert to_pixels(grey, 3).unique().tolist() == [9] and to_pixels(grey, 1).unique().tolist() == [9]


def test_decode_keeps_the_pixels() -> None:
    image = pattern(20, 11)
    assert decode_image(encoded(image)).tobytes() == image.tobytes()
    assert decode_image(encoded(image.convert("L"))).mode == "RGB"
    assert decode_image(encoded(image, "JPEG")).size == (20, 11)
    assert decode_image(encoded(image.convert("CMYK"), "JPEG")).mode == "RGB"


def test_transparency_is_composited() -> None:
    rgba = Image.new("RGBA", (2, 1), (200, 100, 0, 255))
    rgba.putpixel((1, 0), (200, 100, 0, 0))
    white, red = decode_image(encoded(rgba)), decode_image(encoded(rgba), (255, 0, 0))
    assert list(white.get_flattened_data() if hasattr(white, "get_flattened_data") else white.getdata()) == [
        (200, 100, 0),
        (255, 255, 255),
    ]
    assert red.getpixel((1, 0)) == (255, 0, 0)
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert decode_image(encoded(half)).getpixel((0, 0)) == (127, 127, 127)
    palette = Image.new("P", (1, 1))
    assert decode_image(encoded(palette, transparency=0), (1, 2, 3)).getpixel((0, 0)) == (1, 2, 3)
    grey = Image.new("LA", (1, 1), (0, 0))
    assert decode_image(encoded(grey), (9, 9, 9)).getpixel((0, 0)) == (9, 9, 9)


@pytest.mark.parametrize(
    "data", [b"", b"not an image", encoded(pattern(64, 64))[:-200], encoded(pattern(64, 64), "JPEG")[:300]]
)
def test_unreadable_images(data: bytes) -> None:
    with pytest.raises(DataError, match="not a readable image"):
        decode_image(data)


def test_damaged_inside() -> None:
    data = bytearray(encoded(pattern(64, 64)))
    data[len(data) // 2] ^= 255
    with pytest.raises(DataError, match="not a readable image"):
        decode_image(bytes(data))


def test_deep_colours_keep_their_high_byte() -> None:
    """Pillow reads a colour PNG of 16 bits as one of 8; nothing is clipped, so it is taken."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    values = (np.arange(4 * 5 * 3) * 1091).astype(">u2").reshape(4, 5, 3)
    header = struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 0)  # 16 bits, red green blue
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    found = np.asarray(decode_image(b"\x89PNG\r\n\x1a\n" + b"".join(parts)))
    assert np.array_equal(found, values >> 8)


def test_deep_images_are_refused_not_clipped() -> None:
    deep = Image.fromarray((np.arange(16, dtype=np.uint16) * 4000).reshape(4, 4))
    with pytest.raises(DataError, match="more than 8 bits"):
        decode_image(encoded(deep))


def test_channel_sums_match_numpy_and_merge_exactly() -> None:
    pixels = torch.randint(0, 256, (50, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    whole = ChannelSums.of(pixels)
    parts = [ChannelSums.from_json(ChannelSums.of(pixels[i : i + 7]).to_json()) for i in range(0, 50, 7)]
    assert ChannelSums.merge(parts) == whole == ChannelSums.merge(parts[::-1])
    statistics = whole.mean_and_std()
    values = pixels.double().transpose(0, 1).reshape(3, -1).numpy()
    np.testing.assert_allclose(statistics["mean"], values.mean(1), rtol=1e-14)
    np.testing.assert_allclose(statistics["std"], values.std(1), rtol=1e-12)
    latents = torch.randn(50, 4, 2, 2).half()
    np.testing.assert_allclose(
        ChannelSums.of(latents).mean_and_std()["std"], latents.double().transpose(0, 1).reshape(4, -1).numpy().std(1)
    )
    assert ChannelSums.of(torch.full((4, 1, 2), 7, dtype=torch.uint8)).mean_and_std() == {"mean": [7.0], "std": [0.0]}


def test_images_below_a_folder_are_of_every_format_that_encode_reads(tmp_path: Path) -> None:
    (tmp_path / "deep.png").mkdir()  # a folder is no image, whatever it is called
    for name in ("b.gif", "a.BMP", "notes.txt", "deep.png/c.webp"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in images_below(tmp_path)] == ["a.BMP", "b.gif"]
    assert [path.name for path in images_below(tmp_path, deep=True)] == ["a.BMP", "b.gif", "c.webp"]
    for empty in (tmp_path / "none", tmp_path / "notes.txt"):
        with pytest.raises(UserError, match="holds no image"):
            images_below(empty)
