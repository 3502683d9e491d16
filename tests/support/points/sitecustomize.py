"""Holds a task of a Slurm job at a named point until a SIGTERM has really reached it, or lets a unit fail once.

Python loads this file at its start when this folder is on PYTHONPATH; the profile of tests/support/scenes.py puts it there,
so the code under test is what users run. It patches modules as they are imported and does nothing outside a job step.

HPC_GEN_TEST_POINTS   names separated by commas: the first is for the first start of the job, the second for the second ...
HPC_GEN_TEST_FAIL     STAGE:TASK, which is killed once
HPC_GEN_TEST_MARKS    folder for files that tell who reached what: POINT.JOB.RESTART.RANK.(reached|told), failed.STAGE.TASK
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

LIMIT_S = 240.0  # a machine may be busy; a point that nobody preempts is a mistake of the test
_noticed = False
_real_signal = signal.signal


def _variable(name: str, default: str = "") -> str:
    return os.environ.get(name) or default


def _start() -> tuple[str, str, str]:
    """Job, start of the job, rank or task."""
    array, element = _variable("SLURM_ARRAY_JOB_ID"), _variable("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{element}" if array else _variable("SLURM_JOB_ID")
    return job, _variable("SLURM_RESTART_COUNT", "0"), _variable("SLURM_PROCID", "0")


def _mark(name: str) -> None:
    path = os.path.join(_variable("HPC_GEN_TEST_MARKS"), name)
    with open(path, "w") as stream:
        stream.write(f"{time.time()}\n")


def _noting(number: int, handler: Any) -> Any:
    """signal.signal, whose handlers also tell that a SIGTERM has come."""
    if number != signal.SIGTERM or not callable(handler):
        return _real_signal(number, handler)

    def note(got: int, frame: Any) -> None:
        global _noticed
        _noticed = True
        handler(got, frame)

    return _real_signal(number, note)


def pause(point: str) -> None:
    """Stay here until SIGTERM is there, handled already or held back by the mask, or the test makes the file `release`."""
    name = ".".join([point, *_start()])
    _mark(f"{name}.reached")
    due = time.monotonic() + LIMIT_S
    release = os.path.join(_variable("HPC_GEN_TEST_MARKS"), "release")
    while not _noticed and signal.SIGTERM not in signal.sigpending() and not os.path.exists(release):
        if time.monotonic() > due:
            print(f"point {point}: no SIGTERM within {LIMIT_S:g} s", file=sys.stderr, flush=True)
            os._exit(99)
        time.sleep(0.005)
    _mark(f"{name}.told")


# ---------------------------------------------------------------- points


def _before(
    module: ModuleType, owner: str | None, function: str, point: str, ranks: Sequence[int] | None, at: int
) -> None:
    """Pause in front of call number `at` (from 1) of a function, on the ranks named; None: on all."""
    holder = module if owner is None else getattr(module, owner)
    real, calls = getattr(holder, function), [0]

    def held(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == at and (ranks is None or int(_start()[2]) in ranks):
            pause(point)
        return real(*args, **kwargs)

    setattr(holder, function, held)


def _before_rename(module: ModuleType, point: str) -> None:
    """Pause in front of the rename that makes a checkpoint visible."""
    real = module.ops.rename
    done = [False]

    def held(source: Any, target: Any) -> None:
        if (
            not done[0]
            and os.path.basename(os.path.dirname(target)) == "checkpoints"
            and os.path.basename(target).isdigit()
        ):
            done[0] = True
            pause(point)
        real(source, target)

    module.ops.rename = held


def _slow(module: ModuleType) -> None:
    """Every step takes more than a second on rank 0, so the others wait for it."""
    real = module._step_all_turns

    def slowly(*args: Any, **kwargs: Any) -> Any:
        if _start()[2] == "0":
            time.sleep(1.5)
        return real(*args, **kwargs)

    module._step_all_turns = slowly


def _hang(module: ModuleType) -> None:
    """Rank 1 does not come to its fifth step, whatever it is told."""
    real, calls = module._step_all_turns, [0]

    def hanging(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 5 and _start()[2] == "1":
            _mark(".".join(["hang", *_start(), "reached"]))
            while True:
                time.sleep(1.0)
        return real(*args, **kwargs)

    module._step_all_turns = hanging


def _ill(module: ModuleType) -> None:
    """The health probe finds that the node of rank 1 is ill. Only the first task of a node looks."""
    real = module.check_memory

    def checked(*args: Any) -> list[str]:
        return [*real(*args), *(["its memory is gone"] if _start()[2] == "1" else [])]

    module.check_memory = checked


POINTS: dict[str, tuple[str, Callable[[ModuleType], None]]] = {
    "rendezvous": ("torch.distributed", lambda m: _before(m, None, "init_process_group", "rendezvous", [1], 1)),
    "load": (
        "hpc_gen.training.checkpoint.chain",
        lambda m: _before(m, "CheckpointChain", "load_newest", "load", None, 1),
    ),
    "first_step": ("hpc_gen.training.loop", lambda m: _before(m, None, "_step_all_turns", "first_step", [0], 1)),
    "step": ("hpc_gen.training.loop", lambda m: _before(m, None, "_step_all_turns", "step", [0], 5)),
    "agreement": ("hpc_gen.runtime.ranks", lambda m: _before(m, "Ranks", "all_reduce_max_cpu", "agreement", [1], 4)),
    "save": ("hpc_gen.training.checkpoint.storage", lambda m: _before(m, None, "save", "save", [0], 1)),
    "rename": ("hpc_gen.runtime.commit", lambda m: _before_rename(m, "rename")),
    "evaluation": ("hpc_gen.training.validation", lambda m: _before(m, None, "validate", "evaluation", [0], 1)),
    "last_barrier": ("hpc_gen.runtime.ranks", lambda m: _before(m, "Ranks", "stop", "last_barrier", None, 1)),
    "slow": ("hpc_gen.training.loop", _slow),
    "hang": ("hpc_gen.training.loop", _hang),
    "ill": ("slurm.probe", _ill),
    "sampling": ("hpc_gen.sampling.generate", lambda m: _before(m, None, "generate_block", "sampling", None, 1)),
}
AT_ONCE = ("before_import", "in_import")


def _fail_once(module: ModuleType) -> None:
    """The task of HPC_GEN_TEST_FAIL is killed once, when it begins with its units (others may take them over)."""
    stage, _, task = _variable("HPC_GEN_TEST_FAIL").partition(":")
    real = module._do_units

    def failing(run: Any, context: Any, *rest: Any) -> Any:
        name = f"failed.{context.stage}.{context.task}"
        if (context.stage, str(context.task)) == (stage, task) and not os.path.exists(
            os.path.join(_variable("HPC_GEN_TEST_MARKS"), name)
        ):
            _mark(name)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(run, context, *rest)

    module._do_units = failing


class _Patching(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds nothing itself: lets the others find a module and patches it once it is executed."""

    def __init__(self, patches: dict[str, list[Callable[[ModuleType], None]]]) -> None:
        self._patches = patches
        self._loader: Any = None

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._patches:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return None
        patches, loader = self._patches.pop(fullname), spec.loader
        execute = loader.exec_module

        def executed(module: ModuleType) -> None:
            execute(module)
            for patch in patches:
                patch(module)

        loader.exec_module = executed  # type: ignore[method-assign]
        return spec


def _install() -> None:
    points = _variable("HPC_GEN_TEST_POINTS").split(",")
    restart = int(_start()[1])
    point = points[restart] if restart < len(points) else ""
    patches: dict[str, list[Callable[[ModuleType], None]]] = {}
    if point in POINTS:
        module, patch = POINTS[point]
        patches.setdefault(module, []).append(patch)
    if point == "in_import":
        patches.setdefault("torch.nn", []).append(lambda module: pause("in_import"))
    if _variable("HPC_GEN_TEST_FAIL"):
        patches.setdefault("hpc_gen.stages.runner", []).append(_fail_once)
    if point not in ("", *POINTS, *AT_ONCE):
        raise SystemExit(f"no point {point!r}")
    signal.signal = _noting  # type: ignore[assignment]
    sys.meta_path.insert(0, _Patching(patches))
    if point == "before_import":
        pause(point)


# the tasks of a step only; submitit's process is the one that has this variable and no parent of ours
if _variable("SLURM_STEP_ID") and _variable("HPC_GEN_TEST_MARKS"):
    _install()
