"""The training loop: read top to bottom, in the order in which things happen. It knows a method by its protocol only.

The clock is `images_seen`. A run that was killed and resumed passes through the same states as one that was not:
weights, optimizer, averages and `TrainState` come from the checkpoint, everything else is a function of the clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hpc_gen.config.experiment import TrainConfig
from hpc_gen.data.feed import Feed
from hpc_gen.methods.protocol import Method
from hpc_gen.runtime import clock, spans
from hpc_gen.runtime.errors import CheckpointError, FencedError, HpcGenError, StopRequested
from hpc_gen.runtime.journal import Journal
from hpc_gen.runtime.memory import peak_host_bytes
from hpc_gen.runtime.progress import Progress
from hpc_gen.runtime.ranks import Ranks
from hpc_gen.runtime.stop import Stop, StopToken
from hpc_gen.training.checkpoint.chain import CheckpointChain, Loaded
from hpc_gen.training.checkpoint.pieces import Pieces
from hpc_gen.training.ema import EmaSet
from hpc_gen.training.engines.base import Engine, StepResult
from hpc_gen.training.guard import NonFiniteGuard, Verdict
from hpc_gen.training.meter import Meter
from hpc_gen.training.schedules import learning_rate
from hpc_gen.training.state import TrainState

WORTH_SAYING_S = 1.0  # of waiting for a slow disk; less is in the journal only


@dataclass(frozen=True)
class Periodic:
    """Something done every `every_images` and at `at_images`, between steps: validation, previews, evaluation.

    `action(images_seen)` returns values for the row; it may raise StopRequested, on all ranks at once.
    """

    name: str
    every_images: int | None
    action: Callable[[int], Mapping[str, float]]
    at_images: frozenset[int] = frozenset()

    def due(self, images_seen: int) -> bool:
        """Whether it is to be done at this clock."""
        return images_seen in self.at_images or (self.every_images is not None and images_seen % self.every_images == 0)


@dataclass
class TrainJob:
    """Everything the loop needs, put together by the train stage.

    `open_feed(start_images, draw_counter)` starts the feed; `facts` go into every manifest; `published(images,
    final, preempted)` is told what is committed and how the attempt ends (the wandb mirror); `say` prints a line on
    rank 0; `first_step_done` is called once, for the start-up budget. `cut_before`: how often a stop has cut short the
    validation, previews or evaluation at the clock from which this attempt goes on.
    """

    method: Method
    engine: Engine
    ema: EmaSet
    chain: CheckpointChain
    config: TrainConfig
    ranks: Ranks
    stop: StopToken
    journal: Journal
    progress: Progress
    open_feed: Callable[[int, int], Feed]
    facts: Mapping[str, Any]
    say: Callable[[str], None]
    periodic: Sequence[Periodic] = ()
    cut_before: int = 0
    published: Callable[[int, bool, bool], None] = lambda images, final, preempted: None
    first_step_done: Callable[[], None] | None = None
    state: TrainState = field(default_factory=TrainState)
    meter: Meter = field(default_factory=Meter)


@dataclass
class Timing:
    """Seconds of the open log interval, for the goodput receipt."""

    begun: float = field(default_factory=clock.monotonic)
    images: int = 0
    data_wait: float = 0.0
    save_stall: float = 0.0
    other: float = 0.0


def restore(job: TrainJob, loaded: Loaded | None) -> None:
    """Bring engine, averages and state to a checkpoint; None leaves the initial values. Raises CheckpointError."""
    if loaded is None:
        return
    job.engine.load(loaded.tensors)
    try:
        job.ema.load(loaded.tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{loaded.path} has {error}") from error
    job.state = TrainState.from_tensors(loaded.tensors)
    assert job.state.images_seen == loaded.images_seen, "a checkpoint's name and its clock differ"
    job.chain.begun_images = job.chain.committed_images = loaded.images_seen


def train(job: TrainJob) -> Stop | None:
    """Train from `job.state` to the end of the stage, or until all ranks agreed to stop; the state is saved then.

    Returns the stop, or None when the stage is done. Raises DivergedError, CheckpointError, FencedError.
    """
    config, guard = job.config, NonFiniteGuard(job.config.non_finite)
    feed = job.open_feed(job.state.images_seen, job.state.draw_counter)
    job.progress.go_on_from(job.state.images_seen)
    timing, reserved = Timing(), False
    stop: Stop | None = _catch_up(job, timing)
    try:
        while stop is None and job.state.images_seen < config.end_images:
            with spans.span("agree"):
                stop = job.stop.agree(job.ranks)
            if stop is not None:
                break
            before_wait = feed.wait_s
            with spans.span(spans.DATA_WAIT):
                iteration = next(feed)
            timing.data_wait += feed.wait_s - before_wait
            assert iteration.images_seen == job.state.images_seen, "the feed and the clock have parted"

            results = _step_all_turns(job, iteration.micro_batches)
            job.state.images_seen += config.global_batch
            if job.engine.leads_data:
                job.state.add_digest(iteration.digest)
            spans.step_done(job.state.images_seen)
            if job.first_step_done is not None:
                job.first_step_done()
                job.first_step_done = None
            job.meter.step()
            timing.images += config.global_batch
            if not reserved:  # optimizers have their state only now
                job.chain.reserve(_everything(job))
                reserved = True

            verdict = guard.judge(job.state, all(result.finite for result in results.values()))
            if verdict is Verdict.ROLL_BACK:
                feed.close()
                _book(job, timing)
                _roll_back(job)
                feed = job.open_feed(job.state.images_seen, job.state.draw_counter)
                job.progress.go_on_from(job.state.images_seen)
                timing = Timing()
                continue
            if verdict is Verdict.SKIPPED:
                _tell_skipped(job, results)
            else:
                with spans.span("ema", job.ranks.device):
                    job.ema.update(job.engine.trained_roles())
                guard.remember(job.state, {purpose: result.total for purpose, result in results.items()})
                job.state.add_losses(_row_values(results))
            stop = _at_intervals(job, timing, job.periodic)
    finally:
        feed.close()
        job.meter.close()
    if job.chain.begun_images != job.state.images_seen:
        timing.save_stall += _save(job)
    begun = clock.monotonic()
    with spans.span("save_wait"):
        job.chain.wait()  # the last save of an attempt must hold: its failure is the attempt's
    timing.save_stall += clock.monotonic() - begun
    _book(job, timing)
    if job.chain.committed_images is not None:
        with spans.span("publish"):
            job.published(job.chain.committed_images, True, stop is not None)
    return stop


def _step_all_turns(job: TrainJob, micro_batches: Sequence[Any]) -> dict[str, StepResult]:
    """Every turn of one iteration, in order, over the same global batch."""
    images_seen, config = job.state.images_seen, job.config
    rate = learning_rate(
        images_seen,
        peak=config.learning_rate,
        warmup_images=config.schedule.warmup_images,
        total_images=config.total_images,
        kind=config.schedule.kind,
        min_lr=config.schedule.min_lr,
    )
    results: dict[str, StepResult] = {}
    for turn in job.method.turns(images_seen // config.global_batch, images_seen):
        micros = [(micro.batch, micro.draws[turn.purpose]) for micro in micro_batches]
        highest = NonFiniteGuard(config.non_finite).highest_loss(job.state, turn.purpose)
        with spans.span("step", together=True):
            results[turn.purpose] = job.engine.step(turn, micros, rate, highest)
    return results


def _tell_skipped(job: TrainJob, results: Mapping[str, StepResult]) -> None:
    """Which step was skipped, and why."""
    spikes = [
        result.total
        for result in results.values()
        if not result.finite and math.isfinite(result.total) and math.isfinite(result.grad_norm)
    ]
    why = f"a spike of the loss ({spikes[0]:.4g})" if spikes else "not finite"
    told = {"loss": spikes[0]} if spikes else {}
    job.journal.event("non_finite", images_seen=job.state.images_seen, run=job.state.non_finite_run, **told)
    job.say(f"step before {job.state.images_seen} images was {why} and was skipped")


def _row_values(results: Mapping[str, StepResult]) -> dict[str, float]:
    """What a row says of one iteration; names carry the turn's purpose only where there are several turns."""
    values: dict[str, float] = {}
    for purpose, result in results.items():
        prefix = f"{purpose}/" if len(results) > 1 else ""
        values[f"{prefix}loss"] = result.total
        values[f"{prefix}grad_norm"] = result.grad_norm
        values.update({f"{prefix}{name}": value for name, value in result.losses.items() if name != "loss"})
    return values


