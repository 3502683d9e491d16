"""Making a run folder: resolved config, hashes and a copy of the code, so that a run can be restarted and audited."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import hpc_gen
from hpc_gen.config import loader
from hpc_gen.config.loader import Resolved
from hpc_gen.methods import registry
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.runtime.run_folder import RunFolder

PACKAGES = ("hpc_gen", "shard_tools", "eval_jobs", "slurm")
WEIGHTS_DEPEND_ON = ("seed", "method", "data", "encode", "train")
_SOURCE = Path(hpc_gen.__file__).resolve().parent.parent


def typed(resolved: Resolved) -> Resolved:
    """The experiment with its method section and sampler settings typed by the method (their defaults filled in)."""
    entry = registry.entry(str(resolved.experiment.method["name"]))
    return loader.type_method(resolved, entry.config, entry.settings)


def prepare_run(resolved: Resolved, workspace: Path, name: str | None = None) -> RunFolder:
    """The run folder of an experiment: made when new, checked when it exists.

    An existing run goes on. Changed operation keys (ranks, intervals, stop_at_images) and other settings of sampling
    and evaluation are taken over: samples and metrics carry hashes of their own and refuse to be mixed. Raises
    UserError naming the keys that differ when what the weights depend on is another.
    """
    resolved = typed(resolved)
    run = RunFolder(workspace / "runs" / (name or resolved.experiment.name))
    if not run.exists():
        _create(run, resolved)
        return run
    before = load_run(run)
    if before.identity_of(*WEIGHTS_DEPEND_ON) != resolved.identity_of(*WEIGHTS_DEPEND_ON):
        differences = loader.identity_diff(before, resolved, WEIGHTS_DEPEND_ON)
        changed = [f"{key} ({old!r} -> {new!r})" for key, old, new in differences]
        raise UserError(
            f"run '{run.name}' was made with other settings: {'; '.join(changed[:4])}"
            f"{' and more' if len(changed) > 4 else ''}; choose another name with name=..., or remove {run.path}"
        )
    if (before.identity, before.operation) != (resolved.identity, resolved.operation):
        # two files do not change at once: a kill in between leaves either experiment, and both are accepted
        commit.write_json(run.hashes_path, {**_hashes(before), "becoming": resolved.identity})
        commit.write_text(run.config_path, resolved.to_yaml())
        commit.write_json(run.hashes_path, _hashes(resolved))
    return run


def load_run(run: RunFolder) -> Resolved:
    """The frozen experiment of a run folder. Raises UserError when there is none, DataError when it was changed."""
    if not run.exists():
        raise UserError(f"{run.path} is not a run folder (no config.yaml); give the name or path of a run")
    resolved = typed(loader.load(run.config_path))
    try:
        hashes = json.loads(run.hashes_path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{run.hashes_path} cannot be read ({error}); restore it, or start a new run") from error
    if resolved.identity not in (hashes.get("identity"), hashes.get("becoming")):
        raise DataError(
            f"{run.config_path} no longer has the identity of {run.hashes_path.name}: it was edited after the run "
            "began; undo the edit, or start a new run with another name"
        )
    return resolved


def _hashes(resolved: Resolved) -> dict[str, str]:
    return {"identity": resolved.identity, "operation": resolved.operation, "version": hpc_gen.__version__}


def _create(run: RunFolder, resolved: Resolved) -> None:
    """Everything in a staging folder, then one rename: a run folder is whole or absent."""
    commit.make_folder(run.path.parent)
    staging = commit.staging_path(run.path)
    commit.make_folder(staging)
    freeze_code(staging / "code")
    commit.write_text(staging / run.config_path.name, resolved.to_yaml())
    commit.write_json(staging / run.hashes_path.name, _hashes(resolved))
    commit.make_folder(staging / run.journal.name)
    commit.make_folder(staging / run.logs.name)
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
