"""Shards as safetensors and WebDataset tar: ours are read by the plain packages, others' by us, damage has a sentence."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from shard_files import DAMAGES, flip_bit, latents

from hpc_gen.data.index import LABELS, TableIndex
from hpc_gen.data.order import BlockShuffle
from hpc_gen.data.ordered import OrderedReader
from hpc_gen.data.table import Table
from hpc_gen.data.tar_shard import open_tar_shard, tar_bytes
from hpc_gen.data.write import write_table
from hpc_gen.runtime.errors import DataError, UserError

FORMATS = {"ptshard": "shard_00000.pt", "safetensors": "shard_00000.safetensors", "webdataset": "shard_00000.tar"}
each_format = pytest.mark.parametrize("layout", FORMATS)


@each_format
def test_rows_come_back_in_any_order(tmp_path: Path, layout: str) -> None:
    columns = latents(21)
    index = write_table(tmp_path / "t", columns, shard_rows=8, num_classes=4, layout=layout)
    assert [shard.file for shard in index.shards][0] == FORMATS[layout] and index.layout == layout
    table = Table.open(tmp_path / "t", verify=True)
    picked = np.array([20, 0, 7, 8, 8, 19, 3])
    found = table.read(picked, tuple(columns))
    assert all(torch.equal(found[name], columns[name][picked]) for name in columns)
    order = BlockShuffle(table.shard_rows, 3, 2)
    reader = OrderedReader(table, order, ("moments", LABELS))
    for begin in range(0, 63, 7):
        rows, batch = reader.read(begin, begin + 7)
        assert torch.equal(batch["moments"], columns["moments"][rows.tolist()])
        assert torch.equal(batch[LABELS], columns[LABELS][rows.tolist()])


def test_the_identity_does_not_know_the_format(tmp_path: Path) -> None:
    made = {layout: write_table(tmp_path / layout, latents(), shard_rows=8, layout=layout) for layout in FORMATS}
    assert len({index.identity for index in made.values()}) == 1
    assert TableIndex.read(tmp_path / "webdataset").layout == "webdataset"


def test_plain_torch_and_safetensors_read_ours(tmp_path: Path) -> None:
    columns = latents()
    for layout in ("ptshard", "safetensors"):
        write_table(tmp_path / layout, columns, shard_rows=20, layout=layout)
    plain = torch.load(tmp_path / "ptshard" / FORMATS["ptshard"], weights_only=True)
    other = load_file(tmp_path / "safetensors" / FORMATS["safetensors"])
    for found in (plain, other):
        assert set(found) == set(columns) and all(torch.equal(found[name], columns[name]) for name in columns)


def test_plain_webdataset_reads_ours(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="the package webdataset is not installed")
    columns = latents(20)
    write_table(tmp_path, columns, shard_rows=8, layout="webdataset")
    urls = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"{row:09d}" for row in range(20)]
    assert [sample["cls"] for sample in samples] == columns[LABELS].tolist()
    for name in ("moments", "moments_flip"):
        assert np.array_equal(np.stack([sample[f"{name}.npy"] for sample in samples]), columns[name].numpy())


def test_plain_webdataset_writes_what_we_read(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="the package webdataset is not installed")
    columns = latents(20)
    with webdataset.ShardWriter(str(tmp_path / "s-%05d.tar"), maxcount=8, verbose=0) as sink:
        for row in range(20):
            sink.write(
                {
                    "__key__": f"{row:05d}",
                    "moments.npy": columns["moments"][row].numpy(),
                    "cls": int(columns[LABELS][row]),
                }
            )
    table = Table.open(tmp_path)
    assert (table.rows, table.index.layout, table.index.num_classes, table.index.indexed) == (
        20,
        "webdataset",
        4,
        False,
    )
    found = table.read([19, 0, 8], ("moments", LABELS))
    assert torch.equal(found["moments"], columns["moments"][[19, 0, 8]])
    assert found[LABELS].tolist() == columns[LABELS][[19, 0, 8]].tolist()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def pth(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_tars_of_other_programs_may_be_uneven(tmp_path: Path) -> None:
    arrays = [np.arange(4, dtype=np.float32) + row for row in range(3)]
    tars = {
        "torch": {f"{row}.z.pth": pth(torch.from_numpy(array)) for row, array in enumerate(arrays)},
        "fortran": {f"{row}.z.npy": npy(np.asfortranarray(array.reshape(2, 2))) for row, array in enumerate(arrays)},
        "big-endian": {f"{row}.z.npy": npy(array.astype(">f4")) for row, array in enumerate(arrays)},
        "long names": {f"{'deep/' * 30}{row}.z.npy": npy(array) for row, array in enumerate(arrays)},
        "gaps": {f"{row}.{kind}": data for row, array in enumerate(arrays) for kind, data in
                 (("cls", b"%d" % (10**row)), ("z.npy", npy(array)))},
    }  # fmt: skip
    for name, members in tars.items():
        found = open_tar_shard(write_tar(tmp_path / f"{name}.tar", members))
        assert torch.equal(found["z"].reshape(3, 4), torch.from_numpy(np.stack(arrays))), name
    assert found[LABELS].tolist() == [1, 10, 100]


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        (
            {"0.jpg": b"x", "1.jpg": b"y"},
            "holds files .jpg, which are no arrays; of images make a table with encode.source=tar",
        ),
        (
            {"0.z.npy": npy(np.zeros(2)), "1.y.npy": npy(np.zeros(2))},
            r"sample 1 has the files \['y.npy'\], the first one",
        ),
        ({"0.z.npy": npy(np.array([{}], dtype=object))}, r"cannot be read \(.*allow_pickle"),
        ({"0.cls": b"cat"}, "has a class b'cat' that is no number"),
        ({"0.z.npy": npy(np.zeros(2)), "1.z.npy": npy(np.zeros(3))}, "cannot be read"),
        ({"0.z.pth": pth({"a": 1})}, "holds files .z.pth, which are no arrays"),
    ],
)
def test_tars_that_are_no_tables(tmp_path: Path, members: dict[str, bytes], sentence: str) -> None:
    write_tar(tmp_path / "0.tar", members)
    with pytest.raises(DataError, match=sentence):
        Table.open(tmp_path)


def test_a_column_that_a_tar_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="column 'x' is torch.bfloat16, which the .npy files of a tar do not have; choose"
    ):
        tar_bytes({"x": torch.zeros(2, 2, dtype=torch.bfloat16)}, 0)


@each_format
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_found_before_or_when_it_is_read(tmp_path: Path, layout: str, damage: str) -> None:
    write_table(tmp_path, latents(24), shard_rows=8, num_classes=4, layout=layout)
    path = tmp_path / FORMATS[layout].replace("0.", "1.")
    DAMAGES[damage](path)
    table = Table.open(tmp_path)
    if damage == "bit-flipped":  # nobody reads all bytes before each start: `verify` does
        problems = table.verify()
        assert len(problems) == 1 and str(path) in problems[0]
    else:
        with pytest.raises(DataError, match=rf"shard \S+{path.name} (has \d+ bytes, the index says|cannot be opened)"):
            table.read([9], ("moments",))
        assert len(table.verify(full=False)) == 1
    assert table.read([3], ("moments",))["moments"].shape == (1, 2, 2, 2)  # the others are as they were


@pytest.mark.parametrize("layout", ["safetensors", "webdataset"])
@pytest.mark.parametrize("damage", ["empty", "truncated", "foreign", "bit-flipped"])
def test_a_damaged_shard_without_an_index(tmp_path: Path, layout: str, damage: str) -> None:
    columns = {"latents": latents()["moments"], LABELS: latents()[LABELS]}
    write_table(tmp_path, columns, shard_rows=8, num_classes=4, layout=layout)
    (tmp_path / "index.json").unlink()
    before = Table.open(tmp_path)
    path = tmp_path / FORMATS[layout]
    DAMAGES[damage](path) if damage != "bit-flipped" else flip_bit(path, 0.01)
    try:
        assert Table.open(tmp_path).identity != before.identity
    except DataError as error:
        assert str(path) in str(error) and ("restore it" in str(error) or "again" in str(error))
    else:
        assert damage == "bit-flipped"  # of a value: no such file carries a checksum of it


@each_format
def test_mislabelled_shards(tmp_path: Path, layout: str) -> None:
    write_table(tmp_path / "t", latents(8), shard_rows=8, num_classes=2, layout=layout)
    with pytest.raises(DataError, match="labels run from 0 to 3, the index has 2 classes"):
        Table.open(tmp_path / "t").read([0], (LABELS,))
    one, two = (write_table(tmp_path / name, latents(16), shard_rows=8, layout=layout) for name in ("a", "b"))
    other = {"moments": torch.zeros(8, 3), LABELS: torch.zeros(8, dtype=torch.int64)}
    write_table(tmp_path / "c", other, shard_rows=8, layout=layout)
    file = FORMATS[layout]
    (tmp_path / "a" / file).write_bytes((tmp_path / "c" / file).read_bytes())
    assert any("bytes, the index says" in problem for problem in Table.open(tmp_path / "a").verify())
    (tmp_path / "b" / two.shards[1].file).write_bytes((tmp_path / "b" / file).read_bytes())
    assert len(Table.open(tmp_path / "b").verify()) == 1 and one.identity == two.identity


def test_safetensors_of_other_programs(tmp_path: Path) -> None:
    columns = latents(12)
    shard = {
        "latents": columns["moments"].float(),
        "latents_flip": columns["moments_flip"].float(),
        LABELS: columns[LABELS],
    }
    for rank in range(2):
        part = {name: value[6 * rank : 6 * rank + 6].contiguous() for name, value in shard.items()}
        save_file(part, tmp_path / f"latents_rank{rank:02d}_shard000.safetensors", {"total_size": "6"})
    table = Table.open(tmp_path)
    assert (table.rows, table.index.num_classes, table.verify()) == (12, 4, [])
    found = table.read([11, 0], tuple(shard))
    assert all(torch.equal(found[name], shard[name][[11, 0]]) for name in shard)
    save_file({"weight": torch.zeros(3)}, tmp_path / "latents_rank02_shard000.safetensors")
    with pytest.raises(
        DataError, match=r"latents_rank02_shard000.safetensors has no column 'labels'|has no column 'latents'"
    ):
        Table.open(tmp_path)
    save_file({"weight": torch.zeros(3)}, tmp_path / "a.safetensors")
    with pytest.raises(DataError, match="holds shards but no index.json"):
        Table.open(tmp_path)
