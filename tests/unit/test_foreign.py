"""Shards without an index, as the energy reference caches them: read as they are, damage and mixtures named."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from hpc_gen import cli
from hpc_gen.data import row_files
from hpc_gen.data.index import INDEX_NAME, LABELS, TableIndex
from hpc_gen.data.table import Table
from hpc_gen.runtime.errors import DataError, UserError
from shard_tools.indexing import write_index
from shard_tools.inspect import format_info, info, verify

KEYS = ("moments", "moments_flip")
CLASSES = ("n01", "n02", "n05")


def rows(count: int = 6, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    columns = {key: torch.randn(count, 4, 2, 2, generator=generator).half() for key in KEYS}
    return {**columns, LABELS: torch.arange(count) * 3 % 7}


def write(folder: Path, layout: str, columns: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A folder as the reference's program leaves it; returns what a table of it must give."""
    columns = columns or rows()
    count = len(columns[LABELS])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "last_idx.txt").write_text("3")
    if layout == "ptshard":
        for number, start in enumerate(range(0, count, 4)):
            part = {name: column[start : start + 4].clone() for name, column in columns.items()}
            torch.save(part, folder / f"shard_{number:05d}.pt")
        return columns
    labels = torch.arange(count) * len(CLASSES) // count
    for i, label in enumerate(labels.tolist()):
        path = folder / CLASSES[label] / f"{i}.JPEG.{layout}"
        path.parent.mkdir(exist_ok=True)
        save(path, {key: columns[key][i].clone() for key in KEYS})
    return {key: columns[key].float() if layout == "npz" else columns[key] for key in KEYS} | {LABELS: labels}


def save(path: Path, row: dict[str, Tensor]) -> None:
    path.unlink(missing_ok=True)  # a torch that has it mapped must not see it change
    if path.suffix == ".npz":
        np.savez(path, **{key: tensor.float().numpy() for key, tensor in row.items()})
    else:
        torch.save(row, path)


def first(folder: Path, number: int = 0) -> Path:
    return sorted(path for path in folder.rglob("*") if path.suffix in (".pt", ".npz"))[number]


LAYOUTS = pytest.mark.parametrize("layout", ["ptshard", "pt", "npz"])


@LAYOUTS
def test_rows_come_in_any_order(tmp_path: Path, layout: str) -> None:
    expected = write(tmp_path, layout)
    table = Table.open(tmp_path)
    order = np.array([5, 0, 3, 3, 1])
    found = table.read(order, (*KEYS, LABELS))
    assert all(torch.equal(found[name], expected[name][order]) for name in found)
    assert table.shard_rows == ([4, 2] if layout == "ptshard" else [1] * 6)
    assert table.index.num_classes == (int(expected[LABELS].max()) + 1 if layout == "ptshard" else 3)


