"""What the demos share: typing commands as a user does, and reading what they leave behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_gen.metrics import results
from hpc_gen.runtime import clock, env
from hpc_gen.runtime.errors import ExitCode, HpcGenError, UserError
from hpc_gen.runtime.journal import attempts, history
from hpc_gen.runtime.run_folder import RunFolder

CONFIGS = Path(__file__).resolve().parents[3] / "job_configs" / "demo"

Printer = Callable[[str], None]


@dataclass(frozen=True)
class Demo:
    """One demo in one workspace."""

    workspace: Path
    say: Printer

    def run_folder(self, name: str) -> RunFolder:
        """A run of this workspace."""
        return RunFolder(self.workspace / "runs" / name)

    def command(self, *words: str, expect: Sequence[int] = (ExitCode.DONE,)) -> int:
        """Run `hpc-gen WORDS` as typed, its output passed through. Raises DemoFailed for an unexpected exit code."""
        return self.expected(self.start(*words), words, expect)

    def start(self, *words: str, new_session: bool = False) -> subprocess.Popen[bytes]:
        """Begin a command; the caller waits with `expected`. `new_session`: it can be killed with all its children."""
        self.say(f"$ hpc-gen {' '.join(words)}")
        argv = [sys.executable, "-m", "hpc_gen.cli", *words]
        environment = env.child_environment(HPC_GEN_WORKSPACE=str(self.workspace))
        return subprocess.Popen(argv, env=environment, cwd=self.workspace, start_new_session=new_session)

    def expected(self, process: subprocess.Popen[bytes], words: Sequence[str], codes: Sequence[int]) -> int:
        """Wait for a command and check its exit code."""
        try:
            code = process.wait()
        except BaseException:
            process.terminate()  # it saves and ends by itself; the demo may be called again
            process.wait()
            raise
        if code not in codes:
            raise DemoFailed(f"`hpc-gen {' '.join(words)}` ended with code {code}; see its message above", code)
        return code

    def killed_and_resumed(self, file: str, name: str, stages: str) -> None:
        """Run an experiment, with SIGKILL to all of its processes in the middle of its training, and resume it.

        A run that was killed before is resumed only.
        """
        run = self.run_folder(name)
        words = ("run", str(config_file(file)), "--stages", stages)
        if run.exists() and len([a for a in attempts(run) if a.stage == "train"]) > 1:
            if run.report.is_file():
                self.say(f"done already: {run.path}; its stages say what they find")
            self.command("resume", str(run.path), "--stages", stages)
            return
        process = self.start(*words, new_session=True)
        while process.poll() is None and not 0 < seen(run) < row_at(run):  # between two checkpoints: something to lose
            clock.sleep(0.1)
        if process.poll() is None:
            lost = f"checkpoint at {seen(run)} images, {row_at(run)} are logged"
            self.say(f"-- {lost}: SIGKILL to every process of the run")
            os.killpg(process.pid, signal.SIGKILL)
        self.expected(process, words, (-signal.SIGKILL, 0))
        self.command("resume", str(run.path), "--stages", stages)


class DemoFailed(HpcGenError):
    """A step of the demo did not do what it must; the exit code is that of the command."""

    def __init__(self, message: str, code: int) -> None:
        """`code`: exit code of the command that failed."""
        super().__init__(message)
        known = {int(member) for member in ExitCode}
        self.exit_code = ExitCode(code) if code in known and code != 0 else ExitCode.BUG


def metric_lines(run: RunFolder) -> list[str]:
    """The metrics of a run, a line each."""
    path = run.metrics("main")
    lines = [f"metrics ({path}):"]
    for record in results.read(path).records:
        value = "-" if record.value is None else f"{record.value:.4g}"
        lines.append(f"  {record.name}: {value}{f'  ({record.note})' if record.note else ''}")
    return lines


def checkpoint(run: RunFolder, images_seen: int) -> Path:
    """Where the checkpoint at that position lies."""
    return run.checkpoints / f"{images_seen:012d}"


def seen(run: RunFolder) -> int:
    """Position of the newest committed checkpoint; -1 when there is none."""
    names = [p.name for p in run.checkpoints.iterdir()] if run.checkpoints.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=-1)


def row_at(run: RunFolder) -> int:
    """Newest position that the journal has a row of."""
    if not run.exists():
        return -1
    rows = history(run)
    return rows[-1].images_seen if rows else -1


def was_preempted(run: RunFolder) -> bool:
    """Whether an attempt of its training has ended to be queued again."""
    return run.exists() and any(a.stage == "train" and a.exit_code == ExitCode.REQUEUE for a in attempts(run))


def config_file(name: str) -> Path:
    """A demo's experiment. Raises UserError where there is no clone of the project."""
    path = CONFIGS / name
    if not path.is_file():
        raise UserError(f"{path} is missing: the demo runs from a clone of the project; clone it and use `make demo`")
    return path
