"""The feed by worker processes and by DALI: the same bits as by the thread, also from the middle, also in a training."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import experiments
import pytest
import torch
from experiments import LINEAR, TABLE, Workspace

from hpc_gen.data.dali_feed import DaliMover
from hpc_gen.data.feed import Feed, FeedPlan, Iteration
from hpc_gen.data.order import BlockShuffle
from hpc_gen.data.table import Table
from hpc_gen.data.write import write_table
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.runtime.randomness import Draw, Integers, Uniform

ROWS, BATCH = 50, 16
COLUMNS = ("pixels", "latents", "brain", "labels")


def turn_draws(images_seen: int) -> Sequence[tuple[str, Mapping[str, Draw]]]:
    main = {"noise": Draw((3, 4)), "t": Draw((), Uniform()), "shared": Draw((2,), Integers(0, 1000), per="group")}
    extra = [("second", {"noise": Draw((2,))})] if images_seen // BATCH % 2 == 0 else []
    return [("main", main), *extra]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table") / "t"
    generator = torch.Generator().manual_seed(0)
    columns = {
        "pixels": torch.randint(0, 256, (ROWS, 3, 4, 4), dtype=torch.uint8, generator=generator),
        "latents": torch.randn(ROWS, 4, 2, 2, generator=generator).half(),
        "brain": torch.randn(ROWS, 3, generator=generator).bfloat16(),
        "labels": torch.arange(ROWS) % 10,
    }
    write_table(folder, columns, shard_rows=7, num_classes=10)
    return folder


def iterations(folder: Path, way: str, start: int = 0, end: int = 160, **changes: object) -> list[Iteration]:
    table = Table.open(folder)
    move = None
    if "dali" in way:
        pytest.importorskip("nvidia.dali", reason="the package DALI is not installed")
        move = DaliMover(torch.device("cpu"))
    settings = {"micro_batch": 8, "rank": 0, "world_size": 1, "coupling_group": 2} | changes
    plan = FeedPlan(3, BATCH, columns=COLUMNS, workers=2 if "workers" in way else 0, **settings)  # type: ignore[arg-type]
    order = BlockShuffle(table.shard_rows, 3, 3)
    with Feed(table, order, plan, turn_draws, start, end_images=end, move=move) as feed:
        return list(feed)


def tensors(iteration: Iteration) -> list[torch.Tensor]:
    found = []
    for each in iteration.micro_batches:
        found += [torch.from_numpy(each.positions), torch.from_numpy(each.rows.copy())]
        found += [each.batch[name] for name in COLUMNS]
        found += [drawn for named in each.draws.values() for drawn in named.values()]
    return found


def assert_same(one: list[Iteration], two: list[Iteration]) -> None:
    assert [(i.images_seen, i.digest) for i in one] == [(i.images_seen, i.digest) for i in two]
    for a, b in zip(one, two, strict=True):
        for x, y in zip(tensors(a), tensors(b), strict=True):
            assert x.dtype == y.dtype and x.shape == y.shape and x.device == y.device and torch.equal(x, y)


@pytest.mark.parametrize("way", ["workers", "dali", "workers and dali"])
def test_every_way_gives_the_same_bits(folder: Path, way: str) -> None:
    thread = iterations(folder, "thread")
    assert len(thread) == 10
    assert_same(iterations(folder, way), thread)


@pytest.mark.parametrize("way", ["workers", "dali"])
def test_a_resume_enters_anywhere_in_the_stream(folder: Path, way: str) -> None:
    thread = iterations(folder, "thread")
    assert_same(iterations(folder, way, start=48), thread[3:])
    middle = 1_000_000 * ROWS  # epochs on: a whole number of batches and of coupling groups
    assert_same(
        iterations(folder, way, start=middle, end=middle + 32),
        iterations(folder, "thread", start=middle, end=middle + 32),
    )


def test_ranks_by_workers_are_the_shares_of_one(folder: Path) -> None:
    whole = iterations(folder, "thread", end=32)
    for rank in range(2):
        own = iterations(folder, "workers", end=32, rank=rank, world_size=2)
        for a, b in zip(own, whole, strict=True):
            assert torch.equal(a.micro_batches[0].batch["latents"], b.micro_batches[rank].batch["latents"])


def worker_processes() -> set[int]:
    return {int(p.name) for p in Path("/proc").iterdir() if p.name.isdecimal() and parent(p) == os.getpid()}


def parent(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return -1


def test_closing_early_ends_the_processes_and_the_thread(folder: Path) -> None:
    before, threads = worker_processes(), threading.active_count()
    table = Table.open(folder)
    plan = FeedPlan(3, BATCH, 16, 0, 1, COLUMNS, workers=2)
    feed = Feed(table, BlockShuffle(table.shard_rows, 3, 3), plan, turn_draws, 0)  # endless
    next(feed)
    assert len(worker_processes() - before) == 2
    feed.close()
    for _ in range(100):
        if worker_processes() <= before and threading.active_count() <= threads:
            return
        time.sleep(0.1)
    raise AssertionError("processes or threads are left")


def test_an_error_in_a_worker_is_the_same_sentence(folder: Path, tmp_path: Path) -> None:
    columns = {"pixels": torch.zeros(20, 1, dtype=torch.uint8)}
    write_table(tmp_path / "t", columns, shard_rows=5)
    path = tmp_path / "t" / "shard_00002.pt"
    path.write_bytes(path.read_bytes()[:-5])
    said = []
    for workers in (0, 2):
        table = Table.open(tmp_path / "t")
        plan = FeedPlan(0, 4, 4, 0, 1, ("pixels",), workers=workers)
        with Feed(table, BlockShuffle(table.shard_rows, 0, 1), plan, lambda n: [], 0, end_images=20) as feed:
            with pytest.raises(DataError) as caught:
                list(feed)
            said.append(str(caught.value))
    assert said[0] == said[1] and "shard_00002.pt has" in said[0]


def test_a_worker_that_is_killed_is_said(folder: Path) -> None:
    before = worker_processes()
    table = Table.open(folder)
    plan = FeedPlan(3, BATCH, 16, 0, 1, COLUMNS, workers=2, prefetch=2)
    with Feed(table, BlockShuffle(table.shard_rows, 3, 3), plan, turn_draws, 0) as feed:
        next(feed)
        for process in worker_processes() - before:
            os.kill(process, signal.SIGKILL)
        with pytest.raises(UserError, match="a worker process of the feed was killed, perhaps for want of memory"):
            for _ in range(1000):
                next(feed)


def test_without_the_package_the_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match=r"run: pip install 'hpc-gen\[dali\]'"):
        DaliMover(torch.device("cpu"))


def test_a_training_does_not_know_its_feed_and_may_change_it_at_a_resume(workspace: Workspace, tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="the package DALI is not installed")
    ways = {
        "plain": [], "workers": ["data.workers=1"], "dali": ["data.feed=dali"],
        "staged": [f"data.stage_to={tmp_path / 'nvme'}"],
    }  # fmt: skip
    found = {}
    for name, overrides in ways.items():
        run = workspace.run(name, *overrides, text=LINEAR)
        workspace.train(run)
        found[name] = experiments.contents(sorted(run.checkpoints.iterdir())[-1])
        identity = (run.path / "hashes.json").read_text()
        assert "identity" in identity
    assert all(each == found["plain"] for each in found.values())
    copies = list((tmp_path / "nvme").glob(f"{Path(TABLE).name}-*"))
    assert (
        len(copies) == 1 and Table.open(copies[0], verify=True).identity == Table.open(workspace.path / TABLE).identity
    )