def test_no_file_of_one_row_stays_open(tmp_path: Path) -> None:
    write(tmp_path, "npz")
    table = Table.open(tmp_path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    table.read(np.arange(6), KEYS)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@LAYOUTS
def test_identity_follows_names_sizes_and_content(tmp_path: Path, layout: str) -> None:
    write(tmp_path / "a", layout)
    identity = Table.open(tmp_path / "a").identity
    (tmp_path / "a").rename(tmp_path / "b")
    assert Table.open(tmp_path / "b").identity == identity, "the folder's own name or place"
    changed = rows()
    changed["moments"][0, 0, 0, 0] += 1
    write(tmp_path / "b", layout, changed)  # the same names and sizes
    assert Table.open(tmp_path / "b").identity != identity
    write(tmp_path / "b", layout)
    assert Table.open(tmp_path / "b").identity == identity
    first(tmp_path / "b").rename(first(tmp_path / "b").with_name(f"a{first(tmp_path / 'b').name}"))
    assert Table.open(tmp_path / "b").identity != identity
    first(tmp_path / "b").unlink()
    assert Table.open(tmp_path / "b").identity != identity


def test_opening_does_not_read_the_rows(tmp_path: Path) -> None:
    """Damage inside an array leaves the header as it was: found by verify, which reads every byte."""
    for layout in ("ptshard", "pt", "npz"):
        folder = tmp_path / layout
        expected = write(folder, layout)
        identity = Table.open(folder).identity
        path = first(folder, -1)
        data = bytearray(path.read_bytes())
        data[data.index(expected["moments"][5].numpy().tobytes()) + 3] ^= 64
        path.write_bytes(data)
        table = Table.open(folder)
        assert table.identity == identity
        (problem,) = table.verify()
        assert str(path) in problem and ("is damaged in" in problem or "Bad CRC-32" in problem)


Spoil = Callable[[Path], None]


def without_flip(path: Path) -> None:
    row = {"moments": torch.zeros(4, 2, 2).half()}
    save(path, {"moments": torch.zeros(2, 4, 2, 2).half(), LABELS: torch.zeros(2).long()} if flat(path) else row)


def of_shape(path: Path) -> None:
    row = {key: torch.zeros(4, 3, 3).half() for key in KEYS}
    save(
        path,
        {key: torch.zeros(2, 4, 3, 3).half() for key in KEYS} | {LABELS: torch.zeros(2).long()} if flat(path) else row,
    )


def same_bytes_other_shape(path: Path) -> None:
    shape = (2, 2, 4)
    row = {key: torch.zeros(shape).half() for key in KEYS}
    save(
        path,
        {key: torch.zeros(2, *shape).half() for key in KEYS} | {LABELS: torch.zeros(2).long()} if flat(path) else row,
    )


def of_dtype(path: Path) -> None:
    kind = torch.float64 if path.suffix == ".npz" else torch.float32
    row = {key: torch.zeros(4, 2, 2, dtype=kind) for key in KEYS}
    if path.suffix == ".npz":
        np.savez(path, **{key: tensor.numpy() for key, tensor in row.items()})
    elif flat(path):
        save(path, {key: torch.zeros(2, 4, 2, 2) for key in KEYS} | {LABELS: torch.zeros(2).long()})
    else:
        save(path, row)


def with_more(path: Path) -> None:
    row = {key: torch.zeros(4, 2, 2).half() for key in (*KEYS, "more")}
    save(
        path,
        {k: torch.zeros(2, 4, 2, 2).half() for k in (*KEYS, "more")} | {LABELS: torch.zeros(2).long()}
        if flat(path)
        else row,
    )


def flat(path: Path) -> bool:
    return path.name.startswith("shard_")


@LAYOUTS
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_flip, "has no column 'moments_flip' (it has"),
        (of_shape, "column 'moments': rows are"),
        (of_dtype, "column 'moments': rows are"),
        (with_more, "has the columns ['"),
    ],
)
def test_files_unlike_the_first_are_refused(tmp_path: Path, layout: str, spoil: Spoil, message: str) -> None:
    write(tmp_path, layout)
    path = first(tmp_path, -1)
    spoil(path)
    with pytest.raises(DataError) as error:
        Table.open(tmp_path)
    assert str(path) in str(error.value) and message in str(error.value)
    if spoil is not without_flip:
        assert f"{first(tmp_path).relative_to(tmp_path)} has " in str(error.value), (
            "and the file that it is compared with"
        )
    assert path.is_file(), "the reference deletes what it cannot read"


def test_a_shape_that_hides_behind_its_size_is_found_when_read(tmp_path: Path) -> None:
    write(tmp_path, "npz")
    same_bytes_other_shape(first(tmp_path, 3))
    table = Table.open(tmp_path)
    with pytest.raises(
        DataError, match=r"3\.JPEG\.npz, column 'moments': rows are float32 \[2, 2, 4\], the table was opened"
    ):
        table.read([3], ("moments",))
    assert len(table.verify(full=False)) == 1


