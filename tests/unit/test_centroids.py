"""The stage `centroids`: its sample, its resumption, what it writes, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from experiments import scratch_folder

from hpc_gen.data.index import ColumnInfo, ShardInfo, TableIndex
from hpc_gen.data.ptshard import content_sha256, write_shard
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.stages.units import Ledger
from hpc_gen.tokenizers.kmeans import Centroids
from shard_tools.centroids import CentroidsOptions, CentroidsWorker

ROWS, TOKENS, WIDTH = 50, 4, 6


def make_table(workspace: Path, dtype: torch.dtype = torch.float16, column: str = "features") -> torch.Tensor:
    """Two shards of features; returns all vectors [ROWS * TOKENS, WIDTH] as float32."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(5, WIDTH, generator=generator) * 3
    chosen = torch.randint(0, 5, (ROWS, TOKENS), generator=generator)
    values = (centres[chosen] + 0.3 * torch.randn(ROWS, TOKENS, WIDTH, generator=generator)).to(dtype)
    infos = []
    for number, part in enumerate(values.split(30)):
        path = workspace / "tables/f" / f"shard_{number:05d}.pt"
        columns = {column: part.contiguous()}
        write_shard(path, columns)
        infos.append(
            ShardInfo(path.name, len(part), path.stat().st_size, commit.sha256_file(path), content_sha256(columns))
        )
    name = str(dtype).removeprefix("torch.")
    TableIndex({column: ColumnInfo(name, (TOKENS, WIDTH))}, tuple(infos)).write(workspace / "tables/f")
    return values.float().view(-1, WIDTH)


def make_worker(workspace: Path, **changes: Any) -> CentroidsWorker:
    options = {"table": "tables/f", "codes": 5, "iterations": 6, "points_per_centroid": 20, "block_rows": 8} | changes
    return CentroidsWorker(CentroidsOptions.model_validate(options), workspace)


def run(
    workspace: Path, worker: CentroidsWorker, names: list[str] | None = None, ledger: str = "ledger", **poll: Any
) -> list[str]:
    """What the runner does, in short; returns the units done."""
    book, done = Ledger(workspace / ledger, workspace), []
    units = [unit for unit in worker.units() if names is None or unit.name in names]
    for unit in book.missing(units, worker.fingerprint()):
        staging = commit.make_folder(commit.staging_path(workspace / "staging" / unit.name))
        try:
            book.commit(unit, worker.do(unit, staging, poll.get("poll", lambda: None)), worker.fingerprint())
        finally:
            commit.remove_tree(staging)
        done.append(unit.name)
    if names is None:
        worker.finish()
    return done


def result(workspace: Path) -> bytes:
    return (workspace / "centroids/km_0k.npy").read_bytes()


def test_centroids_of_a_table(tmp_path: Path) -> None:
    vectors = make_table(tmp_path)
    worker = make_worker(tmp_path)
    assert run(tmp_path, worker) == [*(f"sample-{i:05d}" for i in range(7)), "fit"]
    found = Centroids.read(tmp_path / "centroids/km_0k.npy", WIDTH)
    facts = json.loads((tmp_path / "centroids/km_0k.json").read_text())
    assert facts["codes"] == len(found) == 5 and facts["vectors"] == 100 and len(facts["iterations"]) == 6
    assert facts["sha256"] == commit.sha256_file(tmp_path / "centroids/km_0k.npy")
    assert facts["table"]["identity"] == worker.table.identity
    assert float(found.nearest(vectors)[1].mean()) < 0.3 * float(vectors.var(0).sum()), "near the five clouds"
    assert sorted(path.name for path in (tmp_path / "centroids").iterdir()) == ["km_0k.json", "km_0k.npy"]
    assert run(tmp_path, make_worker(tmp_path)) == [], "done work is not repeated, though the sample was swept"


