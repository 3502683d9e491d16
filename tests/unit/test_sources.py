"""Image sources: labels, splits and ids, and refusal of files that are not what they claim."""

from __future__ import annotations

import gzip
import io
import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpc_gen.runtime.errors import DataError, UserError
from shard_tools.sources import MNIST_FILES, open_source, read_idx


def png(colour: tuple[int, ...], mode: str = "RGB", size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (size, size), colour).save(buffer, "PNG")
    return buffer.getvalue()


def idx(array: np.ndarray) -> bytes:
    return (
        b"\0\0\x08"
        + bytes([array.ndim])
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.astype(np.uint8).tobytes()
    )


def make_mnist(folder: Path, train: int = 20, validation: int = 6, zipped: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for (images, labels), count in zip(MNIST_FILES.values(), (train, validation), strict=True):
        pixels = np.arange(count * 28 * 28).reshape(count, 28, 28) % 251
        for name, data in ((images, idx(pixels)), (labels, idx(np.arange(count) % 10))):
            (folder / (name + ".gz" if zipped else name)).write_bytes(gzip.compress(data) if zipped else data)


def make_folder(folder: Path, split: str = "", classes: tuple[str, ...] = ("cat", "dog"), each: int = 3) -> None:
    for label, name in enumerate(classes):
        (folder / split / name).mkdir(parents=True, exist_ok=True)
        for i in range(each):
            (folder / split / name / f"{i}.png").write_bytes(png((label, i, 7)))


CATEGORIES = ("Objects", "Flags", "Component")


def make_emoji(folder: Path, bases: int = 60) -> None:
    """Every third base has two skin tones; the 'twitter' set lacks the first base."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for i in range(bases):
        has = {"has_img_google": True, "has_img_twitter": i > 0}
        tones = {t: {"image": f"{i:04x}-{t}.png", **has} for t in ("1f3fb", "1f3ff")} if i % 3 == 0 else None
        entry = {"unified": f"{i:04X}", "category": CATEGORIES[i % 3], "image": f"{i:04x}.png", **has}
        entries.append(entry | ({"skin_variations": tones} if tones else {}))
    (folder / "emoji.json").write_text(json.dumps(entries))
    for number, name in enumerate(("google", "twitter")):
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
            for i, entry in enumerate(entries):
                for drawing in (entry, *entry.get("skin_variations", {}).values()):
                    archive.writestr(drawing["image"], png((i, number, 0, 255 if i % 2 else 0), "RGBA"))


@pytest.mark.parametrize("zipped", [False, True])
def test_mnist(tmp_path: Path, zipped: bool) -> None:
    make_mnist(tmp_path, zipped=zipped)
    source = open_source("mnist", tmp_path)
    assert source.class_names == tuple("0123456789") and source.num_classes == 10
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 20, "validation": 6}
    image, label, name = source.splits["train"].item(13)
    assert (image.mode, image.size, label, name) == ("L", (28, 28), 3, "mnist/train/00013")
    assert np.array_equal(np.asarray(image), np.arange(13 * 784, 14 * 784).reshape(28, 28) % 251)


def test_content_follows_the_data_not_the_place(tmp_path: Path) -> None:
    make_mnist(tmp_path / "a")
    make_mnist(tmp_path / "b", zipped=True)
    make_mnist(tmp_path / "c", train=21)
    hashes = [open_source("mnist", tmp_path / name).content for name in "abc"]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an idx file"),
        (b"\x89PNG1234", "not an idx file"),
        (b"\0\0\x08\x03\0\0", "cut short"),
        (idx(np.zeros((2, 28, 28)))[:-1], r"1567 bytes of data for the shape \(2, 28, 28\); it is cut short"),
        (idx(np.zeros((2, 28, 28))) + b"x", "cut short"),
    ],
)
def test_odd_idx_files(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_idx(tmp_path / "f")


def test_damaged_gzip_and_disagreeing_files(tmp_path: Path) -> None:
    make_mnist(tmp_path, zipped=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    good = path.read_bytes()
    for bad in (good[: len(good) // 2], b"no gzip", good[:50] + bytes(40) + good[90:]):
        path.write_bytes(bad)
        with pytest.raises(DataError, match="cannot be unpacked"):
            open_source("mnist", tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"run: hpc-gen shards fetch mnist"):
        open_source("mnist", tmp_path)
    path.write_bytes(gzip.compress(idx(np.zeros((3, 28, 28)))))
    with pytest.raises(DataError, match=r"has shape \(3, 28, 28\) and .* \(20,\)"):
        open_source("mnist", tmp_path)


def test_label_out_of_range(tmp_path: Path) -> None:
    make_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.full(20, 10)))
    with pytest.raises(DataError, match="labels of split 'train' run from 10 to 10, it has 10 classes"):
        open_source("mnist", tmp_path)


def test_cifar10(tmp_path: Path) -> None:
    (tmp_path / "batches.meta.txt").write_text("plane\ncar\nbird\n\n")
    rng = np.random.default_rng(0)
    records = rng.integers(0, 256, (12, 3073), dtype=np.uint8)
    records[:, 0] = np.arange(12) % 3
    for number in range(5):
        (tmp_path / f"data_batch_{number + 1}.bin").write_bytes(records[2 * number : 2 * number + 2].tobytes())
    (tmp_path / "test_batch.bin").write_bytes(records[10:].tobytes())
    source = open_source("cifar10", tmp_path)
    assert source.class_names == ("plane", "car", "bird")
    assert [len(source.splits[name]) for name in ("train", "validation")] == [10, 2]
    image, label, _ = source.splits["train"].item(7)
    assert label == 1
    assert np.array_equal(np.asarray(image), records[7, 1:].reshape(3, 32, 32).transpose(1, 2, 0))
    (tmp_path / "data_batch_3.bin").write_bytes(b"x" * 3074)
    with pytest.raises(DataError, match=r"data_batch_3\.bin has 3074 bytes, not a multiple of 3073"):
        open_source("cifar10", tmp_path)
    (tmp_path / "test_batch.bin").unlink()
    with pytest.raises(UserError, match=r"test_batch\.bin; run: hpc-gen shards fetch cifar10"):
        open_source("cifar10", tmp_path)


def test_emoji_labels_split_and_background(tmp_path: Path) -> None:
    make_emoji(tmp_path)
    source = open_source("emoji", tmp_path, background=(10, 20, 30))
    assert source.class_names == ("Flags", "Objects")
    assert source.skipped == {"category Component": 40}
    assert sum(len(split) for split in source.splits.values()) == 20 * 2 * 3 + 20 * 2 - 3
    bases = {
        name: {i.split("/")[-1].split(".")[0].split("-")[0] for i in split.ids} for name, split in source.splits.items()
    }
    assert bases["train"] and bases["validation"]
    assert not bases["train"] & bases["validation"], "drawings of one base emoji lie on both sides"
    for split in source.splits.values():
        for i in range(len(split)):
            image, label, name = split.item(i)
            _, drawing_set, member = name.split("/")
            number = int(member[:4], 16)
            assert source.class_names[label] == CATEGORIES[number % 3]
            expected = (number, int(drawing_set == "twitter"), 0) if number % 2 else (10, 20, 30)
            assert image.mode == "RGB" and image.getpixel((0, 0)) == expected


def test_emoji_split_of_a_base_does_not_depend_on_the_others(tmp_path: Path) -> None:
    ids = []
    for bases in (60, 90):
        make_emoji(tmp_path / str(bases), bases)
        listing = tmp_path / str(bases) / "emoji.json"
        listing.write_text(json.dumps(json.loads(listing.read_text())[:: 1 if bases == 60 else -1]))
        ids.append(open_source("emoji", tmp_path / str(bases)).splits)
    for name in ("train", "validation"):
        assert set(ids[0][name].ids) <= set(ids[1][name].ids)


def test_emoji_damage(tmp_path: Path) -> None:
    make_emoji(tmp_path)
    archive = tmp_path / "google.zip"
    good = archive.read_bytes()
    archive.write_bytes(good[:-30])
    with pytest.raises(DataError, match=r"google\.zip cannot be read"):
        open_source("emoji", tmp_path)
    damaged = bytearray(good)
    damaged[good.index(b"IDAT") + 6] ^= 255
    archive.write_bytes(damaged)
    split = open_source("emoji", tmp_path).splits
    with pytest.raises(DataError, match=r"google\.zip: .*\.png cannot be read"):
        for part in split.values():
            for i in range(len(part)):
                part.item(i)
    archive.unlink()
    with pytest.raises(UserError, match="run: hpc-gen shards fetch emoji"):
        open_source("emoji", tmp_path)
    for text in ("[]x", "{}", '[{"category": 3}]', '["a"]', '{"a": "b"}'):
        (tmp_path / "emoji.json").write_text(text)
        with pytest.raises((DataError, UserError), match="emoji"):
            open_source("emoji", tmp_path)


def test_folder(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "dog" / "notes.txt").write_text("x")
    (tmp_path / "stray.png").write_bytes(png((1, 1, 1)))
    (tmp_path / ".cache").mkdir()
    source = open_source("folder", tmp_path)
    assert source.class_names == ("cat", "dog") and list(source.splits) == ["train"]
    assert source.skipped == {"not an image file": 1, "image outside a class folder": 1}
    split = source.splits["train"]
    assert list(split.ids) == [f"train/{c}/{i}.png" for c in ("cat", "dog") for i in range(3)]
    assert [split.item(i)[1] for i in range(6)] == [0, 0, 0, 1, 1, 1]
    assert split.item(4)[0].getpixel((0, 0)) == (1, 1, 7)


@pytest.mark.parametrize("name", ["validation", "val"])
def test_folder_with_splits(tmp_path: Path, name: str) -> None:
    make_folder(tmp_path, "train", ("b", "c"))
    make_folder(tmp_path, name, ("a", "c"), each=1)
    source = open_source("folder", tmp_path)
    assert source.class_names == ("a", "b", "c")
    assert source.splits["train"].labels.tolist() == [1, 1, 1, 2, 2, 2]
    assert source.splits["validation"].labels.tolist() == [0, 2]
    assert source.splits["validation"].ids[0] == "validation/a/0.png"


def test_folder_content_is_free_of_paths(tmp_path: Path) -> None:
    for name in ("x", "y"):
        make_folder(tmp_path / name)
    assert open_source("folder", tmp_path / "x").content == open_source("folder", tmp_path / "y").content
    (tmp_path / "y" / "cat" / "9.png").write_bytes(png((0, 0, 0)))
    assert open_source("folder", tmp_path / "x").content != open_source("folder", tmp_path / "y").content


def test_empty_and_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no class folders"):
        open_source("folder", tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(UserError, match="has no images for the split 'train'"):
        open_source("folder", tmp_path)
    with pytest.raises(UserError, match=r"there is no folder .*absent; check encode\.source_path"):
        open_source("folder", tmp_path / "absent")
    with pytest.raises(UserError, match="run: hpc-gen shards fetch mnist"):
        open_source("mnist", tmp_path / "absent")
    with pytest.raises(UserError, match=r"unknown source 'mnits' \(did you mean 'mnist'\?\)"):
        open_source("mnits", tmp_path)


def test_unreadable_file_is_an_error_of_that_image(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "cat" / "1.png").write_bytes(b"garbage")
    split = open_source("folder", tmp_path).splits["train"]
    with pytest.raises(DataError, match="not a readable image"):
        split.item(1)
    (tmp_path / "cat" / "2.png").unlink()
    with pytest.raises(DataError, match=r"2\.png cannot be read"):
        split.item(2)
