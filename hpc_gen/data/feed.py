"""The feed: micro-batches and all their randomness, prepared one prefetch thread ahead of training.

The thread prepares them itself, which is fastest where rows are mapped files, or has them prepared by processes
(data/workers.py); either way the stream is the same.

Everything an iteration needs is a function of (seed, images_seen, rank, world size): the feed has no state to save,
and starting it at any image gives the same stream. Rank r of W holds the contiguous positions
[images_seen + r*G/W, images_seen + (r+1)*G/W) of a global batch of G, cut into micro-batches.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
from torch import Tensor

from hpc_gen.data.ordered import Order, OrderedReader
from hpc_gen.data.ptshard import as_bytes
from hpc_gen.data.table import Table
from hpc_gen.data.workers import in_workers
from hpc_gen.runtime import clock
from hpc_gen.runtime.errors import UserError
from hpc_gen.runtime.randomness import Draw, Stream

Int64Array = npt.NDArray[np.int64]
TurnDraws = Callable[[int], Sequence[tuple[str, Mapping[str, Draw]]]]

POLL_S = 0.1  # how often a waiting side looks whether the other has ended


@dataclass(frozen=True)
class FeedPlan:
    """How the global batch lies over ranks. Batch sizes count samples; `prefetch` counts iterations held ready."""

    seed: int
    global_batch: int
    micro_batch: int
    rank: int
    world_size: int
    columns: tuple[str, ...]
    coupling_group: int = 1
    prefetch: int = 4
    workers: int = 0  # processes that prepare iterations for the thread; 0: it prepares them itself

    def __post_init__(self) -> None:
        """Raise UserError when the batch cannot be cut as asked."""
        for name in ("global_batch", "micro_batch", "world_size", "coupling_group", "prefetch"):
            if getattr(self, name) < 1:
                raise UserError(f"feed: {name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.rank < self.world_size:
            raise UserError(f"feed: rank {self.rank} is not one of {self.world_size} ranks")
        if self.global_batch % self.world_size:
            raise UserError(
                f"train.global_batch {self.global_batch} is not a multiple of the {self.world_size} ranks; "
                "choose another number of ranks"
            )
        if self.share % self.micro_batch:
            raise UserError(
                f"train.micro_batch {self.micro_batch} does not divide the {self.share} samples that each of "
                f"{self.world_size} ranks holds of train.global_batch {self.global_batch}"
            )
        if self.micro_batch % self.coupling_group:
            raise UserError(
                f"train.micro_batch {self.micro_batch} is not a multiple of train.coupling_group "
                f"{self.coupling_group}: a micro-batch must hold whole groups"
            )

    @property
    def share(self) -> int:
        """Samples of a global batch that one rank holds."""
        return self.global_batch // self.world_size


@dataclass(frozen=True)
class MicroBatch:
    """m samples: positions and rows int64 [m]; batch {column: [m, ...]}; draws {purpose: {name: [m, ...]}}.

    Draws with per='group' have one row per coupling group: [m / coupling_group, ...].
    """

    positions: Int64Array
    rows: Int64Array
    batch: dict[str, Tensor]
    draws: dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Iteration:
    """One global batch's share of this rank.

    `images_seen` counts positions done before it. `digest` sums the samples' hashes modulo 2**64: added up over all
    ranks it does not depend on how the batch was cut.
    """

    images_seen: int
    micro_batches: list[MicroBatch]
    digest: int


class Feed:
    """Iterator over `Iteration`s; its one thread reads and draws while the caller trains. Close it when done."""

    def __init__(
        self,
        table: Table,
        order: Order,
        plan: FeedPlan,
        turn_draws: TurnDraws,
        start_images: int,
        draw_counter: int = 0,
        end_images: int | None = None,
        move: Callable[[Iteration], Iteration] | None = None,
    ) -> None:
        """Start the thread at `start_images`; stop before `end_images` (None = endless).

        `move` is applied to every iteration in the thread: what carries it to a device, say (data/dali_feed.py).

        `turn_draws(images_seen)` gives (purpose, draws) of each turn of an iteration; it is called in the thread.
        `draw_counter` is the k of every stream (higher after a rollback, so that the noise is not the same again).
        Raises UserError when start or end do not fall on the grid of batches or coupling groups.
        """
        if start_images < 0 or start_images % plan.coupling_group:
            raise UserError(f"feed: start at image {start_images} is not on the grid of coupling groups")
        if end_images is not None and (end_images - start_images) % plan.global_batch:
            raise UserError(
                f"from image {start_images} to {end_images} is not a whole number of global batches of "
                f"{plan.global_batch}"
            )
        self.wait_s = 0.0  # seconds __next__ has waited, in total
        self._reader, self._plan, self._turn_draws = OrderedReader(table, order, plan.columns), plan, turn_draws
        self._start, self._end, self._draw_counter = start_images, end_images, draw_counter
        self._streams: dict[str, Stream] = {}
        self._queue: queue.Queue[Iteration | BaseException | None] = queue.Queue(plan.prefetch)
        self._closing = threading.Event()
        self._move = move
        self._source = self._prepared() if plan.workers == 0 else in_workers(self.prepare, plan, self._starts())
        self._ended: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="feed", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Iteration]:
        """The feed itself."""
        return self

    def __next__(self) -> Iteration:
        """The next iteration; waits for it. Re-raises what went wrong in the thread; StopIteration at the end."""
        if self._ended is not None:
            raise self._ended
        before = clock.monotonic()
        item = self._take()
        self.wait_s += clock.monotonic() - before
        if isinstance(item, Iteration):
            return item
        self._ended = StopIteration() if item is None else item
        self._thread.join()
        raise self._ended

    def _take(self) -> Iteration | BaseException | None:
        while True:
            try:
                return self._queue.get(timeout=POLL_S)
            except queue.Empty:
                # A fork copies the queue but not the thread: waiting on would be for ever.
                assert self._thread.is_alive() or not self._queue.empty(), "the feed's thread is gone (a fork?)"

    def close(self) -> None:
        """Stop the thread and wait for it; safe to call twice."""
        self._closing.set()
        self._thread.join()
        self._ended = self._ended or StopIteration()
        while not self._queue.empty():
            self._queue.get_nowait()

    def __enter__(self) -> Feed:
        """Use as a context manager to have it closed."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close."""
        self.close()

    def _work(self) -> None:
        """Body of the thread: prepare iterations until the end, an error, or close()."""
        try:
            for iteration in self._source:
                self._put(iteration if self._move is None else self._move(iteration))
                if self._closing.is_set():
                    break
            self._put(None)
        except BaseException as error:  # handed to the caller, who re-raises it in __next__
            self._put(error)
        finally:
            self._source.close()  # ends the worker processes

    def _starts(self) -> Iterator[int]:
        """Images seen before each iteration."""
        images_seen = self._start
        while self._end is None or images_seen < self._end:
            yield images_seen
            images_seen += self._plan.global_batch

    def _prepared(self) -> Generator[Iteration, None, None]:
        for images_seen in self._starts():
            yield self.prepare(images_seen)

    def _put(self, item: Iteration | BaseException | None) -> None:
        while not self._closing.is_set():
            try:
                self._queue.put(item, timeout=POLL_S)
                return
            except queue.Full:
                continue

    def prepare(self, images_seen: int) -> Iteration:
        """This rank's share of the global batch that begins at `images_seen`; a pure function of its argument."""
        plan = self._plan
        first = images_seen + plan.rank * plan.share
        positions = np.arange(first, first + plan.share, dtype=np.int64)
        rows, batch = self._reader.read(first, first + plan.share)
        groups = positions[:: plan.coupling_group] // plan.coupling_group
        draws: dict[str, dict[str, Tensor]] = {}
        per_group: list[tuple[Tensor, bool]] = []
        for purpose, wanted in self._turn_draws(images_seen):
            assert purpose not in draws, f"two turns of one iteration share the purpose {purpose!r}"
            draws[purpose] = {}
            for name, draw in wanted.items():
                ids = groups if draw.per == "group" else positions
                drawn = self._stream(f"train/{purpose}/{name}").batch(draw, ids.tolist(), self._draw_counter)
                draws[purpose][name] = drawn
                per_group.append((drawn, draw.per == "group"))
        micro_batches = [
            self._cut(begin, positions, rows, batch, draws) for begin in range(0, plan.share, plan.micro_batch)
        ]
        return Iteration(images_seen, micro_batches, _digest(positions, rows, per_group, plan.coupling_group))

    def _stream(self, purpose: str) -> Stream:
        if purpose not in self._streams:
            self._streams[purpose] = Stream(self._plan.seed, purpose)
        return self._streams[purpose]

    def _cut(
        self,
        begin: int,
        positions: Int64Array,
        rows: Int64Array,
        batch: dict[str, Tensor],
        draws: dict[str, dict[str, Tensor]],
    ) -> MicroBatch:
        """Views of one micro-batch; nothing is copied."""
        end = begin + self._plan.micro_batch
        group = self._plan.coupling_group

        def part(drawn: Tensor) -> Tensor:
            return drawn[begin:end] if len(drawn) == len(positions) else drawn[begin // group : end // group]

        return MicroBatch(
            positions[begin:end],
            rows[begin:end],
            {name: column[begin:end] for name, column in batch.items()},
            {purpose: {name: part(t) for name, t in named.items()} for purpose, named in draws.items()},
        )


def _digest(positions: Int64Array, rows: Int64Array, drawn: Sequence[tuple[Tensor, bool]], coupling_group: int) -> int:
    """Sum modulo 2**64 of an 8-byte blake2b per sample over (position, row, its draws), little-endian.

    A draw of a group is hashed once, with the group's first sample.
    """
    heads = np.stack([positions, rows], axis=1).astype("<i8").tobytes()
    parts: list[tuple[memoryview, int, bool]] = []
    for tensor, is_group in drawn:
        as_2d = as_bytes(tensor.contiguous())
        parts.append((as_2d.numpy().reshape(-1).data, as_2d.shape[1], is_group))
    total = 0
    for sample in range(len(positions)):
        hasher = blake2b(heads[16 * sample : 16 * sample + 16], digest_size=8)
        for view, size, is_group in parts:
            if not is_group:
                hasher.update(view[sample * size : (sample + 1) * size])
            elif sample % coupling_group == 0:
                group = sample // coupling_group
                hasher.update(view[group * size : (group + 1) * size])
        total += int.from_bytes(hasher.digest(), "little")
    return total % 2**64
