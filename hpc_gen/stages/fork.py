"""A new run that starts from a checkpoint of another: `hpc-gen fork`.

Weights, averages, optimizer, clock and draws go on where the parent was; the config is the parent's with changes. The
tensor files are copied as they are, only what the manifest says of the checkpoint is new: its identity is that of the
fork, and `forked` tells whose child it is. Nothing of the parent is touched, and later the child needs nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpc_gen.config import loader
from hpc_gen.config.describe import show
from hpc_gen.config.loader import Resolved
from hpc_gen.data.table import Table
from hpc_gen.methods.protocol import Method
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import CheckpointError, UserError
from hpc_gen.runtime.progress import format_bytes
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import forecast
from hpc_gen.stages.build import check_columns, meta_method, open_table, table_facts
from hpc_gen.stages.compare import Difference, differences
from hpc_gen.stages.origin import init_from, pinned
from hpc_gen.stages.parent import FORKED, fork_line
from hpc_gen.stages.periodic import cuts_at
from hpc_gen.stages.run_setup import create_run, load_run, training_identity, typed
from hpc_gen.stages.weights import Say
from hpc_gen.training.checkpoint import manifest, read, storage
from hpc_gen.training.checkpoint.read import CheckpointInfo

_CHUNK = 1 << 24


def fork(
    run: RunFolder,
    name: str,
    overrides: Sequence[str],
    say: Say,
    *,
    at: int | None = None,
    dry_run: bool = False,
) -> RunFolder:
    """Make the run `name` beside `run`, from its checkpoint `at` (None: the newest), with keys replaced.

    Raises UserError for a name that is taken and for a changed key that the checkpoint cannot carry, naming it,
    CheckpointError when the checkpoint is not there or not whole.
    """
    parent = load_run(run)
    info = read.newest(run) if at is None else read.at(run, at)
    resolved = pinned(_changed(run, name, overrides), run.workspace, parent)
    child = RunFolder(run.path.parent / resolved.experiment.name)
    if child.exists():
        raise UserError(f"run {child.path} exists already; choose another name, or remove it")
    if found := read.verify(info.path):
        raise CheckpointError(f"{info.path} is not whole: {found[0]}; fork from another one with --at")
    changed = [each for each in differences(parent, resolved) if each.key != "name"]
    table = _check_carried(info, parent, resolved, changed, run.workspace)
    origin = {
        "run": run.name,
        "identity": parent.identity,
        "manifest_sha256": read.manifest_sha256(info.path),
        "images_seen": info.images_seen,
        "changed": [each.key for each in changed],
    }
    _tell(child, origin, changed, manifest.read(info.path).facts, table, say)
    _tell_rest(resolved, info, say)
    need = forecast.Need(info.bytes, info.world_size + forecast.FILES_PER_CHECKPOINT)
    forecast.check("fork", need, child.path, resolved.experiment.data.forecast, say)
    if dry_run:
        say(f"would copy {info.path} ({format_bytes(info.bytes)}) to {child.path} (new)")
        return child
    told = {**origin, "cut_short": cuts_at(run, info.images_seen)}
    facts = {"identity": training_identity(resolved), "table": table.identity, "forked": told}
    create_run(child, resolved, {FORKED: origin}, lambda staging: _copy(info, staging, facts))
    say(f"{child.path} goes on from {info.images_seen:,} images: `hpc-gen resume {child.name}`")
    return child


def _changed(run: RunFolder, name: str, overrides: Sequence[str]) -> Resolved:
    named = [text for text in overrides if text.partition("=")[0].strip() == "name"]
    if named:
        raise UserError(f"'{named[0]}' and --name exclude one another; the name of the fork is given with --name")
    return typed(loader.load(run.config_path, [*overrides, f'name="{name}"']))


def _tell(
    child: RunFolder,
    origin: Mapping[str, Any],
    changed: Sequence[Difference],
    parents: Mapping[str, Any],
    table: Table,
    say: Say,
) -> None:
    """Whose child it is, and which changes change numbers."""
    say(f"fork        {child.name} of {fork_line({**origin, 'changed': None}).removesuffix('; changed: nothing')}")
    for each in changed:
        what = "changes numbers" if each.identity else "operation only"
        say(f"changed     {each.key} = {show(each.second)} (was {show(each.first)}): {what}")
    if parents.get("table") != table.identity:
        said = f"{table.identity[:12]} (was {str(parents.get('table'))[:12]})"
        say(f"changed     content of the table {table.folder.name}, {said}: changes numbers")
    elif not any(each.identity for each in changed):
        say("changed     nothing that changes numbers: the fork goes on bit for bit as its parent would")


def _tell_rest(resolved: Resolved, info: CheckpointInfo, say: Say) -> None:
    train = resolved.experiment.train
    assert train is not None  # _check_carried
    if train.end_images <= info.images_seen:
        key = "train.stop_at_images" if train.stop_at_images is not None else "train.total_images"
        say(f"training    nothing is left: {key} = {train.end_images}; raise it to train on")
    else:
        say(f"training    from {info.images_seen:,} to {train.end_images:,} images")


def _copy(info: CheckpointInfo, staging: Path, facts: Mapping[str, Any]) -> None:
    """The checkpoint below the staging folder of a new run: its files byte for byte, a manifest with new facts."""
    content = manifest.read(info.path)
    folder = commit.make_folder(staging / "checkpoints" / info.path.name)
    for name, expected in content.files.items():
        try:
            source = (info.path / name).open("rb")
        except FileNotFoundError as error:  # a parent at work retires its older checkpoints
            raise CheckpointError(f"{info.path} was removed while it was copied; fork from another one") from error
        with source, commit.CommitStream(folder / name) as stream:
            while chunk := source.read(_CHUNK):
                stream.write(chunk)
        if stream.sha256 != expected["sha256"]:
            raise CheckpointError(f"{info.path / name} changed while it was copied; fork again")
    told = manifest.Manifest(content.images_seen, content.world_size, content.files, {**content.facts, **facts})
    commit.write_json(folder / manifest.NAME, told.to_json())


# ---------------------------------------------------------------- what a checkpoint can carry


def _check_carried(
    info: CheckpointInfo, parent: Resolved, resolved: Resolved, changed: Sequence[Difference], workspace: Path
) -> Table:
    """Refuse a change with which the checkpoint could not go on, naming the key; returns the fork's table."""
    experiment, train = resolved.experiment, resolved.experiment.train
    if train is None:
        raise UserError(f"experiment '{experiment.name}' has no 'train' section, so there is nothing to fork")
    if init_from(parent) != init_from(resolved):
        raise UserError(
            "'train.init_from' is for runs without a checkpoint, a fork has one; begin a new run with `hpc-gen run`"
        )
    if info.images_seen % train.global_batch:
        raise UserError(
            f"'train.global_batch' = {train.global_batch} does not divide the {info.images_seen} images of the "
            "checkpoint, so its clock would stand between two steps; choose another, or another --at"
        )
    if train.total_images < info.images_seen:
        raise UserError(
            f"'train.total_images' = {train.total_images} lies before the checkpoint at {info.images_seen} images; "
            "raise it, or fork at an earlier one"
        )
    if not (workspace / experiment.data.table).is_dir():
        raise UserError(
            f"'data.table' = '{experiment.data.table}' is not there yet, and a checkpoint says which table it belongs "
            "to; encode it first with `hpc-gen run CONFIG --stages encode`"
        )
    table = open_table(workspace, experiment.data.table, experiment)
    method = meta_method(experiment, table_facts(table))
    check_columns(method, table)
    misfit = _misfit(method, storage.keys(info.path), list(train.ema))
    if misfit is not None:
        what, sections = misfit
        keys = [
            f"{each.key} ({show(each.first)} -> {show(each.second)})"
            for each in changed
            if each.key.startswith(sections)
        ]
        raise UserError(
            f"the checkpoint at {info.images_seen} images cannot carry the change of "
            f"{', '.join(keys) or 'the table or of the code'}: {what}; leave it, or begin from the weights alone with "
            "train.init_from"
        )
    return table


