"""DALI and Pillow decode the same; whatever DALI does not read is Pillow's to judge."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from PIL import Image

from hpc_gen.data import decode
from hpc_gen.runtime.errors import DataError, UserError


def photograph(width: int, height: int) -> Image.Image:
    random = np.random.default_rng(width)
    wave = np.sin(np.linspace(0, 9, width)[None, :, None] + np.linspace(0, 5, height)[:, None, None] + np.arange(3))
    return Image.fromarray((127 + 90 * wave + random.normal(0, 9, (height, width, 3))).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def dali() -> decode.ImageDecoder:
    pytest.importorskip("nvidia.dali", reason="the package DALI is not installed")
    return decode.build("dali", threads=2)


def pixels(found: list[Image.Image | DataError]) -> list[np.ndarray]:
    assert all(isinstance(each, Image.Image) for each in found), found
    return [np.asarray(each) for each in found]


def test_jpegs_of_all_kinds_are_equal_to_the_byte(dali: decode.ImageDecoder) -> None:
    data = [
        encoded(photograph(100, 75)),
        encoded(photograph(321, 200), quality=95),
        encoded(photograph(64, 64).convert("L")),
        encoded(photograph(133, 91), subsampling=0),
        encoded(photograph(50, 40), progressive=True),
        encoded(photograph(51, 40).convert("CMYK")),
        encoded(Image.new("RGBA", (9, 9), (255, 0, 0, 0)), "PNG"),
    ]
    ours = pixels(decode.build("pillow", (1, 2, 3)).decode(data))
    theirs = pixels(decode.build("dali", (1, 2, 3), threads=2).decode(data))
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert theirs[-1][0, 0].tolist() == [1, 2, 3]  # transparency is Pillow's


def test_orientation_is_ignored_by_both(dali: decode.ImageDecoder) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = [encoded(photograph(40, 20), exif=exif.tobytes())]
    assert pixels(dali.decode(data))[0].shape == pixels(decode.build("pillow").decode(data))[0].shape == (20, 40, 3)


def test_a_bad_image_costs_no_other_one(dali: decode.ImageDecoder) -> None:
    good = encoded(photograph(100, 75))
    broken = [good[: len(good) // 3], b"\xff\xd8 no image", b"", b"text"]
    found = dali.decode([good, *broken, good])
    assert [isinstance(each, Image.Image) for each in found] == [True, False, False, False, False, True]
    said = decode.build("pillow").decode(broken)
    assert [str(each) for each in found[1:5]] == [str(each) for each in said]
    assert "not a readable image" in str(found[1])
    assert len(pixels(dali.decode([good] * 9))) == 9  # the pipeline is built anew, also for more at once


def test_without_the_package_the_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match=r"no package nvidia.dali; run: pip install 'hpc-gen\[dali\]'"):
        decode.build("dali")
