"""Runs on the lab's Slurm for tests and for tests/prove_slurm.py: submit as a user would, disturb, wait for events.

The experiment is tiny and whole: a folder of pictures is encoded, two nodes with two processes each train, samples are
drawn, scored and reported. Where a process is to be preempted is chosen by tests/support/points/sitecustomize.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from hpc_gen.runtime import commit, journal
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.sampling.images import write_png
from hpc_gen.training.checkpoint import read
from slurm import records
from slurm.lab import Lab

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
POINTS = SUPPORT / "points"
TRAINING_POINTS = (
    "before_import", "in_import", "rendezvous", "load", "first_step", "step", "agreement", "save", "rename",
    "evaluation", "last_barrier",
)  # fmt: skip
ALL_POINTS = (*TRAINING_POINTS, "sampling")
STARTED_POINTS = TRAINING_POINTS[4:]  # training has begun: the preempting job is to start within 5 s
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
BATCH = 16

EXPERIMENT = f"""
name: tiny
seed: 7
method:
  {{name: energy, input: pixels, image_size: 8, channels: 1, patch_size: 4, hidden: 16, depth: 1, heads: 2,
   diffusion_timesteps: 50}}
data: {{table: tables/tiny, validation_table: tables/tiny-validation, shuffle_shards: 2}}
encode: {{source: folder, source_path: pictures, image_size: 8, channels: 1, shard_rows: 32, tasks: 3}}
train:
  total_images: {BATCH * 40}
  global_batch: {BATCH}
  ranks: 4
  optimizer: {{lr: 1.0e-3}}
  ema: {{main: {{decay: 0.9}}}}
  log_every: {BATCH * 4}
  save_every: {BATCH * 8}
  validate: {{every_images: {BATCH * 16}, num_images: 16}}
sample: {{num_images: 16, block_images: 4, batch: 4, settings: {{steps: 2}}, seed: 11, tasks: 2}}
evaluate:
  metrics: [fid, kid]
  extractor: {{name: random-conv}}
  reference: {{table: tables/tiny, rows: 32}}
  batch: 4
  block_images: 8
  kid_subset_size: 8
  tasks: 2
