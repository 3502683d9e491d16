"""A sweep as arrays of a real Slurm: twelve points of 100 images, with tasks that are killed and preempted, a line of the
grid that goes while tasks are at work, lines that come later; the same sweep here without Slurm gives the same bytes.

The model is a tiny one of 8 pixels: what is shown is who does which point when, and that nothing of it shows in them.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toy_run
import yaml
from typer.testing import CliRunner

from eval_jobs import sweep_plan
from hpc_gen import cli
from hpc_gen.metrics import results
from hpc_gen.runtime import journal
from hpc_gen.runtime.errors import ExitCode
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.sampling.index import read_index
from slurm.lab import Lab

pytestmark = pytest.mark.slurm_real

Until = Callable[..., None]
ROOT = Path(__file__).resolve().parents[2]
IMAGES, BLOCK, TASKS, SEED = 100, 10, 2, 7
BLOCKS = IMAGES // BLOCK
METHOD = "{name: energy, input: pixels, image_size: 8, channels: 1, patch_size: 2, hidden: 64, depth: 2, heads: 2}"
LINES = [{"checkpoint": c, "guidance": 3.0, "steps": s} for c, s in ((64, 8), (64, 16), (128, 8), (128, 64))]
LATER = {"checkpoint": 128, "guidance": 4.0, "steps": 8}
GRID: dict[str, Any] = {
    "run": "toy",
    "axes": {"checkpoint": [64, 128], "guidance": [1.0, 2.0], "steps": [8, 16]},
    "sample": {"num_images": IMAGES, "block_images": BLOCK, "batch": BLOCK},
    "evaluate": {
        "metrics": ["fid", "kid", "prc"],
        "extractor": {"name": "random-conv"},
        "kid_subset_size": 50,
        "block_images": IMAGES,
        "reference": {"table": "tables/train", "rows": 120},
    },
    "tasks": TASKS,
}


def write_grid(workspace: Path, name: str, points: list[dict[str, Any]]) -> Path:
    path = workspace / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**GRID, "name": name, "points": points}))
    return path


def sweep(workspace: Path, lab: Lab, name: str, points: list[dict[str, Any]], *words: str) -> str:
    """Output of `hpc-gen sweep` as typed, which must succeed."""
    grid = write_grid(workspace, name, points)
    command = [sys.executable, "-P", "-m", "hpc_gen.cli", "sweep", str(grid), *words, "--workspace", str(workspace)]
    variables = lab.environment(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    done = subprocess.run(command, env=variables, cwd=workspace, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    return done.stdout


def on_slurm(workspace: Path, lab: Lab, points: list[dict[str, Any]]) -> str:
    return sweep(workspace, lab, "cluster", points, "--cluster", "lab", "--set", "retries=9")


def at_once(workspace: Path, lab: Lab, patch: pytest.MonkeyPatch, points: list[dict[str, Any]]) -> str:
    """The same in this process: a new one takes seconds to begin, in which the tasks at work go on."""
    with patch.context() as here:
        for name, value in lab.environment(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1").items():
            here.setenv(name, value)
        here.setattr("os.umask", lambda mask: mask)  # of this process, which runs other tests, too
        grid = write_grid(workspace, "cluster", points)
        done = CliRunner().invoke(cli.app, ["sweep", str(grid), "--cluster", "lab", "--workspace", str(workspace)])
    assert done.exit_code == 0, done.output + str(done.exception)
    print(done.output)
    return done.output


def strike(folder: RunFolder, draw: random.Random, number: signal.Signals) -> bool:
    """Send a signal to a task that makes images now; whether there was one."""
    claims = sorted(folder.claims("points").glob("*.claim")) if folder.claims("points").is_dir() else []
    try:
        os.kill(json.loads(draw.choice(claims).read_bytes())["pid"], number)
    except (IndexError, OSError, ValueError, KeyError):  # nobody at work, or it has just ended
        return False
    return True


def submitted(told: str) -> list[str]:
    return re.findall(r"^submitted  (\w+): job", told, re.MULTILINE)


def units_done(folder: RunFolder) -> list[tuple[str, str]]:
    """(stage, unit) of every commit that the journal tells, in order of time."""
    events = [event for event in journal.read(folder) if event.kind == "unit_committed" and event.stage != "report"]
    return [(event.stage, str(event.fields["unit"])) for event in sorted(events, key=lambda event: event.t)]


def digests(folder: RunFolder, names: list[str]) -> tuple[str, str, str]:
    """SHA-256 over the pixels, the indices and the numbers of all points."""
    indices = [read_index(folder.samples(name)) for name in names]
    pixels = "".join(block.pixel_sha256 for index in indices for block in index.blocks)
    records = [[(r.name, r.value, r.std) for r in results.read(folder.metrics(name)).records] for name in names]
    texts = (pixels, "".join(index.sha256 for index in indices), json.dumps(records))
    pixels, index, numbers = (hashlib.sha256(text.encode()).hexdigest() for text in texts)
    return pixels, index, numbers


def table_of(folder: RunFolder) -> dict[str, Any]:
    """The table beside the page, which every form of it must agree with."""
    table: dict[str, Any] = json.loads((folder.report.parent / "sweep.json").read_text())
    rows = list(csv.DictReader((folder.report.parent / "sweep.csv").open()))
    assert [row["point"] for row in rows] == [point["name"] for point in table["points"]]
    assert [float(row["fid"]) for row in rows] == [point["metrics"]["fid"]["value"] for point in table["points"]]
    fronts = [row for row in rows if row["front"]]
    page = " ".join(re.sub("<[^>]*>", " ", folder.report.read_text()).split())
    assert f"points scored {len(rows)} of {len(rows)}" in page
    assert f"points that no other beats in both quality and cost {len(fronts)}" in page
    return table


@pytest.fixture(scope="module")
def workspace(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, and a table to compare with."""
    folder = tmp_path_factory.mktemp("sweep")
    toy_run.write_table(folder / "tables" / "train", rows=120, shard_rows=60)
    run, resolved = toy_run.make_run(folder, f"method={METHOD}")
    toy_run.write_checkpoint(run, resolved, folder, images_seen=128)
    return folder


