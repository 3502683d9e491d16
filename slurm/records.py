"""What was submitted for a run: RUN/slurm/jobs.json, and the lock that keeps two submissions apart."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hpc_gen.runtime import clock, commit
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.runtime.fence import process_start_ticks
from hpc_gen.runtime.run_folder import RunFolder
from slurm.commands import LiveJob

VERSION = 1


@dataclass(frozen=True)
class JobRecord:
    """One job: `tasks` are the (task, number of tasks) of an array's elements in order, [] for a job that is none."""

    job_id: str
    stage: str
    name: str
    tasks: list[list[int]] = field(default_factory=list)
    dependency: str | None = None


@dataclass(frozen=True)
class Submission:
    """One `hpc-gen submit`: its number from 1, wall time, cluster, its profile and the jobs in order."""

    number: int
    time: float
    cluster: str
    profile: dict[str, Any]
    jobs: list[JobRecord]


def folder(run: RunFolder) -> Path:
    """Everything of Slurm in a run folder."""
    return run.path / "slurm"


def path_of(run: RunFolder) -> Path:
    """The record of submissions."""
    return folder(run) / "jobs.json"


def read(run: RunFolder) -> list[Submission]:
    """All submissions of a run, oldest first. Raises DataError when the record cannot be read."""
    path = path_of(run)
    try:
        content = json.loads(path.read_bytes())
        return [
            Submission(**{**each, "jobs": [JobRecord(**job) for job in each["jobs"]]})
            for each in content["submissions"]
        ]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path} is not a record of submissions ({error}); move it away, the run itself needs it not"
        ) from error


def write(run: RunFolder, submissions: list[Submission]) -> None:
    """Replace the record."""
    commit.write_json(path_of(run), {"version": VERSION, "submissions": [asdict(each) for each in submissions]})


def ends(run: RunFolder, job_id: str) -> list[dict[str, Any]]:
    """How the starts of a job (or of an element of an array) ended, oldest first, as slurm/requeue.py noted it."""
    path = folder(run) / "ends" / f"{job_id}.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            content = json.loads(line)
        except ValueError:
            continue  # torn by a kill
        if isinstance(content, dict):
            found.append(content)
    return found


def is_of(job: LiveJob, run: RunFolder) -> bool:
    """Whether a live job is one of a run.

    Its comment is the run's path, or, where it is an element of an array of runs, the folder of that array, in which
    the link of the element's number leads to the run.
    """
    if job.comment == str(run.path):
        return True
    if not job.element.isdigit() or not job.comment:
        return False
    try:
        return os.readlink(os.path.join(job.comment, job.element)) == str(run.path)
    except OSError:
        return False


@contextmanager
def lock(run: RunFolder) -> Iterator[None]:
    """Keep other submissions of this run away. Raises UserError while one is under way.

    A file that is created exclusively; one that a killed `submit` on this host has left is taken over.
    """
    path = folder(run) / "submit.lock"
    commit.make_folder(path.parent)
    _clear_stale(path)
    facts = {"host": socket.gethostname(), "pid": os.getpid(), "pid_start": process_start_ticks(os.getpid())}
    try:
        with commit.CommitStream(path) as stream:
            stream.write(json.dumps({**facts, "time": clock.now()}).encode())
    except FileExistsError:
        raise UserError(
            f"another submission of run '{run.name}' is under way ({path}); wait for it, or remove that file if the "
            "machine it names is gone"
        ) from None
    try:
        yield
    finally:
        commit.ops.unlink(path)


def _clear_stale(path: Path) -> None:
    try:
        facts = json.loads(path.read_bytes())
        pid, here = int(facts["pid"]), facts["host"] == socket.gethostname()
    except (OSError, ValueError, KeyError, TypeError):
        return  # absent, or being written: exclusive creation decides
    if here and process_start_ticks(pid) != facts.get("pid_start"):
        commit.ops.unlink(path)
