"""Twenty kills of a two-rank run by the real launcher, each followed by a resume: the result is the undisturbed one.

Who is killed, how and when comes from a fixed seed (tests/support/killing.py): single ranks, all of them, the
launcher; SIGKILL and SIGTERM; while training, while saving, while starting. `make prove` does it 200 times.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import experiments
import killing
import pytest

from hpc_gen.runtime.errors import ExitCode
from hpc_gen.runtime.journal import attempts
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import run_setup

KILLS = 20
SEED = 11
WINDOW = 128  # images between kills
EXPERIMENT = f"""
name: killed
seed: 7
method:
  {{name: energy, input: pixels, image_size: 8, channels: 1, patch_size: 4, hidden: 16, depth: 1, heads: 2,
   diffusion_timesteps: 50}}
data: {{table: tables/toy, validation_table: tables/toyval, shuffle_shards: 2}}
train:
  total_images: {(KILLS + 1) * WINDOW}
  global_batch: 16
  ranks: 2
  optimizer: {{lr: 1.0e-3}}
  engine: {{bucket_mb: 0.01}}
  ema: {{main: {{decay: 0.9}}}}
  log_every: 16
  save_every: 64
  validate: {{every_images: 256, num_images: 32}}
"""


@pytest.fixture(scope="module")
def space() -> Iterator[Path]:
    with experiments.scratch_folder() as folder:
        experiments.make_tables(folder)
        yield folder


def make(space: Path, name: str) -> RunFolder:
    """A run folder as `hpc-gen run` makes it, code and all."""
    return run_setup.prepare_run(experiments.resolved(text=EXPERIMENT), space, name)


def expected_codes(kill: killing.Kill) -> set[int | None]:
    """What the launcher may end with (None: killed itself)."""
    if kill.kind == "SIGKILL the launcher":
        return {None}
    if kill.kind.startswith("SIGKILL"):
        return {128 + 9}
    early = {None} if kill.kind == "SIGTERM the launcher" and kill.moment == "starting" else set()
    return {ExitCode.REQUEUE, *early}  # early: before the launcher could take signals


@pytest.mark.timeout(900)
def test_twenty_kills_leave_no_trace(space: Path, counts: Any, record_property: Any) -> None:
    undisturbed, killed = make(space, "undisturbed"), make(space, "killed")
    killing.finish(undisturbed, space, space / "undisturbed.log")

    log, kills = space / "killed.log", []
    for number in range(KILLS):
        plan = killing.plan(number, SEED, WINDOW, world_size=2)
        kills.append(killing.disturb(killed, space, log, plan))
        print(kills[-1], flush=True)
        assert killing.broken(killed) == []
    killing.finish(killed, space, log)
    record_property("kills", [kill.to_json() for kill in kills])

    assert not any(kill.finished for kill in kills), "the run ended before all kills"
    for kill in kills:
        assert kill.code in expected_codes(kill), (kill, log.read_text()[-3000:])
        assert kill.moment == "starting" or kill.attempt > 0
    assert {kill.kind for kill in kills} == set(killing.KINDS)

    end = f"{(KILLS + 1) * WINDOW:012d}"
    assert experiments.contents(killed.checkpoints / end) == experiments.contents(undisturbed.checkpoints / end)
    assert killing.manifests(killed) == killing.manifests(undisturbed), "other checkpoints were kept, or they differ"
    assert experiments.rows(killed) == experiments.rows(undisturbed)
    assert [row[0] for row in experiments.rows(killed)] == list(range(16, (KILLS + 1) * WINDOW + 1, 16))
    assert experiments.leftovers(killed) == []
    assert len({attempt.number for attempt in attempts(killed)}) == len(attempts(killed))
    counts.add("kills", KILLS)
