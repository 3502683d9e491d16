"""Verbs of daily work as typed: fork, compare, gc, a longer training, initial weights, the notification."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from experiments import TINY, make_tables

from hpc_gen.runtime import clock
from hpc_gen.runtime.errors import ExitCode
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.training.checkpoint import manifest, read

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLED = TINY + "sample: {num_images: 8, block_images: 4, batch: 4, settings: {steps: 2}}\n"
SAMPLED += "evaluate: {metrics: [fid], extractor: {name: random-conv}, reference: {table: tables/toy, rows: 24}}\n"
WRITE = "import os; open('heard', 'a').write(' '.join(os.environ['HPC_GEN_' + k] for k in ('STAGE', 'OUTCOME', 'EXIT_CODE')) + '\\n')"


class Shell:
    """Commands in a workspace, as a user types them."""

    def __init__(self, workspace: Path) -> None:
        self.workspace = workspace

    def start(self, *words: str) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "hpc_gen.cli", *words]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, stdout=pipe, stderr=subprocess.STDOUT, text=True, cwd=self.workspace, env=environment
        )

    def __call__(self, *words: str, code: int = 0) -> str:
        """Output of one command, which must end with `code`."""
        process = self.start(*words)
        said, _ = process.communicate()
        assert process.returncode == code, said
        assert "Traceback" not in said
        return said

    def run(self, name: str) -> RunFolder:
        return RunFolder(self.workspace / "runs" / name)


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """A workspace with two tables and an experiment."""
    make_tables(tmp_path)
    (tmp_path / "tiny.yaml").write_text(SAMPLED)
    return Shell(tmp_path)


@pytest.mark.timeout(900)
def test_fork_compare_and_gc(shell: Shell) -> None:
    said = shell("run", "tiny.yaml", "train.keep_last=9", "--stages", "train", "--dry-run")
    assert "disk        train will write about" in said and not (shell.workspace / "runs").exists()
    shell("run", "tiny.yaml", "train.keep_last=9", "train.total_images=64", "--stages", "train,sample,evaluate")
    said = shell("fork", "tiny", "--at", "32", "--name", "hot", "train.optimizer.lr=0.01", "--dry-run")
    assert "train.optimizer.lr = 0.01 (was 0.001): changes numbers" in said and not shell.run("hot").path.exists()
    shell("fork", "tiny", "--at", "32", "--name", "hot", "train.optimizer.lr=0.01")
    shell("fork", "tiny", "--at", "32", "--name", "same")
    for name in ("hot", "same"):
        shell("resume", name, "--stages", "train,sample,evaluate" if name == "hot" else "train")
    newest = f"{64:012d}"
    parent, same, hot = (manifest.read(shell.run(name).checkpoints / newest) for name in ("tiny", "same", "hot"))
    assert parent.files == same.files != hot.files
    said = shell("status", "same")
    assert "forked from  tiny at 32 images" in said
    said = shell("fork", "tiny", "--at", "33", "--name", "x", code=ExitCode.DATA)
    assert "has no checkpoint at 33 images; it has: 16, 32, 48, 64" in said
    said = shell("fork", "tiny", "--at", "x", "--name", "x", code=ExitCode.USER)
    assert "--at is 'x'; give images seen as a whole number, or latest" in said
    said = shell("fork", "tiny", "--name", "x", "method.hidden=32", code=ExitCode.USER)
    assert "cannot carry the change of method.hidden (16 -> 32)" in said

    said = shell("compare", "tiny", "hot")
    assert "forked from tiny at 32 images" in said and "train.optimizer.lr" in said
    assert "loss at the images seen that both logged (2)" in said and "main/fid" in said
    shown = json.loads(shell("compare", "tiny", "hot", "--json"))
    assert [point[0] for point in shown["curves"][0]["points"]] == [48, 64]
    assert shown["metrics"][0]["refused"] is None and isinstance(shown["metrics"][0]["difference"], float)
    said = shell("compare", "tiny", "hto", code=ExitCode.USER)
    assert "did you mean 'hot'?" in said

    leftover = shell.run("tiny").checkpoints / ".tmp-000000000112-0003"
    leftover.mkdir()
    os.utime(leftover, (1e9, 1e9))
    said = shell("gc", "tiny", "--dry-run")
    assert (
        "tiny: would remove unfinished writes of killed attempts: 1," in said
        and len(read.list_checkpoints(shell.run("tiny"))) == 4
    )
    shell("resume", "tiny", "train.keep_last=1", "--stages", "train")
    shell("gc", "tiny")
    assert [path.name for path in shell.run("tiny").checkpoints.iterdir()] == [newest]
    assert "nothing to remove" in shell("gc", "--all")
    assert "give a run or --all" in shell("gc", code=ExitCode.USER)


@pytest.mark.timeout(900)
def test_a_longer_training_initial_weights_and_the_notification(shell: Shell) -> None:
    told = [f"notify.command={json.dumps([sys.executable, '-c', WRITE])}", "stages=[train]"]
    shell("run", "tiny.yaml", "train.total_images=32", *told)
    said = shell("resume", "tiny", "train.total_images=64", "--dry-run")
    assert "stage       train" in said and read.newest(shell.run("tiny")).images_seen == 32
    shell("resume", "tiny", "train.total_images=64")
    assert read.newest(shell.run("tiny")).images_seen == 64
    said = shell("run", "tiny.yaml", "train.total_images=48", *told, code=ExitCode.USER)
    assert "cannot be shortened" in said and "train.stop_at_images=48" in said
    shell("run", "tiny.yaml", "name=cosine", "train.total_images=32", "train.schedule.kind=cosine", *told)
    said = shell("resume", "cosine", "train.total_images=64", code=ExitCode.USER)
    assert "`hpc-gen fork cosine --at latest --name NEW train.total_images=64` goes on" in said
    shell("fork", "cosine", "--at", "latest", "--name", "longer", "train.total_images=64")
    shell("resume", "longer")
    assert read.newest(shell.run("longer")).images_seen == 64

    shell("weights", "export", "tiny", "--to", "tiny.safetensors")
    said = shell("run", "tiny.yaml", "name=tuned", "train.init_from.weights=tiny.safetensors", *told)
    assert "initial weights of role 'denoiser':" in said and "differences" not in said
    said = shell(
        "run", "tiny.yaml", "name=wide", "train.init_from.run=tiny", "method.mlp_ratio=2.0", *told, code=ExitCode.DATA
    )
    assert "the model needs" in said and "train.init_from.strict=false" in said
    lenient = ["train.init_from={run: tiny, strict: false}", "method.mlp_ratio=2.0"]
    said = shell("run", "tiny.yaml", "name=wide2", *lenient, *told)
    assert "tensors taken;" in said and "  the source has 'dit.blocks.0.mlp" in said
    heard = (shell.workspace / "heard").read_text().splitlines()
    assert heard == ["train done 0"] * 5 + ["train failed 64", "train done 0"]


@pytest.mark.timeout(900)
def test_a_living_run_is_left_alone_and_its_end_is_told(shell: Shell) -> None:
    long = ["train.total_images=8000000", "train.save_every=1600", "stages=[train]"]
    process = shell.start("run", "tiny.yaml", *long, f"notify.command={json.dumps([sys.executable, '-c', WRITE])}")
    try:
        until = clock.monotonic() + 120
        while not list(shell.run("tiny").checkpoints.glob("[0-9]*")) and clock.monotonic() < until:
            clock.sleep(0.1)
        leftover = shell.run("tiny").checkpoints / ".tmp-000000000007-0000"
        leftover.mkdir()
        os.utime(leftover, (1e9, 1e9))
        said = shell("gc", "tiny", code=ExitCode.USER)
        assert "attempt 1 (train) is at work in process" in said and leftover.is_dir()
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate()
    assert process.returncode == ExitCode.REQUEUE
    assert (shell.workspace / "heard").read_text() == "train requeued 85\n"
    said = shell("gc", "tiny")
    assert "removing unfinished writes of killed attempts: 1," in said and not leftover.exists()
