"""Image files: the same bytes for the same pixels, exact round trips, damaged files named, grids."""

import numpy as np
import pytest
import torch
from PIL import Image

from hpc_gen.runtime.errors import DataError
from hpc_gen.sampling.images import captioned_grid, grid, pixel_sha256, png_bytes, read_png, write_png


def _image(seed: int = 0, size: int = 9) -> torch.Tensor:
    return torch.randint(0, 256, (3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_round_trip_is_exact_and_deterministic(tmp_path):
    image = _image()
    write_png(tmp_path / "a.png", image)
    write_png(tmp_path / "b.png", image.clone())
    assert torch.equal(read_png(tmp_path / "a.png"), image)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert b"tEXt" not in png_bytes(image) and b"tIME" not in png_bytes(image)


def test_pillow_images_are_written_alike():
    image = _image()
    assert png_bytes(Image.fromarray(image.permute(1, 2, 0).numpy())) == png_bytes(image)


@pytest.mark.parametrize("keep", [0, 10, 40, 150])
def test_truncated_files_are_named(tmp_path, keep):
    path = tmp_path / "000007.png"
    path.write_bytes(png_bytes(_image(size=16))[:keep])
    with pytest.raises(DataError, match=r"000007\.png cannot be read as an image"):
        read_png(path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(DataError, match="none.png cannot be read"):
        read_png(tmp_path / "none.png")


def test_pixel_hash_sees_pixels_and_shape_only():
    images = torch.stack([_image(0), _image(1)])
    assert pixel_sha256(images) == pixel_sha256(images.clone())
    assert pixel_sha256(images) == pixel_sha256(images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))
    assert pixel_sha256(images) != pixel_sha256(images.flip(0))
    assert pixel_sha256(images) != pixel_sha256(images.reshape(1, 6, 9, 9))


def test_grid_places_images_in_rows():
    images = torch.stack([torch.full((3, 2, 2), value, dtype=torch.uint8) for value in (10, 20, 30)])
    picture = np.asarray(grid(images, columns=2, gap=1, scale=2))
    assert picture.shape == (2 * (4 + 1) + 1, 2 * (4 + 1) + 1, 3)
    assert picture[1, 1, 0] == picture[4, 4, 0] == 10
    assert picture[1, 6, 0] == 20
    assert picture[6, 1, 0] == 30
    assert picture[6, 6, 0] == 255  # nothing there
    assert picture[0, 0, 0] == picture[5, 5, 0] == 255


def test_grid_needs_images():
    with pytest.raises(ValueError, match="a grid needs images"):
        grid(torch.zeros(0, 3, 2, 2, dtype=torch.uint8), columns=2)


def test_captioned_grid_draws_below_each_picture():
    images = torch.stack([torch.full((3, 8, 8), value, dtype=torch.uint8) for value in (10, 20, 30)])
    captions = ["class 0: cat", "class 1: a name that is far too long for one line and for two lines and for three", ""]
    picture = np.asarray(captioned_grid(images, captions, columns=2, scale=4, gap=8, cell_width=96))
    assert picture.shape[1] == 2 * (96 + 8) + 8
    for i, value in enumerate((10, 20, 30)):  # the pixels themselves, centred in their cells
        left, top = 8 + (i % 2) * 104 + (96 - 32) // 2, 8 + (i // 2) * (picture.shape[0] - 8) // 2
        assert (picture[top : top + 32, left : left + 32] == value).all()
        below = picture[top + 32 : top + 32 + 45, 8 + (i % 2) * 104 : 8 + (i % 2) * 104 + 96]
        assert (below.min() < 100) == bool(captions[i])  # ink where there is a caption, none elsewhere
    assert (picture[:, :8] == 255).all() and (picture[:, -8:] == 255).all()  # nothing runs over the edge


def test_captions_with_letters_that_the_font_lacks():
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    same = [captioned_grid(images, [text], 1).tobytes() for text in ("class 0: café", "class 0: cafe")]
    assert same[0] == same[1]


def test_captioned_grid_without_captions_is_the_grid():
    images = torch.stack([_image(0), _image(1)])
    assert captioned_grid(images, ["", ""], 2, scale=2).tobytes() == grid(images, 2, scale=2).tobytes()
    with pytest.raises(ValueError, match="2 images have 1 captions"):
        captioned_grid(images, ["a"], 2)
