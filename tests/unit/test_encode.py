"""The encode stage: a table does not depend on tasks, order or interruption; bad input is counted or refused."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hpc_gen.config.experiment import EncodeConfig
from hpc_gen.data.images import center_crop, to_pixels
from hpc_gen.data.index import TableIndex
from hpc_gen.data.table import Table
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.stages.units import Ledger, Unit
from shard_tools.encode import EncodeWorker
from shard_tools.sources import open_source

TABLES = {"train": "tables/t", "validation": "tables/v"}
COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


def make_images(root: Path, train: int = 10, validation: int = 4) -> None:
    """`train` images of each of three classes; image i is 12 pixels wide, its colour darkened by i."""
    for split, count in (("train", train), ("validation", validation)):
        for name, colour in COLOURS.items():
            folder = root / "images" / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                Image.new("RGB", (12, 16), tuple(max(0, c - 5 * i) for c in colour)).save(folder / f"{i:02d}.png")


def make_worker(workspace: Path, tables: dict[str, str] | None = None, **changes: object) -> EncodeWorker:
    keys = {"source": "folder", "source_path": "images", "image_size": 8, "shard_rows": 7} | changes
    return EncodeWorker(EncodeConfig.model_validate(keys), workspace, TABLES if tables is None else tables)


def encode(workspace: Path, worker: EncodeWorker, units: list[Unit] | None = None, ledger: str = "run") -> list[str]:
    """What the stage runner does with a worker, in short; returns the names of the units done."""
    book = Ledger(workspace / "ledger" / ledger, workspace)
    done = []
    for unit in book.missing(worker.units() if units is None else units, worker.fingerprint()):
        staging = commit.make_folder(commit.staging_path(workspace / "staging" / unit.name))
        try:
            book.commit(unit, worker.do(unit, staging, lambda: None), worker.fingerprint())
        finally:
            commit.remove_tree(staging)
        done.append(unit.name)
    if units is None:
        worker.finish()
    return done


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_images_become_a_table(tmp_path: Path) -> None:
    make_images(tmp_path)
    worker = make_worker(tmp_path)
    assert [unit.name for unit in worker.units()] == [
        *(f"train-{i:05d}" for i in range(5)),
        "validation-00000",
        "validation-00001",
    ]
    encode(tmp_path, worker)
    table = Table.open(tmp_path / "tables/t", verify=True)
    assert table.shard_rows == [7, 7, 7, 7, 2] and table.index.num_classes == 3
    assert table.index.class_names == ("blue", "green", "red")
    assert Table.open(tmp_path / "tables/v", verify=True).rows == 12
    batch = table.read(np.arange(30), ("pixels", "labels"))
    assert batch["pixels"].shape == (30, 3, 8, 8) and batch["pixels"].dtype == torch.uint8
    split = open_source("folder", tmp_path / "images").splits["train"]
    expected = sorted(
        (label, to_pixels(center_crop(image, 8)).numpy().tobytes()) for image, label, _ in map(split.item, range(30))
    )
    assert expected == sorted(
        (int(y), x.numpy().tobytes()) for x, y in zip(batch["pixels"], batch["labels"], strict=True)
    )
    assert batch["labels"].tolist() != sorted(batch["labels"].tolist()), "rows are class after class"


def test_index_holds_what_it_must(tmp_path: Path) -> None:
    make_images(tmp_path)
    encode(tmp_path, make_worker(tmp_path))
    index = TableIndex.read(tmp_path / "tables/t")
    pixels = Table.open(tmp_path / "tables/t").read(np.arange(30), ("pixels",))["pixels"].double().numpy()
    statistics = index.statistics
    np.testing.assert_allclose(statistics["columns"]["pixels"]["mean"], pixels.mean((0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(statistics["columns"]["pixels"]["std"], pixels.std((0, 2, 3)), rtol=1e-12)
    assert statistics["label_histogram"] == {"0": 10, "1": 10, "2": 10} and statistics["skipped"] == {}
    assert index.tokenizer == {"name": "identity"} and index.bad_images == ()
    assert {key: index.recipe[key] for key in ("source", "split", "image_size", "channels", "shard_rows")} == {
        "source": "folder", "split": "train", "image_size": 8, "channels": 3, "shard_rows": 7,
    }  # fmt: skip
    assert str(tmp_path) not in json.dumps(index.to_json())
    for shard in index.shards:
        assert commit.sha256_file(tmp_path / "tables/t" / shard.file) == shard.sha256


@pytest.mark.parametrize("order", ["reversed", "two tasks", "interrupted", "twice"])
def test_the_table_does_not_depend_on_how_it_was_made(tmp_path: Path, order: str) -> None:
    for name in ("a", "b"):
        make_images(tmp_path / name)
    encode(tmp_path / "a", make_worker(tmp_path / "a"))
    there = tmp_path / "b"
    units = make_worker(there).units()
    if order == "reversed":
        encode(there, make_worker(there), units[::-1])
    elif order == "two tasks":
        encode(there, make_worker(there), units[1::2])
        encode(there, make_worker(there), units[::2])
    elif order == "interrupted":
        encode(there, make_worker(there), units[:3])
    else:
        encode(there, make_worker(there))
    encode(there, make_worker(there))
    assert files(there / "tables") == files(tmp_path / "a" / "tables")
    assert Table.open(there / "tables/t").identity == Table.open(tmp_path / "a" / "tables/t").identity


def test_done_work_is_not_repeated(tmp_path: Path) -> None:
    make_images(tmp_path)
    assert len(encode(tmp_path, make_worker(tmp_path))) == 7
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "tables").rglob("*")}
    assert encode(tmp_path, make_worker(tmp_path)) == []
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "tables").rglob("*")} == before
    (tmp_path / "tables/t/shard_00002.pt").unlink()
    assert encode(tmp_path, make_worker(tmp_path)) == ["train-00002"]
    Table.open(tmp_path / "tables/t", verify=True)


def test_another_run_takes_over_whole_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two experiments may share a table: the second verifies and records, and encodes only what is damaged."""
    make_images(tmp_path)
    encode(tmp_path, make_worker(tmp_path))
    expected = files(tmp_path / "tables")
    damaged = tmp_path / "tables/t/shard_00001.pt"
    damaged.write_bytes(expected["t/shard_00001.pt"][:-1] + b"?")
    (tmp_path / "tables/t/facts/shard_00003.json").write_text("{}")
    encoded: list[int] = []
    real = EncodeWorker._encode
    monkeypatch.setattr(EncodeWorker, "_encode", lambda self, o, s, p: encoded.append(s) or real(self, o, s, p))
    assert len(encode(tmp_path, make_worker(tmp_path), ledger="second run")) == 7
    assert encoded == [1, 3]
    assert files(tmp_path / "tables") == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 4}, "image_size = 8, asked is 4"),
        ({"channels": 1}, "channels = 3, asked is 1"),
        ({"shard_rows": 8}, "shard_rows = 7, asked is 8"),
        ({"limit": 5}, "limit = None, asked is 5"),
        ({"classes": ["red"]}, r"classes = \[0, 1, 2\], asked is \[2\]"),
        ({"background": [0, 0, 0]}, r"background = \[255, 255, 255\], asked is \[0, 0, 0\]"),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_another_recipe_is_refused_by_field(tmp_path: Path, changes: dict, message: str, whole: bool) -> None:
    make_images(tmp_path)
    worker = make_worker(tmp_path)
    encode(tmp_path, worker, None if whole else worker.units()[:2])
    before = files(tmp_path / "tables")
    with pytest.raises(UserError, match=rf"table .*tables/t was encoded with {message}; choose another data\.table"):
        make_worker(tmp_path, **changes).units()
    assert files(tmp_path / "tables") == before


