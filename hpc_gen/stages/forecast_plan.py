"""The forecast for --dry-run: with what only the method and the source of the images can tell. Changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hpc_gen.config.loader import Resolved
from hpc_gen.runtime.errors import HpcGenError
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import forecast
from hpc_gen.stages.forecast import Forecasts, Need
from hpc_gen.stages.units import StageContext


def lines(run: RunFolder, resolved: Resolved, stages: Sequence[str] | None = None) -> list[str]:
    """What each stage will write, beside what is free; what cannot be told yet says why."""
    found = []
    for name in stages or resolved.experiment.stage_order():
        try:
            told = _encode(run, resolved) if name == "encode" else _train(run, resolved) if name == "train" else None
        except HpcGenError as error:
            # what encode reads, nothing before it makes: it would fail, as things are
            certain = name == "encode" and not resolved.experiment.extra_stages
            found.append(f"{name}: would be refused now: {error}" if certain else f"{name}: not known yet ({error})")
            continue
        told = told or forecast.stage_need(run, resolved.experiment, name)
        if told is not None:
            found.append(forecast.line(name, *told))
    return found


def _train(run: RunFolder, resolved: Resolved) -> tuple[Need, Path] | None:
    """Before there is a checkpoint, its size follows from the networks (on the meta device, without memory)."""
    experiment, config = resolved.experiment, resolved.experiment.train
    assert config is not None  # a stage of the experiment
    if (need := forecast.train_need(run, config)) is None and not any(run.checkpoints.glob("[0-9]*")):
        from hpc_gen.stages.weights import meta_of

        method = meta_of(experiment, run.workspace)
        size = forecast.checkpoint_bytes(method, method.roles(), len(config.ema))
        need = forecast.train_need(run, config, size)
    return (need, run.path) if need is not None else None


def _encode(run: RunFolder, resolved: Resolved) -> tuple[Need, Path] | None:
    """The worker of the stage counts the rows of its source."""
    from hpc_gen.stages.runner import make_worker

    worker = make_worker(StageContext(run, resolved, "encode", run.workspace))
    if not isinstance(worker, Forecasts):
        return None
    return worker.forecast(), run.workspace / resolved.experiment.data.table
