"""(b) Reading ptshard in training order against a numpy memmap; memory over an epoch; the first batch after a resume.

The table is the one of specs/dependencies.md section 7: 20,000 samples that store a latent and its flip, 16 KiB per
row, of which one, 8 KiB, is delivered in batches of 64. The page cache is warm for all.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from measure import Spread, Table, by_turns
from torch import Tensor

from hpc_gen.data import table as reading
from hpc_gen.data.feed import Feed, FeedPlan
from hpc_gen.data.order import BlockShuffle
from hpc_gen.data.ordered import OrderedReader
from hpc_gen.data.write import write_table

SHAPE = (16, 16, 16)  # float16: 8 KiB
BATCH = 64
SHARD_ROWS, SHUFFLE_SHARDS = 1024, 16  # the defaults of encode.shard_rows and data.shuffle_shards
SEED = 0


def bench(quick: bool) -> list[Table]:
    """Three tables: speed, memory, resume."""
    torch.set_num_threads(1)
    rows, rounds = (2_048, 3) if quick else (20_000, 5)
    with tempfile.TemporaryDirectory(prefix="hpc-gen-bench-") as name:
        folder = Path(name)
        moments = torch.randn((rows, *SHAPE), generator=torch.Generator().manual_seed(SEED)).half()
        flipped = moments.flip(-1).contiguous()
        write_table(folder / "table", {"moments": moments, "moments_flip": flipped}, shard_rows=SHARD_ROWS)
        np.save(folder / "both.npy", torch.stack([moments, flipped], dim=1).numpy())
        del flipped
        memory = _memory(folder, rows)  # before the others have mapped the same files
        return [_speed(folder, moments, rows, rounds), memory, _resume(folder, rows, rounds)]


def _speed(folder: Path, moments: Tensor, rows: int, rounds: int) -> Table:
    """Samples per second over one epoch, a batch at a time."""
    table = reading.Table.open(folder / "table")
    both = np.load(folder / "both.npy", mmap_mode="r")
    flat = both.reshape(2 * rows, -1)  # row 2 n: the latent of sample n
    random = np.random.default_rng(SEED)
    batches = rows // BATCH

    def ptshard() -> Iterator[Tensor]:
        reader = OrderedReader(table, BlockShuffle(table.shard_rows, SEED, SHUFFLE_SHARDS), ("moments",))
        for begin in range(0, batches * BATCH, BATCH):
            yield reader.read(begin, begin + BATCH)[1]["moments"]

    def feed() -> Iterator[Tensor]:
        order = BlockShuffle(table.shard_rows, SEED, SHUFFLE_SHARDS)
        plan = FeedPlan(SEED, BATCH, BATCH, rank=0, world_size=1, columns=("moments",))
        with Feed(table, order, plan, lambda images_seen: [], 0, end_images=batches * BATCH) as found:
            for iteration in found:
                yield iteration.micro_batches[0].batch["moments"]

    def shuffled() -> Iterator[np.ndarray]:
        order = random.permutation(rows)
        for begin in range(0, batches * BATCH, BATCH):
            yield order[begin : begin + BATCH]

    def memmap_index() -> Iterator[Tensor]:
        for picked in shuffled():
            yield torch.from_numpy(both[picked, 0])

    def memmap_take() -> Iterator[Tensor]:
        for picked in shuffled():
            yield torch.from_numpy(np.take(flat, 2 * picked, axis=0).reshape(-1, *SHAPE))

    def memory() -> Iterator[Tensor]:
        for picked in shuffled():
            yield moments[torch.from_numpy(picked)]

    _check_rows(table, moments, rows)
    ways: dict[str, Callable[[], Iterator[Tensor]]] = {
        "ptshard, block shuffle, in-process": ptshard,
        "ptshard through the feed (one thread, order digest), no draws": feed,
        "numpy memmap, batch gather memmap[rows, 0], fully random": memmap_index,
        "numpy memmap, batch gather by np.take of flat rows, fully random": memmap_take,
        "limit: gather of the same rows from memory by torch": memory,
    }
    found = by_turns({name: _consumer(way) for name, way in ways.items()}, rounds)
    names = list(ways)
    best = min(names[2:4], key=lambda name: sorted(found[name].values)[rounds // 2])
    result = Table(
        "Reading a table in training order",
        f"{rows:,} samples, 16 KiB per row on disk (latent and flip, float16), one of the two delivered (8 KiB), batch "
        f"{BATCH}, shards of {SHARD_ROWS} rows, blocks of {SHUFFLE_SHARDS} shards; {rounds} rounds of one epoch by "
        "turns, warm page cache, one thread. Ratio: samples/s over the faster memmap row's (issue 4: at least 1).",
        ("way", "samples/s", "ratio to memmap"),
    )
    for name in names:
        result.add(name, found[name].per(batches * BATCH).show("{:,.0f}"), found[best].over(found[name]).show())
    return result


def _check_rows(table: reading.Table, moments: Tensor, rows: int) -> None:
    """What is timed is also right: every row of an epoch once, bit for bit."""
    order = BlockShuffle(table.shard_rows, SEED, SHUFFLE_SHARDS)
    seen = order.rows(np.arange(rows))
    assert np.array_equal(np.sort(seen), np.arange(rows))
    for begin in range(0, rows, 1_000):
        picked = seen[begin : begin + 1_000]
        assert torch.equal(table.read(picked, ("moments",))["moments"], moments[torch.from_numpy(picked)])


def _consumer(way: Callable[[], Iterator[Tensor]]) -> Callable[[], None]:
    def consume() -> None:
        for _ in way():
            pass

    return consume


def _memory(folder: Path, rows: int) -> Table:
    """Memory of this process along two epochs of a table that is opened anew, in blocks of few shards."""
    table = reading.Table.open(folder / "table")
    blocks = 2 if table.rows < 10_000 else 4
    reader = OrderedReader(table, BlockShuffle(table.shard_rows, SEED, len(table.shard_rows) // blocks), ("moments",))
    result = Table(
        "Memory over an epoch",
        f"The same table read in training order, in blocks of {len(table.shard_rows) // blocks} of its "
        f"{len(table.shard_rows)} shards. Private: anonymous memory of the process. Mapped: pages of files in its "
        "resident memory, those of the page cache included; shards of blocks that are done are let go. Both must stay "
        "flat from the second block on.",
        ("place", "shards mapped", "private, MiB", "change since the start, MiB", "mapped files, MiB"),
    )
    start = _status_mib("RssAnon")
    marks = {int(2 * rows * part / 16) // BATCH * BATCH: f"epoch {part / 8:.2f}" for part in range(17)}
    for begin in range(0, 2 * rows + 1, BATCH):
        if begin in marks:
            private = _status_mib("RssAnon")
            told = f"{private:.1f}", f"{private - start:+.1f}", f"{_status_mib('RssFile'):.0f}"
            result.add(marks[begin], str(table.num_open), *told)
        reader.read(begin, begin + BATCH)
    return result


def _status_mib(name: str) -> float:
    """A line of /proc/self/status in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def _resume(folder: Path, rows: int, rounds: int) -> Table:
    """Seconds from opening the table to the first batch of the feed, at several positions."""
    places = {
        "the start": 0,
        "a quarter of epoch 0": rows // 4,
        "the last batch of epoch 0": rows - BATCH,
        "the middle of epoch 1,000": 1_000 * rows + rows // 2,
        "the middle of epoch 1,000,000": 1_000_000 * rows + rows // 2,
    }
    plan = FeedPlan(SEED, BATCH, BATCH, rank=0, world_size=1, columns=("moments",), prefetch=1)

    def first_batch(position: int) -> float:
        begun = time.perf_counter()
        table = reading.Table.open(folder / "table")
        order = BlockShuffle(table.shard_rows, SEED, SHUFFLE_SHARDS)
        with Feed(table, order, plan, lambda images_seen: [], position) as feed:
            next(feed)
            return time.perf_counter() - begun

    actions = {name: (lambda position=position: first_batch(position)) for name, position in places.items()}
    found: dict[str, Spread] = by_turns(actions, 2 * rounds)
    result = Table(
        "First batch after a resume",
        f"Table, order and feed made anew, the time to the first batch of {BATCH}; {2 * rounds} rounds by turns. It "
        "must not depend on the position.",
        ("resumed at", "ms to the first batch", "ratio to the start"),
    )
    for name in places:
        result.add(name, found[name].show("{:.1f}", 1e3), found[name].over(found["the start"]).show())
    return result
