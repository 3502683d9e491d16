"""The local runner: stages of a run in order, each in processes of its own, as a cluster would start them.

`run_stage` is what such a process does; srun and torchrun call the same through `hpc-gen stage RUN NAME`.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

from hpc_gen.config.loader import Resolved
from hpc_gen.runtime import clock, commit, env, launch
from hpc_gen.runtime.claims import Claims, units_in_turn
from hpc_gen.runtime.errors import ExitCode, HpcGenError, StopRequested, UserError, nearest
from hpc_gen.runtime.fence import claim_attempt
from hpc_gen.runtime.journal import Journal
from hpc_gen.runtime.progress import Progress, count
from hpc_gen.runtime.rank_detection import detect
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.runtime.stop import StopToken
from hpc_gen.stages import ending, forecast, width
from hpc_gen.stages.run_setup import load_run, notes, prepare_run
from hpc_gen.stages.units import Ledger, StageContext, Unit, UnitWorker

Printer = Callable[[str], None]

WORKERS = {
    "encode": "shard_tools.encode:worker",
    "sample": "eval_jobs.sample:worker",
    "evaluate": "eval_jobs.evaluate:worker",
    "report": "eval_jobs.report:worker",
}


GRACE_S = 10.0  # between a rank's failure and SIGKILL for the others
UNIT_MARGIN_S = 30.0  # before the end of a job, for a task of units: to leave the unit in hand and tell
JOB_END = "HPC_GEN_JOB_END"
"""Wall seconds at which the job ends by its time limit, from the batch body; 0 or unset: not known."""


@dataclass(frozen=True)
class Width:
    """Processes of one stage, and CPU threads of each."""

    processes: int
    threads: int


def run_stages(run: RunFolder, stages: Sequence[str] | None, printer: Printer) -> int:
    """Run the named stages (None: all of the experiment) one after the other; returns the first code that is not 0."""
    resolved = load_run(run)
    chosen = in_order(resolved, stages)
    for number, name in enumerate(chosen, 1):
        printer(f"[{number}/{len(chosen)}] {run.name}: {name}")
        code = launch_stage(run, resolved, name)
        ending.tell(run, resolved, name, code)
        if code != ExitCode.DONE:
            printer(_explain(run, name, code))
            return code
    return ExitCode.DONE


def launch_stage(run: RunFolder, resolved: Resolved, name: str) -> int:
    """Start the processes of one stage and wait for them; returns the stage's exit code."""
    wide = width_of(resolved, name)
    argv = [sys.executable, "-P", "-m", "hpc_gen.cli", "stage", str(run.path), name]
    path = os.pathsep.join([str(run.code), *filter(None, [env.get("PYTHONPATH")])])
    extra = {"PYTHONPATH": path, "HPC_GEN_WORKSPACE": str(run.workspace), ending.RUNNER: "1"}
    if name == "train":
        # ranks end together (a barrier), so one that has failed leaves the others nothing to do but to fail, too
        return launch.run_ranks(
            argv,
            wide.processes,
            env=extra,
            log_dir=run.logs,
            threads=wide.threads,
            log_name=name,
            grace_s=GRACE_S,
        )
    extra["HPC_GEN_ATTEMPT"] = str(claim_attempt(run, name))
    return launch.run_tasks(argv, wide.processes, env=extra, log_dir=run.logs, threads=wide.threads, log_name=name)


def plan(run: RunFolder, resolved: Resolved, stages: Sequence[str] | None = None) -> list[str]:
    """What `run` would do, a line each, for --dry-run; changes nothing."""
    lines = [f"run folder  {run.path}{'' if run.exists() else ' (new)'}", f"identity    {resolved.identity}"]
    lines += [f"changes     {note}" for note in notes(run, resolved)]
    for name in in_order(resolved, stages):
        wide = width_of(resolved, name)
        kind = "rank" if name == "train" else "task"
        train = resolved.experiment.train
        allowed = f", of {train.width} allowed" if name == "train" and train is not None and train.width else ""
        counts = f"{count(wide.processes, kind)}, {count(wide.threads, 'thread')} each"
        lines.append(f"stage       {name}: {counts}{allowed}")
    return lines


