"""Kill ranks of a sharded save before each of their file operations, and load what is left on other numbers of ranks.

    python kill_sharded.py           # prints one JSON object: kills, attempts that ended, operations, problems
    python kill_sharded.py RUN       # only leaves checkpoints of two ranks at 16 and 32 images in a run folder

Two ranks (gloo, forked from one warm process) hold the boxes of cut tensors: rows that do not divide, stretches of a
flat buffer, boxes on one rank only. An attempt claims, sweeps, loads, saves twice. For every k: rank 0, rank 1, or the
node with both of them dies by SIGKILL before operation k of a rank. After each the chain must hold whole checkpoints
only, byte-equal to those of an undisturbed attempt and none older than the last commit; after some of them one or three
ranks go on from it, find every value of every tensor, and save theirs. Then the same with a disk that is full from
operation k of one rank on until that save has failed: on both ranks it must fail with the sentence, and the next succeed.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import signal
import socket
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import experiments
import torch
from torch import Tensor

from hpc_gen.runtime import clock, commit
from hpc_gen.runtime.commit_log import DurabilityLog, Operation
from hpc_gen.runtime.errors import HpcGenError
from hpc_gen.runtime.rank_detection import RankInfo
from hpc_gen.runtime.ranks import Ranks
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import train
from hpc_gen.training.checkpoint import manifest, read
from hpc_gen.training.checkpoint.chain import CheckpointChain, Retention
from hpc_gen.training.checkpoint.pieces import Box, Pieces, of_flat_slice, whole

RANKS, SAVE_EVERY, END, FINAL = 2, 16, 32, 48
WHO = ("rank 0", "rank 1", "node")
FULL = ("disk of rank 0", "disk of rank 1")
RECOVERED = 4
SHAPES = {"model/net/rows": (7, 5), "optim/net/rows/exp_avg": (7, 5), "ema/net/main/bias": (3,)}


def full(images_seen: int) -> dict[str, Tensor]:
    """Every tensor whole, a function of the clock."""
    generator = torch.Generator().manual_seed(images_seen)
    state = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return state | {"train/images_seen": torch.tensor(images_seen), "model/net/scale": torch.tensor(2.0)}


def held(images_seen: int, rank: int, world_size: int) -> dict[str, Tensor | Pieces]:
    """What one rank holds of it."""
    state: dict[str, Tensor | Pieces] = dict(full(images_seen))
    rows, flat, bias = (full(images_seen)[name] for name in SHAPES)
    parts = list(torch.chunk(rows, world_size))
    begin = sum(len(part) for part in parts[:rank])
    state["model/net/rows"] = Pieces((7, 5), rows.dtype, (Box((begin, 0), parts[rank]),))
    cuts = [flat.numel() * place // world_size for place in range(world_size + 1)]
    state["optim/net/rows/exp_avg"] = of_flat_slice((7, 5), cuts[rank], flat.reshape(-1)[cuts[rank] : cuts[rank + 1]])
    state["ema/net/main/bias"] = whole(bias) if rank == world_size - 1 else Pieces((3,), bias.dtype, ())
    return state


@dataclass
class Driver:
    """The warm process and what it has found so far."""

    folder: Path
    kills: int = 0
    ended: int = 0
    operations: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    reference: dict[tuple[int, int], str] = field(default_factory=dict)  # (ranks, images_seen) -> SHA-256 of manifest
    trials: int = 0

    def run(self, name: str) -> RunFolder:
        """A fresh run folder."""
        run = RunFolder(self.folder / "runs" / name)
        for folder in (run.journal, run.logs):
            folder.mkdir(parents=True)
        return run

    def attempt(self, run: RunFolder, ranks: int, end: int, who: str = "", at: int = 0) -> tuple[bool, list[Operation]]:
        """One attempt; whether the planned kill happened, and the operations of rank 0. `who` of FULL: no kill."""
        self.trials += 1
        scratch = self.folder / "scratch" / str(self.trials)
        victim = 1 if who.endswith("rank 1") else 0
        children: dict[int, int] = {}
        with socket.socket() as port:
            port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            port.bind(("127.0.0.1", 0))
            for rank in range(ranks):
                child = os.fork()
                if child == 0:
                    fault = Fault(who in FULL, at) if who and rank == victim else None
                    info = RankInfo(rank, ranks, rank, ranks, "torchrun")
                    be_a_rank(run, info, port.getsockname()[1], end, scratch, fault, who in FULL)
                children[child] = rank
            codes = self._wait(children, node=who == "node")
        killed = who in WHO and codes[victim] == -signal.SIGKILL
        if not killed and any(codes.values()):
            self.problems.append(f"{run.name}: attempt {self.trials} of {ranks} ranks ended with {codes}")
        operations = DurabilityLog.replay(scratch / "0").operations
        shutil.rmtree(scratch)
        self.kills += killed
        self.ended += not killed
        return killed, operations

    @staticmethod
    def _wait(children: dict[int, int], node: bool) -> dict[int, int]:
        """Codes by rank. A node that dies takes all its ranks; a rank that dies alone is noticed by the others."""
        codes: dict[int, int] = {}
        left = dict(children)
        signal.signal(signal.SIGALRM, lambda number, frame: [os.kill(child, signal.SIGTERM) for child in left])
        signal.alarm(60)  # a rank that waits for ever for one that is dead is a problem, by its code
        while left:
            child, status = os.wait()
            codes[left.pop(child)] = os.waitstatus_to_exitcode(status)
            if node and status:
                for other in left:
                    os.kill(other, signal.SIGKILL)
        signal.alarm(0)
        return codes

    def undisturbed(self) -> None:
        """The checkpoints that every disturbed attempt must pass through, for each number of ranks."""
        for ranks in (1, RANKS, 3):
            run = self.run(f"reference-{ranks}")
            for end in range(SAVE_EVERY, FINAL + 1, SAVE_EVERY):
                self.attempt(run, ranks, end)
                info = read.newest(run)
                self.reference[ranks, info.images_seen] = read.manifest_sha256(info.path)
        assert len(self.reference) == 9, self.problems

    def every_point(self, who: str) -> None:
        """Kill before each operation of the victim's."""
        kill_at = 0
        while True:
            kill_at += 1
            run = self.run(f"{who.replace(' ', '-')}-{kill_at}")
            killed, operations = self.attempt(run, RANKS, END, who, kill_at)
            where = f"{run.name}, killed before operation {kill_at}"
            self.check(run, where, operations, killed)
            if not killed:
                self.operations[who] = kill_at - 1
                return
            if kill_at % RECOVERED == 0:
                clock.sleep(0.02)  # the kernel counts starts in hundredths of a second, and sweep goes by them
                ranks = 3 if kill_at % (2 * RECOVERED) else 1
                self.check(run, f"{where}, then {ranks} ranks", self.attempt(run, ranks, FINAL)[1], False)
                if read.newest(run).images_seen != FINAL or experiments.leftovers(run):
                    self.problems.append(f"{where}: {ranks} ranks did not come to the end, or left something behind")
            shutil.rmtree(run.path)

    def full_at_every_point(self, who: str) -> None:
        """A disk that fills up at each operation of the saves, on one rank."""
        at = 0
        while True:
            at += 1
            run = self.run(f"{who.replace(' ', '-')}-{at}")
            self.attempt(run, RANKS, END, who, at)
            told = [json.loads((run.logs / f"saves_{rank}.json").read_text()) for rank in range(RANKS)]
            where = f"{run.name}, from operation {at} on"
            if {**told[0], "hit": None} != {**told[1], "hit": None}:
                self.problems.append(f"{where}: the ranks do not agree on what was saved: {told}")
            if any("the disk is full" not in error for error in told[0]["errors"]):
                self.problems.append(f"{where}: {told[0]['errors']}")
            whole = [info.images_seen for info in read.list_checkpoints(run) if not read.verify(info.path)]
            if whole != told[0]["saved"][-1:] or experiments.leftovers(run):
                self.problems.append(f"{where}: {told[0]['saved']} were saved, {whole} are whole, or something is left")
            if not any(each["hit"] for each in told):
                self.operations[who] = at - 1
                return
            shutil.rmtree(run.path)

    def check(self, run: RunFolder, where: str, operations: list[Operation], killed: bool) -> None:
        """Note everything that is not as it must be."""
        newest = -1
        for path in sorted(run.checkpoints.glob("[0-9]*")) if run.checkpoints.is_dir() else []:
            found = manifest.problems(path)
            if found:
                self.problems.append(f"{where}: {found[0]}")
                continue
            content = manifest.read(path)
            newest = max(newest, content.images_seen)
            if read.manifest_sha256(path) != self.reference[content.world_size, content.images_seen]:
                self.problems.append(f"{where}: the checkpoint at {content.images_seen} is not the undisturbed one")
        renamed = [int(o.path.name) for o in operations if o.name == "rename" and o.path.name.isdigit()]
        if newest < max(renamed, default=-1) or (not killed and newest < END):
            self.problems.append(f"{where}: {renamed} images were committed, {newest} are left")


