"""Kill a run that the local runner started, at a chosen moment, and tell what was seen (`hpc-gen prove-resume`).

A kill is planned from a seed: who gets which signal, and when. Linux only: ranks are found in /proc.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hpc_gen
from hpc_gen.runtime import clock, env
from hpc_gen.runtime.errors import ExitCode, HpcGenError
from hpc_gen.runtime.fence import process_start_ticks
from hpc_gen.runtime.journal import Event, Reader, attempts
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.training.checkpoint import manifest, read

SOURCE = Path(hpc_gen.__file__).resolve().parent.parent
NODE = "SIGKILL half of the ranks"
"""As when one of two nodes is lost: its ranks are gone at once, the others and the launcher are not."""
KINDS = (
    "SIGKILL one rank",
    "SIGKILL all ranks",
    "SIGKILL the launcher",
    "SIGTERM one rank",
    "SIGTERM the launcher",
    NODE,
)
MOMENTS = ("training", "training", "training", "saving", "starting")
START_S = 4.0  # a kill while starting comes within this time
POLL_S = 0.01  # a finer one would take the time that the ranks need
PATIENCE_S = 600.0  # an attempt without a new row for so long will not get further


@dataclass(frozen=True)
class Plan:
    """One kill: how, when, and at how many images (not while starting)."""

    number: int
    kind: str
    moment: str
    target: int
    delay_s: float
    rank: int


@dataclass(frozen=True)
class Kill:
    """What happened. `images_seen`: the last row in the journal; `code`: what the launcher ended with, None: SIGKILL.

    `finished`: the run came to its end first. `attempt` and `resumed_from` are those of the attempt that was killed;
    attempt 0: it was killed before it claimed a number.
    """

    number: int
    kind: str
    moment: str
    attempt: int
    resumed_from: int | None
    images_seen: int
    code: int | None
    finished: bool
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain fields."""
        return asdict(self)


class ProofFailed(HpcGenError):
    """An attempt did not get where it had to."""

    exit_code = ExitCode.BUG


def plan(number: int, seed: int, window: int, world_size: int, kinds: Sequence[str] = KINDS) -> Plan:
    """Kill `number` (from 0), a function of its arguments: somewhere in its own window of so many images."""
    draw = random.Random(seed * 1_000_003 + number)
    kind = kinds[number % len(kinds)] if number < len(kinds) else draw.choice(kinds)  # each kind once at least
    moment = draw.choice(MOMENTS)
    target = number * window + draw.randrange(1, window)
    delay_s = draw.uniform(0.0, START_S if moment == "starting" else 0.05)
    return Plan(number, kind, moment, target, delay_s, draw.randrange(world_size))


