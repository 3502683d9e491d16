"""(d) How long a person waits for `hpc-gen --help` and `hpc-gen status`, against an empty Python of the same kind."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from facts import ROOT
from measure import Spread, Table, by_turns

from hpc_gen.config import loader
from hpc_gen.runtime import clock, env
from hpc_gen.runtime.journal import Journal
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import run_setup

CONFIG = ROOT / "job_configs" / "demo" / "mnist16.yaml"
RANKS = 2


def bench(quick: bool) -> list[Table]:
    """One table: wall time of each command and its ratio to starting Python."""
    rounds, attempts, intervals = (3, 2, 10) if quick else (11, 20, 200)
    with tempfile.TemporaryDirectory(prefix="hpc-gen-bench-") as name:
        workspace = Path(name)
        resolved = loader.load(CONFIG)
        lines = _journal(run_setup.prepare_run(resolved, workspace, "bench"), attempts, intervals)
        program = _program()
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "python, import typer and pydantic": [sys.executable, "-c", "import typer, pydantic"],
            "hpc-gen --help": [*program, "--help"],
            "hpc-gen run --help": [*program, "run", "--help"],
            f"hpc-gen status, {attempts} attempts, {lines:,} journal lines": [*program, "status", "bench"],
        }
        actions = {told: _timed(argv, workspace) for told, argv in commands.items()}
        found: dict[str, Spread] = by_turns(actions, rounds)
    table = Table(
        "Waiting for the command line",
        f"Wall time of whole processes, started {rounds} times by turns after one that does not count, output into a "
        f"pipe; hpc-gen started as {' '.join(Path(part).name for part in program)}. Issue 4 asks for at most 0.4 s for "
        "--help and 0.6 s for status. Ratio: to a Python that does nothing.",
        ("command", "s", "ratio"),
        identity=resolved.identity,
    )
    for told in commands:
        table.add(told, found[told].show("{:.3f}"), found[told].over(found["python -c pass"]).show("{:.1f}"))
    return [table]


def _program() -> list[str]:
    """The console script of this Python where it is installed, else the module."""
    script = Path(sys.executable).parent / "hpc-gen"
    return [str(script)] if script.exists() else [sys.executable, "-m", "hpc_gen.cli"]


def _timed(argv: Sequence[str], workspace: Path) -> Callable[[], None]:
    variables = env.child_environment(HPC_GEN_WORKSPACE=workspace, PYTHONPATH=ROOT, OMP_NUM_THREADS=1)

    def start() -> None:
        done = subprocess.run(argv, env=variables, cwd=workspace, capture_output=True, text=True)
        assert done.returncode == 0, f"{argv} ended with code {done.returncode}: {done.stderr}"

    return start


def _journal(run: RunFolder, attempts: int, intervals: int) -> int:
    """A journal as of a long run: `attempts` of the train stage, each with `intervals` rows; returns its lines."""
    images = 0
    for number in range(1, attempts + 1):
        ranks = [Journal(run, number, "train", rank) for rank in range(RANKS)]
        for rank, journal in enumerate(ranks):
            start = {"world_size": RANKS, "rank": rank, "host": "bench", "process_start": clock.now()}
            journal.event("attempt_start", **start, resumed_from=images or None, identity="0")
        for _ in range(intervals):
            images += 640
            for journal in ranks:
                seconds = {"productive_s": 1.7, "data_wait_s": 0.1, "save_stall_s": 0.0, "other_s": 0.0}
                journal.event("interval", images_seen=images, images=640, **seconds)
            ranks[0].row(images, {"loss": 0.1, "mse": 0.1, "grad_norm": 1.0, "learning_rate": 1e-3})
        for journal in ranks:
            journal.event("attempt_end", exit_code=85, cause="SIGTERM", images_seen=images)
            journal.close()
    return sum(len(path.read_bytes().splitlines()) for path in run.journal.glob("*.jsonl"))
