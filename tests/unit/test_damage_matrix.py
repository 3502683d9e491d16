"""Every format that is read, damaged in every way: each ends in a sentence that names the file, or reads on.

Where a format carries no checksum, a flipped bit of a value cannot be known; where files have no numbers, a missing one
cannot. Those cells say so below, all others must refuse.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shard_files import DAMAGES, latents

from hpc_gen.data.archive_ends import bytes_after_zip, first_byte_after_tar
from hpc_gen.data.index import LABELS
from hpc_gen.data.table import Table
from hpc_gen.data.write import write_table
from hpc_gen.runtime.errors import DataError, UserError
from shard_tools.convert import Wish, convert, open_rows
from shard_tools.sources import open_source

Read = Callable[[], object]
Made = tuple[Path, Read]  # the file to be damaged, and how all of the data is read


def say(line: str) -> None:
    pass


def whole_table(folder: Path) -> None:
    """Every row of every column, then the bytes."""
    table = Table.open(folder)
    table.read(np.arange(table.rows), tuple(table.index.columns))
    problems = table.verify()
    if problems:
        raise DataError(problems[0])


def shards(folder: Path, layout: str, suffix: str, indexed: bool) -> Made:
    made = latents(24)
    columns = {"latents": made["moments"], LABELS: made[LABELS]} if layout == "safetensors" else made
    write_table(folder / "t", columns, shard_rows=8, num_classes=4, layout=layout)
    if not indexed:
        (folder / "t" / "index.json").unlink()
    return folder / "t" / f"shard_00001{suffix}", lambda: whole_table(folder / "t")


def row_files(folder: Path, layout: str, indexed: bool) -> Made:
    write_table(folder / "s", latents(8), shard_rows=8, num_classes=4)
    convert(open_rows(folder / "s"), folder / "t", Wish(layout=layout), say)  # type: ignore[arg-type]
    if not indexed:
        (folder / "t" / "index.json").unlink()
        for facts in folder.glob("t/facts/*"):
            facts.unlink()
        for each in [path for path in (folder / "t").iterdir() if path.name == "facts"]:
            each.rmdir()
    path = sorted((folder / "t").rglob(f"*.{layout}"))[3]
    return path, lambda: whole_table(folder / "t")


def converted(source: Path, target: Path) -> None:
    convert(open_rows(source, feature_batch=2) if source.is_dir() else open_rows(source), target, Wish(), say)


def features(folder: Path, uvit: bool, label: int = 1) -> Made:
    (folder / "f").mkdir()
    for number in range(8):
        z = np.random.default_rng(number // 4).standard_normal((4, 8, 8)).astype(np.float32)
        if uvit:
            pair = np.empty(2, dtype=object)
            pair[:] = [z, label]
            np.save(folder / "f" / f"{number}.npy", pair, allow_pickle=True)
        else:
            np.savez(folder / "f" / f"{number}.npy.npz", z=z, label=np.int64(label))
    return folder / "f" / f"3.{'npy' if uvit else 'npy.npz'}", lambda: converted(folder / "f", folder / "out")


def picture(number: int, size: int = 24) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def edm_zip(folder: Path, label: int = 1) -> Path:
    path = folder / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(4):
            archive.writestr(f"00000/img{number:08d}.png", picture(number))
        archive.writestr("dataset.json", json.dumps({"labels": [[f"00000/img{n:08d}.png", label] for n in range(4)]}))
    return path


def tar(path: Path, name: str = "c{}/{}.png", more: dict[str, bytes] | None = None) -> Path:
    with tarfile.open(path, "w") as archive:
        members = {name.format(number % 2, number): picture(number) for number in range(6)} | (more or {})
        for inner, data in members.items():
            info = tarfile.TarInfo(inner)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def parquet(path: Path, label: int = 1) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="the package pyarrow is not installed")
    writer = pytest.importorskip("pyarrow.parquet", reason="the package pyarrow is not installed")
    images = [{"bytes": picture(number), "path": f"{number}.png"} for number in range(6)]
    writer.write_table(pyarrow.table({"image": images, "label": [label] * 6}), path, compression="NONE")
    return path


def images(folder: Path) -> Path:
    for number in range(6):
        path = folder / "images" / f"c{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    return folder / "images" / "c0" / "2.png"


def every_image(kind: str, path: Path) -> None:
    for split in open_source(kind, path).splits.values():  # type: ignore[arg-type]
        for number in range(len(split)):
            try:
                split.item(number)[0].load()
            except DataError as error:  # the stage puts the image's id before it
                raise DataError(f"{split.ids[number]}: {error}") from error


def source(kind: str, path: Path, of: Path | None = None) -> Made:
    return path, lambda: every_image(kind, of or path)


FORMATS: dict[str, Callable[[Path], Made]] = {
    **{
        f"{layout}{', no index' * (not indexed)}": lambda f, a=(layout, suffix, indexed): shards(f, *a)
        for layout, suffix in (("ptshard", ".pt"), ("safetensors", ".safetensors"), ("webdataset", ".tar"))
        for indexed in (True, False)
    },
    **{
        f"{layout}{', no index' * (not indexed)}": lambda f, a=(layout, indexed): row_files(f, *a)
        for layout in ("pt", "npz")
        for indexed in (True, False)
    },
    "features of DiM": lambda f: features(f, uvit=False),
    "features of U-ViT": lambda f: features(f, uvit=True),
    "EDM zip, converted": lambda f: (edm_zip(f), lambda: converted(f / "set.zip", f / "out")),
    "EDM zip, images": lambda f: source("edm_zip", edm_zip(f)),
    "tar, images": lambda f: source("tar", tar(f / "set.tar")),
    "parquet, images": lambda f: source("parquet", parquet(f / "set.parquet")),
    "folder, images": lambda f: source("folder", images(f), f / "images"),
}
# format -> what nothing in it can tell. Bits may also be flipped in padding, which is no damage: flips are asked below.
UNKNOWABLE = {
    "pt, no index": {"missing"},  # files are named as the images were
    "npz, no index": {"missing"},
    "folder, images": {"missing", "oversized"},  # cameras put their own things behind a JPEG
}


def ends_in_a_sentence(path: Path, read: Read, is_missing: bool = False) -> bool:
    """Whether reading is refused, which must be in one line that names the file, or the image in it."""
    try:
        read()
    except (DataError, UserError) as error:
        sentence = str(error)
        named = path.name in sentence or path.stem in sentence or (is_missing and str(path.parent) in sentence)
        assert named or re.search(r"img0+\d\.png|c\d/\d\.png|set/\d+/\d", sentence), sentence
        assert "\n" not in sentence and len(sentence) < 700
        return True
    return False


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_of_any_format_ends_in_a_sentence(tmp_path: Path, name: str, damage: str) -> None:
    path, read = FORMATS[name](tmp_path)
    DAMAGES[damage](path)
    refused = ends_in_a_sentence(path, read, damage == "missing")
    assert refused or damage == "bit-flipped" or damage in UNKNOWABLE.get(name, set()), "read as if nothing were"


@pytest.mark.parametrize("name", FORMATS)
def test_random_damage_does_no_more_than_to_refuse(tmp_path: Path, name: str) -> None:
    """Flips near both ends, where headers and directories stand, flips anywhere, and cuts anywhere."""
    path, read = FORMATS[name](tmp_path)
    good = path.read_bytes()
    random = np.random.default_rng(20)
    for number in range(16):
        data = bytearray(good)
        near = int(random.integers(0, min(len(good), 800)))
        at = (near, len(good) - 1 - near, int(random.integers(0, len(good))))[number % 3]
        data[at] ^= 1 << int(random.integers(0, 8))
        path.unlink()  # what is mapped must not change under its reader
        path.write_bytes(bytes(data) if number % 4 else bytes(data[:at]))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        ends_in_a_sentence(path, read)


@pytest.mark.parametrize("name", FORMATS)
def test_the_undamaged_file_is_read(tmp_path: Path, name: str) -> None:
    FORMATS[name](tmp_path)[1]()


@pytest.mark.parametrize("name", ["ptshard", "safetensors", "webdataset", "pt", "npz"])
def test_with_an_index_no_flipped_bit_goes_unnoticed(tmp_path: Path, name: str) -> None:
    path, read = FORMATS[name](tmp_path)
    good = path.read_bytes()
    for at in np.random.default_rng(0).integers(0, 8 * len(good), 24).tolist():
        data = bytearray(good)
        data[at // 8] ^= 1 << at % 8
        path.unlink()  # a shard that is mapped must not change under its reader
        path.write_bytes(bytes(data))
        with pytest.raises(DataError, match=path.name):
            read()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda f: features(f, uvit=False, label=-1)[1], r"0\.npy\.npz has the label -1; class numbers begin at 0"),
        (lambda f: features(f, uvit=True, label=-2)[1], r"0\.npy has the label -2; class numbers begin at 0"),
        (lambda f: source("edm_zip", edm_zip(f, label=-1))[1], "has the label -1; class numbers begin at 0"),
        (
            lambda f: source("parquet", parquet(f / "x.parquet", label=-1))[1],
            r"x\.parquet, column 'label' holds values that are no class numbers",
        ),
        (lambda f: source("tar", tar(f / "x.tar", "{1}.png", {"0.cls": b"-1"}))[1], "0.cls holds '-1', not the number"),
    ],
    ids=["DiM", "U-ViT", "EDM", "Parquet", "tar"],
)
def test_labels_that_are_no_class_numbers(tmp_path: Path, make: Callable[[Path], Read], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        make(tmp_path)()


@pytest.mark.parametrize("uvit", [False, True], ids=["DiM", "U-ViT"])
def test_features_that_are_not_finite_or_too_large_for_halves_are_not_converted(tmp_path: Path, uvit: bool) -> None:
    path, read = features(tmp_path, uvit)
    other = path.with_name(path.name.replace("3", "7"))
    good = other.read_bytes()
    for value, wish in ((np.float32("nan"), Wish()), (np.float32(1e6), Wish(half=True))):
        place = good.index(np.random.default_rng(1).standard_normal((4, 8, 8)).astype(np.float32).tobytes()[:64])
        data = bytearray(good)
        data[place : place + 4] = value.tobytes()
        if uvit:
            other.write_bytes(bytes(data))
        else:
            z = np.random.default_rng(1).standard_normal((4, 8, 8)).astype(np.float32)
            z[0, 0, 0] = value
            np.savez(other, z=z, label=np.int64(1))
        with pytest.raises(DataError, match="row 3 has values in column 'moments_flip' that are not finite; repair"):
            convert(open_rows(tmp_path / "f", feature_batch=4), tmp_path / f"out{wish.half}", wish, say)


def test_an_archive_whose_directory_points_elsewhere_is_named(tmp_path: Path) -> None:
    """The short way of reading rows (data/row_files.py) must not trust an offset."""
    path, read = FORMATS["pt, no index"](tmp_path)
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\1\2", 0, data.rindex(b"data/0") + 1)
    data[entry + 42 : entry + 46] = (len(data) - 40).to_bytes(4, "little")
    path.write_bytes(bytes(data))
    assert ends_in_a_sentence(path, read)


def test_tars_put_together_are_refused_where_the_second_would_be_lost(tmp_path: Path) -> None:
    for layout in ("images", "arrays"):
        folder = tmp_path / layout
        if layout == "images":
            folder.mkdir()
            one, two = tar(folder / "a.tar"), tar(folder / "b.tar")
        else:
            write_table(folder, latents(16), shard_rows=8, num_classes=4, layout="webdataset")
            one, two = sorted(folder.glob("*.tar"))
            (folder / "index.json").unlink()
        one.write_bytes(one.read_bytes() + two.read_bytes())
        with pytest.raises(DataError, match=rf"{one.name} has its end mark at byte [\d,]+ and more at byte [\d,]+"):
            every_image("tar", one) if layout == "images" else Table.open(folder)


def numbered(folder: Path, names: list[str]) -> Path:
    folder.mkdir()
    for name in names:
        columns = latents(4)
        torch.save({"moments": columns["moments"], LABELS: columns[LABELS]}, folder / name)
    return folder


def test_a_gap_in_the_numbers_of_shards_is_a_missing_shard(tmp_path: Path) -> None:
    three = [f"shard_{number:05d}.pt" for number in range(4) if number != 2]
    with pytest.raises(
        DataError, match=r"from shard_00000.pt to shard_00003.pt, but none with the number 2; restore it"
    ):
        Table.open(numbered(tmp_path / "a", three))
    ranks = [
        f"latents_rank{rank:02d}_shard{number:03d}.pt" for rank in (0, 1) for number in range(3) if rank + number != 2
    ]
    with pytest.raises(
        DataError, match=r"rank01_shard000.pt to latents_rank01_shard002.pt, but none with the number 1"
    ):
        Table.open(numbered(tmp_path / "b", ranks))
    for number, names in enumerate(
        (
            ["a_2019.pt", "a_2023.pt"],
            ["x1.pt", "x2.pt", "x3.pt"],
            ["part7.pt"],
            ["n01440764.pt", "n01443537.pt"],
            ["all.pt"],
        )
    ):
        assert Table.open(numbered(tmp_path / f"fine{number}", names)).rows == 4 * len(names)


def test_what_follows_the_end_of_a_zip_or_tar_is_counted() -> None:
    for comment in (b"", b"made by hand", b"PK\5\6 in a comment" + bytes(30)):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("a", b"data")
            archive.comment = comment
        if not comment.startswith(b"PK"):  # a comment that looks like an end: zipfile itself reads that one
            assert bytes_after_zip(stream) == 0
            assert bytes_after_zip(io.BytesIO(stream.getvalue() + b"12345")) == 5
    assert bytes_after_zip(io.BytesIO(b"no zip")) == 0
    blocks = bytes(3 * 2**20)
    assert first_byte_after_tar(io.BytesIO(blocks), 512) is None
    assert first_byte_after_tar(io.BytesIO(blocks + b"\0\0x"), 512) == 3 * 2**20 + 2
    assert first_byte_after_tar(io.BytesIO(b"\0\0x\0"), 1) == 2
