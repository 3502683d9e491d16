"""One training that passes from engine to engine: nothing is converted, for all of them write and read one layout.

Each leg is a fork with another `train.engine` on another number of ranks (gloo, forked from one warm process). At the end
weights, averages, optimizer state and digest are those of one ddp process that was never moved.
"""

from __future__ import annotations

from collections.abc import Iterator

import experiments
import pytest
import torch
from engine_matrix import ENGINES, STANDARD
from experiments import Workspace
from warm_ranks import WarmRanks, output

from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import checkpoint_tools, weights_transfer
from hpc_gen.stages.fork import fork
from hpc_gen.training.checkpoint import manifest, read, storage

LEG = 32  # images: one step, then a checkpoint
TOUR = (("ddp", 2), ("fsdp z3", 4), ("deepspeed z2", 2), ("fsdp z2", 1), ("deepspeed z3", 2), ("ddp", 1))
TEXT = STANDARD.replace("total_images: 128", f"total_images: {LEG * len(TOUR)}").replace(
    "  validate: {every_images: 64, num_images: 24}\n", ""
).replace("save_every: 64", f"save_every: {LEG}")  # fmt: skip
RESET = ("train.engine.name=ddp", "train.engine.stage=null")


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmRanks]:
    with WarmRanks() as ranks:
        yield ranks


@pytest.fixture(scope="module")
def space() -> Iterator[Workspace]:
    with experiments.scratch_folder() as folder:
        yield experiments.make_workspace(folder)


@pytest.fixture(scope="module")
def legs(warm: WarmRanks, space: Workspace) -> list[RunFolder]:
    """The runs of the tour, each forked from the one before."""
    found: list[RunFolder] = []
    for number, (engine, ranks) in enumerate(TOUR, 1):
        name, settings = f"leg{number}", {**dict(each.split("=") for each in (*RESET, *ENGINES[engine]))}
        overrides = [f"{key}={value}" for key, value in settings.items()]
        if not found:
            run = space.run(name, *overrides, text=TEXT)
        else:
            run = fork(found[-1], name, overrides, lambda line: None)
        stop = f"train.stop_at_images={LEG * number}"
        assert warm.train(run, ranks, [stop, f"train.ranks={ranks}"]) == [0] * ranks, output(run)
        found.append(run)
    return found


@pytest.mark.timeout(600)
def test_a_training_that_changes_engine_at_every_step_is_that_of_one_process(
    warm: WarmRanks, space: Workspace, legs: list[RunFolder]
) -> None:
    alone = space.run("alone", text=TEXT)
    assert warm.train(alone, 1) == [0], output(alone)
    moved, whole = read.newest(legs[-1]), read.newest(alone)
    assert moved.images_seen == whole.images_seen == LEG * len(TOUR)
    assert manifest.read(moved.path).facts["digest"] == manifest.read(whole.path).facts["digest"]
    ours, expected = storage.load(moved.path), storage.load(whole.path)
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        if not name.startswith("train/window"):
            torch.testing.assert_close(
                ours[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
            )


def test_every_engine_writes_the_same_names_shapes_and_types(legs: list[RunFolder]) -> None:
    found = [read.newest(run) for run in legs]
    assert [info.world_size for info in found] == [ranks for _, ranks in TOUR]
    assert [info.engine for info in found] == [engine.partition(" ")[0] for engine, _ in TOUR]
    kinds = [
        {name: kind for name, kind in storage.keys(info.path).items() if not name.startswith("train/")}
        for info in found
    ]
    assert all(each == kinds[0] for each in kinds)
    for info in found:
        parts = len(list(info.path.glob("__*_0.distcp")))
        assert read.verify(info.path) == [] and parts == info.world_size


def test_what_leaves_the_chain_is_the_same_from_any_engine(legs: list[RunFolder]) -> None:
    """Merged, exported, read by sampling: whole tensors, however they were cut."""
    for run in legs:
        merged = checkpoint_tools.convert(run, lambda line: None)
        state, info = storage.load(merged), read.newest(run)
        assert all(torch.equal(state[name], tensor) for name, tensor in storage.load(info.path).items())
        weights = read.load_role(info.path, read.roles(info.path)[0])
        assert all(tensor.isfinite().all() for tensor in weights.values())
        target = weights_transfer.export_weights(run, lambda line: None)
        assert target.is_file()
