"""The feed: the same samples, noise and digest however the batch is cut, wherever the stream is entered."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from hpc_gen.data.feed import Feed, FeedPlan, Iteration, MicroBatch
from hpc_gen.data.order import BlockShuffle
from hpc_gen.data.table import Table
from hpc_gen.data.write import write_table
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.runtime.randomness import Draw, Integers, Stream, Uniform

SEED, GLOBAL = 11, 16
COLUMNS = ("pixels", "labels")
PINNED_DIGESTS = [17085150520131195143, 7550417412042271560]


def turn_draws(images_seen: int) -> Sequence[tuple[str, Mapping[str, Draw]]]:
    """Two turns; the second in every other iteration, as a regulariser would have it."""
    main = {"noise": Draw((3, 4)), "t": Draw((), Uniform()), "shared": Draw((2,), Integers(0, 1000), per="group")}
    extra = [("second", {"noise": Draw((3, 4))})] if images_seen // GLOBAL % 2 == 0 else []
    return [("main", main), *extra]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    folder = tmp_path_factory.mktemp("table") / "t"
    rows = 50  # not a multiple of the batch: epochs end inside batches
    pixels = torch.arange(rows * 4).reshape(rows, 1, 2, 2).to(torch.uint8)
    write_table(folder, {"pixels": pixels, "labels": torch.arange(rows) % 10}, shard_rows=7, num_classes=10)
    return Table.open(folder)


def make_feed(table: Table, *, start: int = 0, end: int | None = None, k: int = 0, draws=turn_draws, **plan) -> Feed:
    defaults = {"global_batch": GLOBAL, "micro_batch": 4, "rank": 0, "world_size": 1, "columns": COLUMNS}
    settings = FeedPlan(seed=SEED, **(defaults | plan))
    return Feed(table, BlockShuffle(table.shard_rows, SEED, 3), settings, draws, start, k, end)


def samples(micro_batches: Sequence[MicroBatch], group: int) -> dict[int, tuple]:
    """Everything a sample brings with it, by position."""
    found = {}
    for micro in micro_batches:
        for i, position in enumerate(micro.positions.tolist()):
            drawn = []
            for purpose, named in micro.draws.items():
                for name, tensor in named.items():
                    place = i // group if len(tensor) != len(micro.positions) or group > 1 and name == "shared" else i
                    drawn.append((purpose, name, tensor[place].numpy().tobytes()))
            columns = tuple(micro.batch[name][i].numpy().tobytes() for name in COLUMNS)
            found[position] = (int(micro.rows[i]), columns, tuple(drawn))
    return found


def collect(
    table: Table, world_size: int, micro: int, iterations: int, start: int = 0, **plan
) -> list[tuple[dict, int]]:
    """(samples, digest) of each global batch, put together from all ranks."""
    group = plan.get("coupling_group", 1)
    batches: list[tuple[dict, int]] = [({}, 0) for _ in range(iterations)]
    for rank in range(world_size):
        end = start + iterations * GLOBAL
        with make_feed(
            table, start=start, end=end, rank=rank, world_size=world_size, micro_batch=micro, **plan
        ) as feed:
            for number, iteration in enumerate(feed):
                assert iteration.images_seen == start + number * GLOBAL
                mine = samples(iteration.micro_batches, group)
                assert all(len(m.positions) == micro for m in iteration.micro_batches)
                assert not set(mine) & set(batches[number][0])
                batches[number] = (batches[number][0] | mine, (batches[number][1] + iteration.digest) % 2**64)
    return batches


@pytest.mark.parametrize("group", [1, 2])
def test_ranks_and_micro_batches_change_nothing(table: Table, group: int) -> None:
    expected = collect(table, 1, GLOBAL, 8, coupling_group=group)
    assert [sorted(found) for found, _ in expected] == [list(range(i * 16, i * 16 + 16)) for i in range(8)]
    for world_size, micro in [(1, 2), (1, 4), (2, 8), (2, 2), (4, 4), (4, 2)]:
        assert collect(table, world_size, micro, 8, coupling_group=group) == expected, (world_size, micro)
    assert len({digest for _, digest in expected}) == 8


def test_one_sample_per_rank(table: Table) -> None:
    assert collect(table, 16, 1, 2) == collect(table, 1, 16, 2)


@pytest.mark.parametrize("start", [16, 48, 64, 160, 16 * 10**9])
def test_starting_anywhere_gives_the_same_stream(table: Table, start: int) -> None:
    begin = max(0, start - 48)
    before = collect(table, 1, 4, (start - begin) // GLOBAL + 3, start=begin)
    assert collect(table, 2, 4, 3, start=start) == before[-3:]


def test_content_is_what_table_order_and_streams_say(table: Table) -> None:
    """Independent of the feed's own cutting: rows, columns and draws by their definitions, over an epoch boundary."""
    order = BlockShuffle(table.shard_rows, SEED, 3)
    with make_feed(table, start=48, end=64, k=2, coupling_group=2) as feed:
        iteration = next(feed)
    assert iteration.images_seen == 48
    for number, micro in enumerate(iteration.micro_batches):
        positions = np.arange(48 + 4 * number, 52 + 4 * number)
        rows = order.rows(positions)
        assert np.array_equal(micro.positions, positions) and np.array_equal(micro.rows, rows)
        expected = table.read(rows, COLUMNS)
        assert all(torch.equal(micro.batch[name], expected[name]) for name in COLUMNS)
        noise = Stream(SEED, "train/main/noise")
        assert torch.equal(
            micro.draws["main"]["noise"], torch.stack([noise.draw(Draw((3, 4)), int(p), 2) for p in positions])
        )
        shared = Stream(SEED, "train/main/shared")
        groups = positions[::2] // 2
        wanted = torch.stack([shared.draw(Draw((2,), Integers(0, 1000)), int(g), 2) for g in groups])
        assert torch.equal(micro.draws["main"]["shared"], wanted)
        assert "second" not in micro.draws
    assert order.rows(np.arange(48, 50)).tolist() != order.rows(np.arange(50, 52)).tolist()