@LAYOUTS
@pytest.mark.parametrize("keep", [0, 10, -1, -30])
def test_truncated_and_garbage_files_are_named_and_kept(tmp_path: Path, layout: str, keep: int) -> None:
    write(tmp_path, layout)
    for number in (0, -1):
        path = first(tmp_path, number)
        good = path.read_bytes()
        path.write_bytes(good[:keep])
        with pytest.raises(DataError, match=f"shard .*{path.name} (cannot be read|is not a whole archive)"):
            Table.open(tmp_path)
        assert path.read_bytes() == good[:keep]
        path.write_bytes(good)


@LAYOUTS
def test_a_file_that_changes_after_the_table_was_opened(tmp_path: Path, layout: str) -> None:
    write(tmp_path, layout)
    table = Table.open(tmp_path)
    path = first(tmp_path)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(DataError, match=r"has \d+ bytes, the table was opened with \d+"):
        table.read([0], ("moments",))
    path.unlink()
    with pytest.raises(DataError, match="cannot be opened"):
        table.read([0], ("moments",))


def test_pickles_are_not_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    write(tmp_path / "npz", "npz")
    np.savez(first(tmp_path / "npz"), moments=np.array([Evil()], dtype=object), moments_flip=np.zeros(1))
    write(tmp_path / "pt", "pt")
    torch.save({"moments": Evil(), "moments_flip": torch.zeros(1)}, first(tmp_path / "pt"))
    for layout in ("npz", "pt"):
        with pytest.raises(DataError, match="cannot be read"):
            Table.open(tmp_path / layout)
    assert not (tmp_path / "ran").exists()


def test_what_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        Table.open(tmp_path / "absent")
    (tmp_path / "n01").mkdir()
    with pytest.raises(DataError, match=r"has no index\.json"):
        Table.open(tmp_path)
    write(tmp_path / "both", "ptshard")
    write(tmp_path / "both", "npz")
    with pytest.raises(DataError, match=r"several layouts, shard_00000\.pt \(ptshard\) and n01/0\.JPEG\.npz \(npz\)"):
        Table.open(tmp_path / "both")
    write(tmp_path / "tables" / "one", "ptshard")
    with pytest.raises(DataError, match=r"tables has no index\.json"):
        Table.open(tmp_path / "tables")
    (tmp_path / "pixels").mkdir()
    torch.save({"pixels": torch.zeros(2, 1), LABELS: torch.zeros(2).long()}, tmp_path / "pixels" / "shard_00000.pt")
    with pytest.raises(DataError, match=r"holds shards but no index\.json, so it is not whole"):
        Table.open(tmp_path / "pixels")
    write(tmp_path / "halted", "ptshard")
    (tmp_path / "halted" / "facts").mkdir()
    with pytest.raises(DataError, match="run the stage encode to its end"):
        Table.open(tmp_path / "halted")
    for labels in (None, torch.zeros(2)):
        columns = {key: torch.zeros(2, 4, 2, 2) for key in KEYS} | ({} if labels is None else {LABELS: labels})
        (tmp_path / "unlabelled").mkdir(exist_ok=True)
        save(tmp_path / "unlabelled" / "shard_00000.pt", columns)
        with pytest.raises(DataError, match="has no column 'labels' of int64 numbers"):
            Table.open(tmp_path / "unlabelled")


@LAYOUTS
def test_big_endian_and_other_packings_are_no_other_columns(tmp_path: Path, layout: str) -> None:
    expected = write(tmp_path, layout)
    if layout != "npz":
        path = first(tmp_path, -1)
        torch.save(torch.load(path, weights_only=True), path.with_name("x"), _use_new_zipfile_serialization=False)
        path.with_name("x").replace(path)  # torch before 1.6: no archive, so nothing says what it holds
        with pytest.raises(DataError, match="is not a whole archive|cannot be read"):
            Table.open(tmp_path)
        return
    arrays = {key: np.asfortranarray(expected[key][5].numpy().astype(">f4")) for key in KEYS}
    np.savez_compressed(first(tmp_path, -1), **arrays)
    other = {key: np.asfortranarray(expected[key][3].numpy()) for key in KEYS}
    np.savez(first(tmp_path, 3), **other)
    for order in ([5, 0, 3, 1, 2, 4], [0, 5, 1, 3, 2, 4], [3, 1, 5, 0, 2, 4]):  # whichever is looked at first
        found = Table.open(tmp_path).read(order, KEYS)
        assert all(torch.equal(found[key], expected[key][order]) for key in KEYS)


