"""A run begun from a weights file, and a weights file written from a run.

An imported run is an ordinary one: the same run folder with one committed checkpoint at 0 images, written by the same
chain from the same engine, so sampling, evaluation, resuming and training need to know nothing of it.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hpc_gen.config.experiment import Experiment
from hpc_gen.config.loader import Resolved
from hpc_gen.data.table import Table
from hpc_gen.methods import registry
from hpc_gen.methods.materialise import materialise
from hpc_gen.methods.protocol import Method
from hpc_gen.runtime import clock, tensor_files
from hpc_gen.runtime.errors import CheckpointError, DataError, ExitCode, HpcGenError, UserError, nearest
from hpc_gen.runtime.fence import Fence, claim_attempt
from hpc_gen.runtime.journal import Journal
from hpc_gen.runtime.progress import format_bytes
from hpc_gen.runtime.rank_detection import RankInfo
from hpc_gen.runtime.ranks import Ranks
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages.build import meta_method, table_facts
from hpc_gen.stages.run_setup import load_run, prepare_run, typed
from hpc_gen.stages.train import training_facts
from hpc_gen.stages.weights import (
    Say,
    WeightsFile,
    adapted,
    chosen_role,
    counts,
    differences,
    known_table,
    meta_of,
    open_weights,
)
from hpc_gen.training.checkpoint import manifest, read
from hpc_gen.training.checkpoint.chain import CheckpointChain, Retention
from hpc_gen.training.ema import EmaSet
from hpc_gen.training.engines.ddp import DdpEngine
from hpc_gen.training.state import TrainState


@dataclass(frozen=True)
class _Import:
    """What goes into the first checkpoint: the method with its roles, and the averages of the imported one."""

    method: Method
    modules: Mapping[str, nn.Module]
    role: str
    averages: Mapping[str, Tensor]
    file: WeightsFile


def import_weights(
    resolved: Resolved,
    path: Path,
    workspace: Path,
    say: Say,
    *,
    key: str | None = None,
    sha256: str | None = None,
    role: str | None = None,
    dry_run: bool = False,
) -> RunFolder:
    """Make the experiment's run with one checkpoint at 0 images that holds the file's weights.

    The other roles of the method keep their initial values, the optimizer begins afresh. The same import again does
    nothing. Raises UserError for a run that holds anything else, for a table that is not encoded yet, and for a file
    whose part is not named; DataError for weights that do not fit exactly.
    """
    resolved = typed(resolved)
    experiment = resolved.experiment
    if experiment.train is None:
        raise UserError(f"experiment '{experiment.name}' has no 'train' section, which names the averages; add one")
    table = known_table(experiment, workspace)
    if table is None:
        raise UserError(
            f"table {workspace / experiment.data.table} is not there, and a checkpoint says which table it belongs to; "
            "encode it first with `hpc-gen run CONFIG --stages encode`"
        )
    method = meta_method(experiment, table_facts(table))
    role = chosen_role([name for name in method.roles() if method.parameter_groups(name)], role)
    file = open_weights(path, key, sha256)
    modules = materialise(method, experiment.seed)
    averages = _take_over(file, experiment, role, modules[role], say)
    run = RunFolder(workspace / "runs" / experiment.name)
    if _imported_already(run, file):
        say(f"{run.path} holds these weights already")
    elif dry_run:
        say(f"would write a checkpoint at 0 images to {run.path}{'' if run.exists() else ' (new)'}")
    else:
        run = prepare_run(resolved, workspace)
        _commit_checkpoint(run, resolved, table, _Import(method, modules, role, averages, file), say)
    return run


def _take_over(
    file: WeightsFile, experiment: Experiment, role: str, module: nn.Module, say: Say
) -> Mapping[str, Tensor]:
    """Copy the file's weights into the role's module, all or nothing; returns the averages under the module's keys."""
    entry, config = registry.typed_config(experiment.method)
    own = module.state_dict()

    def fitting(key: str, flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found_state, notes = adapted(entry, role, flat, config, own)
        found = differences(own, found_state)
        if found:
            label = f"{file.path}: '{key}'" if key else str(file.path)
            more = f" and {len(found) - 1} more differences" if len(found) > 1 else ""
            raise DataError(
                f"{label} {found[0]}{more}; change the method section, or see all of them with `hpc-gen weights verify`"
            )
        for note in notes:
            say(f"{key or file.path.name}: {note}")
        return found_state

    weights = fitting(file.key, file.weights)
    averages = fitting(file.ema_key, file.averages) if file.ema_key is not None else weights
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(weights[name])
    return averages


def _imported_already(run: RunFolder, file: WeightsFile) -> bool:
    """Whether the run holds this import and nothing else. Raises UserError when it holds anything else."""
    found = read.list_checkpoints(run)
    if not found:
        return False
    newest = found[-1]
    origin = manifest.read(newest.path).facts.get("imported")
    if newest.images_seen == 0 and origin is not None and {**origin, "file": file.path.name} == file.facts:
        return True
    what = f"is at {newest.images_seen} images" if newest.images_seen else "was begun from other weights"
    raise UserError(f"run {run.path} {what}; choose another name with name=..., or remove it")


def _commit_checkpoint(run: RunFolder, resolved: Resolved, table: Table, given: _Import, say: Say) -> None:
    """One attempt of its own: fence, journal, checkpoint at 0 images, as the train stage would write it."""
    number = claim_attempt(run, "import")
    fence, journal = Fence.take(run, number), Journal(run, number, "import")
    code, cause = ExitCode.BUG, "error"
    journal.event("attempt_start", world_size=1, rank=0, host=platform.node(), identity=resolved.identity)
    try:
        size = _write_checkpoint(run, resolved, table, given, fence, journal, say)
        journal.event("import", role=given.role, **given.file.facts)
        journal.event("save_committed", images_seen=0, bytes=size)
        code, cause = ExitCode.DONE, "done"
    except HpcGenError as error:
        code, cause = error.exit_code, str(error)
        raise
    finally:
        journal.event("attempt_end", exit_code=int(code), cause=cause, images_seen=0)
        journal.close()
        fence.release(cause)
    key = given.file.ema_key
    origin = f"from '{key}' of the file" if key is not None else "the weights themselves, for the file has none"
    say(f"{run.path} has one checkpoint at 0 images: {counts(given.modules[given.role])}")
    say(f"averages are {origin}; the optimizer begins afresh")


def _write_checkpoint(
    run: RunFolder, resolved: Resolved, table: Table, given: _Import, fence: Fence, journal: Journal, say: Say
) -> int:
    """Commit the checkpoint; returns its bytes."""
    config = resolved.experiment.train
    assert config is not None  # import_weights
    ranks = Ranks(RankInfo(0, 1, 0, 1, "python"), "gloo", torch.device("cpu"))
    engine = DdpEngine(given.method, given.modules, config, ranks, ranks.device)
    trained = {name: given.modules[name] for name in engine.trained_roles()}
    ema = EmaSet(trained, {name: each.decay for name, each in config.ema.items()})
    with torch.no_grad():
        for average in ema.averages[given.role].values():
            for name, value in average.items():
                value.copy_(given.averages[name])
    state: dict[str, Tensor] = {**engine.state(), **TrainState().tensors()}
    for each in ema.averages:
        state.update({f"ema/{each}/{name}": tensor for name, tensor in ema.tensors(each).items()})
    facts = training_facts(resolved, table, engine.name)
    facts |= {"digest": f"{0:016x}", "imported": given.file.facts}
    chain = CheckpointChain(run, ranks, fence, journal, Retention(config.keep_last, config.keep_every), say)
    chain.sweep()
    return chain.write(0, state, facts)


def export_weights(
    run: RunFolder,
    say: Say,
    *,
    checkpoint: int | None = None,
    ema: str | None = None,
    raw: bool = False,
    role: str | None = None,
    target: Path | None = None,
    dry_run: bool = False,
) -> Path:
    """Write one role's weights as safetensors with the official keys, for other programs and for `weights import`.

    `checkpoint`: images seen, None = the newest. `ema`: the average, None = the experiment's first; `raw`: no average.
    `target` None: exports/ROLE-EMA-IMAGES.safetensors of the run; an earlier export is replaced. The metadata says what
    the weights are and where they come from. Raises UserError for what the run does not have and for a target that is
    another file, CheckpointError for a checkpoint that is not whole.
    """
    if raw and ema is not None:
        raise UserError("--raw and --ema exclude one another; give one")
    resolved = load_run(run)
    experiment = resolved.experiment
    entry, config = registry.typed_config(experiment.method)
    info = read.newest(run) if checkpoint is None else read.at(run, checkpoint)
    chosen = None if raw else _average(experiment, ema)
    table = known_table(experiment, run.workspace)
    method = meta_of(experiment, run.workspace)
    role = chosen_role([name for name in method.roles() if method.parameter_groups(name)], role)
    label = chosen if chosen is not None else "raw"
    path = target if target is not None else run.exports / f"{role}-{label}-{info.images_seen:012d}.safetensors"
    _check_target(path)
    if dry_run:
        say(f"would write role '{role}' ({label}) of {info.path} to {path}")
        return path
    state = read.load_role(info.path, role, chosen)
    own = method.roles()[role].state_dict()
    if found := differences(own, state):
        raise CheckpointError(f"{info.path}: role '{role}' {found[0]}; was the method section changed?")
    tensors, more = entry.export(role, state, config, table) if entry.export is not None else (state, {})
    metadata = {
        "format": "pt",
        "hpc_gen.method": str(experiment.method["name"]),
        "hpc_gen.config": json.dumps(config.model_dump(mode="json"), sort_keys=True),
        "hpc_gen.role": role,
        "hpc_gen.identity": resolved.identity,
        "hpc_gen.checkpoint": read.manifest_sha256(info.path),
        "hpc_gen.images_seen": str(info.images_seen),
        "hpc_gen.ema": label,
        **more,
    }
    begun = clock.monotonic()
    digest = tensor_files.write_tensors(path, tensors, metadata)
    size = format_bytes(path.stat().st_size)
    say(f"{path}: {len(tensors)} tensors, {size}, SHA-256 {digest} ({clock.monotonic() - begun:.1f} s)")
    return path


def _check_target(path: Path) -> None:
    """Raise UserError when a file is there that is no earlier export: it would be lost."""
    if not path.exists():
        return
    try:
        exported = "hpc_gen.checkpoint" in tensor_files.metadata_of(path)
    except (HpcGenError, OSError):
        exported = False
    if not exported:
        raise UserError(
            f"{path} exists and is no earlier export of hpc-gen; move it away, or name another file with --to"
        )


def _average(experiment: Experiment, ema: str | None) -> str | None:
    """The name of the average to export: the one asked for, else the first; None where there is none at all."""
    known = list(experiment.train.ema) if experiment.train is not None else []
    if ema is None:
        return known[0] if known else None
    if ema not in known:
        raise UserError(
            f"experiment '{experiment.name}' has no average '{ema}'{nearest(ema, known)}; it has: "
            f"{', '.join(known) or 'none'}; the weights themselves are had with --raw"
        )
    return ema
