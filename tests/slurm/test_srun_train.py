"""Training under a real srun: two ranks on two nodes, stopped twice, equal to a run that nobody disturbed.

The disturbed run gets SIGTERM in its step tasks (`scancel --signal`, what a preemption sends), goes on under
a second srun, is really preempted by a job of partition high, and is brought to its end by a third. Where it
is stopped depends on the machine, so its end is set only then: just beyond the second stop. The twin runs
there in one go.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from hpc_gen.config import loader
from hpc_gen.data import ptshard
from hpc_gen.data.index import ShardInfo, TableIndex
from hpc_gen.runtime import commit, journal
from hpc_gen.runtime.errors import ExitCode
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import runner
from hpc_gen.training.checkpoint import read
from slurm.lab import Lab

pytestmark = pytest.mark.slurm_real

Until = Callable[..., None]
GLOBAL_BATCH = 16
ENDLESS = GLOBAL_BATCH * 10**6  # images; no machine gets there before it is stopped
SAVE_EVERY = GLOBAL_BATCH * 40
EXPERIMENT = f"""
name: tiny
seed: 3
method:
  {{name: energy, input: pixels, image_size: 8, channels: 1, patch_size: 4, hidden: 32, depth: 2, heads: 2}}
data: {{table: tables/tiny, shuffle_shards: 2}}
train:
  total_images: {ENDLESS}
  global_batch: {GLOBAL_BATCH}
  micro_batch: 4
  ranks: 2
  engine: {{bucket_mb: 0.05}}
  optimizer: {{lr: 0.0005}}
  ema: {{main: {{decay: 0.99}}}}
  log_every: {GLOBAL_BATCH * 10}
  save_every: {SAVE_EVERY}
"""


@pytest.fixture(scope="module")
def workspace(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a table of 256 images of noise, 8 pixels square, in 4 shards and 10 classes."""
    folder = tmp_path_factory.mktemp("srun")
    table = folder / "tables" / "tiny"
    table.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    shards, columns = [], {}
    for number in range(4):
        columns = {
            "pixels": torch.randint(0, 256, (64, 1, 8, 8), generator=generator, dtype=torch.uint8),
            "labels": torch.randint(0, 10, (64,), generator=generator),
        }
        path = table / f"{number:05d}.pt"
        ptshard.write_shard(path, columns)
        content, file_hash = ptshard.content_sha256(columns), commit.sha256_file(path)
        shards.append(ShardInfo(path.name, 64, path.stat().st_size, file_hash, content))
    TableIndex(ptshard.columns_of(columns), tuple(shards), num_classes=10).write(table)
    return folder


@dataclass
class SrunJob:
    """`srun` of the train stage on two nodes, one task each; `name` is Slurm's name of the job."""

    lab: Lab
    workspace: Path
    run: RunFolder
    name: str

    def begin(self) -> SrunJob:
        """Submit it; returns itself."""
        stage = [sys.executable, "-P", "-m", "hpc_gen.cli", "stage", str(self.run.path), "train"]
        variables = {"PYTHONPATH": str(self.run.code), "HPC_GEN_WORKSPACE": str(self.workspace)}
        self.log = self.workspace / f"{self.name}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                ["srun", "-p", "low", "-N2", "--ntasks-per-node=1", "-J", self.name, *stage],
                env=self.lab.environment(OMP_NUM_THREADS="1", **variables),
                cwd="/",
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return self

    def end(self, expected: int, limit_s: float = 90.0) -> str:
        """Wait for srun; its exit code must be `expected`. Returns the output of all ranks."""
        try:
            code = self.process.wait(limit_s)
        finally:
            self.process.kill()
        assert code == expected, f"srun of {self.name} ended with {code}:\n{self.log.read_text()}"
        return self.log.read_text()

    def wait_for_training(self, attempt: int, until: Until) -> None:
        """Until rank 0 of this attempt has finished a log interval."""

        def began() -> bool:
            if self.process.poll() is not None:
                self.end(-1)  # fails with its output
            return any(event.attempt == attempt and event.kind == "row" for event in journal.read(self.run))

        until(began, f"attempt {attempt} trains", 90)

    def job_id(self) -> str:
        """Slurm's number of the running job."""
        return self.lab.run(["squeue", "-h", "-n", self.name, "-o", "%i"]).stdout.strip()


