"""DALI and Pillow decode the same; whatever DALI does not read is Pillow's to judge."""

from __future__ import annotations

import io
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
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


class FakeGpu:
    """nvidia.dali with a GPU, as far as decode.py knows it; what it is asked for is kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.built: list[dict] = []
        self.decoded: list[dict] = []
        self.error: str | None = None
        fn = SimpleNamespace(
            external_source=lambda source, batch: source,
            decoders=SimpleNamespace(image=lambda source, **options: self.decoded.append(options) or source),
        )
        dali = ModuleType("nvidia.dali")
        dali.Pipeline = lambda **options: FakePipeline(self, options)  # type: ignore[attr-defined]
        dali.fn, dali.types = fn, SimpleNamespace(RGB="RGB")  # type: ignore[attr-defined]
        parent = ModuleType("nvidia")
        parent.dali = dali  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "nvidia", parent)
        monkeypatch.setitem(sys.modules, "nvidia.dali", dali)


class FakePipeline:
    def __init__(self, gpu: FakeGpu, options: dict) -> None:
        self.gpu, self.max_batch_size = gpu, options["batch_size"]
        gpu.built.append(options)

    def __enter__(self) -> FakePipeline:
        return self

    def __exit__(self, *told: object) -> None:
        pass

    def set_outputs(self, source: object) -> None:
        self.source = source

    def build(self) -> None:
        pass

    def run(self) -> tuple[SimpleNamespace]:
        if self.gpu.error is not None:
            raise RuntimeError(self.gpu.error)
        # other levels than Pillow's, so that it shows whose pixels they are
        found = [np.full((2, 3, 3), len(data) % 251, np.uint8) for data in self.source()]
        return (SimpleNamespace(as_cpu=lambda: found),)


def test_the_gpu_path_decodes_on_the_device_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    jpeg, png = encoded(photograph(100, 75)), encoded(Image.new("RGB", (9, 9), (1, 2, 3)), "PNG")
    found = pixels(decode.build("dali_gpu", threads=3, device_id=1).decode([jpeg, png]))
    assert (found[0] == len(jpeg) % 251).all() and found[1][0, 0].tolist() == [1, 2, 3]  # a PNG is Pillow's
    assert [(options["device_id"], options["num_threads"]) for options in gpu.built] == [(1, 3)]
    assert [options["device"] for options in gpu.decoded] == ["mixed"] and not gpu.decoded[0]["adjust_orientation"]


def test_an_image_that_the_gpu_cannot_read_is_pillows_but_a_gpu_that_fails_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = FakeGpu(monkeypatch)
    jpeg = encoded(photograph(100, 75))
    gpu.error = "Error in decoders.image: unsupported JPEG process"
    by_pillow = pixels(decode.build("pillow").decode([jpeg]))[0]
    assert np.array_equal(pixels(decode.build("dali_gpu").decode([jpeg, jpeg]))[0], by_pillow)
    gpu.error = "CUDA allocation failed: out of memory\nmore"
    with pytest.raises(
        UserError, match=r"^DALI failed on GPU 0 \(CUDA allocation failed: out of memory\); start again"
    ):
        decode.build("dali_gpu").decode([jpeg])


def test_the_gpu_path_is_refused_where_there_is_no_gpu() -> None:
    pytest.importorskip("nvidia.dali", reason="the package DALI is not installed")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match=r"^DALI cannot start \(.*CUDA is not available.*\); set encode.decode=pillow"):
        decode.build("dali_gpu").decode([encoded(photograph(100, 75))])


def test_without_the_package_the_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match=r"no package nvidia.dali; run: pip install 'hpc-gen\[dali\]'"):
        decode.build("dali")