@pytest.mark.timeout(900)
def test_a_sweep_of_twelve_points_is_what_the_grid_says_whatever_happens(
    workspace: Path, lab: Lab, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, draw = time.monotonic(), random.Random(SEED)
    folder = RunFolder(workspace / "runs" / "cluster")
    told = on_slurm(workspace, lab, LINES)
    assert "12 points, 12 to be done" in told
    assert submitted(told) == ["points", "features", "scores", "report"]
    for number in (signal.SIGKILL, signal.SIGTERM):
        until(lambda number=number: strike(folder, draw, number), "a task to strike", 240)
        seen = len(units_done(folder))
        until(lambda seen=seen: len(units_done(folder)) > seen, "work goes on", 240)

    # a line less while tasks are at work: its point is left, and no job is touched
    fewer = [line for line in LINES if line != LINES[-1]]
    told = at_once(workspace, lab, monkeypatch, fewer)
    assert "11 points" in told and told.count("cancelled ") == 1 and "jobs are at it already" in told
    assert submitted(told) == []
    reported = folder.ledger("report") / "page.json"  # written after the page and what lies beside it
    until(reported.exists, "the report of eleven points", 400)
    table = table_of(folder)
    assert len(table["points"]) == 11 and not table["problems"]
    eleven = [point["name"] for point in table["points"]]
    (gone,) = {path.name for path in folder.path.glob("samples/p*")} - set(eleven)
    assert not folder.metrics(gone).exists() and not (folder.samples(gone) / "index.json").exists()
    left = {path.name.partition("-")[0] for path in (folder.path / "cancelled").glob("*")}
    assert left <= {gone}, "another point was cancelled"  # empty where no task met its units after the line was gone

    # it comes back, and a line more: only what is missing of these two is submitted and done
    before = units_done(folder)
    assert {name for _, name in before if name.startswith("p")} and len(before) == len(set(before)), "a unit done twice"
    kept = digests(folder, eleven)
    until(lambda: not lab_jobs(lab), "the queue to be empty", 60)
    told = on_slurm(workspace, lab, [*LINES, LATER])
    assert "13 points, 2 to be done" in told and told.count("to do ") == 2
    first_report = reported.stat().st_mtime_ns
    here = sweep(workspace, lab, "here", [*LINES, LATER], "tasks=1")  # without Slurm, meanwhile
    assert "13 points, 13 to be done" in here
    until(lambda: reported.stat().st_mtime_ns != first_report, "the report of thirteen points", 400)
    after = units_done(folder)[len(before) :]
    table = table_of(folder)
    names = [point["name"] for point in table["points"]]
    new = {name for name in names if name not in eleven}
    assert len(names) == 13 and {name.partition("-")[0] for _, name in after} == new
    assert {stage for stage, _ in after} == set(sweep_plan.STAGES)
    assert digests(folder, eleven) == kept

    local = RunFolder(workspace / "runs" / "here")
    found = digests(folder, names)
    assert found == digests(local, names), "Slurm and one process here disagree"
    other = table_of(local)
    told_points = [{k: p[k] for k in ("name", "keys", "metrics", "nfe")} for p in table["points"]]
    assert told_points == [{k: p[k] for k in ("name", "keys", "metrics", "nfe")} for p in other["points"]]
    assert table["best"] == other["best"] and any("NFE" in point["front"] for point in table["points"])
    ends = [attempt.exit_code for attempt in journal.attempts(folder) if attempt.stage == "points"]
    assert None in ends and ExitCode.REQUEUE in ends, "nobody was struck while at work"
    pixels, indices, numbers = found
    print(
        f"{len(names)} points, {len(before)} + {len(after)} units, attempts of points ended {ends}, "
        f"{time.monotonic() - started:.0f} s; digests: pixels {pixels}; indices {indices}; numbers {numbers}"
    )


def lab_jobs(lab: Lab) -> str:
    """What Slurm has in its queue."""
    command = ["squeue", "--noheader", "--states=all", "--format=%i %T"]
    lines = subprocess.run(command, env=lab.environment(), capture_output=True, text=True, check=True).stdout
    return "\n".join(line for line in lines.splitlines() if re.search("PENDING|RUNNING|COMPLETING", line))