def prepare(workspace: Path, name: str, stop_at: int | None = None) -> RunFolder:
    """A run folder of the experiment, ending at `stop_at` images; an existing run gets only that new end."""
    overrides = [f"name={name}", *([f"train.stop_at_images={stop_at}"] if stop_at else [])]
    return runner.prepare_run(loader.loads(EXPERIMENT, overrides), workspace)


def ends_of(run: RunFolder, attempt: int) -> list[tuple[int, int]]:
    """(exit code, images seen) with which each rank of an attempt ended, by rank."""
    ends = [event for event in journal.read(run) if event.attempt == attempt and event.kind == "attempt_end"]
    ends.sort(key=lambda event: event.task)
    return [(event.fields["exit_code"], event.fields["images_seen"]) for event in ends]


def saved_by_all(run: RunFolder, attempt: int) -> int:
    """Images seen at which both ranks stopped and saved together; asserts that they did."""
    ends = ends_of(run, attempt)
    assert len(ends) == 2 and ends[0] == ends[1], f"the ranks parted: {ends}"
    code, images_seen = ends[0]
    assert code == ExitCode.REQUEUE
    newest = read.newest(run)
    assert newest.images_seen == images_seen and newest.world_size == 2 and read.verify(newest.path) == []
    cause = json.loads((run.journal / f"{attempt:04d}.cause.json").read_text())
    assert (cause["exit_code"], cause["stop"]) == (ExitCode.REQUEUE, "PREEMPTED")
    return images_seen


def test_stopped_twice_and_still_the_same(lab: Lab, workspace: Path, until: Until) -> None:
    run = prepare(workspace, "disturbed")

    first = SrunJob(lab, workspace, run, "first").begin()
    first.wait_for_training(1, until)
    lab.run(["scancel", "--signal=TERM", f"{first.job_id()}.0"])
    first.end(ExitCode.REQUEUE)
    first_stop = saved_by_all(run, 1)

    second = SrunJob(lab, workspace, run, "second").begin()
    second.wait_for_training(2, until)
    submitted = time.monotonic()
    lab.run(["srun", "-p", "high", "-N4", "--exclusive", "true"])  # all nodes: it needs those of the second attempt
    waited_s = time.monotonic() - submitted
    second.end(ExitCode.REQUEUE)
    second_stop = saved_by_all(run, 2)
    assert waited_s < 20, f"the preempting job waited {waited_s:.1f} s, as if nobody had heard the signal"

    finish = second_stop + 3 * GLOBAL_BATCH
    assert prepare(workspace, "disturbed", finish) == run
    output = SrunJob(lab, workspace, run, "third").begin().end(ExitCode.DONE)
    assert f"from {second_stop} images, 2 ranks" in output
    twin = prepare(workspace, "twin", finish)
    SrunJob(lab, workspace, twin, "twin").begin().end(ExitCode.DONE)

    attempts = journal.attempts(run)
    assert [attempt.exit_code for attempt in attempts] == [85, 85, 0]
    assert [attempt.resumed_from for attempt in attempts] == [None, first_stop, second_stop]
    assert {attempt.world_size for attempt in attempts} == {2}
    hosts = {event.fields["host"] for event in journal.read(run) if event.kind == "attempt_start"}
    assert hosts == set(lab.node_names[:2])
    assert_same_files(read.at(run, finish).path, read.at(twin, finish).path)
    assert [(row.images_seen, row.data) for row in journal.history(run)] == [
        (row.images_seen, row.data) for row in journal.history(twin)
    ]


def assert_same_files(one: Path, other: Path) -> None:
    """Both checkpoints have the same files with the same bytes, at least one of them from each rank."""
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    assert len([name for name in names if name.endswith(".distcp")]) == 2
    different = [name for name in names if (one / name).read_bytes() != (other / name).read_bytes()]
    assert not different
