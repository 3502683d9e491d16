"""What becomes of a job when its step has ended: done, start again, start again on other nodes, or fail with a code.

`decide` is a pure function of facts. The batch body runs this file as a program on the node, outside any container,
where Python may be as old as 3.6 and nothing of ours is installed: standard library only, no newer syntax
(tests/unit/test_slurm_requeue.py compiles it as 3.6). It prints one line, `ACTION CODE NODES`, and what it says to
people goes to stderr, that is into the job's log.

What decides, in this order (measured in specs/slurm_lab.md): what Slurm is doing with the job already, the cause file
that rank 0 wrote, the code of the task that failed first, srun's code, and whether Slurm has begun to preempt the job.
srun's code alone never does: tasks that died unequally give 143 or 137 whatever the first of them said.
"""

import argparse
import json
import os
import re
import sys
import time
from typing import List, NamedTuple, Optional

DONE, USER, DATA, BUG, DIVERGED, REQUEUE, ELSEWHERE, STOPPED = 0, 2, 64, 70, 75, 85, 86, 87
FINAL = {  # the same start would end the same way, or was not wanted
    USER: "a mistake in the command or the config",
    DATA: "data, weights or a checkpoint were refused",
    DIVERGED: "the loss diverged",
    STOPPED: "stopped by the user, the state is saved",
}
OURS = (USER, DATA, BUG, DIVERGED, REQUEUE, ELSEWHERE, STOPPED)  # what a task that says such a code means by it
TRAIN = "train"
_SIGNALS = {"Killed": 137, "Terminated": 143, "Aborted": 134, "Segmentation fault": 139, "Bus error": 135,
            "Floating point exception": 136, "Interrupt": 130, "User defined signal 1": 138,
            "User defined signal 2": 140}  # fmt: skip
_EXIT = re.compile(r"srun: error: (\S+?): tasks? ([0-9,-]+): (?:Exited with exit code (\d+)|(.+))")

Failure = NamedTuple("Failure", [("host", str), ("task", str), ("code", int)])
Facts = NamedTuple(
    "Facts",
    [
        ("stage", str),
        ("code", int),  # srun's
        ("first", Optional[int]),  # code of the task that failed first, by srun's own words
        ("cause", Optional[int]),  # exit code in the cause file of this very attempt; None: there is none
        ("told", bool),  # the batch shell got a signal: Slurm is ending the job by itself
        ("over_time", bool),  # ... and does so because the time limit is reached
        ("preempted", bool),  # Slurm has begun to preempt the job, and waits for its grace time
        ("restarts", int),
        ("limit", int),
        ("stalled", int),  # requeues in a row, this one included, that nobody forced on us and that brought no progress
        ("stalled_limit", int),
        ("failures", int),  # ends in a row, before this one, by a crash without progress
        ("retries", int),
        ("chain_left", Optional[int]),  # jobs of the chain after this one; None: the job may requeue itself
        ("ill", List[str]),  # nodes that failed the health probe, did not come to a collective, or that Slurm has lost
    ],
)
Decision = NamedTuple("Decision", [("action", str), ("code", int), ("why", str), ("nodes", List[str])])


def decide(facts):
    # type: (Facts) -> Decision
    """What to do; actions: end (exit with the code), requeue, elsewhere (requeue, without `nodes`), next (end this job
    of a chain well: the one behind it goes on)."""
    code = facts.cause
    if code is None:
        code = facts.first if facts.code != DONE and facts.first in OURS else facts.code
    if facts.told and not (facts.over_time or facts.preempted):
        return _end(code or facts.code, "Slurm itself ends this job (cancelled, requeued by hand, or its node is lost)")
    if facts.cause == DONE and facts.code != DONE:
        code = facts.code  # rank 0 was done, another rank was not: not done
    if code == DONE:
        return _end(DONE, "done")
    if code in FINAL:
        return _end(code, "%s (code %d)" % (FINAL[code], code))
    if code == ELSEWHERE:
        where = "without %s" % ", ".join(facts.ill) if facts.ill else "no node is known to be ill"
        return _again(facts, "elsewhere" if facts.ill else "requeue", code, "wants other nodes: %s" % where)
    if code == REQUEUE:
        return _again(facts, "requeue", code, "its state is saved")
    if facts.preempted or facts.over_time:
        what = "preempted" if facts.preempted else "out of time"
        return _again(facts, "requeue", REQUEUE, "%s before it could save; the newest checkpoint stands" % what)
    if facts.failures < facts.retries and _may_retry(facts.stage, code):
        why = "failed with code %d; tried again (%d of %d)" % (code, facts.failures + 1, facts.retries)
        return _again(facts, "elsewhere" if facts.ill else "requeue", code, why)
    return _end(code, "failed with code %d" % code)


