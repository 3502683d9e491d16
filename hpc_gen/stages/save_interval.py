"""How often training saves where the config leaves it open, and what a save costs: both measured by earlier attempts.

The interval is that of Young (1974) and Daly (2006): sqrt(2 * C * M), for a cost C of one save, in seconds that
training waits for it, and a mean time M between interruptions. Saves are written beside the training, so C is small; an
interval is never so short that a save would wait for the one before it.

The same measurements answer whether a preemption leaves time to save (slurm/grace.py).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpc_gen.runtime import journal
from hpc_gen.runtime.errors import ExitCode
from hpc_gen.runtime.journal import Attempt, Event
from hpc_gen.runtime.run_folder import RunFolder

if TYPE_CHECKING:
    from hpc_gen.config.train import TrainConfig

FIRST_SHARE = 20  # before anything is measured: so many saves in the whole training
CALM_S = 24 * 3600.0  # mean time between interruptions where none has been seen
SHORTEST_S = 60.0
NEWEST_ATTEMPTS = 5
NEWEST = 20  # saves and intervals that are looked at: what they cost of late


@dataclass(frozen=True)
class Cost:
    """Measured in earlier attempts, of late: the longest of the newest NEWEST saves and steps, in seconds.

    `stall_s`: training waits for a save; `save_s`: until it is committed; `step_s`: one iteration, after which ranks
    agree on a stop; `images_per_s`: of all ranks together; `saves`: how many of them were looked at.
    """

    stall_s: float
    save_s: float
    step_s: float
    images_per_s: float
    saves: int

    @property
    def leave_s(self) -> float:
        """From a signal to the state being saved, at worst: the iteration in hand, a save under way, and one more."""
        return self.step_s + 2 * self.save_s


def cost(run: RunFolder, global_batch: int) -> Cost | None:
    """What saves and steps of a run cost; None before a save was measured.

    Read from the ends of the files of its newest attempts: a preempted one has saved at its end, and the journals of a
    long run are large.
    """
    newest = sorted(int(path.name.partition("_")[0]) for path in run.journal.glob("*_train_0.jsonl"))[-NEWEST_ATTEMPTS:]
    events = [event for attempt in newest for event in journal.ends(run, attempt) if event.stage == "train"]
    return cost_of(events, global_batch)


def cost_of(events: Iterable[Event], global_batch: int) -> Cost | None:
    """As `cost`, from events of training. A save is as slow as its slowest rank."""
    stalls: dict[tuple[int, int], float] = defaultdict(float)
    writes: dict[tuple[int, int], float] = defaultdict(float)
    steps: list[tuple[float, float]] = []  # seconds of an iteration, images per second
    for event in events:
        fields = event.fields
        if event.kind == "save_committed" and "write_s" in fields:
            key = (event.attempt, int(fields["images_seen"]))
            stalls[key] = max(stalls[key], float(fields["stall_s"]))
            writes[key] = max(writes[key], float(fields["stall_s"]) + float(fields["write_s"]))
        elif event.kind == "interval" and event.task == 0 and fields.get("images"):
            busy_s = float(fields["productive_s"]) + float(fields["data_wait_s"])
            if busy_s > 0:
                images = int(fields["images"])
                steps.append((busy_s * global_batch / images, images / busy_s))
    if not writes or not steps:
        return None
    newest = sorted(writes)[-NEWEST:]
    late = steps[-NEWEST:]
    return Cost(
        max(stalls[key] for key in newest),
        max(writes[key] for key in newest),
        max(step_s for step_s, _ in late),
        sum(rate for _, rate in late) / len(late),
        len(newest),
    )


def between_interruptions_s(attempts: Iterable[Attempt]) -> float:
    """Mean seconds of training between two interruptions; CALM_S where none was seen yet."""
    mine = [attempt for attempt in attempts if attempt.stage == "train"]
    held_s = sum(attempt.last_seen - attempt.start for attempt in mine)
    interrupted = sum(attempt.exit_code not in (ExitCode.DONE, ExitCode.STOPPED) for attempt in mine)
    return held_s / interrupted if interrupted and held_s > 0 else CALM_S


def interval_s(measured: Cost, between_s: float) -> float:
    """Seconds between two saves: the formula's, no shorter than two saves take, nor than SHORTEST_S."""
    return max(math.sqrt(2 * max(measured.stall_s, 1e-3) * between_s), 2 * measured.save_s, SHORTEST_S)


def in_images(seconds: float, measured: Cost, config: TrainConfig) -> int:
    """An interval in images: whole global batches, and a divisor of `keep_every`, so that what is kept is saved."""
    return _fitting(seconds * measured.images_per_s, config)


def first(config: TrainConfig) -> int:
    """The interval before anything is measured."""
    return _fitting(config.end_images / FIRST_SHARE, config)


def _fitting(images: float, config: TrainConfig) -> int:
    batch = config.global_batch
    batches = max(1, min(round(images / batch), config.end_images // batch))
    if config.keep_every is not None:
        whole = config.keep_every // batch
        batches = max(divisor for divisor in range(1, min(batches, whole) + 1) if whole % divisor == 0)
    return batches * batch


def choose(run: RunFolder, config: TrainConfig) -> tuple[int, str]:
    """The interval of this attempt in images, and where it comes from, in words. For rank 0: ranks must agree on it."""
    if config.save_every is not None:
        return config.save_every, "as configured"
    measured = cost(run, config.global_batch)
    if measured is None:
        images = first(config)
        return images, f"a save every {images:,} images until their cost is measured"
    between_s = between_interruptions_s(journal.attempts(run))
    images = in_images(interval_s(measured, between_s), measured, config)
    return images, (
        f"a save every {images:,} images: it stalls training for {measured.stall_s:.2g} s and is written in "
        f"{measured.save_s:.2g} s, and {_hours(between_s)} passed between interruptions"
    )


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"
