"""The train stage: puts a training together from a run folder, runs it, and says how it ended.

The same body under torchrun, srun and plain python. Everything that may be refused is refused before the attempt is
claimed or the table is read.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hpc_gen.config import loader
from hpc_gen.config.experiment import Experiment, TrainConfig
from hpc_gen.config.loader import Resolved
from hpc_gen.data import staging
from hpc_gen.data.dali_feed import DaliMover
from hpc_gen.data.feed import Feed, FeedPlan
from hpc_gen.data.order import BlockShuffle
from hpc_gen.data.table import Table
from hpc_gen.methods.materialise import materialise
from hpc_gen.runtime import clock, commit, env
from hpc_gen.runtime.errors import CheckpointError, CollectiveError, ExitCode, FencedError, HpcGenError, UserError
from hpc_gen.runtime.fence import Fence, claim_attempt
from hpc_gen.runtime.journal import Journal
from hpc_gen.runtime.progress import Progress, count
from hpc_gen.runtime.rank_detection import detect
from hpc_gen.runtime.rank_watch import blamed
from hpc_gen.runtime.ranks import Ranks
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.runtime.start_up import StartUp
from hpc_gen.runtime.stop import Stop, StopToken
from hpc_gen.runtime.tracking import WandbMirror
from hpc_gen.stages import forecast, save_interval, width
from hpc_gen.stages.build import check_columns, meta_method, open_table, table_facts
from hpc_gen.stages.frozen import give_frozen
from hpc_gen.stages.initial import take_initial_weights
from hpc_gen.stages.origin import CARRIED
from hpc_gen.stages.periodic import cuts_at, periodic_work
from hpc_gen.stages.run_setup import extensions, training_identity
from hpc_gen.stages.surroundings import Surroundings
from hpc_gen.stages.watching import meter, watched
from hpc_gen.training import loop
from hpc_gen.training.checkpoint.chain import CheckpointChain, Loaded, Retention
from hpc_gen.training.ema import EmaSet
from hpc_gen.training.engines.build import build_engine, needs_values, refuse
from hpc_gen.training.precision import set_determinism

STAGE_TO = "HPC_GEN_STAGE_TO"  # set by the batch script


@dataclass(frozen=True)
class Attempt:
    """One start of the train stage, the same on every rank."""

    number: int
    fence: Fence
    journal: Journal


def run_train(run: RunFolder, resolved: Resolved, workspace: Path, stop: StopToken) -> ExitCode:
    """Train `run` to its end or to a stop; returns the exit code of this rank, the same on all of them.

    `stop` has its signal handlers installed already, so a signal during start-up is honoured. Raises HpcGenError.
    """
    config, start = _train_config(resolved), StartUp.begin()
    width.check(config, detect(env.snapshot()).world_size)
    ranks = Ranks.start(timeout_s=config.collective_timeout_s)
    start.mark("rendezvous")
    try:
        attempt = _claim(run, ranks)
        if ranks.is_main:
            stop.clear_files()  # a PREEMPT that ended the attempt before has had its effect
            for folder in (run.path, run.journal, run.previews):
                commit.sweep(folder)  # what killed attempts were writing; the chain sweeps its own
        config = _with_interval(run, config, ranks, attempt)
        try:
            return _attempt(run, resolved, config, workspace, stop, ranks, attempt, start)
        finally:
            attempt.journal.close()
    finally:
        ranks.stop()


def _with_interval(run: RunFolder, config: TrainConfig, ranks: Ranks, attempt: Attempt) -> TrainConfig:
    """The config with an interval of saves, where it leaves that open; the same on every rank."""
    if config.save_every is not None:
        return config
    chosen = ranks.broadcast_object(save_interval.choose(run, config) if ranks.is_main else None)
    images, why = chosen
    if ranks.is_main:
        attempt.journal.event("save_interval", images=images, why=why)
        print(f"train {run.name}: {why}", flush=True)
    return config.model_copy(update={"save_every": images})


def _train_config(resolved: Resolved) -> TrainConfig:
    if resolved.experiment.train is None:
        raise UserError(f"experiment '{resolved.experiment.name}' has no 'train' section; add one")
    return resolved.experiment.train


def _claim(run: RunFolder, ranks: Ranks) -> Attempt:
    """Rank 0 takes the fence; every rank learns the attempt's number and token, or why there is none."""
    message: dict[str, Any] = {}
    if ranks.is_main:
        try:
            given = env.get("HPC_GEN_ATTEMPT")
            number = int(given) if given else claim_attempt(run, "train", world_size=ranks.world_size)
            message = {"number": number, "token": Fence.take(run, number).token}
        except HpcGenError as error:
            message = {"error": error}
    message = ranks.broadcast_object(message)
    if "error" in message:
        raise message["error"]
    number = message["number"]
    return Attempt(number, Fence(run, number, message["token"]), Journal(run, number, "train", ranks.rank))


