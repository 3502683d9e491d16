"""A real train stage with a measuring hook in it: the whole of stages/train.py runs, ranks, journal and fence included.

The parent starts the ranks with `run_ranks`; each rank calls `train_with`, which hands the finished `TrainJob` to the
hook just before the loop begins. The hook may add periodic actions to it, as validation and previews do.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from facts import ROOT

from hpc_gen.config import loader
from hpc_gen.config.loader import Resolved
from hpc_gen.runtime import commit, env, launch
from hpc_gen.runtime.errors import ExitCode
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.runtime.stop import Stop, StopToken
from hpc_gen.stages import run_setup

RANKS = 2
RESULT = "result.json"


def make_run(folder: Path, config: Path, overrides: Sequence[str]) -> Resolved:
    """A run folder without a copy of the code; `folder` is its workspace."""
    resolved = run_setup.typed(loader.load(config, overrides))
    run = run_of(folder)
    commit.make_folder(run.journal)
    commit.make_folder(run.logs)
    commit.write_text(run.config_path, resolved.to_yaml())
    hashes = {"identity": resolved.identity, "operation": resolved.operation, "version": "0"}
    commit.write_json(run.hashes_path, hashes)
    return resolved


def run_of(folder: Path) -> RunFolder:
    """The one run of a benchmark's folder."""
    return RunFolder(folder / "runs" / "bench")


def run_ranks(script: str, folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Run `script` as two ranks of one thread each; what rank 0 wrote by `write_result`. RuntimeError: it failed."""
    path = ":".join(filter(None, [str(Path(__file__).parent), str(ROOT), env.get("PYTHONPATH")]))
    argv = [sys.executable, script, str(folder), json.dumps(dict(settings))]
    lines: list[str] = []
    code = launch.run_ranks(
        argv,
        RANKS,
        env={"PYTHONPATH": path, "HPC_GEN_WORKSPACE": str(folder)},
        log_dir=folder / "logs",
        on_line=lines.append,
        threads=1,
        hold_signals=False,  # nobody lets them through here: Ctrl-C must end the ranks
    )
    if code != ExitCode.DONE:
        logs = "\n".join(log.read_text() for log in sorted((folder / "logs").glob("*.log")))
        raise RuntimeError(f"{script} ended with code {code}:\n{logs}")
    found: dict[str, Any] = json.loads((folder / RESULT).read_text())
    return found


def write_result(folder: Path, content: Mapping[str, Any]) -> None:
    """What the parent is to read (rank 0)."""
    (folder / RESULT).write_text(json.dumps(dict(content)))


def train_with(folder: Path, hook: Callable[[Any], None]) -> None:
    """The train stage of the run below `folder` in this process; `hook(job)` comes between preparation and loop."""
    from hpc_gen.stages.train import run_train
    from hpc_gen.training import loop

    run, original = run_of(folder), loop.train

    def train(job: loop.TrainJob) -> Stop | None:
        hook(job)
        return original(job)

    loop.train = train
    try:
        code = run_train(run, run_setup.load_run(run), folder, StopToken(run))
    finally:
        loop.train = original
    assert code is ExitCode.DONE, code
