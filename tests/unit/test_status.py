"""`status` and `preempt`, on run folders written by the real journal, fence and ledger."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import UserError
from hpc_gen.runtime.fence import Fence, attempt_path, claim_attempt
from hpc_gen.runtime.journal import Journal
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import control
from hpc_gen.stages.status import lines, status

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = """\
name: toy
method: {name: energy}
data: {table: tables/toy}
train: {total_images: 640, global_batch: 64, log_every: 64, save_every: 64, optimizer: {lr: 1e-3}}
sample: {num_images: 100, block_images: 64}
"""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "runs" / "toy")
    folder.logs.mkdir(parents=True)
    folder.config_path.write_text(CONFIG)
    return folder


def train(run: RunFolder, resumed_from: int | None, upto: int, exit_code: int | None, cause: str) -> int:
    """One attempt of the train stage in the journal, with a row and a checkpoint at its end."""
    number = claim_attempt(run, "train")
    journal = Journal(run, number, "train")
    now = time.time()
    journal.event("attempt_start", world_size=2, rank=0, host="node7", process_start=now, resumed_from=resumed_from)
    journal.row(upto, {"loss": 0.25, "lr": 1e-3})
    if exit_code is not None:
        journal.event("attempt_end", exit_code=exit_code, cause=cause, images_seen=upto)
    journal.close()
    folder = run.checkpoints / f"{upto:012d}"
    folder.mkdir(parents=True)
    manifest = {
        "format": 1,
        "images_seen": upto,
        "world_size": 2,
        "files": {"a": {"bytes": 1500, "sha256": "0"}},
        "facts": {},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return number


def units(run: RunFolder, stage: str, count: int) -> None:
    number = claim_attempt(run, stage)
    journal = Journal(run, number, stage)
    journal.event("attempt_start", world_size=1, rank=0, process_start=time.time())
    for index in range(count):
        commit.make_folder(run.ledger(stage))
        commit.write_json(run.ledger(stage) / f"{index}.json", {"unit": str(index), "files": {}, "fingerprint": ""})
    journal.event("attempt_end", exit_code=0, cause="done")
    journal.close()


def text(run: RunFolder) -> str:
    return "\n".join(lines(status(run)))


def test_run_that_has_not_begun(run: RunFolder) -> None:
    found = text(run)
    assert found.startswith("toy: not begun\n")
    assert "train        not begun: 0 of 640 images" in found
    assert "sample       not begun: 0 of 2 units" in found


def test_preempted_run(run: RunFolder) -> None:
    train(run, None, 128, 85, "SIGTERM")
    found = text(run)
    assert found.startswith("toy: train preempted, state saved (SIGTERM); `hpc-gen resume` goes on\n")
    assert "train        preempted, state saved (SIGTERM): 128 of 640 images, 1 attempt\n" in found
    assert "last row     at 128 images: loss 0.25, lr 0.001" in found
    assert "checkpoints  128 (1.5kB)" in found
    assert "attempt 1    train, 2 ranks, 0.0s: preempted, state saved (SIGTERM)" in found


def test_killed_run(run: RunFolder) -> None:
    number = train(run, None, 128, None, "")
    claim = attempt_path(run, number)  # the claimer of this test is alive: make it a process that is not
    claim.write_text(json.dumps({**json.loads(claim.read_text()), "pid_start": 1}))
    assert text(run).startswith(
        "toy: train killed without a word (its last sign of life is the end); `hpc-gen resume` goes on"
    )


def test_failed_run_is_not_told_to_resume(run: RunFolder) -> None:
    train(run, None, 128, 75, "loss stayed NaN")
    assert text(run).startswith("toy: train diverged (loss stayed NaN)\n")


def test_finished_run(run: RunFolder) -> None:
    train(run, None, 128, 85, "SIGTERM")
    train(run, 128, 640, 0, "done")
    assert text(run).startswith("toy: some stages are left; `hpc-gen resume` goes on\n")
    units(run, "sample", 2)
    units(run, "report", 1)
    found = text(run)
    assert found.startswith("toy: done\n")
    assert "train        done: 640 of 640 images, 2 attempts" in found
    assert "sample       done: 2 of 2 units, 1 attempt\n" in found
    assert "attempt 2    train from 128 images, 2 ranks, " in found


def test_torn_checkpoint_is_named(run: RunFolder) -> None:
    train(run, None, 128, 85, "SIGTERM")
    (run.checkpoints / "000000000128" / "manifest.json").write_text("{")
    assert "checkpoint   " in text(run) and "manifest.json cannot be read" in text(run)


def test_json_is_json_even_with_nan(run: RunFolder) -> None:
    journal = Journal(run, claim_attempt(run, "train"), "train")
    journal.event("attempt_start", world_size=1, rank=0, process_start=time.time(), resumed_from=None)
    journal.row(64, {"loss": float("nan")})
    journal.close()
    found = json.loads(json.dumps(status(run).to_json(), allow_nan=False))
    assert found["last_row"]["data"]["loss"] == "nan"
    assert [stage["name"] for stage in found["stages"]] == ["train", "sample", "report"]


def test_run_is_found_by_path_and_name(run: RunFolder, tmp_path: Path) -> None:
    assert control.find_run("toy", tmp_path).path == run.path
    assert control.find_run(str(run.path), tmp_path / "elsewhere").path == run.path
    with pytest.raises(
        UserError, match=r"no run 'tyo' \(did you mean 'toy'\?\) as a folder or below .*; runs there: toy$"
    ):
        control.find_run("tyo", tmp_path)


# ---------------------------------------------------------------- preempt

WORKER = """
import signal, sys, time
from hpc_gen.runtime.fence import Fence, claim_attempt
from hpc_gen.runtime.journal import Journal
from hpc_gen.runtime.run_folder import RunFolder
run, stage = RunFolder(sys.argv[1]), sys.argv[2]
number = claim_attempt(run, stage)
fence = Fence.take(run, number) if stage == "train" else None
journal = Journal(run, number, stage)
def leave(*_):
    time.sleep(0.2)
    journal.event("attempt_end", exit_code=85, cause="SIGTERM")
    if fence is not None:
        fence.release("SIGTERM")
    sys.exit(85)