def _misfit(
    method: Method, entries: Mapping[str, tuple[torch.dtype, torch.Size]], averages: Sequence[str]
) -> tuple[str, tuple[str, ...]] | None:
    """What training would miss or not know in the checkpoint, and the keys that decide it; None = nothing."""
    roles = method.roles()
    wanted: dict[str, torch.Size] = {}
    known: set[str] = set()
    for role, module in roles.items():
        wanted |= {f"model/{role}/{name}": value.shape for name, value in module.state_dict().items()}
        if method.parameter_groups(role):
            known |= _optimizer_names(role, module)
    for name, shape in wanted.items():
        if name not in entries:
            return f"it has no '{name}' {list(shape)}", ("method.", "data.")
        if entries[name][1] != shape:
            return f"it has '{name}' as {list(entries[name][1])}, which would be {list(shape)}", ("method.", "data.")
    for name in entries:
        if name.startswith("model/") and name not in wanted:
            return f"nothing would take its '{name}'", ("method.", "data.")
        if name.startswith("optim/") and name not in known:
            return f"nothing would take its '{name}'", ("method.",)
    for average in averages:
        for role, module in roles.items():
            parameters = module.named_parameters() if method.parameter_groups(role) else ()
            lacking = [name for name, _ in parameters if f"ema/{role}/{average}/{name}" not in entries]
            if lacking:
                return f"it has no average '{average}' of role '{role}'", (f"train.ema.{average}",)
    return None


def _optimizer_names(role: str, module: nn.Module) -> set[str]:
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    return {f"optim/{role}/{name}/{kind}" for name in names for kind in ("exp_avg", "exp_avg_sq", "step")}
