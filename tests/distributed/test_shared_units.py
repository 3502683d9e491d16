"""Tasks that share the units of encode: two on the same ones, one that joins late, one that is killed half-way.

Each unit is done once, which the ledger and the journal show, and the table is the one that a single task makes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import experiments
import numpy as np
import pytest
from PIL import Image
from tiny_tokenizers import write_vqgan

from hpc_gen.config.vqgan import VqganConfig
from hpc_gen.data.table import Table
from hpc_gen.runtime import clock, env, journal
from hpc_gen.runtime.errors import ExitCode
from hpc_gen.runtime.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
UNITS, ROWS = 12, 4
SIZES = VqganConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=8, codes=16)
EXPERIMENT = f"""
name: shared
method: {{name: energy, input: pixels, image_size: 8, channels: 3, patch_size: 4, hidden: 16, depth: 1, heads: 2}}
data: {{table: TABLE}}
encode:
  source: folder
  source_path: images
  image_size: 64
  shard_rows: {ROWS}
  validation: false
  tokenizer: {{name: vqgan, weights: vqgan.safetensors}}
"""
LIMIT_S = 120.0


@pytest.fixture(scope="module")
def space() -> Iterator[Path]:
    with experiments.scratch_folder() as folder:
        write_vqgan(folder / "vqgan.safetensors", config=SIZES)
        generator = np.random.default_rng(0)
        (folder / "images" / "a").mkdir(parents=True)
        for i in range(UNITS * ROWS):
            coarse = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((80, 70)).save(folder / "images" / "a" / f"{i:02d}.png")
        yield folder


def make(space: Path, name: str) -> RunFolder:
    return experiments.Workspace(space).run(name, text=EXPERIMENT.replace("TABLE", f"tables/{name}"))


class Task:
    """`hpc-gen stage RUN encode` as task `number` of `of`."""

    def __init__(self, space: Path, run: RunFolder, number: int, of: int) -> None:
        extra = {"PYTHONPATH": str(ROOT), "HPC_GEN_TASK": str(number), "HPC_GEN_NUM_TASKS": str(of)}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "hpc_gen.cli", "stage", str(run.path), "encode"],
            env=env.child_environment(HPC_GEN_WORKSPACE=str(space), HPC_GEN_ATTEMPT=None, OMP_NUM_THREADS="1", **extra),
            stdout=subprocess.DEVNULL,
        )

    def end(self) -> int:
        return self.process.wait(LIMIT_S)


def wait_for(condition: Callable[[], bool]) -> None:
    begun = clock.monotonic()
    while not condition():
        assert clock.monotonic() - begun < LIMIT_S
        clock.sleep(0.01)


def committed(run: RunFolder) -> list[str]:
    """Units of the events that tell of a commit."""
    return [event.fields["unit"] for event in journal.read(run) if event.kind == "unit_committed"]


def begun(run: RunFolder) -> Counter[str]:
    return Counter(event.fields["unit"] for event in journal.read(run) if event.kind == "unit_begin")


@pytest.fixture(scope="module")
def undisturbed(space: Path) -> str:
    """Identity of the table that one task makes."""
    run = make(space, "alone")
    assert Task(space, run, 0, 1).end() == ExitCode.DONE
    assert sorted(committed(run)) == [f"train-{i:05d}" for i in range(UNITS)]
    return Table.open(space / "tables/alone", verify=True).identity


def test_total_work_equals_the_units(space: Path, undisturbed: str) -> None:
    run = make(space, "together")
    # two tasks on the very same units, as a requeue beside a task that is still alive
    tasks = [Task(space, run, 0, 2), Task(space, run, 0, 2)]
    wait_for(lambda: len(committed(run)) >= 2)
    tasks.append(Task(space, run, 2, 3))  # joins late, with another idea of how many there are
    assert [task.end() for task in tasks] == [ExitCode.DONE] * 3
    assert sorted(committed(run)) == [f"train-{i:05d}" for i in range(UNITS)], "each once"
    assert set(begun(run).values()) == {1}
    assert len(list(run.ledger("encode").glob("*.json"))) == UNITS
    assert Table.open(space / "tables/together", verify=True).identity == undisturbed
    assert list(run.claims("encode").iterdir()) == [] and experiments.leftovers(run) == []


def test_a_killed_tasks_unit_is_taken_over(space: Path, undisturbed: str) -> None:
    run = make(space, "killed")
    victim = Task(space, run, 0, 2)
    wait_for(lambda: len(begun(run)) >= 2)
    os.kill(victim.process.pid, 9)
    victim.end()
    assert 0 < len(committed(run)) < UNITS
    other = Task(space, run, 1, 2)  # the share of the dead one is not its own
    assert other.end() == ExitCode.DONE
    assert sorted(committed(run)) == [f"train-{i:05d}" for i in range(UNITS)]
    assert sum(begun(run).values()) <= UNITS + 1, "the unit in the dead one's hands alone was begun twice"
    assert Table.open(space / "tables/killed", verify=True).identity == undisturbed