def test_each_epoch_shows_each_row_once(table: Table) -> None:
    found: dict[int, tuple] = {}
    for batch, _ in collect(table, 1, 16, 50):  # 800 positions = 16 epochs of 50 rows
        found |= batch
    rows = np.array([found[position][0] for position in range(800)]).reshape(16, 50)
    assert np.array_equal(np.sort(rows, axis=1), np.tile(np.arange(50), (16, 1)))


def test_purposes_names_counter_and_seed_have_their_own_noise(table: Table) -> None:
    def noise(k: int = 0, purpose: str = "main", name: str = "noise") -> bytes:
        with make_feed(table, end=GLOBAL, k=k, draws=lambda _: [(purpose, {name: Draw((3, 4))})]) as feed:
            micro = next(feed).micro_batches[0]
            return micro.draws[purpose][name].numpy().tobytes()

    assert len({noise(), noise(k=1), noise(purpose="second"), noise(name="other")}) == 4
    assert noise() == noise()


def test_digest_sees_positions_rows_and_every_draw(table: Table) -> None:
    def digest(draws=turn_draws, start: int = 0, k: int = 0) -> int:
        with make_feed(table, start=start, end=start + GLOBAL, k=k, draws=draws) as feed:
            return next(feed).digest

    def fewer(images_seen: int) -> Sequence[tuple[str, Mapping[str, Draw]]]:
        return turn_draws(images_seen)[:1]

    assert len({digest(), digest(fewer), digest(start=GLOBAL), digest(k=1), digest(lambda _: [])}) == 5
    other_rows = BlockShuffle(table.shard_rows, SEED + 1, 3)
    plan = FeedPlan(SEED, GLOBAL, 4, 0, 1, COLUMNS)
    with Feed(table, other_rows, plan, turn_draws, 0, 0, GLOBAL) as feed:
        assert next(feed).digest != digest()


def test_pinned_digest(table: Table) -> None:
    """Digests are compared across versions of this program."""
    with make_feed(table, end=2 * GLOBAL, coupling_group=2) as feed:
        assert [iteration.digest for iteration in feed] == PINNED_DIGESTS


def test_micro_batches_are_views_of_one_read(table: Table) -> None:
    with make_feed(table, end=GLOBAL) as feed:
        micros = next(feed).micro_batches
    for pick in (lambda m: m.batch["pixels"], lambda m: m.draws["main"]["noise"]):
        assert len({pick(micro).untyped_storage().data_ptr() for micro in micros}) == 1


def test_the_end_is_the_end(table: Table) -> None:
    feed = make_feed(table, end=2 * GLOBAL)
    assert [iteration.images_seen for iteration in feed] == [0, 16]
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(feed)
    feed.close()
    assert list(make_feed(table, start=32, end=32)) == []


