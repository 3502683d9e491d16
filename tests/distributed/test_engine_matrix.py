"""The diagonal of the matrix of engines: each engine once against one process, killed and resumed, and moved.

All of it: tests/prove_engines.py (`make prove`), whose table is docs/proofs/engines.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import engine_matrix as matrix
import experiments
import pytest
import torch
from experiments import Workspace
from warm_ranks import WarmRanks, output

from hpc_gen.methods.materialise import materialise
from hpc_gen.runtime.ranks import RankInfo, Ranks
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages.build import meta_method, open_table, table_facts
from hpc_gen.training.engines.ddp import DdpEngine

# engine, variant, ranks, ranks that it is moved to in the middle
DIAGONAL = [
    ("fsdp z2", "energy", 2, 4),
    ("fsdp z3", "standard", 4, 2),
    ("hsdp 2x2", "standard", 4, 2),
    ("deepspeed z1", "standard", 1, 2),
    ("deepspeed z2", "energy", 2, 1),
    ("deepspeed z3", "standard", 4, 2),
    ("tp 2", "standard", 4, 2),
]


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmRanks]:
    with WarmRanks(matrix.WARM) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def space() -> Iterator[Workspace]:
    with experiments.scratch_folder() as folder:
        yield experiments.make_workspace(folder)


@pytest.fixture(scope="module")
def one_process(warm: WarmRanks, space: Workspace) -> dict[str, RunFolder]:
    """ddp on one rank, by variant."""
    return {variant: matrix.undisturbed(warm, space, variant, "ddp", 1) for variant in matrix.VARIANTS}


def test_the_experiment_has_several_buckets_and_units(space: Workspace) -> None:
    """Else resumes would be exact by accident: one sum has one order."""
    experiment = experiments.resolved(text=matrix.STANDARD).experiment
    assert experiment.train is not None
    method = meta_method(experiment, table_facts(open_table(space.path, experiments.TABLE)))
    alone = Ranks(RankInfo(0, 1, 0, 1, "python"), "gloo", torch.device("cpu"))
    engine = DdpEngine(method, materialise(method, 0), experiment.train, alone, alone.device)
    (role,) = engine.trained_roles()
    assert len(engine._buckets[role].flats) >= 3
    assert len(method.parallel_plan(role).fsdp_units) + 1 >= 3
    bytes_of_buckets = experiment.train.engine.bucket_mb * 2**20
    assert sum(part.numel() * 4 for part in engine.parts(role).values()) >= 3 * bytes_of_buckets


@pytest.mark.parametrize(("engine", "variant", "size", "then"), DIAGONAL, ids=[f"{c[0]}-{c[1]}" for c in DIAGONAL])
def test_an_engine_trains_resumes_and_moves_as_one_process_would(
    warm: WarmRanks,
    space: Workspace,
    one_process: dict[str, RunFolder],
    engine: str,
    variant: str,
    size: int,
    then: int,
) -> None:
    reference = one_process[variant]
    whole = matrix.undisturbed(warm, space, variant, engine, size)
    verdict = matrix.compare(whole, reference)
    assert verdict.holds(variant), verdict
    killed = matrix.killed(warm, space, variant, engine, size)
    assert matrix.same_bytes(killed, whole)
    assert experiments.rows(killed) == experiments.rows(whole)
    verdict = matrix.compare(matrix.moved(warm, space, variant, engine, size, then), reference)
    assert verdict.holds(variant), verdict


def test_weights_to_begin_from_reach_ranks_that_never_had_them(
    warm: WarmRanks, space: Workspace, one_process: dict[str, RunFolder]
) -> None:
    """With fsdp rank 0 alone has values at first, its own initial ones or those of `train.init_from`."""
    given = f"train.init_from={{run: {one_process['standard'].name}, ema: main}}"
    runs = []
    for engine, size in (("ddp", 1), ("fsdp z3", 2)):
        run = space.run(f"from-{size}", given, *matrix.overrides(engine, size), text=matrix.STANDARD)
        assert warm.train(run, size) == [0] * size, output(run)
        runs.append(run)
    verdict = matrix.compare(runs[1], runs[0])
    assert verdict.holds("standard"), verdict
    first = [experiments.rows(run)[0][1]["loss"] for run in (runs[0], one_process["standard"])]
    assert first[0] != first[1]  # it did begin elsewhere
