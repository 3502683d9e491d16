"""hpc-gen: train, resume, sample and score image generators on preemptible Slurm clusters.

As a library: `run = hpc_gen.load("demo-mnist16")`, then `run.generate(16)`, `run.metrics()`, `run.history()` (api.py).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpc_gen.api import Run, grid, load

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "grid", "load"]


def __getattr__(name: str) -> Any:
    """The library, imported when it is first used: the rooms below import this package, and so does `--help`."""
    if name in ("Run", "grid", "load"):
        return getattr(importlib.import_module("hpc_gen.api"), name)
    raise AttributeError(f"module 'hpc_gen' has no attribute '{name}'; it has: {', '.join(__all__)}")
