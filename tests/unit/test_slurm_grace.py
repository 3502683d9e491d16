"""The grace contract: the sentences of a run that fits, one that does not, and one that nobody has measured."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_slurm import EXPERIMENT

from hpc_gen.config import loader
from hpc_gen.runtime.fence import claim_attempt
from hpc_gen.runtime.journal import Journal
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import run_setup
from hpc_gen.stages.save_interval import Cost
from slurm import grace

QUICK = Cost(stall_s=0.1, save_s=2.0, step_s=0.5, images_per_s=10.0, saves=3)
SLOW = Cost(stall_s=0.1, save_s=8.0, step_s=0.5, images_per_s=10.0, saves=3)
HOPELESS = Cost(stall_s=0.1, save_s=80.0, step_s=0.5, images_per_s=10.0, saves=3)


def test_a_save_that_fits() -> None:
    assert grace.fits(QUICK, 10)
    assert grace.judge(QUICK, 10, 640) == (
        "a preemption leaves time to save: a step of 0.5 s, a save under way and one more of 2 s each: 4.5 s at worst, of "
        "10 s of grace"
    )


def test_a_save_that_fits_unless_it_meets_another() -> None:
    assert not grace.fits(SLOW, 10)
    assert grace.judge(SLOW, 10, 640) == (
        "A PREEMPTION MAY COME TOO FAST TO SAVE: a step of 0.5 s, a save under way and one more of 8 s each: 16.5 s at "
        "worst, and the grace is 10 s; most saves fit (they take 8.5 s), one that meets a save under way does not. Then up "
        "to 1m 04s of training is done again. What would help: a grace time of 16 s (GraceTime of the partition), or more "
        "ranks, which share a save, or fewer images per save"
    )


def test_a_save_that_never_fits() -> None:
    told = grace.judge(HOPELESS, 10, None)
    assert "even a single save takes 80.5 s. Then what came after the last save is done again." in told
    assert "fewer images" not in told


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return run_setup.prepare_run(loader.loads(EXPERIMENT), tmp_path / "w")


def test_before_and_after_a_measurement(run: RunFolder) -> None:
    assert grace.sentence(run, 10) == (
        "not measured yet whether a save fits into the grace time of 10 s; later starts will tell"
    )
    journal = Journal(run, claim_attempt(run, "train"), "train")
    journal.event("interval", images=160, productive_s=5.0, data_wait_s=0.0, save_stall_s=0.0, other_s=0.0)
    journal.event("save_committed", images_seen=160, bytes=1, stall_s=0.5, write_s=1.5)
    journal.close()
    assert grace.sentence(run, 10) == grace.judge(QUICK, 10, 16)
    assert grace.sentence(run, 3).startswith("A PREEMPTION MAY COME TOO FAST TO SAVE")


def test_a_run_that_cannot_be_read_keeps_nobody_from_submitting(run: RunFolder) -> None:
    run.hashes_path.unlink()
    assert grace.sentence(run, 10).startswith("the grace time cannot be judged: ")
