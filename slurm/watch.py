"""The jobs of a run in plain words, for `hpc-gen status`: what is queued and why, what runs where, what failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hpc_gen.runtime import clock
from hpc_gen.runtime.errors import DataError, ExitCode, UserError
from hpc_gen.runtime.run_folder import RunFolder
from slurm import logs, records
from slurm.commands import Commands, EndedJob, LiveJob
from slurm.records import JobRecord, Submission

ASK_EVERY_S = 10.0  # a controller serves thousands of users: --watch asks it no more often
SHOWN_FAILURES = 4
FAILURE_LINES = 3

REASONS = {
    "Priority": "others are before it in the queue",
    "Resources": "waits for free nodes",
    "None": "just queued",
    "": "just queued",
    "BeginTime": "just requeued; Slurm lets it start in two minutes at most",
    "Dependency": "waits for the stage before it",
    "DependencyNeverSatisfied": "the stage before it failed; it will be cancelled",
    "JobArrayTaskLimit": "as many tasks run already as may run at a time",
    "JobHeldUser": "held; `scontrol release` lets it go",
    "JobHeldAdmin": "held by an administrator",
    "PartitionTimeLimit": "asks for more time than its partition allows; it will never start",
    "PartitionNodeLimit": "asks for more nodes than its partition allows; it will never start",
    "PartitionConfig": "asks for more than its partition allows; it will never start",
    "PartitionDown": "its partition is down",
    "PartitionInactive": "its partition takes no jobs now",
    "ReqNodeNotAvail": "nodes that it needs are down or reserved",
    "Reservation": "waits for a reservation",
    "Licenses": "waits for a licence",
    "Cleaning": "its last start is still being cleaned up",
    "Singleton": "waits for the job before it in its chain",
}
_LIMITS = ("QOS", "Assoc", "MaxJobs", "MaxCpu", "MaxNode", "MaxGRES", "MaxTRES")

ENDED = {
    "COMPLETED": "done",
    "CANCELLED": "cancelled",
    "TIMEOUT": "out of time",
    "NODE_FAIL": "its node failed",
    "OUT_OF_MEMORY": "out of memory",
    "PREEMPTED": "preempted",
    "BOOT_FAIL": "its node did not boot",
    "DEADLINE": "missed its deadline",
}


@dataclass(frozen=True)
class StageJobs:
    """The jobs of one stage: how many are in which state, in words, and what there is to say."""

    stage: str
    job_id: str
    states: dict[str, int]
    words: str


@dataclass(frozen=True)
class FailedTask:
    """A job, or an element of an array, that failed: `first` says which process did so first; the end of its log."""

    stage: str
    job_id: str
    words: str
    tail: list[str]


@dataclass(frozen=True)
class Jobs:
    """All jobs of the newest submission of a run. `problem`: why Slurm could not be asked, None when it could."""

    cluster: str
    number: int
    stages: list[StageJobs]
    failed: list[FailedTask]
    live: int = 0
    problem: str | None = None

    def lines(self) -> list[str]:
        """For people, to stand below the table of stages."""
        found = [f"  slurm        submission {self.number} to {self.cluster}"]
        if self.problem is not None:
            found.append(f"  slurm        cannot be asked: {self.problem}")
        for each in self.stages:
            counts = ", ".join(f"{count} {state}" if len(each.states) > 1 or count > 1 else state
                               for state, count in each.states.items())  # fmt: skip
            found.append(f"  job {each.job_id:<8} {each.stage}: {counts}{f'; {each.words}' if each.words else ''}")
        for task in self.failed[:SHOWN_FAILURES]:
            found.append(f"  failed       {task.stage} {task.job_id}: {task.words}")
            found += [f"               | {line}" for line in task.tail]
        if len(self.failed) > SHOWN_FAILURES:
            found.append(f"  failed       {len(self.failed) - SHOWN_FAILURES} more; `hpc-gen logs` shows them")
        return found

    @property
    def over(self) -> bool:
        """Whether none of them is queued or running, as far as Slurm could be asked."""
        return self.problem is not None or not self.live

    def to_json(self) -> dict[str, Any]:
        """For other programs."""
        return asdict(self)


def reader(run: RunFolder, commands: Commands) -> Callable[[], Jobs | None]:
    """A function that tells of the jobs again and again, asking Slurm no more often than ASK_EVERY_S; None: no jobs."""
    last: list[tuple[float, Jobs | None]] = []

    def read() -> Jobs | None:
        if not last or clock.monotonic() - last[-1][0] >= ASK_EVERY_S:
            last[:] = [(clock.monotonic(), jobs_of(run, commands))]
        return last[-1][1]

    return read


def jobs_of(run: RunFolder, commands: Commands) -> Jobs | None:
    """The jobs of the newest submission: live by squeue, ended by sacct, else by what the jobs themselves noted."""
    try:
        submissions = records.read(run)
    except DataError as error:
        return Jobs("?", 0, [], [], problem=str(error))
    if not submissions:
        return None
    newest = submissions[-1]
    live: list[LiveJob] = []
    ended: dict[str, EndedJob] = {}
    problem = None
    try:
        live = commands.live()
        ended = commands.ended([job.job_id for job in newest.jobs])
    except UserError as error:
        problem = str(error)
    stages = [_stage(run, job, newest, live, ended, problem is not None) for job in newest.jobs]
    running = {job.job_id for job in live}
    failed = [task for job in newest.jobs for task in _failures(run, job, running)]
    mine = [job for job in live if records.is_of(job, run)]
    return Jobs(newest.cluster, newest.number, stages, failed, len(mine), problem)


def _elements(job: JobRecord) -> list[str]:
    return [f"{job.job_id}_{place}" for place in range(len(job.tasks))] if job.tasks else [job.job_id]


def _stage(
    run: RunFolder,
    job: JobRecord,
    submission: Submission,
    live: Sequence[LiveJob],
    ended: dict[str, EndedJob],
    unasked: bool,
) -> StageJobs:
    by_id = {each.job_id: each for each in live}
    states: Counter[str] = Counter()
    for element in _elements(job):
        if element in by_id:
            states[by_id[element].state.lower()] += 1
        else:
            states[_ended_word(run, element, ended, unasked)] += 1
    mine = [by_id[element] for element in _elements(job) if element in by_id]
    said = list(dict.fromkeys(words(each, submission) for each in mine))
    return StageJobs(job.stage, job.job_id, dict(states), "; ".join(text for text in said if text))


def _ended_word(run: RunFolder, job_id: str, ended: dict[str, EndedJob], unasked: bool) -> str:
    """How a job that is not live ended: Slurm's accounting, else its own last word."""
    known = ended.get(job_id)
    last = records.ends(run, job_id)[-1:]
    if last and last[0].get("action") == "next":
        return "saved for the next of its chain"
    if known is not None:
        return ENDED.get(known.state) or _code_word(known.exit_code or 128 + known.signal)
    if not last:
        return "not known" if unasked else "gone before it began"
    if last[0].get("action") != "end":
        return "requeued" if unasked else "cancelled"
    return _code_word(last[0].get("code"))


