"""Real ranks on gloo: one sleeps, is frozen, is killed or fails; the others say which, on which host, and in what."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from experiments import LINEAR, Workspace
from warm_ranks import WarmRanks, output

from hpc_gen.runtime.errors import ExitCode
from hpc_gen.runtime.journal import read
from hpc_gen.runtime.run_folder import RunFolder

TIMEOUT = "train.collective_timeout_s=5"


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmRanks]:
    with WarmRanks() as server:
        yield server


def cause(run: RunFolder, attempt: int = 1) -> dict[str, Any]:
    return json.loads((run.journal / f"{attempt:04d}.cause.json").read_text())


def test_a_rank_that_sleeps_is_named_by_the_other(workspace: Workspace, warm: WarmRanks) -> None:
    run = workspace.run("sleeps", text=LINEAR)
    fault = {"name": "sleep", "rank": 1, "step": 5, "seconds": 12}
    codes = warm.train(run, 2, overrides=[TIMEOUT], fault=fault)
    assert codes[0] == ExitCode.REQUEUE_ELSEWHERE
    told = cause(run)
    assert told["exit_code"] == 86 and told["blamed"] == [{"rank": 1, "host": platform.node()}]
    assert f"rank 1 of 2 on {platform.node()} did not come: it is alive, and behind the others" in told["cause"]
    assert "its last span: 'agree'" in told["cause"] and "at 32 images" in told["cause"]
    assert "rank 0 waited for it in" in told["cause"]
    (fault_line,) = [event for event in read(run) if event.kind == "fault" and event.task == 0]
    assert fault_line.fields["what"] == "collective" and fault_line.fields["detail"] == told["cause"]
    # nothing is lost, and the next attempt ends as if nothing had been
    assert warm.train(run, 2) == [0, 0]


def test_a_frozen_rank_gives_no_sign_of_life(workspace: Workspace, warm: WarmRanks) -> None:
    run = workspace.run("frozen", text=LINEAR)
    codes = warm.train(run, 2, overrides=[TIMEOUT], fault={"name": "freeze", "rank": 1, "step": 3})
    assert codes[0] == ExitCode.REQUEUE_ELSEWHERE
    assert "rank 1 of 2" in cause(run)["cause"] and "it gives no sign of life" in cause(run)["cause"]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_gone(workspace: Workspace, warm: WarmRanks, victim: int) -> None:
    run = workspace.run("killed", text=LINEAR)
    codes = warm.train(run, 3, fault={"name": "die", "rank": victim, "step": 3}, overrides=["train.global_batch=12",
        "train.total_images=96", "train.log_every=24", "train.save_every=24"])  # fmt: skip
    assert codes[victim] == -9 and codes[2] == ExitCode.REQUEUE_ELSEWHERE
    said = output(run, 2)
    assert ("rank 1 of 3" in said and "its process is gone" in said) if victim else "rank 0, which holds the" in said


def test_the_words_and_the_code_of_a_rank_that_failed_are_those_of_all(workspace: Workspace, warm: WarmRanks) -> None:
    run = workspace.run("mistake", text=LINEAR)
    codes = warm.train(run, 2, fault={"name": "mistake", "rank": 1, "step": 3})
    assert codes == [ExitCode.DATA, ExitCode.DATA]
    assert cause(run)["cause"] == f"rank 1 of 2 on {platform.node()} failed: the shard of this rank is torn"


# what happens on a GPU, where NCCL would abort the process: the main thread is inside the driver and cannot be woken
STUCK = """
import signal, sys, time
from hpc_gen.runtime import spans
from hpc_gen.runtime.rank_watch import RankWatch
from hpc_gen.runtime.ranks import Ranks

ranks = Ranks.start(timeout_s=120)
recorder = spans.Recorder(None).start(rank=ranks.rank, world_size=2)
watch = RankWatch.start(ranks, limit_s=2.0)
watch.on_stuck = lambda error: print("noted", error.blamed, flush=True)
for step in range(3):
    with spans.span("step", together=True):
        ranks.barrier()
    spans.step_done(8 * (step + 1))
if ranks.rank == 1:
    with spans.span("data_wait"):
        time.sleep(60)
with spans.span("step", together=True), spans.span("reduce"):
    time.sleep(60)
"""


def test_a_rank_stuck_on_the_device_ends_by_itself(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in range(2):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        environment = {**os.environ, **own, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = str(Path(__file__).parents[2])
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen([sys.executable, "-c", STUCK], env=environment, stdout=pipe, stderr=pipe))
    try:
        out, err = processes[0].communicate(timeout=100)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert processes[0].returncode == ExitCode.REQUEUE_ELSEWHERE
    assert f"noted ((1, '{platform.node()}'),)" in out.decode()
    assert "its last span: 'data_wait'" in err.decode() and "at 24 images" in err.decode()
