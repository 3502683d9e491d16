"""Evaluation as arrays of a real Slurm: 2,000 images with tasks that are preempted and killed, the same images with 1, 3
and 7 tasks, the same metrics.

The model is the demo's, with weights of its beginning: what is shown does not depend on how well it draws.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import toy_run

from hpc_gen.config import loader
from hpc_gen.metrics import results
from hpc_gen.runtime import journal
from hpc_gen.runtime.errors import ExitCode
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.sampling.index import read_index
from hpc_gen.stages import run_setup
from slurm.lab import Lab

pytestmark = pytest.mark.slurm_real

Until = Callable[..., None]
ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "job_configs" / "demo" / "mnist16.yaml"
IMAGES, BLOCK, SEED = 2000, 50, 5
CHANGES = [
    "data={table: tables/digits}",
    "encode=null",
    "train.validate=null",
    f"sample={{num_images: {IMAGES}, block_images: {BLOCK}, batch: {BLOCK}, settings: {{steps: 2, guidance: 2.0}}}}",
    "evaluate={metrics: [fid, sfid, kid, prc, density_coverage], extractor: {name: random-conv}, kid_subset_size: 100, "
    "block_images: 500, tasks: 2, reference: {table: tables/digits, rows: 200}}",
]


def hpc_gen(workspace: Path, *words: str, variables: dict[str, str]) -> str:
    """Output of a command as typed, which must succeed."""
    command = [sys.executable, "-P", "-m", "hpc_gen.cli", *words, "--workspace", str(workspace)]
    done = subprocess.run(command, env=variables, cwd=workspace, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def strike(run: RunFolder, draw: random.Random, number: signal.Signals) -> bool:
    """Send a signal to a task that works on a block now; whether there was one."""
    claims = sorted(run.claims("sample").glob("*.claim")) if run.claims("sample").is_dir() else []
    try:
        os.kill(json.loads(draw.choice(claims).read_bytes())["pid"], number)
    except (IndexError, OSError, ValueError, KeyError):  # nobody at work, or it has just ended
        return False
    return True


def blocks(run: RunFolder) -> int:
    return len(list(run.ledger("sample").glob("*.json")))


@pytest.fixture(scope="module")
def workspace(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs of the demo's model with the same checkpoint, for 1, 3 and 7 tasks."""
    folder = tmp_path_factory.mktemp("evaluate")
    toy_run.write_table(folder / "tables" / "digits", rows=200, shard_rows=100, size=16)
    for tasks in (1, 3, 7):
        resolved = run_setup.typed(loader.load(DEMO, [*CHANGES, f"name=tasks{tasks}", f"sample.tasks={tasks}"]))
        run = run_setup.prepare_run(resolved, folder)
        toy_run.write_checkpoint(run, resolved, folder, images_seen=6400)
    return folder


def submit(workspace: Path, lab: Lab, run: RunFolder, stages: str) -> None:
    variables = lab.environment(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    words = ["submit", str(run.config_path), "--cluster", "lab", "--stages", stages, "--set", "retries=9"]
    print(hpc_gen(workspace, *words, variables=variables))


@pytest.mark.timeout(900)
def test_the_same_images_with_1_3_and_7_tasks_some_of_them_killed(workspace: Path, lab: Lab, until: Until) -> None:
    started, draw, struck = time.monotonic(), random.Random(SEED), 0
    runs = {tasks: RunFolder(workspace / "runs" / f"tasks{tasks}") for tasks in (1, 3, 7)}
    submit(workspace, lab, runs[3], "sample,evaluate")
    index = runs[3].samples("main") / "index.json"
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM):
        until(lambda number=number: strike(runs[3], draw, number) or index.exists(), "a task to strike", 240)
        struck += not index.exists()
        seen = blocks(runs[3])
        until(lambda seen=seen: blocks(runs[3]) > seen + 2 or index.exists(), "work goes on", 240)
    submit(workspace, lab, runs[7], "sample,evaluate")
    variables = lab.environment(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    for stage in ("sample", "evaluate"):  # one task, here and without Slurm
        hpc_gen(workspace, "stage", str(runs[1].path), stage, variables=variables)
    for tasks in (3, 7):
        until(lambda run=runs[tasks]: run.metrics("main").exists(), f"metrics of {tasks} tasks", 400)

    indices = {tasks: read_index(run.samples("main")) for tasks, run in runs.items()}
    assert len({index.sha256 for index in indices.values()}) == 1, "the same images"
    assert indices[1].num_images == IMAGES and struck >= 2
    assert indices[7].read(range(IMAGES)).shape == (IMAGES, 3, 16, 16)  # every file is the one that was hashed
    files = [results.read(run.metrics("main")) for run in runs.values()]
    for record in files[0].records:
        assert all(file.get(record.name).value == record.value for file in files), record.name
    ends = [attempt.exit_code for attempt in journal.attempts(runs[3]) if attempt.stage == "sample"]
    assert any(code != ExitCode.DONE for code in ends), "nobody was struck while at work"
    pixels = hashlib.sha256("".join(block.pixel_sha256 for block in indices[1].blocks).encode()).hexdigest()
    print(
        f"{IMAGES} images, {struck} strikes, {len(ends)} attempts, {time.monotonic() - started:.0f} s; digest of the "
        f"pixels {pixels}; index {indices[1].sha256}; FID {files[0].get('fid').value!r}"
    )
