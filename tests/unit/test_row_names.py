"""From which image each row came: said by every way of making a table, in step with its rows, no part of its identity."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shard_files import DAMAGES, killed_at, latents
from typer.testing import CliRunner

from hpc_gen import cli, cli_errors
from hpc_gen.config.experiment import EncodeConfig
from hpc_gen.data.index import ROW_ID, TableIndex
from hpc_gen.data.joined import join
from hpc_gen.data.staging import stage
from hpc_gen.data.table import Table
from hpc_gen.data.write import write_table
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.stages.units import Ledger
from shard_tools.convert import Wish, convert, open_rows, split
from shard_tools.encode import EncodeWorker
from shard_tools.inspect import format_info, info, rows, shown, verify

BROKEN = ("train/a/03.png", "train/b/07.png")
SAID: list[str] = []


def colour(name: str) -> int:
    """The grey that image train/CLASS/NN.png has, and no other."""
    _, folder, file = name.split("/")
    return 100 * "ab".index(folder) + 5 * int(file[:2])


def make_images(root: Path, broken: tuple[str, ...] = ()) -> None:
    for folder in "ab":
        (root / "images" / folder).mkdir(parents=True)
        for number in range(12):
            name = f"train/{folder}/{number:02d}.png"
            path = root / "images" / folder / f"{number:02d}.png"
            Image.new("RGB", (8, 8), (colour(name),) * 3).save(path)
            if name in broken:
                path.write_bytes(path.read_bytes()[:30])


def encode(workspace: Path, ledger: str = "run", **changes: object) -> Table:
    keys = {
        "source": "folder",
        "source_path": "images",
        "image_size": 8,
        "shard_rows": 5,
        "validation": False,
    } | changes
    worker = EncodeWorker(EncodeConfig.model_validate(keys), workspace, {"train": "t"})
    book = Ledger(workspace / "ledger" / ledger, workspace)
    for unit in book.missing(worker.units(), worker.fingerprint()):
        staging = commit.make_folder(commit.staging_path(workspace / "staging" / unit.name))
        book.commit(unit, worker.do(unit, staging, lambda: None), worker.fingerprint())
        commit.remove_tree(staging)
    worker.finish()
    return Table.open(workspace / "t", verify=True)


def names_of(table: Table) -> list[str]:
    """All names; none may be missing."""
    found = table.names(np.arange(table.rows))
    assert found is not None and None not in found
    return [str(name) for name in found]


def in_step(table: Table) -> None:
    """Each row is the image that its name says."""
    pixels = table.read(np.arange(table.rows), ["pixels"])["pixels"]
    assert [int(each[0, 0, 0]) for each in pixels] == [colour(name) for name in names_of(table)]


@pytest.mark.parametrize("layout", ["ptshard", "webdataset", "safetensors"])
def test_rows_are_of_the_images_that_they_name(tmp_path: Path, layout: str) -> None:
    make_images(tmp_path)
    table = encode(tmp_path, format=layout)
    in_step(table)
    assert sorted(names_of(table)) == [f"train/{folder}/{n:02d}.png" for folder in "ab" for n in range(12)]
    assert [each.rows for each in table.index.names] == [5, 5, 5, 5, 4]
    assert table.names(np.array([7, 0, 7])) == [names_of(table)[row] for row in (7, 0, 7)]
    with pytest.raises(DataError, match="has 24 rows; asked for 3 to 24"):
        table.names(np.array([3, 24]))


def test_images_left_out_shift_no_name(tmp_path: Path) -> None:
    make_images(tmp_path, BROKEN)
    table = encode(tmp_path, max_bad_fraction=0.2)
    in_step(table)
    assert table.rows == 22 and not set(BROKEN) & set(names_of(table))
    whole = encode(tmp_path, ledger="only", max_bad_fraction=0.2)  # the same again, by another run
    assert whole.index.to_json() == table.index.to_json()


def test_a_unit_without_any_image_has_no_names(tmp_path: Path) -> None:
    make_images(tmp_path)
    for path in (tmp_path / "images").rglob("*.png"):
        if path.parent.name == "a":
            path.write_bytes(b"no image")
    table = encode(tmp_path, max_bad_fraction=0.9, shard_rows=1)
    assert table.rows == 12 and len(table.index.names) == 12
    in_step(table)


def test_names_change_no_identity_and_tables_without_read_on(tmp_path: Path) -> None:
    make_images(tmp_path)
    table = encode(tmp_path)
    document = json.loads((tmp_path / "t/index.json").read_text())
    del document["names"]
    (tmp_path / "t/index.json").write_text(json.dumps(document))
    for path in [*(tmp_path / "t").glob("*.names.json"), *(tmp_path / "t/facts").glob("*")]:
        if path.parent.name == "facts":
            facts = json.loads(path.read_text())
            del facts["names"]
            path.write_text(json.dumps(facts))
        else:
            path.unlink()
    old = Table.open(tmp_path / "t", verify=True)
    assert old.identity == table.identity and not old.has_names and old.names(np.arange(3)) is None
    assert "names" not in TableIndex.read(tmp_path / "t").to_json()
    assert "names     none" in "\n".join(format_info(info(tmp_path / "t")))
    with pytest.raises(UserError, match="does not say from which images its rows came; encode it again under another"):
        list(rows(tmp_path / "t"))
    before = {path: path.stat().st_ino for path in (tmp_path / "t").glob("*.pt")}
    again = encode(tmp_path, ledger="another")
    assert again.identity == old.identity and again.index.shards == old.index.shards and len(before) == 5
    in_step(again)


def test_names_of_archives_say_the_member(tmp_path: Path) -> None:
    make_images(tmp_path)
    with tarfile.open(tmp_path / "pack.tar", "w") as archive:
        archive.add(tmp_path / "images", "pack")
    table = encode(tmp_path, source="tar", source_path="pack.tar")
    assert set(names_of(table)) == {f"train/pack/{folder}/{n:02d}.png" for folder in "ab" for n in range(12)}
    pixels = table.read(np.arange(24), ["pixels"])["pixels"]
    told = [name.replace("/pack", "") for name in names_of(table)]
    assert [int(each[0, 0, 0]) for each in pixels] == [colour(name) for name in told]


def test_converted_split_and_joined_tables_keep_them(tmp_path: Path) -> None:
    make_images(tmp_path, BROKEN)
    table = encode(tmp_path, max_bad_fraction=0.2, row_ids=True)
    convert(open_rows(tmp_path / "t"), tmp_path / "cut", Wish("webdataset", shard_rows=7), SAID.append)
    cut = Table.open(tmp_path / "cut", verify=True)
    assert names_of(cut) == names_of(table)
    in_step(cut)
    split(open_rows(tmp_path / "cut"), tmp_path / "kept", tmp_path / "held", 6, Wish(shard_rows=4), SAID.append)
    parts = [Table.open(tmp_path / name, verify=True) for name in ("kept", "held")]
    for part in parts:
        in_step(part)
    assert {name for part in parts for name in names_of(part)} == set(names_of(table))

    ids = parts[1].read(np.arange(6), [ROW_ID])[ROW_ID]
    write_table(tmp_path / "more", {"extra": ids.float()[:, None].flip(0), ROW_ID: ids.flip(0)}, shard_rows=6)
    both = join(tmp_path / "both", [tmp_path / "more", tmp_path / "held"])
    in_step(both)
    assert names_of(both) == names_of(parts[1])[::-1] and both.index.names == ()
    in_step(Table.open(tmp_path / "both", verify=True).with_tokenizer({"name": "x"}))
    convert(open_rows(tmp_path / "both"), tmp_path / "whole", Wish(shard_rows=2), SAID.append)
    assert names_of(Table.open(tmp_path / "whole", verify=True)) == names_of(both)
    write_table(tmp_path / "plain", {"other": ids[:, None], ROW_ID: ids}, shard_rows=6)
    assert not join(tmp_path / "nameless", [tmp_path / "plain", tmp_path / "more"]).has_names


def test_a_conversion_killed_anywhere_ends_with_all_names(tmp_path: Path) -> None:
    names = [f"train/{i}.png" for i in range(4)]
    write_table(tmp_path / "a", latents(4), shard_rows=2, num_classes=4, names=names)
    operation = 0
    while True:
        target = tmp_path / f"b{operation}"

        def work(target: Path = target) -> None:
            convert(open_rows(tmp_path / "a"), target, Wish(shard_rows=3), SAID.append)

        killed = killed_at(operation, work)
        work()
        assert names_of(Table.open(target, verify=True)) == names
        if not killed:
            break
        operation += 1
    assert operation > 20


def test_staged_copies_have_them(tmp_path: Path) -> None:
    names = [f"train/{i}.png" for i in range(20)]
    write_table(tmp_path / "t", latents(20), shard_rows=8, num_classes=4, names=names)
    copy = Table.open(stage(tmp_path / "t", tmp_path / "nvme", SAID.append), verify=True)
    assert copy.folder.parent == tmp_path / "nvme" and names_of(copy) == names
    (copy.folder / "shard_00001.names.json").unlink()
    assert names_of(Table.open(stage(tmp_path / "t", tmp_path / "nvme", SAID.append), verify=True)) == names


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_looks_at_them(tmp_path: Path, damage: str) -> None:
    write_table(tmp_path, latents(20), shard_rows=8, num_classes=4, names=[f"{i}.png" for i in range(20)])
    path = tmp_path / "shard_00001.names.json"
    DAMAGES[damage](path)
    for full in (True, False):
        (problem,) = verify(tmp_path, full)
        assert str(path) in problem and problem.count(".json") == 1
    table = Table.open(tmp_path)
    assert table.names(np.array([7, 16])) == ["7.png", "16.png"]  # of the others
    with pytest.raises(DataError, match="names of rows|cannot be read"):
        table.names(np.array([8]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": 7}, "the names are of another number of rows than the shards"),
        ({"rows": 0}, "the names are of another number of rows"),
        ({"file": "../x"}, "'../x' lies outside the table"),
        ({"bytes": "many"}, "misstates a field"),
    ],
)
def test_an_index_that_misstates_them_is_refused(tmp_path: Path, change: dict[str, object], words: str) -> None:
    write_table(tmp_path, latents(8), shard_rows=8, num_classes=4, names=[None] * 8)
    document = json.loads((tmp_path / "index.json").read_text())
    document["names"][0] |= change
    (tmp_path / "index.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match=words):
        Table.open(tmp_path)


def test_names_that_are_not_so_many_are_refused(tmp_path: Path) -> None:
    write_table(tmp_path, latents(8), shard_rows=8, num_classes=4, names=["x"] * 8)
    path = tmp_path / "shard_00000.names.json"
    path.write_text(json.dumps(["x"] * 7))
    document = json.loads((tmp_path / "index.json").read_text())
    document["names"][0]["sha256"] = commit.sha256_file(path)
    (tmp_path / "index.json").write_text(json.dumps(document))
    assert "does not hold 8 names" in verify(tmp_path)[0]


def test_the_command(tmp_path: Path) -> None:
    names = [f"train/{i}.png" for i in range(19)] + ["odd\nname"]
    write_table(tmp_path / "t", latents(20), shard_rows=8, num_classes=4, names=names)

    def typed(*words: str) -> str:
        return CliRunner().invoke(cli.app, ["shards", "rows", "t", *words, "-w", str(tmp_path)]).stdout

    assert typed("5", "17") == "         5  train/5.png\n        17  train/17.png\n"
    assert typed("--find", "/1.p") == "         1  train/1.png\n"
    assert typed().splitlines()[-1] == "        19  'odd\\nname'" and len(typed().splitlines()) == 20
    assert json.loads(typed("3", "--json")) == [{"row": 3, "name": "train/3.png"}]
    assert shown(None) == "-" and "names     image of each row" in "\n".join(format_info(info(tmp_path / "t")))
    for wrong in ("20", "99"):
        words = ["shards", "rows", "t", "5", wrong, "-w", str(tmp_path)]
        code = cli_errors.exit_code_of(lambda words=words: cli.app(words, standalone_mode=False), words)
        assert code == 2
    with pytest.raises(UserError, match="has rows 0 to 19, not -1"):
        list(rows(tmp_path / "t", [-1]))


def test_long_and_foreign_letters_come_back(tmp_path: Path) -> None:
    names = ["train/ü/猫 “x”.png", 'train/"\\/.png', "x" * 4000, None, *("y" for _ in range(4))]
    write_table(tmp_path, latents(8), shard_rows=8, num_classes=4, names=names)
    assert Table.open(tmp_path, verify=True).names(np.arange(8)) == names
    assert torch.equal(Table.open(tmp_path).read([3], ["labels"])["labels"], latents(8)["labels"][[3]])