signal.signal(signal.SIGTERM, leave)
journal.event("attempt_start", world_size=1, rank=0, process_start=time.time(), resumed_from=None)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def worker(run: RunFolder, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """A process at work on the run, as attempt 1 of the stage that the test names."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    arguments = [sys.executable, "-c", WORKER, str(run.path), request.param]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("worker", ["train", "encode"], indirect=True)
def test_preempt_here(run: RunFolder, worker: subprocess.Popen[str]) -> None:
    told: list[str] = []
    assert f"running here: attempt 1 ({'train' if run.lock.exists() else 'encode'}), process {worker.pid}" in text(run)
    assert control.preempt(run, told.append, dry_run=True)
    assert told[0].startswith(f"would send SIGTERM to process {worker.pid}, attempt 1 (")
    assert worker.poll() is None
    assert control.preempt(run, told.append, wait_s=20)
    assert told[1].startswith(f"sending SIGTERM to process {worker.pid}")
    assert "attempt 1 ended with code 85 (SIGTERM) after " in told[2]
    assert worker.wait(5) == 85
    assert not run.preempt_file.exists()
    with pytest.raises(UserError, match=r"nothing is running in .*toy, so there is nothing to preempt"):
        control.preempt(run, told.append)


@pytest.mark.parametrize("worker", ["train"], indirect=True)
def test_preempt_that_is_not_heard_says_so(run: RunFolder, worker: subprocess.Popen[str]) -> None:
    worker.send_signal(signal.SIGSTOP)
    told: list[str] = []
    assert control.preempt(run, told.append, wait_s=0.5) is False
    assert told[-1].startswith("attempt 1 has not ended within 0.5 s")


@pytest.mark.parametrize("worker", ["train"], indirect=True)
def test_killed_holder_is_nobody(run: RunFolder, worker: subprocess.Popen[str]) -> None:
    worker.kill()
    worker.wait()
    assert control.holder(run) is None
    with pytest.raises(UserError, match="nothing is running"):
        control.preempt(run, lambda line: None)


def test_preempt_elsewhere_writes_a_file(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    number = claim_attempt(run, "train")
    Fence.take(run, number)
    monkeypatch.setattr(socket, "gethostname", lambda: "login1")
    lock = json.loads(run.lock.read_text())
    told: list[str] = []
    assert control.preempt(run, told.append, dry_run=True) and not run.preempt_file.exists()
    assert control.preempt(run, told.append)
    assert run.preempt_file.exists()
    assert told[-1] == (
        f"writing {run.preempt_file}: attempt {number} (train) runs on {lock['host']} and looks at it once a second"
    )


def test_reused_pid_gets_no_signal(run: RunFolder) -> None:
    """The start time tells our process from a stranger that was given its number later."""
    Fence.take(run, claim_attempt(run, "train"))
    lock = json.loads(run.lock.read_text())
    commit.write_json(run.lock, {**lock, "pid": os.getppid(), "pid_start": 1})
    assert control.holder(run) is None
