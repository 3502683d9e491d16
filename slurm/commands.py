"""The one door to Slurm's programs: squeue for live jobs, sacct for ended ones, sinfo, scontrol, scancel.

Text formats with separators, which 22.05 and newer print alike; the JSON of these programs changes between versions.
One call answers for all jobs. Tests put a function in the place of `runner`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_gen.runtime import env
from hpc_gen.runtime.errors import UserError

TIMEOUT_S = 60.0
Runner = Callable[[Sequence[str], float], "Answer"]

_LIVE_FORMAT = "%i|%A|%T|%r|%S|%e|%V|%P|%N|%j|%k"  # the comment, a path of ours, last: it may hold any character
_ENDED_FIELDS = "JobID,JobIDRaw,State,ExitCode,Start,End,NodeList"


@dataclass(frozen=True)
class Answer:
    """What a program printed and returned."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class LiveJob:
    """A job that Slurm still has to do with: pending, running or completing. Times as Slurm prints them, "" for none.

    `job_id` is 12, or 12_3 for an element of an array; `state` Slurm's word, `reason` why it is pending.
    """

    job_id: str
    state: str
    reason: str
    start: str
    end: str
    submitted: str
    partition: str
    nodes: str
    name: str
    comment: str

    @property
    def base_id(self) -> str:
        """The number of the job, or of its array."""
        return self.job_id.partition("_")[0]

    @property
    def element(self) -> str:
        """The number of the element within its array; "" for a job that is none."""
        return self.job_id.partition("_")[2]


@dataclass(frozen=True)
class EndedJob:
    """A job by the accounting: `state` is Slurm's first word, so CANCELLED by 1000 is CANCELLED."""

    job_id: str
    state: str
    exit_code: int
    signal: int
    start: str
    end: str
    nodes: str


@dataclass(frozen=True)
class Partition:
    """A partition: nodes and the size of one; `gpus` by the generic resource, 0 when it has none."""

    name: str
    default: bool
    up: bool
    limit_min: int | None
    nodes: int
    cpus: int
    mem_mb: int
    gpus: int
    gpu_types: tuple[str, ...]
    features: tuple[str, ...]


