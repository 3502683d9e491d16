"""Bad input as a user meets it: commands as typed, their exit code, and one sentence without a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from experiments import LINEAR, TABLE, contents, make_tables

from hpc_gen.runtime import launch
from hpc_gen.runtime.errors import ExitCode
from hpc_gen.runtime.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"


class Shell:
    """Commands in a workspace."""

    def __init__(self, workspace: Path) -> None:
        self.workspace = workspace
        path = os.pathsep.join([str(ROOT), str(SUPPORT), os.environ.get("PYTHONPATH", "")])
        self.environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    def __call__(self, *words: str, code: int = 0) -> str:
        """What a command said; it must end with `code` and show no traceback."""
        done = subprocess.run(
            [sys.executable, "-m", "hpc_gen.cli", *words],
            capture_output=True,
            text=True,
            cwd=self.workspace,
            env=self.environment,
            check=False,
        )
        said = done.stdout + done.stderr
        assert done.returncode == code, said
        assert "Traceback" not in said
        return said


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    make_tables(tmp_path)
    (tmp_path / "tiny.yaml").write_text(LINEAR + "stages: [train]\n")
    return Shell(tmp_path)


def test_yaml_that_is_none(shell: Shell) -> None:
    (shell.workspace / "broken.yaml").write_text("name: tiny\ntrain: {total_images: 96\n")
    said = shell("run", "broken.yaml", code=ExitCode.USER)
    assert "broken.yaml:" in said and len(said.strip().splitlines()) <= 2
    (shell.workspace / "binary.yaml").write_bytes(bytes(range(256)))
    assert "binary.yaml" in shell("run", "binary.yaml", code=ExitCode.USER)


def test_a_damaged_table_then_a_whole_one(shell: Shell) -> None:
    path = shell.workspace / TABLE / "shard_00001.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    said = shell("run", "tiny.yaml", code=ExitCode.DATA)
    assert (
        f"{path.name} has {len(whole) - 9} bytes, the index says {len(whole)}; restore it or encode the table again"
        in said
    )
    assert path.name in shell("shards", "verify", TABLE, code=ExitCode.DATA)
    path.write_bytes(whole)
    shell("run", "tiny.yaml")
    assert len(contents(RunFolder(shell.workspace / "runs" / "tiny").checkpoints)) > 0


def test_threads_and_ranks_that_do_not_fit(shell: Shell) -> None:
    said = shell("run", "tiny.yaml", "train.ranks=3", code=ExitCode.USER)
    assert "'train.ranks' = 3 does not divide 'train.global_batch' = 8; choose ranks that do" in said
    shell("run", "tiny.yaml", "train.stop_at_images=32")
    said = shell("run", "tiny.yaml", "train.threads=2", code=ExitCode.USER)
    assert "train.threads (1 -> 2)" in said


def test_a_launcher_with_a_number_of_ranks_that_does_not_divide(shell: Shell) -> None:
    """torchrun and srun decide the number themselves: all three ranks end with the same sentence."""
    shell("run", "tiny.yaml", "train.stop_at_images=32")
    run = shell.workspace / "runs" / "tiny"
    before = contents(run / "checkpoints")
    lines: list[str] = []
    environment = {"PYTHONPATH": shell.environment["PYTHONPATH"], "HPC_GEN_WORKSPACE": str(shell.workspace)}
    argv = [sys.executable, "-m", "hpc_gen.cli", "stage", str(run), "train"]
    code = launch.run_ranks(
        argv, 3, env=environment, log_dir=run / "logs", on_line=lines.append, threads=1, hold_signals=False
    )
    logs = "\n".join(log.read_text() for log in sorted((run / "logs").rglob("*.log")))
    assert code == ExitCode.USER, logs
    sentence = "train.global_batch 8 is not a multiple of the 3 ranks; choose another number of ranks"
    assert logs.count(sentence) >= 3 and "Traceback" not in logs
    assert contents(run / "checkpoints") == before
