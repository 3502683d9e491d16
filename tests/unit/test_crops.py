"""Crops by name. Byte parity is held by the goldens center_crop, image_ops and image_prep, in tests/parity."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from hpc_gen.config import loader
from hpc_gen.config.errors import ConfigError
from hpc_gen.data.crops import CROPS, crop, middle, short_side
from hpc_gen.data.images import center_crop
from hpc_gen.runtime.errors import UserError

TEXT = """\
name: toy
method: {name: energy}
data: {table: t}
encode: {source: folder, source_path: images, image_size: 64, validation: false}
"""


def pattern(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x % 251, y % 251, (x * y) % 251], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("name", CROPS)
@pytest.mark.parametrize("size", [(100, 75), (33, 140), (64, 64), (20, 25)])
def test_every_crop_has_the_size_asked(name: str, size: tuple[int, int]) -> None:
    assert crop(name, pattern(*size), 32).size == (32, 32)


def test_adm_is_the_one_of_before_and_an_unknown_name_has_a_neighbour() -> None:
    image = pattern(100, 75)
    assert crop("adm", image, 32).tobytes() == center_crop(image, 32).tobytes()
    with pytest.raises(UserError, match=r"unknown crop 'edm_centre'.*did you mean 'edm_center'"):
        crop("edm_centre", image, 32)


def test_the_shorter_side_is_scaled_and_the_middle_cut() -> None:
    scaled = short_side(pattern(420, 300), 224, Image.Resampling.BICUBIC)
    assert scaled.size == (313, 224)  # floor(224 * 420 / 300)
    assert short_side(pattern(300, 420), 224, Image.Resampling.BICUBIC).size == (224, 313)
    cut = np.asarray(middle(pattern(37, 32), 32))
    assert cut[0, :, 0].tolist() == list(range(2, 34))  # (37 - 32) / 2 = 2.5, rounded to even
    probe = crop("short_bicubic", pattern(420, 300), 224, 256)
    assert probe.size == (224, 224) and probe.tobytes() != crop("short_bicubic", pattern(420, 300), 224).tobytes()


def test_edm_cuts_a_square_before_it_scales_or_squeezes_the_whole() -> None:
    square = np.asarray(crop("edm_center", pattern(41, 32), 32))
    assert square[0, :, 0].tolist() == list(range(4, 36))  # nothing to scale: (41 - 32) // 2 = 4
    image = pattern(32, 32)
    assert crop("edm_stretch", image, 32).tobytes() == image.tobytes()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["encode.crop=edm"], "did you mean"),
        (["encode.short_side=80"], "'encode.short_side' needs 'encode.crop' short_bicubic or short_bilinear"),
        (["encode.crop=short_bicubic", "encode.short_side=32"], "= 32 is smaller than the crop of 64"),
        (
            ["encode.source=tar", "encode.source_path=null"],
            "'encode.source' = 'tar' needs 'encode.source_path', the file",
        ),
        (["encode.decode=dalli"], "did you mean 'dali'"),
    ],
)
def test_keys_that_do_not_fit(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loader.loads(TEXT, overrides, "toy.yaml")
    assert sentence in str(caught.value)


def test_experiments_without_the_new_keys_keep_their_identity() -> None:
    plain = loader.loads(TEXT, [], "toy.yaml")
    for override in ("encode.crop=adm", "encode.row_ids=true", "encode.decode=dali"):
        assert loader.loads(TEXT, [override], "toy.yaml").identity != plain.identity
    assert loader.loads(TEXT, ["encode.crop=null", "encode.decode=null"], "toy.yaml").identity == plain.identity
