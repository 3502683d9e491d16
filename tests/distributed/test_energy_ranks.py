"""The energy variant over ranks: a loss that differentiates inside its forward reduces right and resumes to the bit."""

from __future__ import annotations

from collections.abc import Iterator

import experiments
import pytest
import torch
from experiments import Workspace
from warm_ranks import WarmRanks, output

from hpc_gen.runtime.errors import ExitCode
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.training.checkpoint import storage

# every loss on, a learnable step size in a group of its own, accumulation, several buckets, validation without gradients
ENERGY = experiments.TINY.replace(
    "diffusion_timesteps: 50}",
    "diffusion_timesteps: 50,\n   variant: energy, energy: {grad_multiplier: 30.0, learnable_step_size: true, "
    "step_size: 0.05, step_size_lr_scale: 10.0, contrastive_weight: 0.05}}",
).replace(
    "  global_batch: 8",
    "  global_batch: 16\n  micro_batch: 4\n  engine: {bucket_mb: 0.005}\n  validate: {every_images: 48, num_images: 16}",
)
END = "000000000096"


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmRanks]:
    with WarmRanks() as ranks:
        yield ranks


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return experiments.make_workspace(tmp_path_factory.mktemp("energy"))


@pytest.fixture(scope="module")
def two_ranks(warm: WarmRanks, space: Workspace) -> RunFolder:
    run = space.run("two", "train.ranks=2", text=ENERGY)
    assert warm.train(run, 2) == [0, 0], output(run)
    return run


def test_two_ranks_agree_with_one(warm: WarmRanks, space: Workspace, two_ranks: RunFolder) -> None:
    """Gradients that stayed unreduced would part the ranks' weights, and these from one rank's, at the first step."""
    one = space.run("one", text=ENERGY)
    assert warm.train(one, 1) == [0], output(one)
    ours, theirs = experiments.rows(two_ranks), experiments.rows(one)
    assert [row[0] for row in ours] == [row[0] for row in theirs]
    names = {name for _, data in ours for name in data}
    assert {"mse", "contrastive", "refinement", "step_size", "validation/refinement"} <= names
    for (_, found), (_, expected) in zip(ours, theirs, strict=True):
        assert found == pytest.approx(expected, rel=2e-4)
    weights, expected_weights = (storage.load(run.checkpoints / END) for run in (two_ranks, one))
    first = storage.load(two_ranks.checkpoints / "000000000080")
    assert float(weights["model/denoiser/alpha"]) != pytest.approx(0.05, abs=1e-4)  # it has learned
    for name, tensor in expected_weights.items():
        if name.startswith("model/"):
            torch.testing.assert_close(
                weights[name], tensor, rtol=0, atol=2e-4, msg=lambda m, name=name: f"{name}: {m}"
            )
    unused = [name for name in weights if name.startswith("model/") and "final_layer" in name]
    assert unused and all(torch.equal(weights[name], first[name]) for name in unused)  # never reached, never decayed


def test_killed_and_resumed_it_is_the_same_to_the_bit(warm: WarmRanks, space: Workspace, two_ranks: RunFolder) -> None:
    run = space.run("disturbed", "train.ranks=2", text=ENERGY)
    assert warm.train(run, 2, fault={"name": "stop", "rank": 1, "step": 2}) == [ExitCode.REQUEUE] * 2
    codes = warm.train(run, 2, fault={"name": "die", "rank": 1, "step": 2})
    assert codes[1] == -9
    assert warm.train(run, 2) == [0, 0], output(run)
    assert experiments.contents(run.checkpoints / END) == experiments.contents(two_ranks.checkpoints / END)
    assert experiments.rows(run) == experiments.rows(two_ranks)
