"""Images in tar, EDM zip and Parquet: splits, classes and ids; archives that are not what they claim."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from hpc_gen.config.experiment import EncodeConfig
from hpc_gen.data.index import ROW_ID
from hpc_gen.data.table import Table
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.stages.units import Ledger
from shard_tools.encode import EncodeWorker
from shard_tools.sources import open_source

pyarrow = pytest.importorskip("pyarrow", reason="the package pyarrow is not installed")
parquet = pytest.importorskip("pyarrow.parquet", reason="the package pyarrow is not installed")


def png(colour: tuple[int, ...], size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(buffer, "PNG")
    return buffer.getvalue()


def make_folder(folder: Path) -> None:
    for name, data in images().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def make_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def images(classes: str = "cat dog", each: int = 3, prefix: str = "") -> dict[str, bytes]:
    return {
        f"{prefix}{name}/{i}.png": png((label, i, 7)) for label, name in enumerate(classes.split()) for i in range(each)
    }


def make_zip(path: Path, labels: object = "given", each: int = 4) -> Path:
    names = [f"{i // 10:05d}/img{i:08d}.png" for i in range(each)]
    with zipfile.ZipFile(path, "w") as archive:
        for i, name in enumerate(names):
            archive.writestr(name, png((i, 5, 6)))
        given = [[name, i % 3] for i, name in enumerate(names)] if labels == "given" else labels
        archive.writestr("dataset.json", json.dumps({"labels": given}))
    return path


def make_parquet(path: Path, rows: int = 6, group: int = 4, told: bool = True, **changes: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    column = [{"bytes": png((i, 1, 2)), "path": f"{i}.png"} for i in range(rows)]
    data = {"image": column, "label": [i % 2 for i in range(rows)]} | changes
    table = pyarrow.table({name: value for name, value in data.items() if value is not None})
    if told:
        facts = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({b"huggingface": json.dumps(facts).encode()})
    parquet.write_table(table, path, row_group_size=group)
    return path


def colours(source: object, split: str = "train") -> list[tuple[int, ...]]:
    found = source.splits[split]  # type: ignore[attr-defined]
    return [found.item(i)[0].getpixel((0, 0)) for i in range(len(found))]


def test_a_tar_of_class_folders(tmp_path: Path) -> None:
    packed = make_tar(tmp_path / "a" / "set.tar", {**images(), "readme.txt": b"hello", "cat/notes.md": b"x"})
    for path in (packed, packed.parent):
        source = open_source("tar", path)
        assert source.class_names == ("cat", "dog") and list(source.splits) == ["train"]
        assert source.splits["train"].labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert source.splits["train"].ids[4] == "train/set/dog/1.png" and source.skipped == {"not an image file": 2}
        assert colours(source) == [(label, i, 7) for label in (0, 1) for i in range(3)]
    around = open_source("tar", make_tar(tmp_path / "b" / "set.tar", images(prefix="my_set/")))
    assert around.class_names == ("cat", "dog") and colours(around) == colours(source)


def test_tars_of_one_class_each_splits_and_webdataset_samples(tmp_path: Path) -> None:
    for label, name in enumerate(("n01", "n02")):
        make_tar(tmp_path / "t" / "train" / f"{name}.tar", {f"{i}.png": png((label, i, 0)) for i in range(2)})
        make_tar(tmp_path / "t" / "val" / f"{name}.tar", {f"{i}.png": png((label, i, 9)) for i in range(1)})
    source = open_source("tar", tmp_path / "t")
    assert source.class_names == ("n01", "n02")
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 4, "validation": 2}
    assert colours(source, "validation") == [(0, 0, 9), (1, 0, 9)]
    inside = make_tar(tmp_path / "i.tar", {**images(prefix="train/"), **images(each=1, prefix="validation/")})
    source = open_source("tar", inside)
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 6, "validation": 2}
    samples = {
        f"{i:06d}.{kind}": data for i in (0, 1, 2) for kind, data in (("cls", b"%d" % (2 * i)), ("png", png((i, 0, 0))))
    }
    source = open_source("tar", make_tar(tmp_path / "w.tar", samples))
    assert source.num_classes == 5 and source.splits["train"].labels.tolist() == [0, 2, 4]
    assert colours(source) == [(i, 0, 0) for i in range(3)] and not source.skipped


def damaged_tar(tmp_path: Path, how: str) -> Path:
    path = make_tar(tmp_path / "x.tar", {f"c/{i}.png": bytes(3000) for i in range(4)})
    data = path.read_bytes()
    if how == "empty":
        path.write_bytes(b"")
    elif how == "cut short":
        path.write_bytes(data[: 512 + 3072 + 512 + 1000])
    elif how == "foreign":
        path.write_bytes(b"PK\3\4" + bytes(2000))
    elif how == "bit-flipped":
        path.write_bytes(data[:3590] + b"\xff" + data[3591:])
    elif how == "compressed":
        with tarfile.open(path, "w:gz") as archive:
            archive.addfile(tarfile.TarInfo("c/0.png"))
    elif how == "no label":
        make_tar(path, {"a.png": b"x", "a.cls": b"1", "b.png": b"y"})
    elif how == "odd label":
        make_tar(path, {"a.png": b"x", "a.cls": b"cat"})
    elif how == "no images":
        make_tar(path, {"a.txt": b"x"})
    return path


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("empty", r"x.tar (cannot be read as a tar \(.*\); fetch it again|holds no file)"),
        ("cut short", r"x.tar (cannot be read as a tar|ends inside c/1.png; it is cut short)"),
        ("foreign", r"x.tar cannot be read as a tar \(.*\); fetch it again"),
        ("bit-flipped", r"x.tar is damaged at byte [\d,]+, where a header should stand; fetch it again"),
        ("compressed", r"it is compressed: unpack it to a plain .tar, which has offsets"),
        ("no label", r"x.tar: b.png has no label beside it \(.cls\), others have"),
        ("odd label", r"x.tar: a.cls holds 'cat', not the number of a class"),
        ("no images", r"x.tar holds no images; check encode.source_path"),
        ("missing", r"there is no file or folder .*missing.tar; check encode.source_path"),
    ],
)
def test_tars_that_are_not_what_they_claim(tmp_path: Path, how: str, sentence: str) -> None:
    path = damaged_tar(tmp_path, how) if how != "missing" else tmp_path / "missing.tar"
    with pytest.raises((DataError, UserError), match=sentence):
        open_source("tar", path)


def test_an_image_that_is_gone_later_is_one_bad_image(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar", images())
    source = open_source("tar", path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(DataError, match=r"x.tar: dog/2.png is cut short"):
        source.splits["train"].item(5)
    path.unlink()
    with pytest.raises(DataError, match=r"x.tar: cat/0.png cannot be read \(No such file or directory\)"):
        source.splits["train"].item(0)


def test_the_zip_of_edm(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "set.zip")
    for place in (path, tmp_path):
        source = open_source("edm_zip", place)
        assert source.class_names == ("0", "1", "2") and source.splits["train"].labels.tolist() == [0, 1, 2, 0]
        assert source.splits["train"].ids[2] == "00000/img00000002.png" and colours(source)[3] == (3, 5, 6)
    unlabelled = open_source("edm_zip", make_zip(tmp_path / "plain.zip", labels=None))
    assert unlabelled.class_names == ("all",) and unlabelled.splits["train"].labels.tolist() == [0] * 4


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda path: make_zip(path, labels=[["00000/img00000000.png", 0]]), "does not give one class number for each"),
        (lambda path: make_zip(path, labels=5), "does not give one class number for each image"),
        (lambda path: make_zip(path, labels=[[f"00000/img{i:08d}.png", -1] for i in range(4)]), "has the label -1"),
        (lambda path: path.write_bytes(b""), "set.zip cannot be read as a data set zip"),
        (lambda path: path.write_bytes(make_zip(path).read_bytes()[:-300]), "set.zip cannot be read as a data set zip"),
        (lambda path: zipfile.ZipFile(path, "w").close(), "set.zip holds no images; make it again"),
    ],
)
def test_zips_that_are_not_what_they_claim(tmp_path: Path, change: object, sentence: str) -> None:
    change(tmp_path / "set.zip")  # type: ignore[operator]
    with pytest.raises(DataError, match=sentence):
        open_source("edm_zip", tmp_path / "set.zip")


def test_a_damaged_member_of_a_zip_is_one_bad_image(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "set.zip")
    data = path.read_bytes()
    path.write_bytes(data[:60] + bytes([data[60] ^ 255]) + data[61:])
    split = open_source("edm_zip", path).splits["train"]
    with pytest.raises(DataError, match=r"img00000000.png cannot be read \(Bad CRC-32"):
        split.item(0)
    assert split.item(1)[0].getpixel((0, 0)) == (1, 5, 6)


def test_parquet(tmp_path: Path) -> None:
    make_parquet(tmp_path / "data" / "train-00000-of-00002.parquet")
    make_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", rows=3)
    make_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", rows=2)
    source = open_source("parquet", tmp_path)
    assert source.class_names == ("cat", "dog")
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 9, "validation": 2}
    assert colours(source) == [(i, 1, 2) for i in (*range(6), *range(3))]
    assert source.splits["train"].ids[5] == "train/train-00000-of-00002/1/1"
    plain = make_parquet(
        tmp_path / "bytes.parquet", told=False, image=[png((i, 0, 0)) for i in range(6)], label=[4] * 6
    )
    assert open_source("parquet", plain).num_classes == 5
    assert open_source("parquet", make_parquet(tmp_path / "u.parquet", told=False, label=None)).class_names == ("all",)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: path.write_bytes(b""), "x.parquet cannot be read as Parquet"),
        (lambda path: path.write_bytes(b"PAR1" + bytes(99)), "x.parquet cannot be read as Parquet"),
        (lambda path: path.write_bytes(make_parquet(path).read_bytes()[:-9]), "x.parquet cannot be read as Parquet"),
        (lambda path: make_parquet(path, image=None), r"x.parquet has no column of images \(it has \['label'\]"),
        (lambda path: make_parquet(path, label=["a"] * 6), "column 'label' holds values that are no class numbers"),
    ],
)
def test_parquet_files_that_are_not_what_they_claim(tmp_path: Path, make: object, sentence: str) -> None:
    make(tmp_path / "x.parquet")  # type: ignore[operator]
    with pytest.raises(DataError, match=sentence):
        open_source("parquet", tmp_path / "x.parquet")


def encode(workspace: Path, table: str, **section: object) -> Table:
    config = {"image_size": 8, "shard_rows": 4, "source_path": "images", "source": "folder"} | section
    worker = EncodeWorker(EncodeConfig.model_validate(config), workspace, {"train": table})
    book = Ledger(workspace / f"ledger-{table}", workspace)
    for unit in worker.units():
        staging = commit.make_folder(workspace / "staging" / table / unit.name)
        book.commit(unit, worker.do(unit, staging, lambda: None), worker.fingerprint())
    worker.finish()
    return Table.open(workspace / table, verify=True)


def test_the_same_images_from_every_container_make_the_same_rows(tmp_path: Path) -> None:
    make_folder(tmp_path / "images")
    make_tar(tmp_path / "images.tar", images())
    make_parquet(
        tmp_path / "images.parquet",
        image=[png((label, i, 7)) for label in (0, 1) for i in range(3)],
        label=[0, 0, 0, 1, 1, 1],
    )
    rows = {}
    for source, path in (("folder", "images"), ("tar", "images.tar"), ("parquet", "images.parquet")):
        table = encode(tmp_path, source, source=source, source_path=path, row_ids=True)
        found = table.read(range(6), ("pixels", "labels", ROW_ID))
        order = found[ROW_ID].argsort()
        rows[source] = {name: column[order] for name, column in found.items()}
        assert table.index.class_names == ("cat", "dog") and found[ROW_ID].dtype == torch.int64
    assert all(torch.equal(rows["folder"][name], each[name]) for each in rows.values() for name in each)
    assert rows["folder"][ROW_ID].tolist() == list(range(6))


def test_bad_images_are_counted_listed_and_stop_above_the_set_share(tmp_path: Path) -> None:
    bad = {**images(), "cat/1.png": png((0, 1, 7))[:40]}
    make_tar(tmp_path / "images.tar", bad)
    section = {"source": "tar", "source_path": "images.tar"}
    with pytest.raises(
        DataError, match=r"at least 1 of 6 images cannot be read, .*: train/images/cat/1.png: not a readable"
    ):
        encode(tmp_path, "strict", **section)
    for decoder in (None, "dali"):
        if decoder:
            pytest.importorskip("nvidia.dali", reason="the package DALI is not installed")
        table = encode(tmp_path, f"lenient-{decoder}", max_bad_fraction=0.2, decode=decoder, **section)
        assert table.rows == 5 and len(table.index.bad_images) == 1
        assert table.index.bad_images[0].startswith("train/images/cat/1.png: not a readable image")
        assert table.index.statistics["skipped"] == {"unreadable": 1}
