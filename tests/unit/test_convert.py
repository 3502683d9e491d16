"""Tables from tables: same rows, same identity; killed anywhere it goes on; what does not fit has a sentence."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from shard_files import content, flip_bit, killed_at, latents

from hpc_gen.data.index import LABELS, TableIndex
from hpc_gen.data.table import Table
from hpc_gen.data.write import write_table
from hpc_gen.runtime.errors import DataError, UserError
from shard_tools.convert import Wish, convert, open_rows, split
from shard_tools.stats import channel_statistics, write_statistics

LAYOUTS = ["ptshard", "webdataset", "safetensors", "pt", "npz"]
HERE: list[str] = []


def say(line: str) -> None:
    HERE.append(line)


def make_source(folder: Path, rows: int = 20) -> TableIndex:
    return write_table(folder, latents(rows), shard_rows=8, num_classes=4, recipe={"source": "test"})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_survive_every_format_and_come_back(tmp_path: Path, layout: str) -> None:
    before = make_source(tmp_path / "a")
    made = convert(open_rows(tmp_path / "a"), tmp_path / "b", Wish(layout), say)
    assert made is not None and made.layout == layout and made.rows == 20
    table = Table.open(tmp_path / "b", verify=True)
    rows = table.read(np.arange(20), ("moments", "moments_flip", LABELS))
    wanted = latents()
    if layout == "npz":  # which has no halves
        wanted |= {name: column.float() for name, column in wanted.items() if name != LABELS}
    if layout in ("pt", "npz"):
        assert sorted({shard.file.partition("/")[0] for shard in made.shards}) == [f"{n:05d}" for n in range(4)]
    else:
        assert made.identity == before.identity
        assert made.statistics["label_histogram"] == {str(label): 5 for label in range(4)}
    assert all(torch.equal(rows[name], wanted[name]) for name in wanted)
    back = convert(open_rows(tmp_path / "b"), tmp_path / "c", Wish(shard_rows=8, half=True), say)
    assert back is not None
    again = Table.open(tmp_path / "c", verify=True).read(np.arange(20), ("moments", LABELS))
    assert all(torch.equal(again[name], latents()[name]) for name in again)


def test_another_cut_a_part_of_the_columns_and_halves(tmp_path: Path) -> None:
    write_table(
        tmp_path / "a", {"latents": torch.randn(20, 3, 2, 2), LABELS: torch.arange(20)}, shard_rows=8, num_classes=20
    )
    made = convert(open_rows(tmp_path / "a"), tmp_path / "b", Wish(shard_rows=7, columns=("latents",), half=True), say)
    assert made is not None and [shard.rows for shard in made.shards] == [7, 7, 6]
    assert list(made.columns) == ["latents"] and made.columns["latents"].dtype == "float16" and made.num_classes == 0
    with pytest.raises(UserError, match="there is no column 'latent' to convert; the table has labels, latents"):
        convert(open_rows(tmp_path / "a"), tmp_path / "c", Wish(columns=("latent",)), say)
    with pytest.raises(UserError, match="layout pt has a folder per class, but there is no column 'labels'"):
        convert(open_rows(tmp_path / "a"), tmp_path / "c", Wish("pt", columns=("latents",)), say)
    assert convert(open_rows(tmp_path / "a"), tmp_path / "c", Wish(), say, dry_run=True) is None
    assert not (tmp_path / "c").exists() and "would write 20 rows in 3 shards" in HERE[-1]


@pytest.mark.parametrize("layout", ["ptshard", "webdataset", "safetensors", "npz"])
def test_killed_before_any_file_operation_it_goes_on(tmp_path: Path, layout: str) -> None:
    """Before each operation in turn: what lies there then is whole or absent, and the end is the undisturbed one."""
    write_table(tmp_path / "a", latents(3), shard_rows=2, num_classes=4)
    wish = Wish(layout, shard_rows=2)
    convert(open_rows(tmp_path / "a"), tmp_path / "undisturbed", wish, say)
    undisturbed = content(tmp_path / "undisturbed")
    operation = 0
    while True:
        target = tmp_path / f"b{operation}"
        if not killed_at(operation, lambda target=target: convert(open_rows(tmp_path / "a"), target, wish, say)):
            break
        assert not (target / "index.json").exists() or content(target) == undisturbed
        for name, data in content(target).items() if target.exists() else ():
            assert "/.t" in f"/{name}" or data == undisturbed[name], f"{name} is visible and not whole"
        convert(open_rows(tmp_path / "a"), target, wish, say)
        found = content(target)
        assert {name: data for name, data in found.items() if "/.t" not in f"/{name}"} == undisturbed
        operation += 1
    assert operation > 20, "there were as few file operations as that?"
    assert content(target) == undisturbed


def test_a_shard_that_was_damaged_meanwhile_is_written_again(tmp_path: Path) -> None:
    make_source(tmp_path / "a")
    convert(open_rows(tmp_path / "a"), tmp_path / "b", Wish("webdataset"), say)
    before = content(tmp_path / "b")
    flip_bit(tmp_path / "b" / "shard_00001.tar")
    (tmp_path / "b" / "shard_00002.tar").unlink()
    convert(open_rows(tmp_path / "a"), tmp_path / "b", Wish("webdataset"), say)
    assert content(tmp_path / "b") == before


def test_what_is_done_already_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_source(tmp_path / "a")
    for done, label in ((False, "convert to b  "), (True, "check b  ")):
        convert(open_rows(tmp_path / "a"), tmp_path / "b", Wish(), say)
        assert HERE[-1].startswith(f"{tmp_path / 'b' / 'index.json'}: done already, and whole: 20 rows in 3") == done
        assert capsys.readouterr().out.startswith(label)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    make_source(tmp_path / "a")
    make_source(tmp_path / "b")
    with pytest.raises(UserError, match="b holds another table already; name another folder, or delete it"):
        convert(open_rows(tmp_path / "a"), tmp_path / "b", Wish(), say)
    convert(open_rows(tmp_path / "a"), tmp_path / "c", Wish(), say)
    with pytest.raises(
        UserError, match=r"c holds a table that was written otherwise \(layout = 'ptshard', asked is 'npz'\)"
    ):
        convert(open_rows(tmp_path / "a"), tmp_path / "c", Wish("npz", shard_rows=8), say)
    (tmp_path / "c" / "facts" / "shard_00000.json").write_text("{")
    with pytest.raises(DataError, match="shard_00000.json holds no facts of a shard"):
        convert(open_rows(tmp_path / "a"), tmp_path / "c", Wish(), say)


def test_a_damaged_source_stops_the_conversion(tmp_path: Path) -> None:
    make_source(tmp_path / "a")
    path = tmp_path / "a" / "shard_00001.pt"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"shard_00001.pt has \d+ bytes, the index says \d+"):
        convert(open_rows(tmp_path / "a"), tmp_path / "b", Wish(), say)
    assert not (tmp_path / "b" / "index.json").exists()


def test_split_gives_every_row_to_one(tmp_path: Path) -> None:
    make_source(tmp_path / "a")
    split(open_rows(tmp_path / "a"), tmp_path / "t", tmp_path / "v", 5, Wish(shard_rows=4), say)
    train, held_out = (Table.open(tmp_path / name, verify=True) for name in "tv")
    assert (train.rows, held_out.rows) == (15, 5)
    values = [table.read(np.arange(table.rows), ("moments",))["moments"][:, 0, 0, 0] for table in (train, held_out)]
    rows = [(value.float() * 2).round().int().tolist() for value in values]  # row i holds i * 8 / 16
    assert sorted(rows[0] + rows[1]) == list(range(20)) and rows[0] == sorted(rows[0]) and rows[1] == sorted(rows[1])
    assert train.index.num_classes == 4 and train.identity != held_out.identity
    split(open_rows(tmp_path / "a"), tmp_path / "t2", tmp_path / "v2", 5, Wish(shard_rows=4), say, seed=1)
    assert Table.open(tmp_path / "v2").identity != held_out.identity
    for rows, seed, how in ((6, 0, "it has 5 rows, asked are 6"), (5, 1, "other rows of the table")):
        with pytest.raises(UserError, match=rf"v holds a table that was written otherwise \({how}\); name another"):
            split(open_rows(tmp_path / "a"), tmp_path / "t", tmp_path / "v", rows, Wish(shard_rows=4), say, seed=seed)
    with pytest.raises(UserError, match=r"t holds a table that was written otherwise \(of another table, or of one"):
        split(open_rows(tmp_path / "t2"), tmp_path / "v3", tmp_path / "t", 5, Wish(shard_rows=4), say)
    with pytest.raises(UserError, match="cannot hold out 20 of 20 rows; both tables need at least one"):
        split(open_rows(tmp_path / "a"), tmp_path / "t3", tmp_path / "v3", 20, Wish(), say)


def features(folder: Path, rows: int = 5, batch: int = 2, uvit: bool = False) -> None:
    """Files as the extraction numbers them: a batch, then the same mirrored."""
    folder.mkdir(parents=True)
    number = 0
    for begin in range(0, rows, batch):
        for sign in (1, -1):
            for row in range(begin, min(begin + batch, rows)):
                z, label = np.full((2, 2, 2), sign * (row + 1), np.float32), row % 3
                if uvit:
                    pair = np.empty(2, dtype=object)
                    pair[:] = [z, label if row % 2 else np.int64(label)]
                    np.save(folder / f"{number}.npy", pair, allow_pickle=True)
                else:
                    np.savez(folder / f"{number}.npy.npz", z=z, label=np.int64(label))
                number += 1


@pytest.mark.parametrize("uvit", [False, True], ids=["dim", "uvit"])
def test_numbered_features(tmp_path: Path, uvit: bool) -> None:
    features(tmp_path / "f", uvit=uvit)
    index = convert(open_rows(tmp_path / "f", feature_batch=2), tmp_path / "t", Wish(shard_rows=3), say)
    assert index is not None and index.num_classes == 3
    found = Table.open(tmp_path / "t", verify=True).read(np.arange(5), ("moments", "moments_flip", LABELS))
    assert found["moments"][:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5] and found[LABELS].tolist() == [0, 1, 2, 0, 1]
    assert torch.equal(found["moments_flip"], -found["moments"])
    with pytest.raises(
        DataError, match=r"file \d has the label \d, its mirror image \d has \d; they were not extracted in"
    ):
        convert(open_rows(tmp_path / "f", feature_batch=5), tmp_path / "u", Wish(), say)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda f: (f / "3.npy.npz").unlink(), "has no file 3.npy.npz, of 10; extract them again"),
        (lambda f: (f / "9.npy.npz").unlink(), "has 9 files, an odd number: the last mirrored image is missing"),
        (lambda f: (f / "3.npy.npz").write_bytes(b""), "3.npy.npz cannot be read as features"),
        (lambda f: flip_bit(f / "3.npy.npz", 0.3), "3.npy.npz cannot be read as features"),
        (lambda f: np.savez(f / "3.npy.npz", x=1), r"3.npy.npz cannot be read as features \(.*z.*\); extract it again"),
        (
            lambda f: np.savez(f / "3.npy.npz", z=np.zeros((2, 2)), label=0),
            r"3.npy.npz has moments of \[2, 2\], file 0 of",
        ),
    ],
)
def test_features_that_are_damaged(tmp_path: Path, change: object, sentence: str) -> None:
    features(tmp_path / "f")
    change(tmp_path / "f")  # type: ignore[operator]
    with pytest.raises(DataError, match=sentence):
        convert(open_rows(tmp_path / "f", feature_batch=2), tmp_path / "t", Wish(), say)


def test_a_pickle_among_features_runs_nothing(tmp_path: Path) -> None:
    features(tmp_path / "f", uvit=True)

    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    bomb = np.empty(2, dtype=object)
    bomb[:] = [Bomb(), 1]
    np.save(tmp_path / "f" / "1.npy", bomb, allow_pickle=True)
    with pytest.raises(DataError, match=r"1.npy cannot be read as features \(the first object is not an array\)"):
        convert(open_rows(tmp_path / "f", feature_batch=2), tmp_path / "t", Wish(), say)
    assert not (tmp_path / "ran").exists()


def test_the_zip_of_edm_becomes_pixels(tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(5):
            with archive.open(f"00000/img{i:08d}.png", "w") as stream:
                Image.new("RGB", (8, 8) if i < 4 else (8, 4), (i, 2, 3)).save(stream, "PNG")
        labels = [[f"00000/img{i:08d}.png", i % 2] for i in range(5)]
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    with pytest.raises(
        DataError, match="img00000004.png is 8 x 4, the first image is 8 wide; use encode.source=edm_zip"
    ):
        convert(open_rows(path), tmp_path / "t", Wish(), say)
    good = tmp_path / "good.zip"
    with zipfile.ZipFile(good, "w") as archive:
        for i in range(4):
            with archive.open(f"00000/img{i:08d}.png", "w") as stream:
                Image.new("RGB", (8, 8), (i, 2, 3)).save(stream, "PNG")
        archive.writestr("dataset.json", json.dumps({"labels": labels[:4]}))
    index = convert(open_rows(good), tmp_path / "u", Wish(), say)
    assert index is not None and index.num_classes == 2 and index.tokenizer == {"name": "identity"}
    found = Table.open(tmp_path / "u", verify=True).read(np.arange(4), ("pixels", LABELS))
    assert found["pixels"][:, 0, 0, 0].tolist() == [0, 1, 2, 3] and found[LABELS].tolist() == [0, 1, 0, 1]


def test_statistics_of_a_column(tmp_path: Path) -> None:
    values = torch.randn(30, 3, 4, 4)
    write_table(tmp_path / "a", {"latents": values, LABELS: torch.arange(30)}, shard_rows=8)
    table = Table.open(tmp_path / "a")
    found = channel_statistics(table, "latents")
    assert torch.allclose(torch.tensor(found["mean"]), values.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(torch.tensor(found["std_unbiased"]), values.std((0, 2, 3)), atol=1e-6)
    part = channel_statistics(table, "latents", rows=10)
    assert (
        part["rows"] == 10 and part["mean"] != found["mean"] and part == channel_statistics(table, "latents", rows=10)
    )
    write_statistics(tmp_path / "latents_stats.pt", found, (3, 4, 4), say)
    stored = torch.load(tmp_path / "latents_stats.pt", weights_only=True)
    assert {name: (t.shape, t.dtype) for name, t in stored.items()} == dict.fromkeys(
        ("mean", "std"), ((1, 3, 1, 1), torch.float32)
    )
    for column, sentence in (
        ("latent", "has no column 'latent'"),
        (LABELS, "is one number per row and has no channels"),
    ):
        with pytest.raises(UserError, match=sentence):
            channel_statistics(table, column)
    with pytest.raises(UserError, match=r"ends with neither .pt nor .json"):
        write_statistics(tmp_path / "x.npz", found, (3, 4, 4), say)
    write_table(tmp_path / "b", {"latents": values / 0}, shard_rows=8)
    with pytest.raises(DataError, match="column 'latents' holds values that are not finite"):
        channel_statistics(Table.open(tmp_path / "b"), "latents")


def test_a_table_is_not_converted_into_itself(tmp_path: Path) -> None:
    make_source(tmp_path / "a")
    with pytest.raises(UserError, match="is the table that is read; name another folder"):
        convert(open_rows(tmp_path / "a"), tmp_path / "b" / ".." / "a", Wish("webdataset"), say)