def test_changed_images_are_another_recipe(tmp_path: Path) -> None:
    make_images(tmp_path)
    encode(tmp_path, make_worker(tmp_path))
    make_images(tmp_path, train=11)
    with pytest.raises(UserError, match="source_content"):
        make_worker(tmp_path).units()


def test_the_fingerprint_covers_recipe_and_table_but_not_tolerance(tmp_path: Path) -> None:
    make_images(tmp_path)
    prints = {
        make_worker(tmp_path).fingerprint(),
        make_worker(tmp_path, image_size=4).fingerprint(),
        make_worker(tmp_path, tables={"train": "tables/other"}).fingerprint(),
    }
    assert len(prints) == 3
    assert make_worker(tmp_path, max_bad_fraction=0.5, tasks=2).fingerprint() == make_worker(tmp_path).fingerprint()


def spoil(root: Path, names: list[str]) -> None:
    for name in names:
        (root / "images" / name).write_bytes(b"not an image")


def test_bad_images_are_counted_and_listed(tmp_path: Path) -> None:
    make_images(tmp_path)
    spoil(tmp_path, ["train/red/03.png", "train/blue/00.png", "validation/green/01.png"])
    encode(tmp_path, make_worker(tmp_path, max_bad_fraction=0.1))
    index = TableIndex.read(tmp_path / "tables/t")
    assert index.rows == 28 and index.statistics["skipped"] == {"unreadable": 2}
    assert sorted(line.split(":")[0] for line in index.bad_images) == ["train/blue/00.png", "train/red/03.png"]
    assert all("not a readable image" in line for line in index.bad_images)
    assert index.statistics["label_histogram"] == {"0": 9, "1": 10, "2": 9}
    assert TableIndex.read(tmp_path / "tables/v").rows == 11
    Table.open(tmp_path / "tables/t", verify=True)