class Broken(Exception):
    """Something unexpected."""


@pytest.mark.parametrize("error", [Broken("boom"), DataError("shard x is missing")])
def test_an_error_in_the_thread_surfaces_in_its_place(table: Table, error: Exception) -> None:
    def draws(images_seen: int) -> Sequence[tuple[str, Mapping[str, Draw]]]:
        if images_seen >= 3 * GLOBAL:
            raise error
        return turn_draws(images_seen)

    feed = make_feed(table, draws=draws)
    assert [next(feed).images_seen for _ in range(3)] == [0, 16, 32]
    for _ in range(2):
        with pytest.raises(type(error), match=str(error)):
            next(feed)
    feed.close()


def test_a_damaged_shard_surfaces(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    write_table(
        folder, {"pixels": torch.zeros(50, 1, dtype=torch.uint8), "labels": torch.zeros(50).long()}, shard_rows=7
    )
    table = Table.open(folder)
    (folder / "shard_00003.pt").write_bytes(b"short")
    with make_feed(table) as feed, pytest.raises(DataError, match=r"shard_00003\.pt has 5 bytes"):
        for _ in range(10):
            next(feed)


def feed_threads() -> int:
    return sum(thread.name == "feed" for thread in threading.enumerate())


def test_close_joins_the_thread(table: Table) -> None:
    before = feed_threads()
    for taken in (0, 1, 7):
        feed = make_feed(table, prefetch=2)
        for _ in range(taken):
            next(feed)
        feed.close()
        feed.close()
        assert feed_threads() == before
        with pytest.raises(StopIteration):
            next(feed)


def test_prefetch_is_bounded_and_waiting_is_counted(table: Table) -> None:
    asked: list[int] = []

    def draws(images_seen: int) -> Sequence[tuple[str, Mapping[str, Draw]]]:
        asked.append(images_seen)
        return []

    with make_feed(table, draws=draws, prefetch=2) as feed:
        deadline = time.monotonic() + 10
        while len(asked) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert asked == [0, 16, 32]  # two ready, one in the thread's hand

    def slow(images_seen: int) -> Sequence[tuple[str, Mapping[str, Draw]]]:
        time.sleep(0.1)
        return []

    with make_feed(table, draws=slow) as feed:
        next(feed)
        assert feed.wait_s > 0.05


def test_a_forked_child_does_not_wait_for_ever(table: Table) -> None:
    """A fork copies the feed without its thread: the child must get an error, not silence."""
    with make_feed(table, prefetch=1) as feed:
        next(feed)
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            try:
                for _ in range(5):
                    next(feed)
            except AssertionError:
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world_size": 3}, r"train\.global_batch 16 is not a multiple of the 3 ranks"),
        ({"micro_batch": 5}, r"train\.micro_batch 5 does not divide the 16 samples"),
        ({"micro_batch": 8, "world_size": 4}, r"train\.micro_batch 8 does not divide the 4 samples"),
        ({"coupling_group": 3}, r"train\.micro_batch 4 is not a multiple of train\.coupling_group 3"),
        ({"micro_batch": 2, "coupling_group": 4}, "whole groups"),
        ({"rank": 1}, "rank 1 is not one of 1 ranks"),
        ({"prefetch": 0}, "prefetch must be at least 1"),
        ({"global_batch": 0}, "global_batch must be at least 1"),
    ],
)
def test_plans_that_cannot_be_cut(table: Table, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_feed(table, **changes)


def test_ends_off_the_grid(table: Table) -> None:
    with pytest.raises(UserError, match="not a whole number of global batches of 16"):
        make_feed(table, end=40)
    with pytest.raises(UserError, match="grid of coupling groups"):
        make_feed(table, start=3, coupling_group=2)
    with pytest.raises(UserError, match="grid"):
        make_feed(table, start=-16)


def test_two_turns_may_not_share_a_purpose(table: Table) -> None:
    with (
        make_feed(table, draws=lambda _: [("main", {}), ("main", {})]) as feed,
        pytest.raises(AssertionError, match="share the purpose 'main'"),
    ):
        next(feed)


def test_iteration_is_what_the_loop_reads(table: Table) -> None:
    with make_feed(table, end=GLOBAL, draws=lambda _: []) as feed:
        iteration = next(feed)
    assert isinstance(iteration, Iteration)
    assert 0 <= iteration.digest < 2**64
    assert iteration.micro_batches[0].draws == {}
