"""Where the output of a run's processes lies, by stage: of jobs of Slurm, and of the local runner."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hpc_gen.runtime import clock
from hpc_gen.runtime.errors import UserError, nearest
from hpc_gen.runtime.run_folder import RunFolder
from slurm import records

_TAIL_BYTES = 65536
_POLL_S = 0.5


@dataclass(frozen=True)
class Log:
    """The output of one process: `what` names it for people; `script` is that of a batch script."""

    stage: str
    what: str
    path: Path
    script: bool = False


def task_log(run: RunFolder, job_id: str, task: int) -> Path:
    """Output of one process of a job."""
    return run.logs / f"{job_id}_{task}.log"


def find(run: RunFolder, stage: str | None = None, task: int | None = None) -> list[Log]:
    """All logs of a run, the last written last; `stage`, `task`: only of these. Raises UserError naming what there is.

    `task` counts the processes of a training, and the elements of an array.
    """
    found = sorted(_all(run), key=lambda log: (log.path.stat().st_mtime, log.path.name))
    stages = list(dict.fromkeys(log.stage for log in found))
    if not found:
        raise UserError(f"run '{run.name}' has no logs yet; see `hpc-gen status {run.name}`")
    if stage is not None and stage not in stages:
        known_stages = ", ".join(stages)
        raise UserError(f"run '{run.name}' has no logs of '{stage}'{nearest(stage, stages)}; it has {known_stages}")
    chosen = [log for log in found if stage in (None, log.stage)]
    if task is not None:
        known = sorted({_number(log) for log in chosen if not log.script})
        chosen = [log for log in chosen if not log.script and _number(log) == task]
        if not chosen:
            numbers = ", ".join(str(number) for number in known[:20])
            raise UserError(f"run '{run.name}' has no logs of task {task}; there are {numbers}")
    return chosen


def newest(run: RunFolder, stage: str | None = None, task: int | None = None) -> list[Log]:
    """Of the stage that wrote last: the batch script's log and the process's, those of the newest job."""
    logs = find(run, stage, task)
    last = [log for log in logs if log.stage == logs[-1].stage]
    processes = [log for log in last if not log.script and (task is not None or _number(log) == _number_wanted(last))]
    return [*[log for log in last if log.script][-1:], *processes[-1:]]


def _number_wanted(logs: list[Log]) -> int:
    return min((_number(log) for log in logs if not log.script), default=0)


def _all(run: RunFolder) -> list[Log]:
    """Every log that a name tells the stage of."""
    stages = {job.job_id: job for each in records.read(run) for job in each.jobs}
    found = []
    for path in sorted(run.logs.glob("*.log")) if run.logs.is_dir() else []:
        parts = path.stem.split("_")
        element = "_".join(parts[:2])  # of an array of runs: a training of several processes
        job = stages.get(element) or stages.get(parts[0])
        if job is None:
            match = re.fullmatch(r"(.+)_(\d+)", path.stem)
            if match is not None and not parts[0].isdigit():
                found.append(Log(match[1], f"process {match[2]}", path))
        elif len(parts) == (2 if job.tasks or "_" in job.job_id else 1):
            found.append(Log(job.stage, f"batch script of job {path.stem}", path, script=True))
        elif job.tasks:
            found.append(Log(job.stage, f"task {parts[1]} of job {parts[0]}", path))
        else:
            found.append(Log(job.stage, f"process {parts[-1]} of job {job.job_id}", path))
    return found


def _number(log: Log) -> int:
    return int(re.sub(r"\D.*", "", log.what.partition(" ")[2]) or 0)


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a file; [] when there is none. Progress that overwrites itself counts as it was last seen."""
    try:
        with open(path, "rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - _TAIL_BYTES))
            text = stream.read().decode(errors="replace")
    except OSError:
        return []
    shown = [line.rpartition("\r")[2].rstrip() for line in text.rstrip().split("\n")]
    return [line for line in shown if line][-lines:]


def follow(logs: list[Log], say: Callable[[str], None], until: Callable[[], bool]) -> None:
    """Print what is added to logs, until `until()` holds and nothing more comes."""
    places = {log.path: log.path.stat().st_size for log in logs}
    while True:
        over, new = until(), False
        for log in logs:
            size = log.path.stat().st_size if log.path.exists() else 0
            if size > places[log.path]:
                with open(log.path, "rb") as stream:
                    stream.seek(places[log.path])
                    data = stream.read()
                end = data.rfind(b"\n") + 1
                places[log.path] += end
                new = new or end > 0
                for line in data[:end].decode(errors="replace").splitlines():
                    say(line)
        if over and not new:
            return
        clock.sleep(_POLL_S)