def _attempt(
    run: RunFolder,
    resolved: Resolved,
    config: TrainConfig,
    workspace: Path,
    stop: StopToken,
    ranks: Ranks,
    attempt: Attempt,
    start: StartUp,
) -> ExitCode:
    """Body of one attempt: everything between taking the fence and giving it back is in the journal."""
    ended, code, cause, seen = None, ExitCode.BUG, "error", -1
    blame: list[Mapping[str, Any]] = []
    stuck = False
    job: loop.TrainJob | None = None
    try:
        with watched(run, config, ranks, attempt.number, attempt.journal):
            job = _prepare(run, resolved, config, workspace, stop, ranks, attempt)
            job.first_step_done = partial(_started, job, start)
            start.mark("load")
            ended = loop.train(job)
        code = ExitCode.DONE if ended is None else ExitCode(ended.exit_code)
        cause = "done" if ended is None else ended.detail
    except HpcGenError as error:
        code, cause, blame, stuck = error.exit_code, str(error), blamed(error), isinstance(error, CollectiveError)
        raise
    finally:
        if job is not None:
            # before the fence is released: what is being written may still be committed, but not without a rank
            job.chain.settle(5.0) if stuck else job.chain.settle()
        seen = job.state.images_seen if job is not None else -1
        attempt.journal.event("attempt_end", exit_code=int(code), cause=cause, images_seen=seen)
        if ranks.is_main:
            _leave(run, attempt, ended, code, cause, seen, blame)
    _tell(job, ended)
    ranks.barrier()  # all end together: a launcher ends those that linger, and rank 0 may still be publishing
    return code


def _started(job: loop.TrainJob, start: StartUp) -> None:
    """The first step is done: the budget of the start goes into the journal and to whoever watches."""
    start.mark("first_step")
    job.journal.event("start_up", **start.fields)
    job.say(f"train: {start.sentence()}")


def _leave(
    run: RunFolder,
    attempt: Attempt,
    stop: Stop | None,
    code: ExitCode,
    cause: str,
    seen: int,
    blame: Sequence[Mapping[str, Any]],
) -> None:
    """Write the cause file, by which the batch body and `status` decide, and release the fence.

    `blame`: ranks and hosts that the others waited for in vain; a requeue leaves these hosts out.

    A full disk keeps neither the attempt from ending as it has ended nor the next from taking over from a dead process.
    """
    content = {"exit_code": int(code), "cause": cause, "images_seen": seen, "stop": stop.cause.name if stop else None}
    if blame:
        content["blamed"] = list(blame)
    path = run.journal / f"{attempt.number:04d}.cause.json"
    try:
        commit.write_json(path, {**content, "stage": "train", "time": clock.now()})
        attempt.fence.release(cause)
    except (OSError, UserError, FencedError) as error:
        attempt.journal.event("fault", what="the end of the attempt is not written", detail=str(error))


def _tell(job: loop.TrainJob, ended: Stop | None) -> None:
    seen = job.state.images_seen
    if ended is None:
        job.say(f"train: done at {seen} images")
    else:
        job.say(f"train: stopped at {seen} images ({ended.detail}); the state is saved, `hpc-gen resume` goes on")