def _may_retry(stage, code):
    # type: (str, int) -> bool
    """Whether a failure may be the machine's: deaths by a signal, broken starts, and any failure of single units."""
    return code >= 128 or code == 1 or stage != TRAIN


def _again(facts, action, code, why):
    # type: (Facts, str, int, str) -> Decision
    if facts.restarts >= facts.limit:
        return _end(code, "%s, but it was requeued %d times already, the limit of the profile" % (why, facts.restarts))
    if facts.stalled >= facts.stalled_limit and not facts.preempted:
        return _end(code, "%s, but the last %d starts brought no progress" % (why, facts.stalled))
    if facts.chain_left is None:
        return Decision(action, code, why, list(facts.ill) if action == "elsewhere" else [])
    if facts.chain_left == 0:
        return _end(code, "%s, and this was the last job of its chain; `hpc-gen resume` submits more" % why)
    return Decision("next", DONE, "%s; the next job of the chain goes on" % why, [])


def _end(code, why):
    # type: (int, str) -> Decision
    return Decision("end", code, why, [])


# ---------------------------------------------------------------- facts of a real job


def first_failure(text):
    # type: (str) -> Optional[Failure]
    """The task that failed first, from what srun wrote to stderr; None when it names none."""
    for line in text.splitlines():
        match = _EXIT.search(line)
        if match:
            words = (match.group(4) or "").strip()
            known = next((code for name, code in sorted(_SIGNALS.items()) if words.startswith(name)), 1)
            return Failure(match.group(1), match.group(2), int(match.group(3)) if match.group(3) else known)
    return None


def is_preempted(shown):
    # type: (str) -> bool
    """Whether `scontrol show job` tells of a preemption: PreemptTime is set while the grace time runs, and stays when
    Slurm then cancels the job (PreemptMode=CANCEL); of a job that Slurm has requeued by itself it is gone."""
    match = re.search(r"\bPreemptTime=(\S+)", shown)
    return bool(match) and match.group(1) not in ("None", "Unknown", "N/A")  # type: ignore[union-attr]


def is_ending(shown):
    # type: (str) -> bool
    """Whether Slurm is ending the job already; this shell's signal may come a moment after the step has ended."""
    match = re.search(r"\bJobState=([A-Z_]+)", shown)
    return bool(match) and match.group(1) not in ("RUNNING", "SUSPENDED", "STOPPED", "RESIZING")  # type: ignore


def cause_of(run, job, restart):
    # type: (str, str, int) -> Dict[str, Any]
    """The cause file of the attempt that this start of the job claimed; {}: none was written."""
    folder = os.path.join(run, "journal")
    names = sorted((name for name in _names(folder) if re.match(r"\d+\.attempt\Z", name)), reverse=True)
    for name in names:
        claim = _read(os.path.join(folder, name))
        if str(claim.get("job_id")) == job and int(claim.get("restart_count") or 0) == restart:
            return _read(os.path.join(folder, name.replace(".attempt", ".cause.json")))
    return {}


def progress_of(run, stage):
    # type: (str, str) -> int
    """How far a stage is: images of the newest whole checkpoint, committed units else."""
    if stage != TRAIN:
        return sum(name.endswith(".json") for name in _names(os.path.join(run, "ledger", stage)))
    folder = os.path.join(run, "checkpoints")
    whole = [int(name) for name in _names(folder) if name.isdigit()
             and os.path.isfile(os.path.join(folder, name, "manifest.json"))]  # fmt: skip
    return max(whole) if whole else -1


def history(path):
    # type: (str) -> List[Dict[str, Any]]
    """The ends of earlier starts of a job, oldest first; a torn line is left out."""
    try:
        with open(path, encoding="utf-8") as stream:
            lines = stream.read().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict):
            found.append(content)
    return found


def in_a_row(ends, progress, failed):
    # type: (List[Dict[str, Any]], int, bool) -> int
    """Ends just before this one that brought no progress, and neither a preemption nor Slurm explains it; `failed`:
    only crashes."""
    count = 0
    for end in reversed(ends):
        excused = end.get("preempted") or end.get("told") or end.get("progress") != progress
        if excused or (failed and end.get("code") in (DONE, REQUEUE, ELSEWHERE)):
            break
        count += 1
    return count


def ill_nodes(run, job, restart):
    # type: (str, str, int) -> List[str]
    """Hosts whose probe failed in this start of the job: files slurm/ill/JOB.RESTART.HOST."""
    start = "%s.%d." % (job, restart)
    return sorted(name[len(start) :] for name in _names(os.path.join(run, "slurm", "ill")) if name.startswith(start))