def run_stage(run: RunFolder, name: str) -> int:
    """The body of one process of a stage: returns its exit code. Raises HpcGenError."""
    stop = StopToken(run)
    stop.install()  # before the heavy imports: a signal during start-up is honoured
    resolved = load_run(run)
    check_stage(resolved, name)
    if env.get(ending.RUNNER):
        return _stage_body(run, resolved, name, stop)[0]
    code, message, answers = int(ExitCode.BUG), None, True
    try:
        code, answers = _stage_body(run, resolved, name, stop)
    except HpcGenError as error:
        code, message = int(error.exit_code), str(error)
        raise
    except Exception as error:
        message = f"unexpected {type(error).__name__}: {error}"
        raise
    finally:
        if answers and (name != "train" or detect(env.snapshot()).rank == 0):
            ending.tell(run, resolved, name, code, message)
    return code


def _stage_body(run: RunFolder, resolved: Resolved, name: str, stop: StopToken) -> tuple[int, bool]:
    """The exit code, and whether this process is the one of its stage to tell of it."""
    stop.deadline = _deadline(resolved, name)
    if name != "train":
        return _run_units(run, resolved, name, stop)
    from hpc_gen.stages.train import run_train

    return int(run_train(run, resolved, run.workspace, stop)), True


def _deadline(resolved: Resolved, name: str) -> float | None:
    """Wall seconds at which to save and leave: before the time limit of the config or of the job, the earlier one."""
    train = resolved.experiment.train
    own = train if name == "train" else None
    ends = []
    if own is not None and own.time_limit_s is not None:
        ends.append(clock.process_start() + own.time_limit_s)
    job_end = float(env.get(JOB_END) or 0)
    if job_end > 0:
        ends.append(job_end)
    margin = own.save_before_limit_s if own is not None else UNIT_MARGIN_S
    return min(ends) - margin if ends else None


def check_stage(resolved: Resolved, name: str) -> None:
    """Raise UserError, naming the nearest, when the experiment has no such stage."""
    configured = resolved.experiment.configured_stages()
    if name not in configured:
        raise UserError(
            f"experiment '{resolved.experiment.name}' has no stage '{name}'{nearest(name, configured)}; "
            f"it has: {', '.join(configured)}"
        )


def check_stages(resolved: Resolved, names: Sequence[str] | None) -> None:
    """`check_stage` for each; to be called before a run folder is made or changed, so a typo changes nothing."""
    for name in names or ():
        check_stage(resolved, name)


def in_order(resolved: Resolved, names: Sequence[str] | None) -> list[str]:
    """The stages to run (None: all of the experiment), each once, in the order in which each finds what it needs.

    The order of the key `stages` is the user's own and kept; --stages only chooses. Raises UserError as `check_stage`.
    """
    if not names:
        return resolved.experiment.stage_order()
    check_stages(resolved, names)
    own = resolved.experiment.stage_order()
    order = own if set(names) <= set(own) else resolved.experiment.configured_stages()
    return [name for name in order if name in names]


def width_of(resolved: Resolved, name: str) -> Width:
    """How many processes a stage wants, and their threads."""
    experiment = resolved.experiment
    if name == "train":
        assert experiment.train is not None
        return Width(width.choose_here(experiment.train), experiment.train.threads)
    section = experiment.extra_stages.get(name) or getattr(experiment, name)
    return Width(getattr(section, "tasks", 1), getattr(section, "threads", 1))


def _explain(run: RunFolder, name: str, code: int) -> str:
    if code == ExitCode.REQUEUE:
        return f"{name} was preempted and has saved its state; `hpc-gen resume {run.name}` goes on"
    if code == ExitCode.STOPPED:
        how = "was stopped, or another attempt has taken over"
        return f"{name} {how}; what is saved stays, and `hpc-gen resume {run.name}` goes on"
    return f"{name} ended with code {code}; see the message above and {run.logs}"


def make_worker(context: StageContext) -> UnitWorker:
    """The worker of a stage, imported by its entry string. Raises UserError when it cannot be imported."""
    extra = context.experiment.extra_stages.get(context.stage)
    target = extra.worker if extra is not None else WORKERS[context.stage]
    module_name, _, attribute = target.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"the worker '{target}' of stage '{context.stage}' cannot be imported: {error}") from error
    worker: UnitWorker = factory(context)
    return worker


