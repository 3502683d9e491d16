"""Resume is bit-exact at four ranks, and what must not depend on the number of ranks does not.

The ranks are real (gloo, one process each), forked from a warm process (tests/support/warm_ranks.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import experiments
import pytest
import torch
from experiments import Workspace
from warm_ranks import WarmRanks, output

from hpc_gen.methods.materialise import materialise
from hpc_gen.runtime.errors import ExitCode
from hpc_gen.runtime.journal import attempts, read
from hpc_gen.runtime.ranks import RankInfo, Ranks
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import run_setup
from hpc_gen.stages.build import meta_method, open_table, table_facts
from hpc_gen.training.checkpoint import manifest, storage
from hpc_gen.training.engines.ddp import DdpEngine

# 4 tokens per image, so that 20 million parameters cost seconds, not minutes
LARGE = """
name: large
seed: 5
method:
  {name: energy, input: pixels, image_size: 8, channels: 1, patch_size: 4, hidden: 528, depth: 4, heads: 8,
   diffusion_timesteps: 50}
data: {table: tables/toy, shuffle_shards: 2}
train:
  total_images: 48
  global_batch: 8
  ranks: 4
  optimizer: {lr: 1.0e-3, clip: 0.5}
  ema: {main: {decay: 0.9}}
  log_every: 8
  save_every: 16
  keep_last: 1