class Launched:
    """`hpc-gen resume RUN` in a process of its own."""

    def __init__(self, run: RunFolder, workspace: Path, log: Path, overrides: Sequence[str] = ()) -> None:
        """Starts it; output is appended to `log`. `overrides` replace operation keys of the run, as train.ranks=1."""
        self.run, self.log = run, log
        self._reader = Reader(run, stage="train", task=0)
        self._claimed = {event.attempt for event in self._reader.events()}
        self.begun = clock.monotonic()
        path = os.pathsep.join([str(SOURCE), *filter(None, [env.get("PYTHONPATH")])])
        extra: Mapping[str, Any] = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HPC_GEN_ATTEMPT": None}
        command = ["resume", str(run.path), "--stages", "train", *overrides]
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "hpc_gen.cli", *command],
                env=env.child_environment(HPC_GEN_WORKSPACE=str(workspace), **extra),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def events(self) -> list[Event]:
        """What rank 0 of this attempt has told so far."""
        return [event for event in self._reader.events() if event.attempt not in self._claimed]

    def images_seen(self) -> int:
        """Of the last row of this attempt; what it resumed from before its first row; -1: not that far."""
        seen = -1
        for event in self.events():
            if event.kind == "attempt_start":
                seen = event.fields.get("resumed_from") or 0
            elif event.kind == "row":
                seen = int(event.fields["images_seen"])
        return seen

    def ranks(self) -> dict[int, int]:
        """Process id of each rank that is alive."""
        found: dict[int, int] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(stat.read_text().rpartition(")")[2].split()[1])
                if parent != self.process.pid:
                    continue
                variables = (stat.parent / "environ").read_bytes().split(b"\0")
            except (OSError, IndexError, ValueError):
                continue  # it has just ended
            found.update({int(v[5:]): int(stat.parent.name) for v in variables if v.startswith(b"RANK=")})
        return found

    def ended(self) -> bool:
        """Whether the launcher has ended."""
        return self.process.poll() is not None

    def wait_for(self, plan: Plan) -> None:
        """Until the moment of the plan, or the end of the run. Raises ProofFailed when neither comes."""
        last, since = -2, clock.monotonic()
        while not self.ended() and not self._has_come(plan):
            if (seen := self.images_seen()) != last:
                last, since = seen, clock.monotonic()
            if clock.monotonic() - since > PATIENCE_S:
                raise ProofFailed(f"{self.run.path} stands at {last} images for {PATIENCE_S:.0f} s; see {self.log}")
            clock.sleep(POLL_S)
        clock.sleep(plan.delay_s)

    def _has_come(self, plan: Plan) -> bool:
        if plan.moment == "starting":
            return True
        if plan.moment == "training":
            return self.images_seen() >= plan.target
        return any(e.kind == "save_begin" and e.fields["images_seen"] >= plan.target for e in self.events())

    def kill(self, plan: Plan) -> None:
        """Send the signal of the plan, once there is someone to get it."""
        number = signal.SIGKILL if plan.kind.startswith("SIGKILL") else signal.SIGTERM
        while not self.ended() and not (victims := self._victims(plan)):
            clock.sleep(POLL_S)
        for victim in victims if not self.ended() else []:
            try:
                os.kill(victim, number)
            except ProcessLookupError:
                pass

    def _victims(self, plan: Plan) -> list[int]:
        if plan.kind.endswith("launcher"):
            return [self.process.pid]
        ranks = self.ranks()
        if plan.kind.endswith("all ranks"):
            return list(ranks.values())
        if plan.kind == NODE:
            half = sorted(ranks)[len(ranks) // 2 :]  # of one rank: that one
            return [ranks[rank] for rank in half]
        return [ranks[plan.rank]] if plan.rank in ranks else []

    def wait(self) -> int:
        """The launcher's code; afterwards no rank is left, even of a launcher that was killed."""
        ranks = self.ranks()
        try:
            code = self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired as error:
            raise ProofFailed(f"the launcher of {self.run.path} outlives its kill; see {self.log}") from error
        deadline = clock.monotonic() + 30.0
        while any(process_start_ticks(pid) is not None for pid in ranks.values()):
            if clock.monotonic() > deadline:
                raise ProofFailed(f"ranks {ranks} of {self.run.path} outlive their launcher")
            clock.sleep(0.005)
        return code

    def stop(self) -> None:
        """For `finally`: nothing is left running."""
        if not self.ended():
            self.process.kill()
            self.wait()


def disturb(run: RunFolder, workspace: Path, log: Path, plan: Plan, overrides: Sequence[str] = ()) -> Kill:
    """Start the run, kill it as planned, wait for everyone's end. Raises ProofFailed."""
    launched = Launched(run, workspace, log, overrides)
    try:
        launched.wait_for(plan)
        seen = launched.images_seen()
        finished = launched.ended()
        launched.kill(plan)
        code = launched.wait()
    finally:
        launched.stop()
    own = {event.attempt for event in launched.events()}
    attempt = next((a for a in reversed(attempts(run)) if a.number in own), None)
    return Kill(
        plan.number,
        plan.kind,
        plan.moment,
        attempt.number if attempt is not None else 0,
        attempt.resumed_from if attempt is not None else None,
        max(seen, 0),
        code if code >= 0 else None,
        finished,
        round(clock.monotonic() - launched.begun, 2),
    )


def finish(run: RunFolder, workspace: Path, log: Path, overrides: Sequence[str] = ()) -> None:
    """Let the run come to its end. Raises ProofFailed with the log's end when it does not."""
    launched = Launched(run, workspace, log, overrides)
    try:
        code = launched.process.wait()
    finally:
        launched.stop()
    if code != ExitCode.DONE:
        raise ProofFailed(f"{run.path} ended with code {code}: {_last_line(log)}; see {log}")


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("hpc-gen: ")]
    return (told or lines or ["no output"])[-1][:400]


def manifests(run: RunFolder) -> dict[int, str]:
    """images_seen -> SHA-256 of the manifest of every committed checkpoint."""
    return {info.images_seen: read.manifest_sha256(info.path) for info in read.list_checkpoints(run)}


def broken(run: RunFolder) -> list[str]:
    """What keeps checkpoints from being whole."""
    return [problem for info in read.list_checkpoints(run) for problem in manifest.problems(info.path)]