def blamed_nodes(cause):
    # type: (Dict[str, Any]) -> List[str]
    """Hosts of ranks that the others waited for in vain, by the cause file, as Slurm names nodes: without a domain."""
    found = cause.get("blamed")
    hosts = [str(each.get("host")) for each in found if isinstance(each, dict)] if isinstance(found, list) else []
    return sorted({host.split(".")[0] for host in hosts if host})


def lost_nodes(text):
    # type: (str) -> List[str]
    """Nodes that do not answer or are out of service, from lines of `sinfo -o "%N %T"`: idle*, down, drained, fail."""
    found = set()
    for line in text.splitlines():
        words = line.split()
        if len(words) == 2 and (words[1].endswith("*") or words[1].startswith(("down", "drain", "fail"))):
            found.add(words[0])
    return sorted(found)


def _names(folder):
    # type: (str) -> List[str]
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _read(path):
    # type: (str) -> Dict[str, Any]
    try:
        with open(path, encoding="utf-8") as stream:
            content = json.load(stream)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def record(path, content):
    # type: (str, Dict[str, Any]) -> None
    """Append one line; a full disk keeps no job from ending as it has to."""
    line = (json.dumps(content, sort_keys=True) + "\n").encode()
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)
    except OSError as error:
        sys.stderr.write("hpc-gen: the end of the job is not recorded: %s\n" % error)


def _parser():
    # type: () -> argparse.ArgumentParser
    parser = argparse.ArgumentParser(description="Decide what becomes of a job; scontrol's description comes on stdin.")
    for name in ("run", "stage", "job"):
        parser.add_argument("--" + name, required=True)
    for name in ("code", "restart", "limit", "stalled-limit", "retries"):
        parser.add_argument("--" + name, type=int, required=True)
    parser.add_argument("--chain-left", type=int, default=None)
    parser.add_argument("--told", default="")
    parser.add_argument("--srun", default="")
    parser.add_argument("--nodes", default="")
    return parser


def main(arguments, shown, now):
    # type: (List[str], str, float) -> Decision
    """Gather the facts of a job, decide, and record the end below RUN/slurm/ends."""
    given = _parser().parse_args(arguments)
    path = os.path.join(given.run, "slurm", "ends", given.job + ".jsonl")
    ends, progress = history(path), progress_of(given.run, given.stage)
    preempted = is_preempted(shown)
    told = bool(given.told.split()) or is_ending(shown)
    cause = cause_of(given.run, given.job, given.restart) if given.stage == TRAIN else {}
    code = cause.get("exit_code")
    ill = set(ill_nodes(given.run, given.job, given.restart))
    if not preempted:  # else ranks are missing because Slurm has killed them
        ill.update(blamed_nodes(cause), lost_nodes(given.nodes))
    if ill:
        ill.update(node for end in ends for node in end.get("nodes", []))
    first = None
    try:
        with open(given.srun, encoding="utf-8", errors="replace") as stream:
            first = first_failure(stream.read())
    except OSError:
        pass
    facts = Facts(
        stage=given.stage,
        code=given.code,
        first=first.code if first else None,
        cause=code if isinstance(code, int) else None,
        told=told,
        over_time=bool(re.search(r"\bReason=TimeLimit\b", shown)),
        preempted=preempted,
        restarts=given.restart,
        limit=given.limit,
        stalled=in_a_row(ends, progress, failed=False) + 1,
        stalled_limit=given.stalled_limit,
        failures=in_a_row(ends, progress, failed=True),
        retries=given.retries,
        chain_left=given.chain_left,
        ill=sorted(ill),
    )
    decision = decide(facts)
    content = {
        "t": now, "restart": given.restart, "code": decision.code if decision.action != "next" else REQUEUE,
        "srun": facts.code, "action": decision.action, "why": decision.why, "preempted": preempted, "told": told,
        "progress": progress, "nodes": decision.nodes, "first": dict(first._asdict()) if first else None,
    }  # fmt: skip
    record(path, content)
    where = " (first failed: task %s on %s with code %d)" % (first.task, first.host, first.code) if first else ""
    sys.stderr.write("hpc-gen: %s of job %s, start %d: %s%s\n"
                     % (given.stage, given.job, given.restart, decision.why, where))  # fmt: skip
    return decision


if __name__ == "__main__":
    made = main(sys.argv[1:], sys.stdin.read(), time.time())
    print(made.action, made.code, ",".join(made.nodes))
