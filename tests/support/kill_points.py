"""Kill a training process before each of its file operations, and look at what is left (run by test_kill_points.py).

    python kill_points.py kill|cut     # prints one JSON object: kills, attempts that ended, operations, problems

One warm process (torch imported, tables made, no other thread) forks a child per attempt; the child is a whole attempt
of the train stage and dies by SIGKILL before operation k. `cut`: then a power cut takes what was not made durable. For
every k of every situation: attempt killed at k -> attempt killed at another place -> attempt that may end. After each
the chain must hold whole checkpoints only, byte-equal to those of an undisturbed run, none older than the last commit.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import json
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import experiments
import torch

from hpc_gen.config.loader import Resolved
from hpc_gen.runtime import clock, commit, journal
from hpc_gen.runtime.commit_log import DurabilityLog, Operation
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.runtime.stop import StopToken
from hpc_gen.stages.train import run_train
from hpc_gen.training.checkpoint import manifest, read

RECOVERED = 6
NAMES: tuple[Literal["keep", "lose"], ...] = ("keep", "lose")
CONTENT: tuple[Literal["empty", "torn"], ...] = ("empty", "torn")


@dataclass(frozen=True)
class Situation:
    """A run folder as an attempt may find it, and where (images) the attempt shall end.

    `before`: where an undisturbed attempt before it ended; `damaged`: its last checkpoint is not whole, on purpose.
    """

    name: str
    end: int
    before: int | None = None
    damaged: bool = False

    @property
    def held(self) -> int:
        """The newest whole checkpoint that the attempt finds; -1: none."""
        return -1 if self.before is None else self.before - SAVE_EVERY if self.damaged else self.before


SAVE_EVERY = 16  # images, as in experiments.LINEAR
SITUATIONS = (
    Situation("fresh", 48),
    Situation("resumed", 80, before=32),
    Situation("preempted", 80, before=40),
    Situation("fallback", 80, before=48, damaged=True),
)


@functools.cache
def resolved_once(*overrides: str) -> Resolved:
    """The experiment with overrides: parsing YAML takes longer than the training."""
    return experiments.resolved(*overrides, text=experiments.LINEAR)


@dataclass
class Driver:
    """The warm process and what it has found so far."""

    folder: Path
    cut: bool
    kills: int = 0
    ended: int = 0
    operations: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    reference: dict[int, str] = field(default_factory=dict)  # images_seen -> SHA-256 of the manifest
    rows: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.workspace = experiments.make_workspace(self.folder)
        self._trials = 0

    def warm_up(self) -> None:
        """One whole attempt in this process: its children then find every lazy import done and every cache filled."""
        run = self.workspace.run("warm", text=experiments.LINEAR)
        for end in ("32", "64"):
            assert self.workspace.train(run, f"train.stop_at_images={end}") == 0
        gc.collect()
        gc.freeze()  # children would copy every page that the collector touches

    @staticmethod
    def is_alone() -> bool:
        """Whether this thread is the only one, by the kernel's word."""
        return threading.active_count() == 1 and len(os.listdir("/proc/self/task")) == 1

    # -- attempts --------------------------------------------------------------------------------------------------

    def attempt(self, run: RunFolder, end: int, *overrides: str, kill_at: int | None = None) -> list[Operation] | None:
        """One attempt in a forked child. Returns its operations when it was killed, None when it ended by itself."""
        found = resolved_once(f"train.stop_at_images={end}", *overrides)
        self._trials += 1
        scratch = self.folder / "scratch" / str(self._trials)
        assert self.is_alone(), "a fork would lose the other threads"
        child = os.fork()
        if child == 0:
            self._be_an_attempt(run, found, scratch, kill_at)
        status = os.waitpid(child, 0)[1]
        log = DurabilityLog.replay(scratch)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            if self.cut:
                # whoever announces an operation has returned from the one before, and the other thread of an
                # attempt that writes (save or main) is not alive or not writing
                log.settle()
                log.apply_power_cut(NAMES[self._trials % 2], CONTENT[self._trials // 2 % 2])
            shutil.rmtree(scratch)
            self.kills += 1
            return log.operations
        if os.waitstatus_to_exitcode(status) != 0:
            self.problems.append(f"{run.name}: attempt {self._trials} ended with status {status}")
        shutil.rmtree(scratch)
        return None

    def _be_an_attempt(self, run: RunFolder, found: Resolved, scratch: Path, kill_at: int | None) -> None:
        """Never returns."""
        code = 99
        try:
            sys.stdout = io.StringIO()
            experiments.begin_anew()
            commit.ops.observer = DurabilityLog(scratch, kill_at)
            code = int(run_train(run, found, self.folder, StopToken(run)))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    # -- situations ------------------------------------------------------------------------------------------------

    def undisturbed(self) -> None:
        """The states and rows that every disturbed run must pass through: one attempt, every checkpoint kept."""
        run = self.workspace.run("reference", text=experiments.LINEAR)
        for end in (40, 80):  # 40: where the preempted one stopped
            self.attempt(run, end, "train.keep_last=99")
        self.reference = {info.images_seen: read.manifest_sha256(info.path) for info in read.list_checkpoints(run)}
        self.rows = experiments.rows(run)
        assert sorted(self.reference) == [16, 32, 40, 48, 64, 80], self.problems

    def base(self, situation: Situation) -> RunFolder:
        """The run folder of a situation, to be copied for each kill."""
        run = self.workspace.run(f"{situation.name}-base", text=experiments.LINEAR)
        if situation.before is not None:
            self.attempt(run, situation.before)
        if situation.damaged:
            data = run.checkpoints / f"{situation.before:012d}" / "__0_0.distcp"
            content = bytearray(data.read_bytes())
            content[len(content) // 2] ^= 1
            data.write_bytes(content)
        return run

    def copies(self, situation: Situation) -> Iterator[RunFolder]:
        """Fresh copies of the base for as long as they are wanted."""
        base, number = self.base(situation), 0
        while True:
            number += 1
            copy = RunFolder(base.path.with_name(f"{situation.name}-{number}"))
            shutil.copytree(base.path, copy.path)
            yield copy
            shutil.rmtree(copy.path)

    def every_point(self, situation: Situation) -> None:
        """Kill before each operation of an attempt; at some, kill the recovery as well and let the third attempt end."""
        for kill_at, run in enumerate(self.copies(situation), 1):
            operations = self.attempt(run, situation.end, kill_at=kill_at)
            self.check(run, situation, operations, kill_at)
            if operations is None:
                self.operations[situation.name] = kill_at - 1  # the attempt has no more
                return
            if kill_at % RECOVERED:
                continue
            again = 1 + kill_at * 37 % 101
            operations = self.attempt(run, situation.end, kill_at=again)
            self.check(run, situation, operations, again)
            clock.sleep(0.02)  # the kernel counts starts in hundredths of a second, and sweep goes by them
            if operations is not None and self.attempt(run, situation.end) is None:
                self.check(run, situation, None, 0)

    # -- verdicts --------------------------------------------------------------------------------------------------

    def check(self, run: RunFolder, situation: Situation, operations: list[Operation] | None, kill_at: int) -> None:
        """Note everything that is not as it must be; `operations` None: the attempt ended by itself."""
        where = (
            f"{run.name}, killed before operation {kill_at}" if operations is not None else f"{run.name}, at its end"
        )
        numbered = sorted(run.checkpoints.glob("[0-9]*")) if run.checkpoints.is_dir() else []
        newest = -1
        for path in numbered:
            found = manifest.problems(path)  # the metadata, too: its bytes are the reference's or it is a problem
            position = int(path.name)
            if found and situation.damaged and position == situation.before:
                continue
            if found:
                self.problems.append(f"{where}: {found[0]}")
            elif read.manifest_sha256(path) != self.reference[position]:
                self.problems.append(f"{where}: the checkpoint at {position} is not the undisturbed run's")
            else:
                newest = max(newest, position)
        committed = situation.end if operations is None else self._committed(run, situation, operations)
        if newest < committed:
            self.problems.append(f"{where}: {committed} images were committed, {newest} are left")
        if operations is None:
            self.ended += 1
            if experiments.leftovers(run):
                self.problems.append(f"{where}: {experiments.leftovers(run)} was not swept")
            expected = [row for row in self.rows if row[0] <= situation.end]
            if experiments.rows(run) != expected:
                self.problems.append(f"{where}: the rows are not the undisturbed run's")

    def _committed(self, run: RunFolder, situation: Situation, operations: list[Operation]) -> int:
        """The last commit that must survive: one that the journal tells of or, without a power cut, one renamed."""
        told = [
            int(event.fields["images_seen"])
            for event in journal.read(run)
            if event.kind == "save_committed" and (event.attempt > 1 or situation.before is None)
        ]
        renamed = [
            int(operation.path.name)
            for operation in operations
            if operation.name == "rename" and operation.path.parent == run.checkpoints and operation.path.name.isdigit()
        ]
        return max([situation.held, *told, *([] if self.cut else renamed)])


def main(family: str) -> None:
    """Run one family and print what was found."""
    torch.set_num_threads(1)
    with experiments.scratch_folder() as folder, contextlib.redirect_stdout(sys.stderr):
        driver = Driver(folder, cut={"kill": False, "cut": True}[family])
        driver.warm_up()
        driver.undisturbed()
        for situation in SITUATIONS:
            driver.every_point(situation)
    found = {"kills": driver.kills, "ended": driver.ended, "operations": driver.operations, "problems": driver.problems}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