def test_too_many_bad_images_stop_the_stage(tmp_path: Path) -> None:
    make_images(tmp_path)
    spoil(tmp_path, ["train/red/03.png"])
    message = (
        r"split 'train': at least 1 of 30 images cannot be read, encode\.max_bad_fraction=0 allows 0: train/red/03\.png"
    )
    with pytest.raises(DataError, match=message):
        encode(tmp_path, make_worker(tmp_path))
    assert not (tmp_path / "tables/t/index.json").exists()


def test_bad_images_spread_over_shards_are_added_up(tmp_path: Path) -> None:
    """No shard alone exceeds the share; all together do, and only `finish` can know."""
    make_images(tmp_path)
    spoil(tmp_path, [f"train/{name}/{i:02d}.png" for name in COLOURS for i in range(2)])
    worker = make_worker(tmp_path, max_bad_fraction=0.15, shard_rows=2)
    encode(tmp_path, worker, worker.units())
    with pytest.raises(DataError, match="at least 6 of 30 images cannot be read, .* allows 4"):
        worker.finish()
    assert not (tmp_path / "tables/t/index.json").exists()
    assert encode(tmp_path, make_worker(tmp_path, max_bad_fraction=0.2, shard_rows=2)) == []
    assert TableIndex.read(tmp_path / "tables/t").rows == 24


def test_a_shard_of_bad_images_only(tmp_path: Path) -> None:
    make_images(tmp_path)
    worker = make_worker(tmp_path, max_bad_fraction=1.0, shard_rows=1)
    first = worker.source.splits["train"].ids[worker.outputs["train"].order[0]]
    spoil(tmp_path, [first])
    encode(tmp_path, make_worker(tmp_path, max_bad_fraction=1.0, shard_rows=1))
    index = TableIndex.read(tmp_path / "tables/t")
    assert index.rows == 29 and index.shards[0].file == "shard_00001.pt"
    Table.open(tmp_path / "tables/t", verify=True)


def test_nothing_readable(tmp_path: Path) -> None:
    make_images(tmp_path, train=1)
    spoil(tmp_path, [f"train/{name}/00.png" for name in COLOURS])
    with pytest.raises(DataError, match="not one of 3 images could be read"):
        encode(tmp_path, make_worker(tmp_path, max_bad_fraction=1.0))


