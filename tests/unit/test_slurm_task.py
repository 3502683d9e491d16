"""What a task of a job runs, as Slurm would start it: held-back signals, submitit's own start, the stage, its code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_slurm import EXPERIMENT
from submitit.core import utils

from hpc_gen.config import loader
from hpc_gen.runtime import journal
from hpc_gen.runtime.fence import Job
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import run_setup
from slurm import hold_signals, probe, requeue, task
from slurm.task import StageTask

SUPPORT = Path(__file__).resolve().parents[1] / "support"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return run_setup.prepare_run(loader.loads(EXPERIMENT), tmp_path / "w")


def start(run: RunFolder, job: StageTask, before: str = "", **variables: str) -> subprocess.Popen[str]:
    """Start a task as the batch script does; `before`: Python that runs in the place of what srun starts first."""
    folder = run.path / "slurm" / "submitted"
    folder.mkdir(parents=True, exist_ok=True)
    utils.DelayedSubmission(job).dump(folder / "7_submitted.pkl")
    program = [sys.executable, "-P", "-u", "-m", "submitit.core._submit", str(folder)]
    hold = [sys.executable, "-I", "-S", hold_signals.__file__, *program]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(run.code), str(SUPPORT)]),
        "HPC_GEN_WORKSPACE": str(run.workspace),
        "SUBMITIT_EXECUTOR": "slurm",
        "SLURM_JOB_ID": "7",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NTASKS": "1",
        "SLURM_JOB_NUM_NODES": "1",
        **variables,
    }
    return subprocess.Popen(hold, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd="/")


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def test_a_task_does_its_stage_from_the_runs_own_code(run: RunFolder) -> None:
    code, output = end(start(run, StageTask(str(run.path), "count", 0, 1)))
    assert code == 0, output
    assert (run.path / "counted" / "count" / "sum").read_text() == "28"
    assert f"hpc-gen: count of {run.path}, job 7, start 0, task 0 on " in output and "this node is well" in output
    (attempt,) = journal.attempts(run)
    assert attempt.exit_code == 0 and requeue.cause_of(str(run.path), "7", 0) == {}  # stages of units write none
    claim = next(run.journal.glob("*.attempt")).read_text()
    assert '"job_id": "7"' in claim


def test_the_code_of_an_error_is_that_of_the_process(run: RunFolder) -> None:
    (run.workspace / "no-input").write_text("")
    code, output = end(start(run, StageTask(str(run.path), "count")))
    assert code == 64 and "hpc-gen: the input is not there" in output and "Traceback" not in output


def test_a_signal_of_the_start_up_is_answered_with_a_requeue(run: RunFolder) -> None:
    """Sent as soon as the signals are held back: it waits for the stage's code, and nothing has begun."""
    process = start(run, StageTask(str(run.path), "count"))
    _until_held(process.pid)
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGCONT)
    code, output = end(process)
    assert code == 85, output
    assert "hpc-gen: SIGTERM before the stage began; nothing to save" in output
    assert not (run.path / "counted").exists() and journal.attempts(run) == []


def _until_held(pid: int) -> None:
    """Wait until SIGTERM is blocked in a process."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        status = Path(f"/proc/{pid}/status").read_text()
        mask = int(next(line for line in status.splitlines() if line.startswith("SigBlk")).split()[1], 16)
        if mask & 1 << (signal.SIGTERM - 1):
            return
        time.sleep(0.001)
    raise AssertionError("SIGTERM was never held back")


def test_the_end_of_a_process_is_not_disturbed(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python gives signals back at its shutdown; one that comes then must not change the code."""
    kept = {number: signal.getsignal(number) for number in [*task.SIGNALS, signal.SIGCONT]}
    monkeypatch.setenv("HPC_GEN_TASK", "0")
    monkeypatch.setenv("HPC_GEN_NUM_TASKS", "1")
    left: list[int] = []
    monkeypatch.setattr(task, "_leave_with", left.append)  # the real one ends this process
    try:
        for code in (0, 85):
            monkeypatch.setattr(StageTask, "_run", lambda self, run, job, code=code: code)
            StageTask(str(run.path), "count")()
            assert [signal.getsignal(number) for number in task.SIGNALS] == [signal.SIG_IGN] * len(task.SIGNALS)
        assert left == [0, 85]
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def test_nothing_is_taken_down_at_the_end(run: RunFolder) -> None:
    """Threads and what was to be done at exit are left: the preempting job waits for the end of the process."""
    lines = [
        "import sys, threading, time, atexit",
        "sys.path.insert(0, sys.argv.pop(1))",
        "from slurm.task import StageTask",
        "def run(self, run, job):",
        "    threading.Thread(target=time.sleep, args=(60,)).start()",
        "    atexit.register(time.sleep, 60)",
        "    print('all is committed', end='')",
        "    return 0",
        "StageTask._run = run",
        "StageTask(sys.argv[1], 'count')()",
    ]
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines), str(run.code), str(run.path)],
        text=True,
        capture_output=True,
        timeout=50,
    )
    assert done.returncode == 0 and done.stdout.endswith("all is committed"), done.stderr
    assert time.monotonic() - begun < 45


def test_an_ill_node_is_left_and_named(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "probe", lambda run, gpus: ["node n3: its GPU 0 is not free"])
    monkeypatch.setenv("SLURMD_NODENAME", "n3")
    assert StageTask(str(run.path), "count", gpus=4)._run(run, Job("7", 2)) == 86
    assert (run.path / "slurm" / "ill" / "7.2.n3").read_text() == "node n3: its GPU 0 is not free"
    assert requeue.ill_nodes(str(run.path), "7", 2) == ["n3"]


def test_who_looks_at_the_node(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process of a node for all; each for itself where GPUs are bound to processes."""
    looked: list[int] = []
    monkeypatch.setattr(probe, "probe", lambda run, gpus: looked.append(gpus) or [])  # type: ignore[func-returns-value]
    monkeypatch.setattr("hpc_gen.stages.runner.run_stage", lambda run, stage: 0)
    for local_rank, gpus in (("0", 4), ("1", 4), ("1", 1), ("2", 0), ("0", 0)):
        monkeypatch.setenv("SLURM_LOCALID", local_rank)
        assert StageTask(str(run.path), "count", gpus=gpus)._run(run, Job("7", 0)) == 0
    assert looked == [4, 1, 0]