def test_the_sample_is_of_the_table_without_repetition_and_adds_up(tmp_path: Path) -> None:
    vectors = make_table(tmp_path)
    worker = make_worker(tmp_path)
    parts = [worker._draw(block, lambda: None) for block in range(worker.num_blocks)]
    sample = {row.tobytes() for row in np.concatenate(parts)}
    assert len(sample) == sum(map(len, parts)) == worker.num_points == 100
    assert sample <= {row.tobytes() for row in vectors.numpy()}
    assert [len(part) for part in parts] == [16, 16, 16, 16, 16, 16, 4]
    everything = make_worker(tmp_path, points_per_centroid=1000)
    assert everything.num_points == len(vectors)
    drawn = np.concatenate([everything._draw(block, lambda: None) for block in range(7)])
    assert np.array_equal(drawn, vectors.numpy()), "all of them, in the table's order"
    other = make_worker(tmp_path, seed=1)
    assert {row.tobytes() for row in other._draw(0, lambda: None)} != {row.tobytes() for row in parts[0]}


@pytest.mark.parametrize("order", ["fit first", "some sampled", "reversed"])
def test_the_result_does_not_depend_on_the_order(tmp_path: Path, order: str) -> None:
    for name in ("a", "b"):
        make_table(tmp_path / name)
    run(tmp_path / "a", make_worker(tmp_path / "a"))
    there = tmp_path / "b"
    first = {"fit first": ["fit"], "some sampled": ["sample-00002", "fit"], "reversed": ["sample-00006"]}[order]
    run(there, make_worker(there), first)
    run(there, make_worker(there))
    assert result(there) == result(tmp_path / "a")


@pytest.mark.parametrize("stops_at", [1, 3, 5])
def test_a_stopped_fit_goes_on(tmp_path: Path, stops_at: int) -> None:
    class Stop(Exception):
        pass

    for name in ("a", "b"):
        make_table(tmp_path / name)
    run(tmp_path / "a", make_worker(tmp_path / "a"))
    there = tmp_path / "b"
    samples = [unit.name for unit in make_worker(there).units()][:-1]
    run(there, make_worker(there), samples)
    calls: list[int] = []

    def poll() -> None:
        calls.append(1)
        if len(calls) > stops_at:
            raise Stop

    with pytest.raises(Stop):
        run(there, make_worker(there), ["fit"], poll=poll)
    state = list((there / "centroids/km_0k.work").glob("*-state.safetensors"))
    assert len(state) == 1 and not (there / "centroids/km_0k.npy").exists()
    polls: list[int] = []
    run(there, make_worker(there), ["fit"], poll=lambda: polls.append(1))
    assert len(polls) == 6 - stops_at, "only what was left"
    run(there, make_worker(there))
    assert result(there) == result(tmp_path / "a")


def test_a_damaged_block_is_drawn_again(tmp_path: Path) -> None:
    make_table(tmp_path)
    worker = make_worker(tmp_path)
    samples = [unit.name for unit in worker.units()][:-1]
    run(tmp_path, worker, samples)
    expected = [worker._read_block(block, lambda: None) for block in range(7)]
    worker._block_path(2).write_bytes(b"")
    np.save(worker._block_path(3), np.zeros((1, WIDTH), np.float32))
    again = [worker._read_block(block, lambda: None) for block in range(7)]
    assert all(np.array_equal(one, other) for one, other in zip(expected, again, strict=True))


def test_other_options_are_other_work(tmp_path: Path) -> None:
    make_table(tmp_path)
    prints = {
        make_worker(tmp_path, **changes).fingerprint()
        for changes in (
            {},
            {"codes": 4},
            {"iterations": 7},
            {"seed": 1},
            {"points_per_centroid": 30},
            {"threads": 2},
            {"backend": "torch"},
            {"output": "other.npy"},
        )  # fmt: skip
    }
    assert len(prints) == 8
    run(tmp_path, make_worker(tmp_path))
    before = result(tmp_path)
    assert run(tmp_path, make_worker(tmp_path, seed=1))[-1] == "fit" and result(tmp_path) != before