def _run(argv: Sequence[str], timeout_s: float) -> Answer:
    try:
        done = subprocess.run(
            list(argv),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        return Answer(127, "", f"{argv[0]}: not found")
    except subprocess.TimeoutExpired:
        return Answer(124, "", f"{argv[0]} did not answer within {timeout_s:g} s; is the controller up?")
    return Answer(done.returncode, done.stdout, done.stderr)


class Commands:
    """Slurm's programs on this machine."""

    def __init__(self, runner: Runner = _run) -> None:
        """`runner` is given the words of a command and a time limit in seconds."""
        self._runner = runner

    def available(self) -> bool:
        """Whether there is a Slurm to ask."""
        return self._runner is not _run or shutil.which("sbatch") is not None

    def program(self, name: str) -> str:
        """Path of a program. Raises UserError where there is none."""
        if self._runner is not _run:
            return name
        found = shutil.which(name)
        if found is None:
            raise UserError(
                f"{name} is not on PATH, so nothing can be submitted from here; log in to the cluster, or use "
                "`hpc-gen run` for this machine"
            )
        return found

    def _ask(self, *argv: str) -> str:
        """What a program printed. Raises UserError when it failed."""
        answer = self._runner([self.program(argv[0]), *argv[1:]], TIMEOUT_S)
        if answer.code != 0:
            raise UserError(f"`{' '.join(argv[:3])}` ended with {answer.code}: {_reason(answer)}")
        return answer.out

    # -- asking -----------------------------------------------------------------------------------------------------

    def live(self) -> list[LiveJob]:
        """All live jobs of this user; elements of arrays one by one."""
        return parse_live(self._ask("squeue", "-h", "-r", "-u", env.user_name(), "-o", _LIVE_FORMAT))

    def ended(self, job_ids: Sequence[str]) -> dict[str, EndedJob]:
        """Jobs (and elements of arrays) by the accounting, of those that it knows; {} where there is no accounting."""
        if not job_ids:
            return {}
        ids = ",".join(sorted({job_id.partition("_")[0] for job_id in job_ids}))
        argv = [self.program("sacct"), "-X", "-P", "-n", "-j", ids, "-o", _ENDED_FIELDS]
        answer = self._runner(argv, TIMEOUT_S)
        return parse_ended(answer.out) if answer.code == 0 else {}

    def show(self, job_id: str) -> str:
        """What `scontrol show job` prints on one line; "" for a job that Slurm has forgotten."""
        answer = self._runner([self.program("scontrol"), "show", "job", "-o", job_id], TIMEOUT_S)
        return answer.out if answer.code == 0 else ""

    def partitions(self) -> list[Partition]:
        """All partitions that this user sees."""
        return parse_partitions(self._ask("sinfo", "-h", "-e", "-o", "%P|%a|%l|%D|%c|%m|%G|%f"))

    def version(self) -> str:
        """Slurm's version, as in "22.05.8"."""
        return self._ask("sinfo", "--version").split()[-1]

    def accounting(self) -> str | None:
        """Why sacct cannot be asked; None when it answers."""
        answer = self._runner([self.program("sacct"), "-X", "-P", "-n", "-S", "now", "-o", "JobID"], TIMEOUT_S)
        return None if answer.code == 0 else _reason(answer)

    def test_only(self, script: Path) -> tuple[bool, str]:
        """Whether Slurm could ever serve a script, and what it says: nodes and expected start, or why not."""
        answer = self._runner([self.program("sbatch"), "--test-only", str(script)], TIMEOUT_S)
        return answer.code == 0, _reason(answer)

    # -- telling ----------------------------------------------------------------------------------------------------

    def cancel(self, job_ids: Sequence[str]) -> None:
        """Cancel jobs, pending or running."""
        if job_ids:
            self._ask("scancel", *job_ids)

    def signal(self, job_ids: Sequence[str], name: str) -> None:
        """Send a signal to all tasks of the steps of running jobs, as a preemption does."""
        if job_ids:
            self._ask("scancel", f"--signal={name}", *job_ids)


# ---------------------------------------------------------------- formats


def parse_live(text: str) -> list[LiveJob]:
    """The output of squeue in our format."""
    found = []
    for line in text.splitlines():
        parts = line.split("|", 10)
        if len(parts) != 11:
            continue  # a warning between the lines
        job_id, _, state, reason, start, end, submitted, partition, nodes, name, comment = (
            part.strip() for part in parts
        )
        if not re.match(r"\d", job_id):
            continue
        times = ["" if each in ("N/A", "NONE", "Unknown") else each for each in (start, end, submitted)]
        reason = "" if reason == "None" else reason.strip("()")
        nodes = "" if nodes == "(null)" else nodes
        comment = "" if comment == "(null)" else comment
        found.append(LiveJob(job_id, state, reason, *times, partition, nodes, name, comment))
    return found


def parse_ended(text: str) -> dict[str, EndedJob]:
    """The output of sacct in our format, by job id; what is live by it is left out: squeue knows better."""
    found: dict[str, EndedJob] = {}
    for line in text.splitlines():
        parts = line.split("|")
        if len(parts) < 7 or "." in parts[0]:
            continue
        job_id, state = parts[0].strip(), (parts[2].split() or [""])[0]
        if "[" in job_id or state in ("", "PENDING", "RUNNING", "REQUEUED", "RESIZING", "SUSPENDED"):
            continue
        code, _, signal = parts[3].partition(":")
        numbers = (int(code) if code.isdigit() else 0, int(signal) if signal.isdigit() else 0)
        found[job_id] = EndedJob(job_id, state.rstrip("+"), *numbers, parts[4], parts[5], parts[6])
    return found


def parse_partitions(text: str) -> list[Partition]:
    """The output of sinfo in our format, one entry per partition: nodes are summed, sizes are the largest."""
    found: dict[str, Partition] = {}
    for line in text.splitlines():
        parts = [part.strip() for part in line.split("|")]
        if len(parts) != 8:
            continue
        name, default = parts[0].rstrip("*"), parts[0].endswith("*")
        gpus, types = _gpus(parts[6])
        features = () if parts[7] == "(null)" else tuple(sorted(parts[7].split(",")))
        cpus, mem = (int(re.sub(r"\D.*", "", each) or 0) for each in (parts[4], parts[5]))
        before = found.get(name)
        one = Partition(
            name, default, parts[1] == "up", minutes(parts[2]), int(parts[3]), cpus, mem, gpus, types, features
        )
        if before is not None:
            one = Partition(
                name, default, one.up, one.limit_min, before.nodes + one.nodes, max(before.cpus, cpus),
                max(before.mem_mb, mem), max(before.gpus, gpus), tuple(sorted({*before.gpu_types, *types})),
                tuple(sorted({*before.features, *features})),
            )  # fmt: skip
        found[name] = one
    return list(found.values())


def _gpus(text: str) -> tuple[int, tuple[str, ...]]:
    """Number and types of GPUs in a text such as "gpu:a100:4(S:0-1),shard:8" or "gpu:4"."""
    number, types = 0, set()
    for match in re.finditer(r"(?:^|,)(?:gres/)?gpu(?::([A-Za-z][\w.-]*))?:(\d+)", text):
        number += int(match[2])
        if match[1]:
            types.add(match[1])
    return number, tuple(sorted(types))


def minutes(text: str) -> int | None:
    """Minutes of a time limit such as "1-00:00:00", "12:00:00", "30:00"; None for "infinite"."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip())
    if match is None:
        return None
    days, hours, mins = (int(part or 0) for part in match.groups()[:3])
    return days * 1440 + hours * 60 + mins


def _reason(answer: Answer) -> str:
    """The line that says most, without the program's name in front."""
    lines = [line.strip() for line in (answer.err + "\n" + answer.out).splitlines() if line.strip()]
    told = [line for line in lines if "error:" in line] or lines
    text = told[0] if told else "it said nothing"
    return re.sub(
        r"^(?:allocation failure: |sbatch: |scancel: |squeue: |scontrol: |sinfo: |slurm_\w+: |error: )+", "", text
    )