"""

PROFILE: dict[str, Any] = {
    "description": "the lab of the tests",
    "partition": "low",
    "tasks_per_node": 2,
    "cpus_per_task": 1,
    "time_limit_min": 30,
    "grace_s": 30,
    "notice_s": 60,
    "parallel": 4,
    "host_python": "/usr/bin/python3",
}


def wait_for(
    condition: Callable[[], bool], what: str | Callable[[], str], limit_s: float = 240.0, every_s: float = 0.1
) -> None:
    """Wait for an event; fails with its name when it does not come."""
    due = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() >= due:
            raise AssertionError(f"waited {limit_s:g} s in vain: {what() if callable(what) else what}")
        time.sleep(every_s)


def make_pictures(folder: Path) -> None:
    """Grey pictures of 8 x 8 in 4 classes that differ in brightness: 96 to train with, 32 held out."""
    generator = torch.Generator().manual_seed(0)
    for number in range(128):
        label, split = number % 4, "train" if number < 96 else "validation"
        noise = torch.rand(1, 8, 8, generator=generator) * 60
        place = folder / split / "abcd"[label]
        place.mkdir(parents=True, exist_ok=True)
        write_png(place / f"{number:04d}.png", (noise + label * 60).to(torch.uint8).expand(3, -1, -1))


@dataclass
class Scene:
    """A workspace on the lab. `profile` is laid over PROFILE; `image`: tasks run in this container."""

    lab: Lab
    workspace: Path
    image: Path | None = None
    profile: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.marks = self.workspace / "marks"
        self.marks.mkdir(parents=True, exist_ok=True)
        self.workspace.chmod(0o755)
        self.marks.chmod(0o777)
        if not (self.workspace / "pictures").exists():
            make_pictures(self.workspace / "pictures")

    # -- commands ---------------------------------------------------------------------------------------------------

    def environment(self, **extra: str) -> dict[str, str]:
        """Of commands that a user types on the login node of the lab."""
        paths = os.pathsep.join([str(ROOT), str(SUPPORT)])
        own = {"PYTHONPATH": paths, "HPC_GEN_WORKSPACE": str(self.workspace), "OMP_NUM_THREADS": "1"}
        return self.lab.environment(**{**own, **extra})

    def command(
        self, *words: str, expected: int | None = 0, limit_s: float = 240.0, **extra: str
    ) -> subprocess.CompletedProcess[str]:
        """`hpc-gen WORDS`; its exit code must be `expected`, unless that is None."""
        done = subprocess.run(
            [sys.executable, "-P", "-m", "hpc_gen.cli", *words],
            env=self.environment(**extra),
            cwd=self.workspace,
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
        said = f"hpc-gen {' '.join(words)} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        assert expected is None or done.returncode == expected, said
        return done

    def config(self) -> Path:
        """The experiment as a file."""
        path = self.workspace / "tiny.yaml"
        path.write_text(EXPERIMENT)
        return path

    def profile_file(self, run: RunFolder) -> Path:
        """A cluster profile whose processes load sitecustomize.py of the points."""
        paths = [str(POINTS), str(run.code), str(SUPPORT)]
        content = {**PROFILE, **self.profile, "environment": {"PYTHONPATH": os.pathsep.join(paths)}}
        if self.image is not None:
            binds = [f"{SUPPORT}:{SUPPORT}:ro", str(self.marks)]
            content["runtime"] = {"kind": "apptainer", "image": str(self.image), "binds": binds}
        path = self.workspace / f"{run.name}-cluster.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    def run(self, name: str) -> RunFolder:
        """The folder of a run."""
        return RunFolder(self.workspace / "runs" / name)

    def submit(
        self,
        name: str,
        *overrides: str,
        stages: str | None = None,
        points: Sequence[str] = (),
        fail: str = "",
        expected: int | None = 0,
        **variables: str,
    ) -> RunFolder:
        """`hpc-gen submit`; `points`: where the first, second ... start is held until it is preempted."""
        run = self.run(name)
        words = ["submit", str(self.config()), "--cluster", str(self.profile_file(run)), f"name={name}", *overrides]
        words += ["--stages", stages] if stages else []
        marks = {"HPC_GEN_TEST_MARKS": str(self.marks / name), **variables}
        (self.marks / name).mkdir(exist_ok=True)
        (self.marks / name).chmod(0o777)
        self.command(*words, expected=expected, HPC_GEN_TEST_POINTS=",".join(points), HPC_GEN_TEST_FAIL=fail, **marks)
        return run

    def submit_array(
        self, name: str, axis: str, *overrides: str, stages: str | None = None, points: Sequence[str] = ()
    ) -> list[RunFolder]:
        """`hpc-gen submit --array AXIS`: its runs in order. All of them leave their marks in the folder of `name`."""
        marks = self.marks / name
        marks.mkdir(exist_ok=True)
        marks.chmod(0o777)
        profile = self.workspace / f"{name}-cluster.yaml"
        profile.write_text(yaml.safe_dump({**PROFILE, **self.profile}))
        words = ["submit", str(self.config()), "--cluster", str(profile), f"name={name}", *overrides, "--array", axis]
        words += ["--stages", stages] if stages else []
        # behind the code of each run, which the script of the array puts first
        path = os.pathsep.join([str(ROOT), str(SUPPORT), str(POINTS)])
        held = {"HPC_GEN_TEST_POINTS": ",".join(points), "HPC_GEN_TEST_MARKS": str(marks), "PYTHONPATH": path}
        self.command(*words, **held)
        key, _, values = axis.partition("=")
        return [self.run(f"{name}-{key}-{value}") for value in values.split(",")]

    def undisturbed(self, name: str, *overrides: str, stages: str | None = None) -> RunFolder:
        """The same experiment by `hpc-gen run` on this machine: what a run on Slurm must be equal to."""
        words = ["run", str(self.config()), f"name={name}", *overrides, *(["--stages", stages] if stages else [])]
        self.command(*words)
        return self.run(name)

    # -- jobs -------------------------------------------------------------------------------------------------------

    def job(self, run: RunFolder, stage: str) -> str:
        """Number of the newest job of a stage."""
        return [job for submission in records.read(run) for job in submission.jobs if job.stage == stage][-1].job_id

    def shown(self, job_id: str) -> dict[str, str]:
        """What scontrol says of a job, as words NAME=VALUE."""
        text = self.lab.run(["scontrol", "show", "job", "-o", job_id], check=False).stdout
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def state(self, job_id: str) -> str:
        """State of a job by the controller, as RUNNING."""
        return self.shown(job_id).get("JobState", "")

    def states(self, job_ids: Sequence[str]) -> dict[str, str]:
        """States by the accounting, the last of each job and of each element of an array."""
        argv = ["sacct", "-X", "-P", "-n", "-j", ",".join(job_ids), "-o", "JobID,State"]
        lines = (line.split("|") for line in self.lab.run(argv).stdout.splitlines())
        return {name: state.split()[0] for name, state in lines}

    def wait_until_over(self, run: RunFolder, limit_s: float = 480.0) -> dict[str, str]:
        """Until every job of the newest submission has ended; returns the states by the accounting."""
        ids = [job.job_id for job in records.read(run)[-1].jobs]

        def over() -> bool:
            live = self.lab.run(["squeue", "-h", "-r", "-o", "%i %A %F"]).stdout.split()
            return not set(ids) & set(live)

        wait_for(over, f"the jobs of {run.name} end\n{self.logs(run)}", limit_s, 0.3)
        wait_for(lambda: all(state in ENDED for state in self.states(ids).values()), "sacct has seen the end", 20)
        return self.states(ids)

    def logs(self, run: RunFolder, last: int = 25) -> str:
        """The ends of the logs of a run, for a failing test."""
        paths = sorted(run.logs.glob("*.log")) if run.logs.is_dir() else []
        return "\n".join(f"--- {path.name}\n" + "\n".join(path.read_text().splitlines()[-last:]) for path in paths)

    def queue(self) -> str:
        """What Slurm has queued and how its nodes are, for a failing test."""
        asked = (["squeue", "-o", "%i %j %T %r %N"], ["sinfo", "-N", "-o", "%N %P %T %E"])
        return "\n".join(self.lab.run(words, check=False).stdout for words in asked)

    def reached(self, run: RunFolder, point: str, restart: int, what: str = "reached") -> list[Path]:
        """Marks of the processes that have come to a point in a start of the job (or have had the signal there)."""
        return sorted((self.marks / run.name).glob(f"{point}.*.{restart}.*.{what}"))

    def preempt(self) -> float:
        """A job of partition high that wants every node; returns the seconds from its submission to its end."""
        begun = time.monotonic()
        nodes = str(len(self.lab.node_names))
        self.lab.run(["srun", "-p", "high", f"-N{nodes}", "--exclusive", "-J", "urgent", "true"], timeout_s=180)
        return time.monotonic() - begun

    def clean(self) -> None:
        """End all jobs and remove the workspace."""
        self.lab.run(["scancel", "--user=root"], check=False)
        shutil.rmtree(self.workspace, ignore_errors=True)


@dataclass(frozen=True)
class Preemption:
    """One preemption: at which point, in which start, how long the preempting job waited, who had the signal there."""

    point: str
    restart: int
    waited_s: float
    told: int


def disturb(scene: Scene, run: RunFolder, points: Sequence[str]) -> list[Preemption]:
    """Preempt the job of a run at each of the points in turn, for real, and let it come to its end."""
    found = []
    for restart, point in enumerate(points):
        wait_for(
            lambda r=restart, p=point: bool(scene.reached(run, p, r)),  # type: ignore[misc]
            lambda r=restart, p=point: f"start {r} of {run.name} comes to {p}\n{scene.queue()}\n{scene.logs(run)}",  # type: ignore[misc]
        )
        waited_s = scene.preempt()
        found.append(Preemption(point, restart, waited_s, len(scene.reached(run, point, restart, "told"))))
    return found


def checkpoint_digest(run: RunFolder) -> str:
    """Hash of the manifest of the last checkpoint, which holds the hash of every file in it."""
    newest = read.newest(run)
    assert read.verify(newest.path) == []
    return read.manifest_sha256(newest.path)


def digests(run: RunFolder) -> dict[str, str]:
    """What two runs of the same experiment must have in common, byte for byte: the last checkpoint, rows, samples."""
    found = {"checkpoint": checkpoint_digest(run), "rows": json.dumps(rows(run), sort_keys=True)}
    for path in sorted((run.path / "samples").glob("*/units/*/*.png")):
        found[path.relative_to(run.path).as_posix()] = commit.sha256_file(path)
    for path in sorted((run.path / "metrics").glob("*.json")):
        for metric in json.loads(path.read_text())["metrics"]:
            found[f"{path.stem}/{metric['name']}"] = repr(metric["value"])
    return found


def rows(run: RunFolder) -> list[tuple[int, dict[str, float]]]:
    """The history of a training."""
    return [(row.images_seen, row.data) for row in journal.history(run)]


def committed_twice(run: RunFolder, stage: str) -> list[str]:
    """Units of a stage that were committed more than once, by the journal."""
    names = [
        event.fields["unit"] for event in journal.read(run) if (event.stage, event.kind) == (stage, "unit_committed")
    ]
    return sorted({name for name in names if names.count(name) > 1})
