"""submitit's executor for Slurm with our batch script: submitit pickles, submits and hands out job handles."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from submitit.core import utils
from submitit.slurm.slurm import SlurmExecutor, SlurmJob

from slurm.batch import JobSpec, script
from slurm.commands import Commands
from slurm.task import StageTask

FOLDER = ("slurm", "submitted")  # below the run folder: scripts and pickled tasks


def folder_of(run: Path) -> Path:
    """Where submitit keeps the scripts and tasks of a run."""
    return run.joinpath(*FOLDER)


class Executor(SlurmExecutor):
    """Submits one job of a run. The script is ours (slurm/batch.py); all the rest is submitit's.

    submitit makes an array through a plain SlurmExecutor, whose script would not be ours;
    `_internal_process_submissions` does the same with this class.
    """

    def __init__(self, spec: JobSpec, commands: Commands) -> None:
        """`spec`: the job; `commands`: the door to Slurm's programs."""
        super().__init__(folder=folder_of(spec.run), python=spec.python)
        self.spec = spec
        self._commands = commands

    @classmethod
    def affinity(cls) -> int:
        """Always: whether Slurm is here was asked before (commands.py)."""
        return 2

    def submit_tasks(self, tasks: list[StageTask]) -> list[SlurmJob[int]]:
        """Submit the job; an array when the spec says so. One handle per element."""
        assert len(tasks) == (self.spec.array or 1), f"{len(tasks)} tasks for an array of {self.spec.array}"
        delayed = [utils.DelayedSubmission(task) for task in tasks]
        jobs = self._internal_process_submissions(delayed)
        return list(jobs)

    def _internal_process_submissions(self, delayed_submissions: list[utils.DelayedSubmission]) -> list[Any]:
        folder = self.folder
        folder.mkdir(parents=True, exist_ok=True)
        pickles = []
        for delayed in delayed_submissions:
            path = folder / f"{uuid.uuid4().hex}.pkl"
            delayed.set_timeout(self.spec.wants.time_limit_min or 0, self.max_num_timeout)
            delayed.dump(path)
            pickles.append(path)
        first = self._submit_command(self._submitit_command_str)
        if self.spec.array is None:
            jobs = [first]
        else:
            ranks = list(range(first.num_tasks))
            jobs = [SlurmJob(folder, f"{first.job_id}_{k}", tasks=ranks) for k in range(self.spec.array)]
        for job, path in zip(jobs, pickles, strict=True):
            job.paths.move_temporary_file(path, "submitted_pickle")
        return jobs

    def _num_tasks(self) -> int:
        return self.spec.nodes * self.spec.tasks_per_node

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return script(self.spec, command)

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return [self._commands.program("sbatch"), str(submission_file_path)]
