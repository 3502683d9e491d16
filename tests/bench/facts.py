"""On what a benchmark ran: processor, memory, versions, commit. Read at the time, never guessed."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def processor() -> str:
    """Model name by /proc/cpuinfo."""
    for line in _lines("/proc/cpuinfo"):
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def memory_gib() -> float:
    """Memory of the machine by /proc/meminfo; 0 where that is missing."""
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) / 2**20
    return 0.0


def versions() -> str:
    """Of Python and of the packages that the numbers depend on."""
    import numpy
    import torch

    return f"Python {platform.python_version()}, torch {torch.__version__}, numpy {numpy.__version__}"


def commit() -> str:
    """The commit of the source tree, with a mark when it was changed since; "unknown" outside git."""
    try:
        name = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", "hpc_gen", "shard_tools", "eval_jobs", "tests/bench")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name} with uncommitted changes" if changed else name


def load() -> str:
    """How busy the machine is besides: 1 and 5 minute averages of runnable processes."""
    one, five, _ = os.getloadavg()
    return f"{one:.1f} over 1 minute, {five:.1f} over 5"


def hardware() -> list[tuple[str, str]]:
    """What stands at the head of a page of results."""
    cores = len(os.sched_getaffinity(0))
    return [
        ("processor", f"{processor()}, {cores} cores usable"),
        ("memory", f"{memory_gib():.0f} GiB"),
        ("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        ("versions", versions()),
        ("commit", commit()),
    ]


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
