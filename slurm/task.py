"""What every task of a job runs: one stage of one run. submitit pickles it by name, so it holds plain values only.

The code that unpickles it is the copy in the run folder (PYTHONPATH of the batch script), not the tree of whoever
submitted.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

from hpc_gen.runtime import clock, commit, env
from hpc_gen.runtime.errors import ExitCode, HpcGenError
from hpc_gen.runtime.fence import Job
from hpc_gen.runtime.run_folder import RunFolder

TRAIN = "train"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def _say(line: str) -> None:
    print(line, flush=True)


def _leave_at_once() -> None:
    """Take signals over from submitit and let them through: until the stop token has them, there is nothing to save.

    submitit's handlers would log in the middle of anything, SIGCONT's too. One that was held back arrives here.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        os.write(2, f"hpc-gen: {signal.Signals(number).name} before the stage began; nothing to save\n".encode())
        os._exit(ExitCode.REQUEUE)

    signal.signal(signal.SIGCONT, signal.SIG_DFL)
    for number in SIGNALS:
        signal.signal(number, leave)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCONT, *SIGNALS})


def _is_healthy(run: RunFolder, job: Job, gpus: int) -> bool:
    """Look at this node (slurm/probe.py); what is wrong goes to slurm/ill/JOB.RESTART.HOST, by which it is excluded."""
    from slurm.probe import probe

    begun = clock.monotonic()
    wrong = probe(run, gpus)
    _say(f"hpc-gen: {'; '.join(wrong) or 'this node is well'} ({clock.monotonic() - begun:.1f} s)")
    if wrong:
        host = env.get("SLURMD_NODENAME") or os.uname().nodename
        try:
            commit.write_text(run.path / "slurm" / "ill" / f"{job.job_id}.{job.restart_count}.{host}", "\n".join(wrong))
        except (OSError, HpcGenError) as error:
            _say(f"hpc-gen: this cannot be written down, so the node is not excluded: {error}")
    return not wrong


def _leave_with(code: int) -> NoReturn:
    """End this process at once: all is committed, and what Python would take down costs the preempting job seconds.

    That of a stage that is done, too: a preemption may come at its very end. No thread is waited for either: one may
    hang in a file system that the probe has found ill.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            pass  # a full disk keeps nobody from ending as he has to
    os._exit(code)


@dataclass(frozen=True)
class StageTask:
    """`stage` of the run in `run_path`; task `task` of `num_tasks` where the stage is made of units.

    `gpus`: how many the process must see.
    """

    run_path: str
    stage: str
    task: int = 0
    num_tasks: int = 1
    gpus: int = 0

    def __call__(self) -> NoReturn:
        """Run the stage and leave the process with its exit code; no result of submitit is written, nobody reads it."""
        _leave_at_once()
        from hpc_gen.cli_errors import exit_code_of

        if self.stage == TRAIN:
            import hpc_gen.stages.train  # noqa: F401 - seconds of imports, in which a signal is still answered at once

        env.set_default("HPC_GEN_TASK", str(self.task))
        env.set_default("HPC_GEN_NUM_TASKS", str(self.num_tasks))
        job = Job.current()
        _say(
            f"hpc-gen: {self.stage} of {self.run_path}, job {job.job_id}, start {job.restart_count}, "
            f"task {env.get('SLURM_PROCID') or 0} on {os.uname().nodename}"
        )
        run = RunFolder(self.run_path)
        code = exit_code_of(lambda: self._run(run, job), ["stage", self.run_path, self.stage])
        # Python gives signals back while it shuts down: one that comes then would be the end's code
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        _leave_with(code)

    def _run(self, run: RunFolder, job: Job) -> int:
        """Look at the node and run the stage; returns its exit code."""
        from hpc_gen.stages import runner

        local_rank = int(env.get("SLURM_LOCALID") or 0)
        # the first task of a node looks for all; where GPUs are bound to tasks, each for itself
        if (self.gpus == 1 or local_rank == 0) and not _is_healthy(run, job, self.gpus):
            return int(ExitCode.REQUEUE_ELSEWHERE)
        if self.stage == TRAIN and (env.get("SLURM_PROCID") or "0") == "0":
            from slurm import grace

            _say(f"hpc-gen: {grace.sentence(run, float(env.get('HPC_GEN_GRACE_S') or 0))}")
        return runner.run_stage(run, self.stage)
