"""Copying the training table to the node: whole or not at all, once, with room to spare, and the same table after."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from experiments import TABLE, TINY, make_workspace

from hpc_gen.config import loader
from hpc_gen.data.index import INDEX_NAME
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError
from hpc_gen.runtime.fence import Job
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import run_setup
from hpc_gen.stages.build import STAGED, open_table
from slurm import staging

JOB = Job("7", 0)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run whose table wants to be on the node's disk."""
    make_workspace(tmp_path / "w")
    monkeypatch.setenv(staging.FOLDER, str(tmp_path / "nvme"))
    monkeypatch.setenv(staging.KEEP_FREE_GB, "0")
    monkeypatch.delenv(STAGED, raising=False)
    yield run_setup.prepare_run(loader.loads(TINY), tmp_path / "w")
    os.environ.pop(STAGED, None)


def test_copied_once_and_read_from_there(run: RunFolder, tmp_path: Path) -> None:
    said: list[str] = []
    before = open_table(run.workspace, TABLE)
    staging.stage_in(run, JOB, 0, said.append)
    found = open_table(run.workspace, TABLE)
    assert str(found.folder).startswith(str(tmp_path / "nvme")) and found.identity == before.identity
    assert len(said) == 1 and "is read from" in said[0] and "copied in" in said[0]
    del os.environ[STAGED]
    staging.stage_in(run, Job("8", 0), 0, said.append)
    assert said[1].endswith("(there already)") and os.environ[STAGED]
    # a table that changed meanwhile has another identity, hence another place
    assert found.folder.parent.parent.name == before.identity[:32]


def test_the_others_wait_for_the_first(run: RunFolder) -> None:
    places: list[str | None] = []
    others = [threading.Thread(target=lambda: places.append(_word(run))) for _ in range(3)]
    for thread in others:
        thread.start()
    staging.stage_in(run, JOB, 0, lambda line: None)
    for thread in others:
        thread.join(20)
    assert places == [os.environ[STAGED]] * 3


def _word(run: RunFolder) -> str | None:
    base = Path(os.environ[staging.FOLDER]) / f"hpc-gen-{os.getuid()}"
    return staging._wait(base / "7.0.json")


def test_no_room_is_said_and_the_table_is_read_where_it_lies(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(staging.KEEP_FREE_GB, "1e9")
    said: list[str] = []
    staging.stage_in(run, JOB, 0, said.append)
    assert "is read from where it lies" in said[0] and "1e+09 GB must stay free" in said[0]
    assert STAGED not in os.environ and open_table(run.workspace, TABLE).folder == run.workspace / TABLE
    staging.stage_in(run, JOB, 1, said.append)  # the other process does not wait for ever
    assert STAGED not in os.environ


def test_a_shard_that_is_not_what_the_index_says(run: RunFolder, tmp_path: Path) -> None:
    shard = next((run.workspace / TABLE).glob("*.pt"))
    data = bytearray(shard.read_bytes())
    data[-9] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(DataError, match=f"{shard.name} is not what index.json says"):
        staging.copy(run.workspace / TABLE, tmp_path / "nvme", TABLE, 0.0)
    assert list((tmp_path / "nvme").iterdir()) == []


def test_a_copy_that_was_cut_short_is_made_again(run: RunFolder, tmp_path: Path) -> None:
    place, size = staging.copy(run.workspace / TABLE, tmp_path / "nvme", TABLE, 0.0)
    assert size > 0
    (place / TABLE / INDEX_NAME).unlink()
    again, size = staging.copy(run.workspace / TABLE, tmp_path / "nvme", TABLE, 0.0)
    assert again == place and size > 0
    names = sorted(path.name for path in (place / TABLE).iterdir())
    assert {commit.sha256_file(place / TABLE / name) for name in names} >= {
        commit.sha256_file(run.workspace / TABLE / name) for name in (INDEX_NAME,)
    }


def test_a_profile_without_staging_changes_nothing(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(staging.FOLDER)
    staging.stage_in(run, JOB, 0, pytest.fail)
    assert STAGED not in os.environ
