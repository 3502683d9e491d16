"""Process groups of real processes on gloo: every collective of Ranks, the agreed stop, and a rank that never comes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

_PROGRAM = """
import json, os, signal, sys, threading
from pathlib import Path
from hpc_gen.runtime.ranks import Ranks
from hpc_gen.runtime.stop import StopToken

token = StopToken()
token.install()
import torch

ranks = Ranks.start(timeout_s=60)
found = {"rank": ranks.rank, "launcher": ranks.info.launcher, "local": ranks.local_rank, "backend": ranks.backend}
x = torch.full((3,), float(ranks.rank + 1))
ranks.all_reduce_sum_(x)
found["sum"] = x.tolist()
pending = ranks.all_reduce_sum_async(x)
pending.wait()
found["async"] = x.tolist()
y = torch.tensor([ranks.rank, 7], dtype=torch.int64)
found["max"] = ranks.all_reduce_max_cpu(y).tolist()
found["sum_cpu"] = ranks.all_reduce_sum_cpu(torch.tensor([ranks.rank + 1])).tolist()
z = torch.tensor([ranks.rank])
ranks.broadcast_(z, src=1)
found["broadcast"] = z.tolist()
found["object"] = ranks.broadcast_object({"from": ranks.rank}, src=1)
found["gathered"] = ranks.gather_objects(f"rank {ranks.rank}")
found["all"] = ranks.all_gather_objects(ranks.rank)

# a saving thread on its own group, while the main thread uses the control group in another order on each rank
saved = []
def save():
    for i in range(20):
        saved.append(ranks.save_all_gather(i))
thread = threading.Thread(target=save)
if ranks.rank == 0:
    thread.start()
stops = []
for iteration in range(20):
    if iteration == 10 and ranks.rank == 1:
        thread.start()
        os.kill(os.getpid(), signal.SIGTERM)
    stop = token.agree(ranks)
    if stop is not None:
        stops.append((iteration, stop.cause.name, stop.detail))
        break
thread.join()
found["saved"] = saved == [[i, i] for i in range(20)]
found["stops"] = stops
ranks.barrier()
ranks.stop()
ranks.stop()
Path(sys.argv[1], f"{ranks.rank}.json").write_text(json.dumps(found))
"""


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _environment(**extra: str) -> dict[str, str]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in names and not k.startswith(("SLURM_", "TORCHELASTIC_"))}
    return {**kept, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", **extra}


def _check(folder: Path, launcher: str) -> None:
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    for rank, facts in enumerate(found):
        assert (facts["rank"], facts["local"], facts["launcher"]) == (rank, rank, launcher)
        assert facts["sum"] == [3.0] * 3 and facts["async"] == [6.0] * 3
        assert facts["max"] == [1, 7] and facts["sum_cpu"] == [3]
        assert facts["broadcast"] == [1] and facts["object"] == {"from": 1}
        assert facts["all"] == [0, 1] and facts["saved"] is True
    assert [facts["gathered"] for facts in found] == [["rank 0", "rank 1"], None]
    # the signal reached rank 1 only; both stop at the same iteration
    assert found[1]["stops"] == [[10, "PREEMPTED", "SIGTERM"]]
    assert found[0]["stops"] == [[10, "PREEMPTED", "another rank was asked to"]]


def _step(rank: int) -> dict[str, str]:
    """Variables of task `rank` of a step of two tasks on one node."""
    return {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_NTASKS": "2",
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "SLURM_TASKS_PER_NODE": "2",
        "SLURM_JOB_NODELIST": "localhost",
    }


def test_ranks_under_torchrun(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--master-addr=127.0.0.1",
    ]
    done = subprocess.run(
        [*launcher, f"--master-port={_free_port()}", str(program), str(tmp_path)],
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    _check(tmp_path, "torchrun")


def test_ranks_under_srun(tmp_path: Path) -> None:
    """The variables of srun, without Slurm: address and port come from node list and job id."""
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(tmp_path)],
            env=_environment(**_step(rank)),
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    for task in tasks:
        stderr = task.communicate(timeout=120)[1]
        assert task.returncode == 0, stderr.decode()[-3000:]
    _check(tmp_path, "srun")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_that_never_comes_is_reported_with_the_place_of_the_meeting(rank: str) -> None:
    program = (
        "from hpc_gen.runtime.ranks import Ranks\n"
        "from hpc_gen.runtime.errors import RendezvousError\n"
        "try:\n    Ranks.start(timeout_s=2)\n"
        "except RendezvousError as error:\n    print(error)\n    raise SystemExit(int(error.exit_code))\n"
    )
    place = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=_environment(**place),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 86, done.stderr[-3000:]
    assert f"rank {rank} of 2 did not meet the others at 127.0.0.1:{place['MASTER_PORT']} within 2 s" in done.stdout
