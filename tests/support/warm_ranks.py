"""Ranks of the train stage by forking one warm process: torch is imported once, not once per rank and attempt.

    with WarmRanks() as warm:
        codes = warm.train(run, 4, overrides=["train.stop_at_images=32"], fault={"name": "stop", "rank": 2, "step": 3})

The same module is the server: it reads one JSON command per line, forks the ranks (gloo between them, as under any
launcher), and answers with their exit codes. Faults are made inside a rank, at a step that the test names.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]


class WarmRanks:
    """The test's side of the server."""

    def __init__(self, also: Sequence[str] = ()) -> None:
        """Start the server; it imports torch, and the modules named in `also`, while the test goes on."""
        unwanted = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "HPC_GEN_ATTEMPT")
        environment = {name: value for name, value in os.environ.items() if name not in unwanted}
        environment.update(PYTHONPATH=os.pathsep.join([str(ROOT), str(Path(__file__).parent)]), OMP_NUM_THREADS="1")
        self._server = subprocess.Popen(
            [sys.executable, "-P", __file__, *also],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that closing ends the ranks as well
        )

    def train(
        self, run: Any, world_size: int, overrides: Sequence[str] = (), fault: dict[str, Any] | None = None
    ) -> list[int]:
        """One attempt of a run (a RunFolder); returns the exit code of each rank, -N for one that signal N ended.

        What the ranks print is in logs/warm_N.log of the run.
        """
        command = {"run": str(run.path), "world_size": world_size, "overrides": list(overrides), "fault": fault or {}}
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(command) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, f"the server of warm ranks has ended with {self._server.wait()}"
        return list(json.loads(answer))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._server.pid, signal.SIGKILL)
        self._server.communicate()


def output(run: Any, rank: int = 0) -> str:
    """What a rank has printed in all its attempts."""
    return (run.logs / f"warm_{rank}.log").read_text()


# ---------------------------------------------------------------- the server


def serve() -> None:
    """Answer commands until the input ends."""
    import torch
    import torch._dynamo

    import hpc_gen.stages.train  # noqa: F401 - warm

    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr):  # some say hello, and the answers of this server go there
        for name in sys.argv[1:]:
            importlib.import_module(name)
    for line in sys.stdin:
        codes = fork_ranks(json.loads(line))
        print(json.dumps(codes), flush=True)


def fork_ranks(command: dict[str, Any]) -> list[int]:
    """Fork every rank and wait for all; a rank that has failed takes the others with it after ten seconds."""
    with socket.socket() as port:
        port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        port.bind(("127.0.0.1", 0))  # held, so that nobody else is given it; torch may listen all the same
        children: dict[int, int] = {}
        for rank in range(command["world_size"]):
            child = os.fork()
            if child == 0:
                be_a_rank(command, rank, port.getsockname()[1])
            children[child] = rank
        codes = [0] * command["world_size"]
        signal.signal(signal.SIGALRM, lambda number, frame: [os.kill(child, signal.SIGKILL) for child in children])
        while children:
            child, status = os.wait()
            codes[children.pop(child)] = os.waitstatus_to_exitcode(status)
            if status:
                signal.alarm(10)
        signal.alarm(0)
    return codes


def be_a_rank(command: dict[str, Any], rank: int, port: int) -> None:
    """The whole life of a rank; never returns."""
    import experiments

    from hpc_gen.runtime.run_folder import RunFolder

    code = 99
    try:
        run = RunFolder(command["run"])
        log = os.open(run.logs / f"warm_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        size = str(command["world_size"])
        if command["world_size"] > 1:
            os.environ.update(RANK=str(rank), WORLD_SIZE=size, LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=size)
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        experiments.begin_anew()
        code = train(run, command["overrides"], command["fault"], rank)
    except BaseException as error:
        traceback.print_exc()
        code = int(getattr(error, "exit_code", 70))
    finally:
        sys.stdout.flush()
        os._exit(code)


def train(run: Any, overrides: Sequence[str], fault: dict[str, Any], rank: int) -> int:
    """The train stage of one rank, with the fault it was given."""
    from hpc_gen.config import loader
    from hpc_gen.runtime.errors import DataError
    from hpc_gen.runtime.ranks import Ranks
    from hpc_gen.runtime.stop import Cause, Stop, StopToken
    from hpc_gen.stages import run_setup
    from hpc_gen.stages.train import run_train

    mine = rank == fault.get("rank")
    if mine and fault["name"] == "full disk":
        fill_disk(fault["part"])
    if mine and fault["name"] == "diverge":
        spoil_samples()

    class Token(StopToken):
        """Counts steps, and makes the fault before the one that was named (counted from 1 in each attempt)."""

        step = 0

        def agree(self, ranks: Ranks) -> Stop | None:
            self.step += 1
            if mine and self.step == fault.get("step"):
                if fault["name"] == "stop":
                    self.request(Cause.PREEMPTED, "the test")
                elif fault["name"] == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                elif fault["name"] == "sleep":
                    time.sleep(fault["seconds"])
                elif fault["name"] == "freeze":
                    os.kill(os.getpid(), signal.SIGSTOP)
                elif fault["name"] == "mistake":
                    raise DataError("the shard of this rank is torn")
            return super().agree(ranks)

        polls = 0

        def poll(self) -> Stop | None:
            self.polls += 1
            if mine and fault["name"] == "stop at poll" and self.polls == fault["poll"]:
                self.request(Cause.PREEMPTED, "the test")
            return super().poll()

    resolved = run_setup.typed(loader.load(run.config_path, list(overrides)))
    return int(run_train(run, resolved, run.path.parents[1], Token(run)))


def fill_disk(part: str) -> None:
    """From now on the disk is full for every file whose path holds `part`: what the kernel says, said by us."""
    from hpc_gen.runtime import commit

    ops = commit.ops
    write, mkdir = ops.write, ops.mkdir

    def full(path: Path, num_bytes: int) -> None:
        if part in str(path):
            with ops._explained(path, num_bytes):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full_write(descriptor: int, data: memoryview, path: Path) -> None:
        full(path, data.nbytes)
        write(descriptor, data, path)

    def full_mkdir(path: Path) -> None:
        full(path, 0)
        mkdir(path)

    ops.write, ops.mkdir = full_write, full_mkdir  # type: ignore[method-assign]


def spoil_samples() -> None:
    """From now on what this rank samples is not finite."""
    from hpc_gen.runtime.errors import DivergedError
    from hpc_gen.sampling import preview

    def spoilt(*arguments: Any) -> Any:
        arguments[5]()  # its poll: the others have begun
        raise DivergedError("1 of 1 latents are not finite")

    preview.generate_batch = spoilt


if __name__ == "__main__":
    serve()
