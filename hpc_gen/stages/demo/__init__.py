"""`hpc-gen demo [NAME]`: real images to a report on this machine, with interruptions and proofs on the way."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path

from hpc_gen.runtime.errors import ExitCode, UserError, nearest
from hpc_gen.stages.demo import latents, pixels, snippets
from hpc_gen.stages.demo.steps import Demo, config_file

# name -> (its experiment below job_configs/demo, what runs it)
DEMOS: dict[str, tuple[str, Callable[[Demo], None]]] = {
    "pixels": (pixels.FILE, pixels.run),
    "latents": (latents.FILE, latents.run),
    "gmem": (snippets.FILE, snippets.run),
}


def config_of(name: str) -> Path:
    """The experiment of a demo. Raises UserError for an unknown name."""
    if name not in DEMOS:
        raise UserError(f"there is no demo '{name}'{nearest(name, DEMOS)}; there are: {', '.join(DEMOS)}")
    return config_file(DEMOS[name][0])


def run_demo(name: str, workspace: Path, printer: Callable[[str], None]) -> int:
    """A whole demo; returns an exit code. Raises HpcGenError."""
    config_of(name)
    workspace.mkdir(parents=True, exist_ok=True)
    # SIGTERM ends a program at once by default, and its children would go on; as an exception it reaches those who wait
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    DEMOS[name][1](Demo(workspace.resolve(), printer))
    return ExitCode.DONE
