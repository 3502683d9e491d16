"""Staging: copies are verified, whole or absent, shared by the processes of a node, and never in the way."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from shard_files import content, flip_bit, killed_at, latents

from hpc_gen.data import staging
from hpc_gen.data.joined import JoinedTable, join
from hpc_gen.data.staging import check_root, stage
from hpc_gen.data.table import Table
from hpc_gen.data.write import write_table
from hpc_gen.runtime.errors import DataError, UserError
from shard_tools.convert import Wish, convert, open_rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_table(tmp_path / "shared" / "t", latents(20), shard_rows=8, num_classes=4)
    return tmp_path / "shared" / "t"


def run(folder: Path, root: Path, **changes: object) -> tuple[Path, list[str]]:
    said: list[str] = []
    return stage(folder, root, said.append, **changes), said  # type: ignore[arg-type]


def test_a_copy_is_the_same_table_and_is_made_once(folder: Path, tmp_path: Path) -> None:
    place, said = run(folder, tmp_path / "nvme")
    assert place.parent == tmp_path / "nvme" and len(said) == 1 and "copying 3 files" in said[0]
    assert Table.open(place, verify=True).identity == Table.open(folder).identity
    files = {path: path.stat().st_mtime_ns for path in place.iterdir()}
    assert run(folder, tmp_path / "nvme") == (place, [])
    assert {path: path.stat().st_mtime_ns for path in place.iterdir()} == files
    write_table(tmp_path / "other" / "t", latents(24), shard_rows=8, num_classes=4)
    assert run(tmp_path / "other" / "t", tmp_path / "nvme")[0] != place  # the same name, another table


def test_killed_before_any_file_operation_it_goes_on(folder: Path, tmp_path: Path) -> None:
    undisturbed = content(run(folder, tmp_path / "undisturbed")[0])
    operation = 0
    while True:
        root = tmp_path / f"n{operation}"
        if not killed_at(operation, lambda root=root: run(folder, root)):
            break
        for path in root.glob("t-*/*"):
            assert path.name.startswith(".t") or path.read_bytes() == undisturbed[path.name], path
        place, _ = run(folder, root)
        assert content(place) == undisturbed and Table.open(place, verify=True).rows == 20
        operation += 1
    assert operation > 15


def test_what_is_missing_or_cut_is_copied_again(folder: Path, tmp_path: Path) -> None:
    place, _ = run(folder, tmp_path / "nvme")
    before = content(place)
    (place / "shard_00001.pt").write_bytes(b"cut")
    (place / "shard_00002.pt").unlink()
    assert "copying 2 files" in run(folder, tmp_path / "nvme")[1][0] and content(place) == before
    (place / staging.DONE_NAME).write_text("{")
    assert run(folder, tmp_path / "nvme")[0] == place and content(place) == before


def test_a_damaged_table_is_not_spread(folder: Path, tmp_path: Path) -> None:
    flip_bit(folder / "shard_00001.pt")
    with pytest.raises(DataError, match=r"shard_00001.pt has another SHA-256 than the index says; restore it"):
        run(folder, tmp_path / "nvme")
    (folder / "shard_00001.pt").unlink()
    with pytest.raises(
        DataError, match=r"shard_00001.pt cannot be copied to .* \(No such file or directory\); start again"
    ):
        run(folder, tmp_path / "nvme")
    assert not list((tmp_path / "nvme").glob("*/shard_00001.pt")) and not list((tmp_path / "nvme").glob("*/.t*"))


def test_a_disk_without_room_is_said_and_training_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: SimpleNamespace(total=10**6, free=2 * 10**4))
    place, said = run(folder, tmp_path / "nvme")
    assert place == folder and len(said) == 1
    assert "0.0 GiB free and the rest of" in said[0] and said[0].endswith("training reads it where it is")


def test_a_stop_is_honoured_between_pieces(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = iter([False, False, True])
    place, _ = run(folder, tmp_path / "nvme", stopping=lambda: next(asked))
    assert place == folder and not list((tmp_path / "nvme").glob(f"*/{staging.DONE_NAME}"))
    place, said = run(folder, tmp_path / "nvme")
    assert "copying 2 files" in said[0] or "copying 1 files" in said[0]
    assert Table.open(place, verify=True).rows == 20


def test_processes_of_a_node_take_turns(folder: Path, tmp_path: Path) -> None:
    found: list[tuple[Path, list[str]]] = []
    threads = [threading.Thread(target=lambda: found.append(run(folder, tmp_path / "nvme"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({place for place, _ in found}) == 1
    assert sum("copying" in line for _, said in found for line in said) == 1


@pytest.mark.parametrize("layout", ["webdataset", "npz"])
def test_other_layouts_and_tables_without_an_index(folder: Path, tmp_path: Path, layout: str) -> None:
    convert(open_rows(folder), tmp_path / "c", Wish(layout), print)  # type: ignore[arg-type]
    assert Table.open(run(tmp_path / "c", tmp_path / "nvme")[0], verify=True).rows == 20
    (tmp_path / "c" / "index.json").unlink()
    shutil.rmtree(tmp_path / "c" / "facts")
    place, _ = run(tmp_path / "c", tmp_path / "nvme")
    assert Table.open(place).identity == Table.open(tmp_path / "c").identity


def test_a_joined_table_is_staged_with_its_parts(folder: Path, tmp_path: Path) -> None:
    write_table(folder.parent / "s", {"snippets": torch.arange(20.0)[:, None]}, shard_rows=8)
    join(folder.parent / "both", [folder, folder.parent / "s"], trust_order=True)
    place, _ = run(folder.parent / "both", tmp_path / "nvme")
    table = Table.open(place, verify=True)
    assert isinstance(table, JoinedTable) and place.parent == tmp_path / "nvme"
    assert all(part.folder.resolve().parent == tmp_path / "nvme" for part in table.parts)
    assert table.identity == Table.open(folder.parent / "both").identity
    assert table.read(np.array([19]), ("snippets",))["snippets"].item() == 19
    assert run(folder.parent / "both", tmp_path / "nvme") == (place, [])


def test_a_path_that_every_node_has_elsewhere_is_refused() -> None:
    assert check_root("/scratch/me") == Path("/scratch/me")
    with pytest.raises(UserError, match="data.stage_to is 'scratch'; give an absolute path on a disk of the node"):
        check_root("scratch")