def _code_word(code: Any) -> str:
    return {ExitCode.DONE: "done", ExitCode.STOPPED: "stopped"}.get(code, f"failed with code {code}")


def words(job: LiveJob, submission: Submission) -> str:
    """What there is to say of a live job: where it runs and until when, or why it waits and when it may start."""
    if job.state != "PENDING":
        until = f", until {_clock(job.end)} at the latest" if job.end else ""
        return f"on {job.nodes}{until}" if job.nodes else ""
    if job.reason == "Dependency":
        record = next((each for each in submission.jobs if each.job_id in (job.base_id, job.job_id)), None)
        if record is not None and record.dependency == "singleton":
            return REASONS["Singleton"]
        if record is not None and record.dependency is not None:
            ids = record.dependency.replace(",", ":").split(":")
            stages = dict.fromkeys(each.stage for each in submission.jobs if each.job_id in ids)
            if stages:
                return f"waits for {' and '.join(stages)}"
    told = reason_words(job.reason)
    return f"{told}, expected to start {_clock(job.start)}" if job.start else told


def reason_words(reason: str) -> str:
    """Slurm's reason of a pending job in plain words; one that is not known as Slurm says it."""
    first = reason.split(",")[0].strip()
    if first in REASONS:
        return REASONS[first]
    if first.startswith(_LIMITS):
        return f"a limit of the account or its quality of service is reached ({first})"
    if "held state" in reason or "held" in reason.lower():
        return f"held ({reason}); `scontrol release` lets it go"
    return f"Slurm says: {reason}"


def _clock(text: str) -> str:
    """2026-11-27T08:28:20 as 08:28 today, with the date otherwise."""
    day, _, time = text.partition("T")
    return time[:5] if day == clock.today() else f"{day} {time[:5]}"


def _failures(run: RunFolder, job: JobRecord, running: set[str]) -> list[FailedTask]:
    found = []
    for element in _elements(job):
        last = records.ends(run, element)[-1:]
        if element in running or not last or last[0].get("action") != "end":
            continue
        if last[0].get("code") in (ExitCode.DONE, ExitCode.STOPPED):
            continue
        first = last[0].get("first")
        where = f"; first failed: task {first['task']} on {first['host']} with code {first['code']}" if first else ""
        task = int(str(first["task"]).split(",")[0].split("-")[0]) if first else 0
        tail = logs.tail(logs.task_log(run, element, task), FAILURE_LINES)
        found.append(FailedTask(job.stage, element, f"{last[0].get('why')}{where}", tail))
    return found
