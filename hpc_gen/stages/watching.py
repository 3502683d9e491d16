"""What watches a training attempt: spans of each rank, the naming of a rank that the others wait for in vain, the
profiler's window, and what MFU is computed from."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from hpc_gen.config.experiment import TrainConfig
from hpc_gen.config.loader import Resolved
from hpc_gen.runtime.errors import CollectiveError
from hpc_gen.runtime.journal import Journal
from hpc_gen.runtime.rank_watch import RankWatch, blamed
from hpc_gen.runtime.ranks import Ranks
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.runtime.spans import Recorder
from hpc_gen.training.device_peak import peak_of
from hpc_gen.training.loop import TrainJob
from hpc_gen.training.memory_plan import plan_of
from hpc_gen.training.meter import Meter, ProfileWindow

SPANS = "spans"  # folder of their files, below the journal's
DEVICE_SHARE = 0.9  # of the collectives' timeout: before NCCL aborts the process without a word


@contextmanager
def watched(run: RunFolder, config: TrainConfig, ranks: Ranks, attempt: int, journal: Journal) -> Iterator[None]:
    """Inside, spans are recorded, and a collective that fails raises CollectiveError; the journal is told as well."""
    recorder = Recorder(Journal(run, attempt, "train", ranks.rank, below=SPANS), config.spans)
    recorder.start(rank=ranks.rank, world_size=ranks.world_size)

    def note(error: CollectiveError) -> None:
        journal.event("fault", what="collective", detail=str(error), blamed=blamed(error))

    try:
        limit_s = DEVICE_SHARE * config.collective_timeout_s if ranks.device.type == "cuda" else None
        watch = RankWatch.start(ranks, limit_s)
        watch.on_stuck = note
        try:
            with watch.naming():
                yield
        except CollectiveError as error:
            note(error)
            raise
        finally:
            watch.close()
    finally:
        recorder.stop()


def meter(run: RunFolder, resolved: Resolved, workspace: Path, attempt: int, job: TrainJob) -> Meter:
    """The meter of this rank; what the ranks will hold is said before the first step.

    Where the peak of the device is known, rank 0 counts the FLOPs of an image. That takes seconds, for a large network
    with an inner loop a minute, so a thread does it beside the first steps, and once per run. A method whose FLOPs
    cannot be counted has no MFU, and it is said.
    """
    config, ranks = job.config, job.ranks
    held = plan_of(job.method, job.engine, job.engine.trained_roles(), config, ranks.world_size)
    job.say(f"memory: {held.summary()}; activations come to it (`hpc-gen run CONFIG --dry-run --world-size N`)")
    peak = config.peak_tflops
    if peak is None and ranks.device.type == "cuda":
        peak = peak_of(torch.cuda.get_device_name(ranks.device))
    found = Meter(peak_tflops=peak, devices=ranks.world_size)
    if config.profile is not None and ranks.rank in config.profile.ranks:
        path = run.path / "profile" / f"{attempt:04d}_rank_{ranks.rank}.json"
        found.window = ProfileWindow(config.profile, path, job.say)
    if peak is not None and ranks.is_main:
        _beside(lambda: _count(run, resolved, workspace, job, found))
    return found


def _beside(action: Callable[[], None]) -> None:
    """Do it while training goes on."""
    threading.Thread(target=action, name="flops", daemon=True).start()


def _count(run: RunFolder, resolved: Resolved, workspace: Path, job: TrainJob, found: Meter) -> None:
    from hpc_gen.stages import train_plan

    try:
        step = train_plan.flops_per_image(run, resolved, workspace)
    except Exception as error:  # any method's code, on tensors without values
        job.journal.event("fault", what="FLOPs not counted", detail=f"{type(error).__name__}: {error}")
        job.say(f"the FLOPs of an image cannot be counted, so there is no MFU: {type(error).__name__}")
        return
    found.flops_per_image = step.flops_per_image
    job.journal.event("flops", flops_per_image=step.flops_per_image, turns=dict(step.turn_flops))
