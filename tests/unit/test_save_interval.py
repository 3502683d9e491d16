"""How often training saves where the config leaves it open: measured costs, the formula, whole batches."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from experiments import TINY
from hypothesis import given
from hypothesis import strategies as st

from hpc_gen.config import loader
from hpc_gen.config.errors import ConfigError
from hpc_gen.config.train import TrainConfig
from hpc_gen.runtime import clock
from hpc_gen.runtime.fence import claim_attempt
from hpc_gen.runtime.journal import Attempt, Journal
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import save_interval
from hpc_gen.stages.save_interval import CALM_S, Cost

MEASURED = Cost(stall_s=0.5, save_s=20.0, step_s=2.0, images_per_s=100.0, saves=5)


def config(*overrides: str) -> TrainConfig:
    """The train section of a tiny experiment whose interval is open; batches of 8 images."""
    train = loader.loads(TINY, ["train.save_every=null", *overrides]).experiment.train
    assert train is not None
    return train


def attempt(number: int, seconds: float, code: int | None) -> Attempt:
    return Attempt(number, "train", 0.0, None, seconds, code, None, None, 1, "n1")


def test_the_formula() -> None:
    assert save_interval.interval_s(MEASURED, 4 * 3600) == pytest.approx(math.sqrt(2 * 0.5 * 4 * 3600))
    assert save_interval.interval_s(MEASURED, 600) == 60  # never more often
    slow = Cost(stall_s=0.5, save_s=200.0, step_s=2.0, images_per_s=100.0, saves=5)
    assert save_interval.interval_s(slow, 3600) == 400  # a save would wait for the one before it


def test_between_interruptions() -> None:
    assert save_interval.between_interruptions_s([]) == CALM_S
    assert save_interval.between_interruptions_s([attempt(1, 900, 0), attempt(2, 900, 87)]) == CALM_S
    preempted = [attempt(1, 900, 85), attempt(2, 2700, None), attempt(3, 3600, 0)]
    assert save_interval.between_interruptions_s(preempted) == 3600
    other = Attempt(4, "sample", 0.0, None, 99.0, 85, None, None, 1, "n1")
    assert save_interval.between_interruptions_s([*preempted, other]) == 3600


def test_in_whole_batches_within_the_training() -> None:
    assert save_interval.in_images(60, MEASURED, config("train.total_images=80000")) == 6000
    assert save_interval.in_images(0.001, MEASURED, config()) == 8
    assert save_interval.in_images(1e6, MEASURED, config()) == 96


@given(st.floats(0.001, 1e5), st.integers(1, 60))
def test_what_is_kept_is_saved(seconds: float, keep: int) -> None:
    train = config("train.total_images=8000", f"train.keep_every={8 * keep}")
    images = save_interval.in_images(seconds, MEASURED, train)
    assert images % 8 == 0 and train.keep_every is not None and train.keep_every % images == 0


def test_a_config_with_an_interval_keeps_it(tmp_path: Path) -> None:
    assert save_interval.choose(RunFolder(tmp_path), config("train.save_every=16")) == (16, "as configured")


def test_before_anything_is_measured(tmp_path: Path) -> None:
    images, why = save_interval.choose(RunFolder(tmp_path), config("train.total_images=1600"))
    assert (images, why) == (80, "a save every 80 images until their cost is measured")


def write(run: RunFolder, begun: float, end: int | None) -> None:
    """An attempt of two ranks with a save and an interval."""
    with clock.use(clock.FakeClock(begun)) as fake:
        number = claim_attempt(run, "train")
        for rank in range(2):
            journal = Journal(run, number, "train", rank)
            journal.event("attempt_start", world_size=2, rank=rank, process_start=begun)
            journal.event("interval", images=800, productive_s=9.0, data_wait_s=1.0, save_stall_s=5.0, other_s=3.0)
            journal.event("save_committed", images_seen=800, bytes=1, stall_s=0.1 + rank, write_s=4.0)
            fake.sleep(1800)  # type: ignore[attr-defined]
            if end is not None:
                journal.event("attempt_end", exit_code=end, cause="SIGTERM", images_seen=800)
            else:
                journal.event("heartbeat")
            journal.close()
            fake.advance(-1800)  # type: ignore[attr-defined]


def test_measured_by_the_slowest_rank(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert save_interval.cost(run, 8) is None
    write(run, 1000.0, 85)
    found = save_interval.cost(run, 8)
    assert found == Cost(stall_s=1.1, save_s=pytest.approx(5.1), step_s=0.1, images_per_s=80.0, saves=1)
    assert found.leave_s == pytest.approx(0.1 + 2 * 5.1)
    images, why = save_interval.choose(run, config("train.total_images=80000"))
    assert images == round(80 * math.sqrt(2 * 1.1 * 1800) / 8) * 8
    assert (
        why
        == f"a save every {images:,} images: it stalls training for 1.1 s and is written in 5.1 s, and 30 min passed between interruptions"
    )


def test_kept_checkpoints_are_whole_batches() -> None:
    with pytest.raises(ConfigError) as caught:
        config("train.keep_every=20")
    assert str(caught.value) == (
        "command line: 'train.keep_every' = 20 is not a multiple of 'train.global_batch' = 8; use 16 or 24"
    )