def _table_folder(experiment: Experiment, workspace: Path, stop: StopToken, ranks: Ranks, attempt: Attempt) -> str:
    """Where this process reads the training table: its copy on a disk of the node if `data.stage_to`, or the
    cluster profile by STAGE_TO, says so."""
    data = experiment.data
    stage_to = data.stage_to or env.get(STAGE_TO)
    if stage_to is None:
        return data.table

    def say(line: str) -> None:
        attempt.journal.event("staging", what=line)
        if ranks.is_main:
            print(line, flush=True)

    root = staging.check_root(stage_to)
    return str(staging.stage(workspace / data.table, root, say, lambda: stop.poll() is not None))


def _prepare(
    run: RunFolder,
    resolved: Resolved,
    config: TrainConfig,
    workspace: Path,
    stop: StopToken,
    ranks: Ranks,
    attempt: Attempt,
) -> loop.TrainJob:
    """Table, method, engine, chain and feed of one attempt, restored to the newest whole checkpoint."""
    experiment = resolved.experiment
    set_determinism(config.deterministic, config.threads)
    table = open_table(workspace, _table_folder(experiment, workspace, stop, ranks, attempt), experiment)
    method = meta_method(experiment, table_facts(table))
    check_columns(method, table)
    frozen = give_frozen(experiment, method, workspace, ranks.device)
    refuse(method, config, ranks.world_size, ranks.device.type)
    modules = materialise(method, experiment.seed) if needs_values(config, ranks) else method.roles()
    progress = Progress(config.end_images, f"train {run.name}") if ranks.is_main else _Silent(config.end_images, "")
    say = progress.say if ranks.is_main else (lambda line: None)
    retention = Retention(config.keep_last, config.keep_every)
    chain = CheckpointChain(run, ranks, attempt.fence, attempt.journal, retention, say)
    chain.sweep()
    taken = None
    if _is_first(run, chain, experiment, forecast.checkpoint_bytes(method, modules, len(config.ema)), ranks, say):
        # before the engine and the averages take the weights as they are
        taken = take_initial_weights(experiment, workspace, method, modules, say)
    engine = build_engine(method, modules, config, ranks, ranks.device)
    trained = {role: modules[role] for role in engine.trained_roles()}
    ema = EmaSet(trained, {name: each.decay for name, each in config.ema.items()}, engine)
    plan = FeedPlan(
        seed=experiment.seed,
        global_batch=config.global_batch,
        micro_batch=config.micro_batch_for(engine.data_ranks),
        rank=engine.data_rank,
        world_size=engine.data_ranks,
        columns=tuple(method.columns()),
        coupling_group=config.coupling_group,
        prefetch=experiment.data.prefetch,
        workers=experiment.data.workers,
    )
    move = DaliMover(ranks.device) if experiment.data.feed == "dali" else None
    order = BlockShuffle(table.shard_rows, experiment.seed, experiment.data.shuffle_shards)

    def turn_draws(images_seen: int) -> list[tuple[str, Mapping[str, Any]]]:
        turns = method.turns(images_seen // config.global_batch, images_seen)
        return [(turn.purpose, method.draws(turn)) for turn in turns]

    def open_feed(start_images: int, draw_counter: int) -> Feed:
        return Feed(table, order, plan, turn_draws, start_images, draw_counter, config.end_images, move)

    facts = training_facts(resolved, table, engine.name)
    if frozen:
        facts["frozen"] = frozen
    if taken is not None:
        facts["initial"] = taken.facts
        attempt.journal.event("initial_weights", **taken.facts, left=taken.differences)
    mirror = WandbMirror(run, experiment.tracking, config=loader.flat(resolved)) if ranks.is_main else None

    def published(images_seen: int, final: bool, preempted: bool) -> None:
        if mirror is not None:
            mirror.publish(images_seen, final, preempted=preempted)

    job = loop.TrainJob(
        method=method,
        engine=engine,
        ema=ema,
        chain=chain,
        config=config,
        ranks=ranks,
        stop=stop,
        journal=attempt.journal,
        progress=progress,
        open_feed=open_feed,
        facts=facts,
        say=say,
        published=published,
    )
    job.periodic = periodic_work(Surroundings(run, resolved, workspace, job, table), plan.micro_batch)
    loaded = chain.load_newest()
    _check_identity(loaded, facts, extensions(run), attempt.journal)
    _go_on(run, job, loaded)
    _begin(run, job, attempt, resolved, loaded)
    job.meter = meter(run, resolved, workspace, attempt.number, job)
    return job


def _go_on(run: RunFolder, job: loop.TrainJob, loaded: Loaded | None) -> None:
    """Bring the job to a checkpoint: state, what the weights began from, and what was cut short there."""
    loop.restore(job, loaded)
    if loaded is None:
        return
    job.facts = {**job.facts, **{key: loaded.facts[key] for key in CARRIED if key in loaded.facts}}
    forked = loaded.facts.get("forked", {})
    before = forked.get("cut_short", 0) if forked.get("images_seen") == loaded.images_seen else 0
    cuts = cuts_at(run, loaded.images_seen, before) if job.ranks.is_main else 0
    job.cut_before = job.ranks.broadcast_object(cuts)


def _is_first(
    run: RunFolder,
    chain: CheckpointChain,
    experiment: Experiment,
    checkpoint_bytes: int,
    ranks: Ranks,
    say: Callable[[str], None],
) -> bool:
    """Whether there is no checkpoint yet; refuses, on all ranks, to begin or go on where the disk has no room."""
    failure: UserError | None = None
    if ranks.is_main:
        assert experiment.train is not None
        need = forecast.train_need(run, experiment.train, checkpoint_bytes)
        try:
            if need is not None:
                forecast.check("train", need, run.checkpoints, experiment.data.forecast, say)
        except UserError as error:
            failure = error
    begun, failure = ranks.broadcast_object((chain.exists(), failure))
    if failure is not None:
        raise failure
    return not begun


def training_facts(resolved: Resolved, table: Table, engine: str) -> dict[str, Any]:
    """What every checkpoint of a run says of itself; a later attempt compares the first two with its own."""
    config = _train_config(resolved)
    return {
        "identity": training_identity(resolved),
        "table": table.identity,
        "method": str(resolved.experiment.method["name"]),
        "engine": engine,
        "threads": config.threads,
        "torch": str(torch.__version__),
    }


def _check_identity(
    loaded: Loaded | None, facts: Mapping[str, Any], extended: Mapping[str, Any], journal: Journal
) -> None:
    """A checkpoint of another experiment or table is refused, not discovered as a bad FID.

    `extended`: identities that this run had before it was extended (run_setup.EXTENDABLE), with what changed.
    """
    if loaded is None:
        return
    told = loaded.facts.get("identity")
    if told in extended and told != facts["identity"]:
        journal.event("extended", images_seen=loaded.images_seen, changed=extended[told])
        facts = {**facts, "identity": told}
    if told != facts["identity"] and loaded.facts.get("threads") != facts["threads"]:
        raise CheckpointError(
            f"{loaded.path} was trained with {loaded.facts.get('threads')} threads per rank, now 'train.threads' is "
            f"{facts['threads']}, which changes the last bits of every sum; set 'train.threads' back, or start a new "
            "run with another name"
        )
    for key, what in (("identity", "seed, method, data or train section"), ("table", "training table")):
        if loaded.facts.get(key) != facts[key]:
            raise CheckpointError(
                f"{loaded.path} was written with another {what} ({key} {str(loaded.facts.get(key))[:12]}, now "
                f"{facts[key][:12]}); start a new run with another name"
            )


def _begin(run: RunFolder, job: loop.TrainJob, attempt: Attempt, resolved: Resolved, loaded: Loaded | None) -> None:
    resumed_from = loaded.images_seen if loaded is not None else None
    attempt.journal.event(
        "attempt_start",
        world_size=job.ranks.world_size,
        rank=job.ranks.rank,
        host=platform.node(),
        process_start=clock.process_start(),
        resumed_from=resumed_from,
        identity=resolved.identity,
    )
    begun = "the start" if resumed_from is None else f"{resumed_from} images"
    ranks = count(job.ranks.world_size, "rank")
    job.say(f"train {run.name}: from {begun}, {ranks}, attempt {attempt.number}")


class _Silent(Progress):
    """Progress of the ranks that nobody watches."""

    def update(self, done: float, **fields: Any) -> None:
        """Nothing: rank 0 reports."""