def _at_intervals(job: TrainJob, timing: Timing, periodic: Sequence[Periodic]) -> Stop | None:
    """Validation, previews and evaluation, then the row, then the checkpoint: what an undisturbed run does here.

    A stop that cuts them short is returned: neither a row nor anything of theirs is left, the log interval stays open
    in the state that is saved then, and the next attempt begins here.
    """
    images_seen, config = job.state.images_seen, job.config
    extra: dict[str, float] = {}
    begun = clock.monotonic()
    for each in periodic:
        if each.due(images_seen):
            try:
                with spans.span(each.name):
                    extra.update(each.action(images_seen))
            except StopRequested as error:
                timing.other += clock.monotonic() - begun
                job.journal.event("cut_short", what=each.name, images_seen=images_seen, detail=error.stop.detail)
                job.say(f"{each.name} at {images_seen} images was cut short ({error.stop.detail})")
                return error.stop
    timing.other += clock.monotonic() - begun
    if images_seen % config.log_every == 0 or extra:
        _log(job, timing, extra, close=images_seen % config.log_every == 0)
    if images_seen % config.save_every == 0:
        _note_best(job.state, extra)
        if job.chain.begun_images != images_seen:  # not when catching up at the checkpoint that was resumed from
            timing.save_stall += _save(job)
    return None


