"""Previews, validation and evaluation on real gloo ranks: the same on any number of them, and stops that all take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import engine_matrix
import experiments
import pytest
from experiments import Workspace
from warm_ranks import WarmRanks, output

from hpc_gen.runtime.errors import ExitCode
from hpc_gen.runtime.journal import Event, read
from hpc_gen.runtime.run_folder import RunFolder

# a rate at which weights hardly move, so that those of other world sizes do not differ in the last bits
STILL = (
    "train.optimizer.lr=1.0e-12",
    "train.total_images=16",
    "train.validate={every_images: 16, num_images: 24}",
    "train.preview={every_images: 16, labels: [0, 1, 2, 3, 0], batch: 2, settings: {steps: 3}}",
    "train.evaluate={num_images: 12, batch: 4, settings: {steps: 2}}",
    "evaluate={metrics: [fid, kid, prc], extractor: {name: random-conv}, kid_subset_size: 6, batch: 4, "
    "reference: {table: tables/toyval, rows: 14}}",
)


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmRanks]:
    with WarmRanks() as ranks:
        yield ranks


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return experiments.make_workspace(tmp_path_factory.mktemp("shelf"))


@pytest.fixture(scope="module")
def alone(shelf: Workspace, warm: WarmRanks) -> RunFolder:
    run = shelf.run("alone", *STILL)
    assert warm.train(run, 1) == [0], output(run)
    return run


def numbers(run: RunFolder) -> dict[str, float]:
    """What the row at the end says of validation and evaluation."""
    (place, data) = experiments.rows(run)[-1]
    assert place == 16
    return {name: value for name, value in data.items() if name.startswith(("evaluate/", "validation/"))}


def events(run: RunFolder, kind: str) -> list[Event]:
    return [event for event in read(run) if event.kind == kind]


def assert_as_alone(run: RunFolder, alone: RunFolder) -> None:
    assert experiments.contents(run.previews) == experiments.contents(alone.previews)
    assert len(experiments.contents(run.previews)) == 6
    mine, theirs = numbers(run), numbers(alone)
    assert {"evaluate/fid", "evaluate/kid_mean", "evaluate/precision", "validation/mse"} <= mine.keys()
    assert mine == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_same_on_any_number_of_ranks(shelf: Workspace, warm: WarmRanks, alone: RunFolder, world_size: int) -> None:
    """4 ranks have fewer batches than ranks: some make padding only."""
    run = shelf.run(f"ranks{world_size}", *STILL)
    assert warm.train(run, world_size) == [0] * world_size, output(run)
    assert_as_alone(run, alone)


@pytest.mark.parametrize("engine", ["fsdp z3", "deepspeed z3", "tp 2"])
def test_the_same_under_engines_that_shard_the_weights(
    shelf: Workspace, warm: WarmRanks, alone: RunFolder, engine: str
) -> None:
    run = shelf.run(f"under-{engine.replace(' ', '-')}", *STILL, *engine_matrix.overrides(engine, 2))
    assert warm.train(run, 2) == [0, 0], output(run)
    assert_as_alone(run, alone)


# looks of a rank: 2 for the steps, then one per micro-batch of validation, and one at the end of it; then the previews
@pytest.mark.parametrize(("poll", "what"), [(3, "validate"), (6, "preview"), (9, "preview"), (16, "evaluate")])
def test_a_stop_of_one_rank_is_taken_by_all_and_made_up_for(
    shelf: Workspace, warm: WarmRanks, alone: RunFolder, poll: int, what: str
) -> None:
    run = shelf.run(f"cut{poll}", *STILL)
    codes = warm.train(run, 2, fault={"name": "stop at poll", "rank": 1, "poll": poll})
    assert codes == [ExitCode.REQUEUE] * 2, output(run)
    cut = events(run, "cut_short")
    assert {(event.task, event.fields["what"], event.fields["images_seen"]) for event in cut} == {
        (0, what, 16),
        (1, what, 16),
    }
    assert [Path(path).name for path in run.checkpoints.iterdir()] == [f"{16:012d}"]
    assert experiments.rows(run) == []
    assert warm.train(run, 4) == [0] * 4, output(run)
    assert_as_alone(run, alone)


def test_a_failure_of_one_rank_is_told_and_costs_the_picture_only(shelf: Workspace, warm: WarmRanks) -> None:
    """Rank 1 alone meets latents that are not finite: rank 0 does not wait for it for ever, and both go on."""
    run = shelf.run("failure", *STILL, "train.evaluate=null", "train.validate=null", "evaluate=null")
    assert warm.train(run, 2, fault={"name": "diverge", "rank": 1}) == [0, 0], output(run)
    told = {event.task: event.fields["detail"] for event in events(run, "fault")}
    assert "not finite" in told[1] and "another rank failed" in told[0]
    assert not run.previews.exists() and [row[0] for row in experiments.rows(run)] == [16]