def test_no_images(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="has no class folders"):
        make_worker(tmp_path).units()
    with pytest.raises(UserError, match=r"there is no folder .*elsewhere"):
        make_worker(tmp_path, source_path="elsewhere").units()
    with pytest.raises(UserError, match="run: hpc-gen shards fetch mnist"):
        make_worker(tmp_path, source="mnist", source_path=None).units()


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    make_images(tmp_path)
    for path in sorted((tmp_path / "images/validation").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (tmp_path / "images/validation").rmdir()
    with pytest.raises(UserError, match=r"has no split 'validation' .* set encode\.validation=false"):
        make_worker(tmp_path).units()


def test_classes_and_limit(tmp_path: Path) -> None:
    make_images(tmp_path)
    encode(tmp_path, make_worker(tmp_path, classes=["red", 0], limit=9))
    table = Table.open(tmp_path / "tables/t", verify=True)
    labels = table.read(np.arange(9), ("labels",))["labels"]
    assert table.rows == 9 and set(labels.tolist()) == {0, 2}, "labels keep their original ids"
    assert table.index.num_classes == 3 and table.index.recipe["classes"] == [0, 2]
    for wanted, message in ((["rad"], r"has no class 'rad' \(did you mean 'red'\?\)"), ([3], "has no class 3")):
        with pytest.raises(UserError, match=message):
            make_worker(tmp_path, {"train": "tables/x"}, classes=wanted).units()


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_and_background(tmp_path: Path, channels: int) -> None:
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(folder / "x.png")
    encode(tmp_path, make_worker(tmp_path, {"train": "tables/t"}, channels=channels, background=[10, 10, 10]))
    pixels = Table.open(tmp_path / "tables/t").read([0], ("pixels",))["pixels"]
    assert pixels.shape == (1, channels, 8, 8) and pixels.unique().tolist() == [10]


def test_poll_stops_between_images(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    make_images(tmp_path)
    worker = make_worker(tmp_path)
    calls: list[int] = []

    def poll() -> None:
        calls.append(1)
        if len(calls) == 4:
            raise Stop

    with pytest.raises(Stop):
        worker.do(worker.units()[0], tmp_path, poll)
    assert not list(tmp_path.glob("*.pt")) and not (tmp_path / "tables").exists()


@pytest.mark.parametrize("operation", ["open_write", "write", "fsync", "rename", "mkdir"])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    """Whatever call the disk is full at: one sentence, nothing half-done, and the same table once there is room."""
    make_images(tmp_path / "a")
    encode(tmp_path / "a", make_worker(tmp_path / "a"))
    there = tmp_path / "b"
    make_images(there)
    staging = commit.make_folder(there / "staging" / "u")
    worker = make_worker(there)
    unit = worker.units()[1]
    call = {"open_write": "open", "fsync": "fsync", "write": "write", "rename": "rename", "mkdir": "mkdir"}[operation]
    real = getattr(os, call)

    def full(*args: object, **kwargs: object) -> object:
        if call == "open" and not (isinstance(args[1], int) and args[1] & os.O_CREAT):
            return real(*args, **kwargs)
        raise OSError(errno.ENOSPC, "No space left on device")

    book = Ledger(there / "ledger" / "run", there)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises((UserError, OSError), match="disk is full|No space left"):
            book.commit(unit, worker.do(unit, staging, lambda: None), worker.fingerprint())
    commit.remove_tree(staging)
    assert not list((there / "tables").rglob("*.pt")), "a shard became visible"
    assert not (there / "tables/t/index.json").exists() and book.record_of(unit.name) is None
    encode(there, make_worker(there))
    assert files(there / "tables") == files(tmp_path / "a" / "tables")


def test_finish_wants_all_units(tmp_path: Path) -> None:
    make_images(tmp_path)
    worker = make_worker(tmp_path)
    encode(tmp_path, worker, worker.units()[1:])
    with pytest.raises(
        DataError, match=r"facts/shard_00000\.json does not hold the facts of a shard .*run the stage encode again"
    ):
        worker.finish()
    encode(tmp_path, worker, worker.units()[:1])
    (tmp_path / "tables/t/shard_00001.pt").unlink()
    with pytest.raises(DataError, match=r"shard_00001\.pt is missing"):
        worker.finish()


def test_facts_of_another_recipe_are_not_merged(tmp_path: Path) -> None:
    make_images(tmp_path)
    worker = make_worker(tmp_path)
    encode(tmp_path, worker, worker.units())
    path = tmp_path / "tables/t/facts/shard_00001.json"
    facts = json.loads(path.read_text())
    facts["recipe"]["image_size"] = 9
    path.write_text(json.dumps(facts))
    with pytest.raises(DataError, match="it belongs to another recipe"):
        worker.finish()
    path.write_text("[")
    with pytest.raises(DataError, match="does not hold the facts"):
        worker.finish()


def test_images_decode_as_they_are_read(tmp_path: Path) -> None:
    """JPEG, grey PNG and palette PNG side by side, as folders in the wild are."""
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    image.save(folder / "1.jpg", quality=95)
    image.convert("L").save(folder / "2.PNG")
    image.convert("P").save(folder / "3.png")
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True)
    (folder / "4.webp").write_bytes(buffer.getvalue())
    encode(tmp_path, make_worker(tmp_path, {"train": "tables/t"}, shard_rows=100))
    assert Table.open(tmp_path / "tables/t", verify=True).rows == 4