def _catch_up(job: TrainJob, timing: Timing) -> Stop | None:
    """What a stop cut short at the clock from which this attempt goes on is done now.

    Only once, unless training ends here: attempts shorter than an evaluation must still get on with training.
    """
    if not job.cut_before:
        return None
    images_seen = job.state.images_seen
    given_up = job.cut_before > 1 and images_seen < job.config.total_images
    if given_up:
        names = ", ".join(each.name for each in job.periodic if each.due(images_seen))
        job.journal.event("dropped", what=names, images_seen=images_seen)
        job.say(f"{names} at {images_seen} images: cut short in {job.cut_before} attempts, left out now")
    stop = _at_intervals(job, timing, () if given_up else job.periodic)
    if stop is None:
        job.journal.event("caught_up", images_seen=images_seen)
    return stop


def _note_best(state: TrainState, extra: Mapping[str, float]) -> None:
    """Called only where a checkpoint follows, so that the best position is one that can be loaded."""
    loss = extra.get("validation/loss")
    if loss is not None and loss < state.best_loss:
        state.best_loss, state.best_images = loss, state.images_seen


def _log(job: TrainJob, timing: Timing, extra: Mapping[str, float], close: bool) -> None:
    """One journal row; at the end of a log interval also its means, its timing and the human line."""
    data = dict(extra)
    if close:
        data.update(job.state.close_window())
        data["learning_rate"] = learning_rate(
            job.state.images_seen - job.config.global_batch,
            peak=job.config.learning_rate,
            warmup_images=job.config.schedule.warmup_images,
            total_images=job.config.total_images,
            kind=job.config.schedule.kind,
            min_lr=job.config.schedule.min_lr,
        )
        elapsed = clock.monotonic() - timing.begun
        job.progress.update(
            job.state.images_seen,
            loss=data.get("loss"),
            data_wait=f"{timing.data_wait / elapsed:.1%}" if elapsed > 0 else None,
            save_stall_s=timing.save_stall,
            mfu=job.meter.mfu(timing.images, elapsed - timing.other),
        )
        _book(job, timing)
    if job.ranks.is_main:
        job.journal.row(job.state.images_seen, data)