"""
# four buckets even at this size; micro-batches, so gradients are accumulated; clipping bites
SMALL = experiments.TINY.replace("global_batch: 8", "global_batch: 16\n  micro_batch: 4").replace(
    "  log_every: 16", "  engine: {bucket_mb: 0.005}\n  log_every: 16"
)
SIZES = (1, 2, 4)


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmRanks]:
    with WarmRanks() as ranks:
        yield ranks


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return experiments.make_workspace(tmp_path_factory.mktemp("resume"))


def engine_of(run: RunFolder, space: Workspace) -> DdpEngine:
    """The engine of a run as one rank builds it; its buckets do not depend on the number of ranks."""
    resolved = run_setup.load_run(run)
    assert resolved.experiment.train is not None
    method = meta_method(resolved.experiment, table_facts(open_table(space.path, experiments.TABLE)))
    modules = materialise(method, resolved.experiment.seed)
    alone = Ranks(RankInfo(0, 1, 0, 1, "python"), "gloo", torch.device("cpu"))
    return DdpEngine(method, modules, resolved.experiment.train, alone, alone.device)


@pytest.mark.timeout(600)
def test_four_ranks_resume_to_the_same_bytes(warm: WarmRanks, space: Workspace) -> None:
    undisturbed, disturbed = space.run("large", text=LARGE), space.run("large-disturbed", text=LARGE)
    engine = engine_of(undisturbed, space)
    (role,) = engine.trained_roles()
    assert sum(p.numel() for p in engine.modules()[role].parameters()) >= 20_000_000
    assert len(engine._buckets[role].flats) >= 3
    del engine

    assert warm.train(undisturbed, 4) == [0] * 4, output(undisturbed)
    # preempted off the grid of checkpoints, by a rank that is not the main one; then a rank is lost; then to the end
    assert warm.train(disturbed, 4, fault={"name": "stop", "rank": 2, "step": 4}) == [ExitCode.REQUEUE] * 4
    codes = warm.train(disturbed, 4, fault={"name": "die", "rank": 3, "step": 3})
    assert codes[3] == -9 and 0 not in codes
    assert warm.train(disturbed, 4) == [0] * 4, output(disturbed)

    starts = [(attempt.resumed_from, attempt.world_size) for attempt in attempts(disturbed)]
    assert starts[:2] == [(None, 4), (24, 4)]
    assert starts[2] in [(24, 4), (32, 4)]  # the save at 32 was under way when the rank was lost
    end = "000000000048"
    ours = experiments.contents(disturbed.checkpoints / end)
    assert sum(name.endswith(".distcp") for name in ours) == 4
    assert ours == experiments.contents(undisturbed.checkpoints / end)
    assert experiments.rows(disturbed) == experiments.rows(undisturbed)
    assert [row[0] for row in experiments.rows(disturbed)] == [8, 16, 24, 32, 40, 48]


@pytest.fixture(scope="module")
def by_size(warm: WarmRanks, space: Workspace) -> dict[int, RunFolder]:
    """The same experiment at 1, 2 and 4 ranks, each to its end."""
    runs = {}
    for size in SIZES:
        run = runs[size] = space.run(f"small-{size}", f"train.ranks={size}", text=SMALL)
        assert warm.train(run, size) == [0] * size, output(run)
    return runs


END = "000000000096"


def test_order_and_draws_are_those_of_one_rank(by_size: dict[int, RunFolder]) -> None:
    found = {size: manifest.read(run.checkpoints / END) for size, run in by_size.items()}
    assert [found[size].world_size for size in SIZES] == list(SIZES)
    assert len({facts.facts["digest"] for facts in found.values()}) == 1
    assert len({facts.facts["identity"] for facts in found.values()}) == 1


@pytest.mark.parametrize("size", [2, 4])
def test_losses_and_weights_of_more_ranks_are_those_of_one_to_rounding(
    by_size: dict[int, RunFolder], size: int
) -> None:
    """The sums of a step are added in another order, so last bits differ: rows to 1e-6, weights to 1e-6 after 6 steps."""
    one, more = experiments.rows(by_size[1]), experiments.rows(by_size[size])
    assert [row[0] for row in more] == [row[0] for row in one]
    for (_, expected), (_, found) in zip(one, more, strict=True):
        assert found == pytest.approx(expected, rel=1e-6)
    expected = storage.load(by_size[1].checkpoints / END)
    found = storage.load(by_size[size].checkpoints / END)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_the_small_experiment_has_several_buckets(by_size: dict[int, RunFolder], space: Workspace) -> None:
    assert all(len(buckets.flats) >= 3 for buckets in engine_of(by_size[1], space)._buckets.values())


@pytest.mark.parametrize("size", [2, 4])
def test_a_run_goes_on_with_another_number_of_ranks(
    warm: WarmRanks, space: Workspace, by_size: dict[int, RunFolder], size: int
) -> None:
    run = space.run(f"changed-{size}", text=SMALL)
    assert warm.train(run, 1, ["train.stop_at_images=48"]) == [0]
    assert warm.train(run, size, [f"train.ranks={size}"]) == [0] * size, output(run)
    facts = manifest.read(run.checkpoints / END)
    assert facts.world_size == size
    assert facts.facts["digest"] == manifest.read(by_size[1].checkpoints / END).facts["digest"]
    for (_, expected), (_, found) in zip(experiments.rows(by_size[1]), experiments.rows(run), strict=True):
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("rank", "part"),
    [(1, ".tmp-000000000032"), (0, ".tmp-000000000032"), (0, ".tmp-manifest")],
    ids=["data of rank 1", "staging of rank 0", "manifest"],
)
def test_a_full_disk_costs_a_checkpoint_and_not_the_training(
    warm: WarmRanks, space: Workspace, by_size: dict[int, RunFolder], rank: int, part: str
) -> None:
    """The save at 32 images fails on one rank; the others must neither wait for it nor mix up their saves."""
    name = f"full-{rank}-{part.strip('.')}"
    run = space.run(name, "train.ranks=2", "train.keep_last=9", text=SMALL)
    codes = warm.train(run, 2, fault={"name": "full disk", "rank": rank, "part": part})
    told = [event for event in read(run) if event.kind == "save_failed"]
    assert all("the disk is full" in event.fields["error"] for event in told)
    assert {event.task for event in told} == {0, 1}
    if part == ".tmp-manifest":  # every save fails, the last one too: that is the attempt's failure
        assert codes == [ExitCode.USER] * 2
        assert list(run.checkpoints.iterdir()) == []
        assert warm.train(run, 2) == [0] * 2
    else:
        assert codes == [0, 0], output(run)
        assert [event.fields["images_seen"] for event in told] == [32, 32]
        assert "was given up" in output(run)
        assert not (run.checkpoints / "000000000032").exists()
    assert experiments.leftovers(run) == []
    expected = experiments.contents(by_size[2].checkpoints / END)
    assert experiments.contents(run.checkpoints / END) == expected


def test_a_rank_that_is_lost_does_not_hang_the_others(warm: WarmRanks, space: Workspace) -> None:
    run = space.run("lost", "train.ranks=4", text=SMALL)
    codes = warm.train(run, 4, fault={"name": "die", "rank": 0, "step": 5})
    assert codes[0] == -9 and -9 not in codes[1:] and 0 not in codes
    lock = json.loads(run.lock.read_text())
    assert "released" not in lock  # nobody could; the next attempt sees that its holder is dead
    assert warm.train(run, 4) == [0] * 4
    assert experiments.leftovers(run) == []


def test_damage_seen_by_rank_0_is_known_to_all(warm: WarmRanks, space: Workspace) -> None:
    run = space.run("damaged", "train.ranks=2", text=SMALL)
    assert warm.train(run, 2, ["train.stop_at_images=64"]) == [0, 0]
    for path in Path(run.checkpoints).iterdir():
        (path / manifest.NAME).write_text("{}")
    assert warm.train(run, 2) == [ExitCode.DATA] * 2
    assert "no checkpoint" in output(run, 0) and "no checkpoint" in output(run, 1)