@pytest.mark.parametrize("layout", ["pt", "npz"])
def test_the_short_way_of_reading_is_taken_and_exact(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the first file are read raw; a file packed otherwise goes the long way, which names what is wrong."""
    expected = write(tmp_path, layout)
    opened: list[str] = []
    real = row_files.open_row
    monkeypatch.setattr(row_files, "open_row", lambda path, *rest: opened.append(path.name) or real(path, *rest))
    table = Table.open(tmp_path)
    order = [4, 1, 0, 5, 2, 3]
    found = [table.read([row], KEYS) for row in order]  # one at a time: a batch is read in the order of the files
    assert all(torch.equal(f[key][0], expected[key][row]) for f, row in zip(found, order, strict=True) for key in KEYS)
    assert opened == [f"4.JPEG.{layout}"]
    path = first(tmp_path, 2)
    size = path.stat().st_size
    turned = {key: expected[key][2].transpose(1, 2) for key in KEYS}  # the same bytes count, other strides
    if layout == "pt":
        path.unlink()
        torch.save(turned, path)
    else:
        np.savez(path, **{key: tensor.numpy() for key, tensor in turned.items()})
    table = Table.open(tmp_path)
    table.read([0], KEYS)
    if path.stat().st_size == size:
        assert torch.equal(table.read([2], KEYS)["moments"][0], turned["moments"])
    assert torch.equal(Table.open(tmp_path).read([2], KEYS)["moments"][0], turned["moments"])


@LAYOUTS
def test_index_is_written_once_and_holds(tmp_path: Path, layout: str) -> None:
    expected = write(tmp_path, layout)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    lines: list[str] = []
    write_index(tmp_path, {}, lines.append, dry_run=True)
    assert "would read 6 rows" in lines[0] and not (tmp_path / INDEX_NAME).exists()
    bare = Table.open(tmp_path).identity
    write_index(tmp_path, {"name": "kl_vae", "scale": 0.2325}, lines.append)
    index = TableIndex.read(tmp_path)
    assert index.indexed and index.layout == layout and index.identity != bare
    assert index.tokenizer == {"name": "kl_vae", "scale": 0.2325}
    table = Table.open(tmp_path, verify=True)
    found = table.read(np.arange(6), (*KEYS, LABELS))
    assert all(torch.equal(found[name], expected[name]) for name in found)
    mean = expected["moments"].double().mean((0, 2, 3))
    np.testing.assert_allclose(index.statistics["columns"]["moments"]["mean"], mean, rtol=1e-12)
    assert sum(index.statistics["label_histogram"].values()) == 6
    assert {path: path.read_bytes() for path in before} == before
    stamp = (tmp_path / INDEX_NAME).stat().st_mtime_ns
    write_index(tmp_path, {}, lines.append)
    assert "every byte agrees" in lines[-1] and (tmp_path / INDEX_NAME).stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="has an index already, of the tokenizer"):
        write_index(tmp_path, {"name": "kl_vae", "scale": 1.0}, lines.append)
    path = first(tmp_path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="does not agree with its shards"):
        write_index(tmp_path, {}, lines.append)


@LAYOUTS
def test_a_damaged_table_gets_no_index(tmp_path: Path, layout: str) -> None:
    expected = write(tmp_path, layout)
    path = first(tmp_path, -1)
    data = bytearray(path.read_bytes())
    data[data.index(expected["moments_flip"][5].numpy().tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"is damaged in .*; restore it \(no index is written\)|Bad CRC-32"):
        write_index(tmp_path, {}, lambda line: None)
    assert not (tmp_path / INDEX_NAME).exists()


@LAYOUTS
def test_info_and_verify(tmp_path: Path, layout: str) -> None:
    write(tmp_path, layout)
    facts = info(tmp_path)
    assert json.loads(json.dumps(facts)) == facts and facts["rows"] == 6 and facts["indexed"] is False
    text = "\n".join(format_info(facts))
    assert f"layout    {layout}, without an index: write one with hpc-gen shards index" in text
    assert verify(tmp_path) == []
    write_index(tmp_path, {}, lambda line: None)
    assert "without an index" not in "\n".join(format_info(info(tmp_path))) and verify(tmp_path) == []
    extra = first(tmp_path).with_name("zz.npz" if layout == "npz" else "zz.pt")
    extra.write_bytes(first(tmp_path).read_bytes())
    (problem,) = verify(tmp_path)
    assert "zz." in problem and "is not in the index" in problem


def test_the_command(tmp_path: Path) -> None:
    write(tmp_path / "cached", "pt")
    runner, words = CliRunner(), ["shards", "index", "cached", "--workspace", str(tmp_path)]
    assert "would read 6 rows" in runner.invoke(cli.app, [*words, "--dry-run"]).output
    assert not (tmp_path / "cached" / INDEX_NAME).exists()
    config = tmp_path / "pixels.yaml"
    config.write_text(
        "name: x\nmethod: {name: energy}\ndata: {table: t}\n"
        "encode: {source: folder, source_path: x, image_size: 8, validation: false}\n"
    )
    refused = runner.invoke(cli.app, [*words, "--config", str(config)])
    assert isinstance(refused.exception, UserError) and "'identity', which stores pixels" in str(refused.exception)
    assert runner.invoke(cli.app, words).exit_code == 0
    assert Table.open(tmp_path / "cached", verify=True).index.indexed


def test_a_class_folder_that_the_index_does_not_know(tmp_path: Path) -> None:
    write(tmp_path, "pt")
    index = write_index(tmp_path, {}, lambda line: None)
    TableIndex.write(TableIndex(index.columns, index.shards, 3, ("n01", "n02", "other"), layout="pt"), tmp_path)
    with pytest.raises(DataError, match="lies in a folder that is no class of the index"):
        Table.open(tmp_path).read([5], (LABELS,))


def test_an_unknown_layout_of_an_index(tmp_path: Path) -> None:
    write(tmp_path, "pt")
    write_index(tmp_path, {}, lambda line: None)
    document = json.loads((tmp_path / INDEX_NAME).read_text())
    (tmp_path / INDEX_NAME).write_text(json.dumps(document | {"layout": "tar"}))
    with pytest.raises(DataError, match="unknown layout 'tar'"):
        TableIndex.read(tmp_path)
    del document["layout"]  # an index of before there were layouts
    (tmp_path / INDEX_NAME).write_text(json.dumps(document))
    assert TableIndex.read(tmp_path).layout == "ptshard"


def test_directories_carry_real_checksums(tmp_path: Path) -> None:
    """The identity rests on them: torch and numpy must not write zeros."""
    for layout in ("ptshard", "pt", "npz"):
        write(tmp_path / layout, layout)
        with zipfile.ZipFile(first(tmp_path / layout)) as archive:
            data = [member for member in archive.infolist() if member.file_size > 10]
            assert data and all(member.CRC for member in data) and archive.testzip() is None


def test_values_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"moments": torch.full((2, 8, 4, 4), float("nan")), "labels": torch.zeros(2).long()}, tmp_path / "0.pt")
    with pytest.raises(DataError, match=r"0\.pt: column 'moments' holds values that are not finite"):
        write_index(tmp_path, {}, lambda line: None)
    assert not (tmp_path / INDEX_NAME).exists()