def _book(job: TrainJob, timing: Timing) -> None:
    """Write the open interval's seconds to the journal and begin the next one."""
    elapsed = clock.monotonic() - timing.begun
    share = job.meter.mfu(timing.images, elapsed - timing.other)
    job.journal.event(
        "interval",
        images_seen=job.state.images_seen,
        images=timing.images,
        productive_s=max(0.0, elapsed - timing.data_wait - timing.save_stall - timing.other),
        data_wait_s=timing.data_wait,
        save_stall_s=timing.save_stall,
        other_s=timing.other,
        peak_bytes=_peak_bytes(job.ranks.device),
        **({} if share is None else {"mfu": share, "flops_per_image": job.meter.flops_per_image}),
    )
    spans.close_interval()
    timing.begun, timing.images = clock.monotonic(), 0
    timing.data_wait = timing.save_stall = timing.other = 0.0


def _peak_bytes(device: torch.device) -> int | None:
    """Most memory held so far: of tensors on the GPU, of the process on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_host_bytes()


def _save(job: TrainJob) -> float:
    """Begin a checkpoint of everything; returns the seconds the loop stood still for it.

    A failed save before it is reported and does not end the training.
    """
    begun, slow = clock.monotonic(), job.chain.saving
    try:
        with spans.span("save_wait"):
            job.chain.wait()
    except FencedError:
        raise
    except (HpcGenError, OSError, RuntimeError) as error:
        job.say(f"the save before this one failed and was given up: {error}")
    else:
        if slow:
            _tell_slow(job, clock.monotonic() - begun)
        if job.chain.committed_images is not None:
            job.published(job.chain.committed_images, False, False)
    if job.state.best_images >= 0:
        job.chain.best_images = job.state.best_images  # not before the save under way has done its own retention
    job.state.merge_digests([_sum_over_ranks(job.state.digest_here, job.ranks)])
    facts = {**job.facts, "digest": f"{job.state.digest:016x}"}
    with spans.span("save"):
        job.chain.save(job.state.images_seen, _everything(job), facts)
    return clock.monotonic() - begun


def _sum_over_ranks(digest: int, ranks: Ranks) -> int:
    """Sum of a 64-bit number over ranks: by halves, which cannot overflow, in one small collective."""
    halves = torch.tensor([digest >> 32, digest & 0xFFFFFFFF])
    high, low = ranks.all_reduce_sum_cpu(halves).tolist()
    return (int(high) << 32) + int(low)


def _tell_slow(job: TrainJob, waited_s: float) -> None:
    """The disk takes longer for a checkpoint than training for what lies between two."""
    job.journal.event("save_waited", images_seen=job.state.images_seen, waited_s=waited_s)
    if waited_s >= WORTH_SAYING_S:
        job.say(
            f"at {job.state.images_seen} images training waited {waited_s:.1f} s for the checkpoint before to be "
            "written; a larger train.save_every, or a faster disk, would spare that"
        )


def _everything(job: TrainJob) -> dict[str, Tensor | Pieces]:
    """What a checkpoint holds, by flat name; the live tensors."""
    state: dict[str, Tensor | Pieces] = {**job.engine.state(), **job.state.tensors()}
    for role in job.ema.averages:
        state.update({f"ema/{role}/{name}": tensor for name, tensor in job.ema.tensors(role).items()})
    return state


def _roll_back(job: TrainJob) -> None:
    """To the newest checkpoint, with other draws from there on (the order of rows stays)."""
    try:
        job.chain.wait()
    except FencedError:
        raise
    except (HpcGenError, OSError, RuntimeError) as error:
        job.say(f"the last save failed and was given up: {error}")
    counter, total = job.state.draw_counter + 1, job.state.non_finite_total
    was = job.state.images_seen
    loaded = job.chain.load_newest()
    if loaded is None:
        raise CheckpointError(
            f"training stopped being finite at {was} images before its first checkpoint; lower train.optimizer.lr"
        )
    restore(job, loaded)
    job.state.draw_counter, job.state.non_finite_total, job.state.non_finite_run = counter, total, 0
    job.journal.event("rollback", images_seen=was, resumed_from=job.state.images_seen, draw_counter=counter)
    job.say(f"went back from {was} to {job.state.images_seen} images; draws continue with counter {counter}")