def _run_units(run: RunFolder, resolved: Resolved, name: str, stop: StopToken) -> tuple[int, bool]:
    """One task of a stage of units: its share of the missing ones, then the end of the stage if all are there.

    Returns the exit code, and whether this is the task to tell of the stage's end: the one that completed it, the first
    one of those that were stopped.
    """
    task, num_tasks = int(env.get("HPC_GEN_TASK") or 0), int(env.get("HPC_GEN_NUM_TASKS") or 1)
    given = env.get("HPC_GEN_ATTEMPT")
    attempt = int(given) if given else claim_attempt(run, name)
    journal = Journal(run, attempt, name, task)
    context = StageContext(run, resolved, name, run.workspace, task, num_tasks, journal)
    journal.event("attempt_start", world_size=num_tasks, rank=task, process_start=clock.process_start())
    code, cause, answers = ExitCode.BUG, "error", task == 0
    try:
        worker = make_worker(context)
        answers = _do_units(run, context, worker, stop)
        code, cause = ExitCode.DONE, "done"
    except StopRequested as error:
        code, cause = ExitCode(error.exit_code), str(error)
        print(f"{name}: stopped between two units ({error.stop.detail}); what is committed stays", flush=True)
    except HpcGenError as error:
        code, cause = error.exit_code, str(error)
        raise
    finally:
        journal.event("attempt_end", exit_code=int(code), cause=cause)
        journal.close()
    return int(code), answers


def _do_units(run: RunFolder, context: StageContext, worker: UnitWorker, stop: StopToken) -> bool:
    """Returns whether this task completed the stage."""
    units, fingerprint = worker.units(), worker.fingerprint()
    ledger = Ledger(run.ledger(context.stage), run.path)
    missing = {unit.name for unit in ledger.missing(units, fingerprint)}
    # Its own share first, cut from all units: tasks that start at different times agree on it. Then what others have
    # not begun, so that a task that joins late, or is done early, takes work off them.
    share = [unit for unit in units[context.task :: context.num_tasks] if unit.name in missing]
    wanted = list(dict.fromkeys(unit.name for unit in [*share, *units] if unit.name in missing))
    if not missing:
        print(f"{context.stage}: all {len(units)} units are committed already", flush=True)
    elif len(units) > len(missing):
        print(f"{context.stage}: {len(units) - len(missing)} of {len(units)} units are committed already", flush=True)

    if missing:
        _check_room(context, worker)

    def poll() -> None:
        found = stop.poll()
        if found is not None:
            raise StopRequested(found)

    claims = Claims(run.claims(context.stage))

    def busy() -> None:
        claims.touch()
        poll()

    by_name = {unit.name: unit for unit in units}
    progress = Progress(len(share), context.stage, "units")
    done = 0
    with closing(units_in_turn(wanted, claims, lambda n: ledger.is_committed(n, fingerprint), poll)) as turns:
        for name in turns:
            _do_unit(run, context, worker, ledger, by_name[name], fingerprint, busy)
            done += 1
            progress.update(min(done, len(share)))
    progress.close()
    complete = all(ledger.is_committed(unit.name, fingerprint) for unit in units)
    if complete:
        worker.finish()
        ledger.finish(fingerprint)
    return complete and (done > 0 or context.task == 0)


def _check_room(context: StageContext, worker: UnitWorker) -> None:
    """Refuse a stage whose files will not fit; each task looks, the first one says what is only a warning."""
    experiment = context.experiment
    if isinstance(worker, forecast.Forecasts):
        told = (worker.forecast(), context.workspace / experiment.data.table)
    else:
        found = forecast.stage_need(context.run, experiment, context.stage)
        if found is None:
            return
        told = found

    def say(line: str) -> None:
        if context.task == 0:
            print(line, flush=True)

    forecast.check(context.stage, *told, experiment.data.forecast, say)


def _do_unit(
    run: RunFolder,
    context: StageContext,
    worker: UnitWorker,
    ledger: Ledger,
    unit: Unit,
    fingerprint: str,
    poll: Callable[[], None],
) -> None:
    assert context.journal is not None
    begun = clock.monotonic()
    context.journal.event("unit_begin", unit=unit.name)
    staging = commit.staging_path(run.path / "staging" / f"{context.stage}-{unit.name}")
    commit.make_folder(staging)
    try:
        files = worker.do(unit, staging, poll)
        size = ledger.commit(unit, files, fingerprint)
    finally:
        commit.remove_tree(staging)
    seconds = clock.monotonic() - begun
    context.journal.event("unit_committed", unit=unit.name, seconds=seconds, bytes=size)


__all__ = ["launch_stage", "load_run", "make_worker", "plan", "prepare_run", "run_stage", "run_stages"]