def test_refusals(tmp_path: Path) -> None:
    make_table(tmp_path)
    with pytest.raises(UserError, match="column 'codes': no such column, but k-means needs .* it has: features"):
        make_worker(tmp_path, column="codes").units()
    with pytest.raises(UserError, match="has 200 vectors for 201 codes; encode more rows"):
        _ = make_worker(tmp_path, codes=201).num_points
    with pytest.raises(UserError, match=r"'km.pt' of the centroids is no .npy file"):
        make_worker(tmp_path, output="km.pt")
    with pytest.raises(DataError, match="is not a folder"):
        make_worker(tmp_path, table="tables/none").units()


def test_features_that_are_not_finite(tmp_path: Path) -> None:
    make_table(tmp_path)
    path = tmp_path / "tables/f/shard_00000.pt"
    columns = dict(torch.load(path, weights_only=True))
    columns["features"] = torch.full_like(columns["features"], float("inf"))
    write_shard(path, columns)
    with pytest.raises(DataError, match="'features' holds values that are not finite"):
        make_worker(tmp_path)._draw(0, lambda: None)


class Killed(BaseException):
    """Stands for SIGKILL."""


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Do the work, dying before its file operation `number`; False when it has fewer."""
    count = 0

    def observer(name: str, path: Path) -> None:
        nonlocal count
        count += 1
        if count == number:
            raise Killed

    commit.ops.observer = observer
    try:
        work()
    except Killed:
        return True
    finally:
        commit.ops.observer = None
    return False


def test_a_kill_at_any_operation_leaves_no_false_centroids() -> None:
    """Whatever it dies at, there is no output or the whole one, and going on leads to the bytes of an undisturbed run."""
    with scratch_folder() as folder:
        make_table(folder)
        few = {"block_rows": 25, "iterations": 3}
        run(folder, make_worker(folder, output="whole/km.npy", **few), ledger="whole")
        wanted = {name: (folder / "whole" / name).read_bytes() for name in ("km.npy", "km.json")}
        number, died = 0, True
        while died:
            number += 1
            output = folder / f"k{number}"
            worker = make_worker(folder, output=f"k{number}/km.npy", **few)
            died = killed_at(number, partial(run, folder, worker, ledger=f"l{number}"))
            if (output / "km.npy").exists():
                assert (output / "km.npy").read_bytes() == wanted["km.npy"]
            if died and number % 4 == 0:  # of all, it would take seconds
                run(folder, make_worker(folder, output=f"k{number}/km.npy", **few), ledger=f"l{number}")
                assert {name: (output / name).read_bytes() for name in wanted} == wanted
                assert not (output / "km.work").exists()
        assert number > 40


@pytest.mark.parametrize("operation", ["open_write", "write", "fsync", "rename"])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    """One sentence, no output, and the same centroids once there is room."""
    for name in ("a", "b"):
        make_table(tmp_path / name)
    run(tmp_path / "a", make_worker(tmp_path / "a"))
    there = tmp_path / "b"
    run(there, make_worker(there), ["sample-00000"])

    call = {"open_write": "open"}.get(operation, operation)
    real = getattr(os, call)

    def full(*args: object, **kwargs: object) -> object:
        if call == "open" and not (isinstance(args[1], int) and args[1] & os.O_CREAT):
            return real(*args, **kwargs)
        raise OSError(errno.ENOSPC, "No space left on device")

    worker = make_worker(there)
    staging = commit.make_folder(there / "staging" / "fit")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises((UserError, OSError), match="disk is full|No space left"):
            worker.do(worker.units()[-1], staging, lambda: None)
    commit.remove_tree(staging)
    assert not (there / "centroids/km_0k.npy").exists()
    run(there, make_worker(there))
    assert result(there) == result(tmp_path / "a")