@dataclass
class Fault:
    """What befalls one rank: SIGKILL before operation `at` of the attempt, or a disk full from operation `at` on."""

    full: bool
    at: int
    count: int = 0
    hit: bool = False
    over: bool = False

    def fill_disk(self) -> None:
        """From the next operation on they are counted, and fail as the kernel says it of a full disk."""
        ops = commit.ops

        def counted(method: Any, place: int) -> Any:
            def call(*arguments: Any) -> Any:
                self.count += 1
                if self.count >= self.at and not self.over:
                    self.hit = True
                    with ops._explained(arguments[place]):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return method(*arguments)

            return call

        for name, place in (("open_write", 0), ("write", 2), ("fsync", 1), ("mkdir", 0)):
            setattr(ops, name, counted(getattr(ops, name), place))


def be_a_rank(
    run: RunFolder, info: RankInfo, port: int, end: int, scratch: Path, fault: Fault | None, may_fail: bool
) -> None:
    """A whole attempt of one rank; never returns."""
    code = 99
    try:
        sys.stdout = io.StringIO()
        os.dup2(os.open(run.logs / f"rank_{info.rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        experiments.begin_anew()
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        kill_at = fault.at if fault is not None and not fault.full else None
        commit.ops.observer = DurabilityLog(scratch / str(info.rank), kill_at)
        ranks = Ranks.start(info, timeout_s=30.0)
        attempt = train._claim(run, ranks)
        if ranks.is_main:  # as the train stage does
            for folder in (run.path, run.journal):
                commit.sweep(folder)
        chain = CheckpointChain(run, ranks, attempt.fence, attempt.journal, Retention(1), print)
        chain.sweep()
        begun = loaded_at(chain)
        if fault is not None and fault.full:
            fault.fill_disk()
        saved, errors = [], []
        for images_seen in range(begun + SAVE_EVERY, end + 1, SAVE_EVERY):
            chain.save(images_seen, held(images_seen, info.rank, info.world_size), {"identity": "toy"})
            try:
                chain.wait()
                saved.append(images_seen)
            except HpcGenError as error:
                if not may_fail:
                    raise
                errors.append(str(error))
                if fault is not None:
                    fault.over = True  # somebody made room
        if fault is not None:
            fault.over = True  # what follows is no save
        if may_fail:
            told = {"saved": saved, "errors": errors, "hit": fault is not None and fault.hit}
            (run.logs / f"saves_{info.rank}.json").write_text(json.dumps(told))
        ranks.barrier()
        if ranks.is_main:
            attempt.fence.release("done")
        ranks.barrier()
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 70
    finally:
        sys.stderr.flush()
        os._exit(code)


def loaded_at(chain: CheckpointChain) -> int:
    """Load the newest checkpoint, compare every value of every tensor, and say where it stands; 0: there is none."""
    loaded = chain.load_newest()
    if loaded is None:
        return 0
    expected = full(loaded.images_seen)
    assert set(loaded.tensors) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(loaded.tensors[name], tensor), name
    return loaded.images_seen


def leave(folder: Path) -> None:
    """Checkpoints at 16 and 32 images of two ranks, in a run folder that is made."""
    driver = Driver(folder.parents[1])
    run = driver.run(folder.name)
    for end in (SAVE_EVERY, END):
        driver.attempt(run, RANKS, end)
        os.rename(read.newest(run).path, folder / f"{end}")  # out of reach of the retention
    for end in (SAVE_EVERY, END):
        os.rename(folder / f"{end}", run.checkpoints / f"{end:012d}")
    assert not driver.problems, driver.problems


def main() -> None:
    """Run every point and print what was found."""
    torch.set_num_threads(1)
    with experiments.scratch_folder() as folder, contextlib.redirect_stdout(sys.stderr):
        driver = Driver(folder)
        driver.undisturbed()
        for who in WHO:
            driver.every_point(who)
        for who in FULL:
            driver.full_at_every_point(who)
    found = {"kills": driver.kills, "ended": driver.ended, "operations": driver.operations, "problems": driver.problems}
    print(json.dumps(found))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        torch.set_num_threads(1)
        leave(Path(sys.argv[1]))
    else:
        main()
