"""`train.width`: which numbers of ranks an attempt may have, and which it gets."""

from __future__ import annotations

from pathlib import Path

import experiments
import pytest

from hpc_gen.config.errors import ConfigError
from hpc_gen.config.experiment import TrainConfig
from hpc_gen.runtime.errors import UserError
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.runtime.stop import StopToken
from hpc_gen.stages import runner, train, width

WIDE = ("train.global_batch=16", "train.micro_batch=2")


def config(*overrides: str) -> TrainConfig:
    found = experiments.resolved(*WIDE, *overrides).experiment.train
    assert found is not None
    return found


def test_a_width_is_no_part_of_the_identity() -> None:
    without, given = experiments.resolved(*WIDE), experiments.resolved(*WIDE, "train.width=[1,2,4,8]")
    assert given.identity == without.identity and given.operation != without.operation


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["train.width=[1,2,3]"],
            r"'train.width' allows 3 ranks, but 3 \* 'train.micro_batch' = 3 \* 2 does not divide 'train.global_batch' = "
            r"16; use \[1, 2\]",
        ),
        (["train.width=[16]"], "does not divide 'train.global_batch' = 16; use divisors of 16 / 2"),
        (["train.width=[2,2]"], r"'train.width' = \[2, 2\] names a number of ranks twice; name each once"),
        (
            ["train.width=[1,2]", "train.micro_batch=null"],
            "'train.width' needs 'train.micro_batch': with null .* changes with the number of ranks; set it, as to 8",
        ),
        (
            ["train.width=[1,2]", "train.ranks=4"],
            r"'train.ranks' = 4 is not one of 'train.width' = \[1, 2\]; leave 'train.ranks' out",
        ),
        (
            ["train.width=[2,3]", "train.ranks=2", "train.engine.tensor_parallel=2"],
            r"'train.width' allows 3 ranks, which 'train.engine.tensor_parallel' = 2 or 'train.engine.shards' = None does "
            r"not divide; use \[2\]",
        ),
        (
            ["train.width=[4,6]", "train.ranks=4", "train.engine.name=fsdp", "train.engine.shards=4"],
            "'train.engine.shards' = 4 does not divide",
        ),
        (["train.width=[]"], "train.width"),
        (["train.width=[0]"], "train.width"),
    ],
    ids=["batch", "nothing fits", "twice", "no micro-batch", "other ranks", "teams", "shards", "empty", "zero"],
)
def test_what_cannot_share_out_the_batch_is_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        config(*overrides)


@pytest.mark.parametrize(("places", "ranks"), [(1, 1), (2, 2), (3, 2), (5, 4), (8, 8), (64, 8)])
def test_the_largest_width_that_is_there(places: int, ranks: int) -> None:
    assert width.choose(config("train.width=[8,1,2,4]"), places) == ranks


def test_tensor_parallel_ranks_share_a_sample() -> None:
    """16 images in micro-batches of 2 go over 8 teams, however many ranks a team has."""
    wide = config("train.width=[2,4,16]", "train.ranks=2", "train.engine.tensor_parallel=2")
    assert width.choose(wide, 20) == 16


def test_without_a_width_ranks_say_it() -> None:
    assert width.choose(config("train.ranks=4"), 1) == 4 and width.choose_here(config("train.ranks=4")) == 4
    width.check(config(), 3)  # the launcher's word, as it was


def test_too_little_is_refused_with_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = config("train.width=[2,4]")
    monkeypatch.setattr(width, "num_gpus", lambda: 1)
    with pytest.raises(UserError, match=r"allows no less than 2 ranks, and there are 1 GPUs; ask for more, or allow 1"):
        width.choose_here(wide)
    monkeypatch.setattr(width, "num_gpus", lambda: 5)
    assert width.choose_here(wide) == 4


@pytest.mark.parametrize(("cores", "threads", "ranks"), [(1, 1, 2), (4, 1, 4), (4, 2, 2), (7, 1, 4), (64, 4, 8)])
def test_on_a_cpu_each_rank_gets_its_threads(
    cores: int, threads: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(width, "num_gpus", lambda: 0)
    monkeypatch.setattr(width, "_cores", lambda: cores)
    assert width.choose_here(config("train.width=[2,4,8]", f"train.threads={threads}")) == ranks


@pytest.mark.parametrize(
    ("world_size", "fix"), [(3, "start 2 of them"), (9, "start 4 of them"), (1, "start at least 2")]
)
def test_a_launcher_that_started_another_number_is_refused(world_size: int, fix: str) -> None:
    with pytest.raises(UserError, match=rf"this attempt has {world_size} ranks, and .* allows \[2, 4\]; {fix}"):
        width.check(config("train.width=[2,4]"), world_size)


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_ranks_of_srun_and_torchrun_are_counted_before_an_attempt_is_claimed(
    launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for a meeting of ranks that may not train together, and the run's journal stays as it was."""
    space = experiments.make_workspace(tmp_path)
    run = space.run("wide", *WIDE, "train.width=[1,2]")
    if launcher == "torchrun":
        variables = {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3"}
    else:
        variables = {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "3"}
        variables |= {"SLURM_LOCALID": "1", "SLURM_TASKS_PER_NODE": "3"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    resolved = experiments.resolved(*WIDE, "train.width=[1,2]")
    with pytest.raises(
        UserError, match=r"this attempt has 3 ranks, and 'train.width' allows \[1, 2\]; start 2 of them"
    ):
        train.run_train(run, resolved, tmp_path, StopToken(run))
    assert list(run.journal.iterdir()) == []


def test_the_plan_names_the_ranks_that_would_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(width, "num_gpus", lambda: 0)
    monkeypatch.setattr(width, "_cores", lambda: 3)
    run = RunFolder(tmp_path / "runs" / "wide")
    lines = runner.plan(run, experiments.resolved(*WIDE, "train.width=[1,2,4]"), ["train"])
    assert lines[-1] == "stage       train: 2 ranks, 1 thread each, of [1, 2, 4] allowed"
