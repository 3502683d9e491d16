"""Making a run folder: resolved config, hashes and a copy of the code, so that a run can be restarted and audited."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hpc_gen
from hpc_gen.config import loader
from hpc_gen.config.loader import Resolved
from hpc_gen.methods import registry
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import control, origin, outline, reference_size

PACKAGES = ("hpc_gen", "shard_tools", "eval_jobs", "slurm")
WEIGHTS_DEPEND_ON = ("seed", "method", "data", "encode", "train")
TRAINING_SECTIONS = ("seed", "method", "data", "train")  # what a checkpoint's numbers depend on
EXTENDABLE = ("train.total_images",)
"""Keys of the identity that a run may change in place, because no number computed so far depends on them."""
EXTENDED = "extended"  # key of hashes.json
_SOURCE = Path(hpc_gen.__file__).resolve().parent.parent


def typed(resolved: Resolved) -> Resolved:
    """The experiment with its method section and sampler settings typed by the method (their defaults filled in)."""
    entry = registry.entry(str(resolved.experiment.method["name"]))
    return loader.type_method(resolved, entry.config, entry.settings)


def prepare_run(resolved: Resolved, workspace: Path, name: str | None = None) -> RunFolder:
    """The run folder of an experiment: made when new, checked when it exists.

    An existing run goes on. Changed operation keys (ranks, intervals, stop_at_images) and other settings of sampling
    and evaluation are taken over: samples and metrics carry hashes of their own and refuse to be mixed. So is a longer
    training where no number computed so far depends on its length, and anything while there is nothing that depends on
    it. Raises UserError naming the keys that differ when what the weights depend on is another.
    """
    run = RunFolder(workspace / "runs" / (name or resolved.experiment.name))
    resolved = accepted(run, typed(resolved), workspace)
    if run.exists():
        _take_over(run, resolved)
    else:
        create_run(run, resolved)
    return run


def changed(run: RunFolder, overrides: Sequence[str]) -> Resolved:
    """The experiment of a run with keys replaced. Raises UserError as `prepare_run` does; nothing is written."""
    before = load_run(run)
    if not overrides:
        return before
    resolved = typed(loader.load(run.config_path, overrides))
    if resolved.experiment.name != before.experiment.name:
        raise UserError(f"a run keeps its name; `hpc-gen fork {run.name} --at latest --name NEW` begins another")
    return accepted(run, resolved, run.workspace)


def change_run(run: RunFolder, overrides: Sequence[str]) -> None:
    """Replace keys of a run as `changed` says."""
    _take_over(run, changed(run, overrides))


def accepted(run: RunFolder, resolved: Resolved, workspace: Path) -> Resolved:
    """A typed experiment as the run would have it, its first weights pinned; refused where an existing run cannot."""
    reference_size.check(resolved.experiment, workspace)
    if not run.exists():
        return origin.pinned(resolved, workspace)
    before = load_run(run)
    resolved = origin.pinned(resolved, workspace, before)
    differences = loader.identity_diff(before, resolved, WEIGHTS_DEPEND_ON)
    if differences and _is_extension(differences):
        _check_extension(run, before, resolved)
    elif differences and not _replaceable(run):
        begun = _entries(run.checkpoints)
        fork = f", go on from its weights with `hpc-gen fork {run.name}`" if begun else ""
        raise UserError(
            f"run '{run.name}' was made with other settings: {_named(differences)}; choose another name with "
            f"name=...{fork}, or remove {run.path}"
        )
    return _with_own_tag(run, before, resolved)


def notes(run: RunFolder, resolved: Resolved) -> list[str]:
    """What an experiment that `accepted` has let pass will change in an existing run and its user should know."""
    if not run.exists():
        return []
    before, told = load_run(run), []
    differences = loader.identity_diff(before, resolved, WEIGHTS_DEPEND_ON)
    if differences and not _is_extension(differences):
        told.append(
            f"run '{run.name}' has no checkpoint yet, so its experiment is replaced in place: {_named(differences)}"
        )
    old, new = before.experiment.sample, resolved.experiment.sample
    if old is not None and new is not None and new.tag == _own_tag(before, resolved, old.tag) != old.tag:
        told.append(
            f"samples/{old.tag} is of another checkpoint and stays; the new samples and metrics get the tag '{new.tag}'"
        )
    return told


def _named(differences: Sequence[tuple[str, Any, Any]]) -> str:
    named = [f"{key} ({old!r} -> {new!r})" for key, old, new in differences]
    return f"{'; '.join(named[:4])}{' and more' if len(named) > 4 else ''}"


def _is_extension(differences: Sequence[tuple[str, Any, Any]]) -> bool:
    return {key for key, _, _ in differences} <= set(EXTENDABLE)


def _replaceable(run: RunFolder) -> bool:
    """Whether nothing in the run depends on its experiment, and nobody is at work on it.

    Tables do not count: each has its own recipe, and units theirs in their fingerprint. The rows of attempts that saved
    nothing are undone by the fresh start (`journal.history`).
    """
    folders = (run.checkpoints, run.exports, run.path / "samples", run.path / "features", run.path / "metrics")
    return not any(_entries(folder) for folder in folders) and control.holder(run) is None


def _entries(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []


def _own_tag(before: Resolved, resolved: Resolved, tag: str) -> str:
    """The tag of the samples at the new end of training: TAG-IMAGES, TAG being without the former end."""
    old, new = before.experiment.train, resolved.experiment.train
    return tag if old is None or new is None else f"{tag.removesuffix(f'-{old.end_images}')}-{new.end_images}"


def _with_own_tag(run: RunFolder, before: Resolved, resolved: Resolved) -> Resolved:
    """The experiment with another tag for its samples, where it trains on past the checkpoint of those that are there.

    Images of two checkpoints never share a folder, and the sample stage would refuse it after the training. The same
    command again finds the tag that it got the first time.
    """
    sample, old, new = resolved.experiment.sample, before.experiment, resolved.experiment.train
    if sample is None or sample.checkpoint != "latest" or old.train is None or new is None:
        return resolved
    tag = _own_tag(before, resolved, sample.tag)
    again = old.sample is not None and old.sample.tag == tag and old.train.end_images == new.end_images
    if not again and (new.end_images <= old.train.end_images or not _entries(run.samples(sample.tag))):
        return resolved
    changes = {"sample.tag": tag}
    if resolved.experiment.evaluate is not None:
        changes["evaluate.tag"] = tag
    return typed(loader.with_changes(resolved, changes))


def _take_over(run: RunFolder, resolved: Resolved) -> None:
    """Give an existing run an experiment that `accepted` has let pass."""
    before = load_run(run)
    for line in notes(run, resolved):
        print(line, flush=True)
    differences = loader.identity_diff(before, resolved, WEIGHTS_DEPEND_ON)
    if (before.identity, before.operation) != (resolved.identity, resolved.operation):
        facts = {key: value for key, value in facts_of(run).items() if key != "becoming"}
        if differences and _is_extension(differences):
            step = {"training_identity": training_identity(before), "changed": [list(each) for each in differences]}
            facts = {**facts, EXTENDED: [*facts.get(EXTENDED, ()), step]}
        # two files do not change at once: a kill in between leaves either experiment, and both are accepted
        commit.write_json(run.hashes_path, {**facts, **_hashes(before), "becoming": resolved.identity})
        commit.write_text(run.config_path, resolved.to_yaml())
        commit.write_json(run.hashes_path, {**facts, **_hashes(resolved)})


def _check_extension(run: RunFolder, before: Resolved, resolved: Resolved) -> None:
    """Refuse a new length of training on which numbers computed already would depend."""
    old, new = before.experiment.train, resolved.experiment.train
    assert old is not None and new is not None  # a key of theirs differs
    if old.schedule.kind != "constant":
        raise UserError(
            f"run '{run.name}' cannot be extended in place: its learning rate follows a {old.schedule.kind} that ends "
            f"at train.total_images = {old.total_images}, so a run of {new.total_images} has other numbers from the "
            f"start; `hpc-gen fork {run.name} --at latest --name NEW train.total_images={new.total_images}` goes on "
            "from its weights"
        )
    if new.total_images < old.total_images:
        raise UserError(
            f"run '{run.name}' cannot be shortened from train.total_images = {old.total_images} to "
            f"{new.total_images}; train.stop_at_images={new.total_images} ends it there"
        )


def training_identity(resolved: Resolved) -> str:
    """Hash of what the numbers of a checkpoint depend on."""
    return resolved.identity_of(*TRAINING_SECTIONS)


def extensions(run: RunFolder) -> dict[str, list[list[Any]]]:
    """Training identities that this run had before it was extended, each with the change: [[key, old, new], ...]."""
    return {str(step["training_identity"]): step["changed"] for step in facts_of(run).get(EXTENDED, ())}


def load_run(run: RunFolder) -> Resolved:
    """The frozen experiment of a run folder. Raises UserError when there is none, DataError when it was changed."""
    if not run.exists():
        raise UserError(f"{run.path} is not a run folder (no config.yaml); give the name or path of a run")
    resolved = typed(loader.load(run.config_path))
    while True:
        hashes = facts_of(run)
        if resolved.identity in (hashes.get("identity"), hashes.get("becoming")):
            return resolved
        again = typed(loader.load(run.config_path))
        if again.identity == resolved.identity:
            raise DataError(
                f"{run.config_path} no longer has the identity of {run.hashes_path.name}: it was edited after the run "
                "began; undo the edit, or start a new run with another name"
            )
        resolved = again  # both files changed between the two looks: a sweep's new grid, a longer training


def facts_of(run: RunFolder) -> dict[str, Any]:
    """The content of hashes.json. Raises DataError when it cannot be read."""
    try:
        return dict(json.loads(run.hashes_path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{run.hashes_path} cannot be read ({error}); restore it, or start a new run") from error


def _hashes(resolved: Resolved) -> dict[str, Any]:
    hashes = {"identity": resolved.identity, "operation": resolved.operation, "version": hpc_gen.__version__}
    return {**hashes, "stages": outline.to_json(resolved.experiment)}


def create_run(
    run: RunFolder,
    resolved: Resolved,
    facts: Mapping[str, Any] | None = None,
    fill: Callable[[Path], None] | None = None,
) -> None:
    """Everything in a staging folder, then one rename: a run folder is whole or absent.

    `facts` go into hashes.json; `fill` puts more into the staging folder, through runtime.commit.
    """
    commit.make_folder(run.path.parent)
    staging = commit.staging_path(run.path)
    commit.make_folder(staging)
    freeze_code(staging / "code")
    commit.write_text(staging / run.config_path.name, resolved.to_yaml())
    commit.write_json(staging / run.hashes_path.name, {**(facts or {}), **_hashes(resolved)})
    commit.make_folder(staging / run.journal.name)
    commit.make_folder(staging / run.logs.name)
    if fill is not None:
        fill(staging)
    commit.commit_directory(staging, run.path)


def freeze_code(target: Path) -> None:
    """Copy the packages that attempts import; a source tree edited later does not change a run half-way."""
    for package in PACKAGES:
        source = _SOURCE / package
        if not source.is_dir():
            continue
        for path in sorted(source.rglob("*")):
            relative = path.relative_to(source)
            hidden = any(part == "__pycache__" or part.startswith(".") for part in relative.parts)
            if path.is_dir() or hidden or path.suffix in (".pyc", ".so"):
                continue
            copy = target / package / relative
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
            commit.sync_file(copy)
