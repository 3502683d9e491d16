"""The only reader of the process environment; a test replaces one dictionary."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

WORKSPACE = "HPC_GEN_WORKSPACE"


def get(name: str, default: str | None = None) -> str | None:
    """Value of an environment variable; one that is set but empty counts as absent."""
    return os.environ.get(name) or default


def set_default(name: str, value: str) -> None:
    """Set a variable that a library of this process will read, unless the user has set it."""
    os.environ.setdefault(name, value)


def workspace() -> Path:
    """Folder of runs, tables and downloads: $HPC_GEN_WORKSPACE, else the current folder (absolute)."""
    return Path(os.path.abspath(get(WORKSPACE) or os.getcwd()))


def user_name() -> str:
    """Name of the user of this process; its number where the system has no name for it."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def snapshot() -> dict[str, str]:
    """A copy of the whole environment; changing it changes nothing else."""
    return dict(os.environ)


def child_environment(**extra: object) -> dict[str, str]:
    """Environment for a child process: this one's plus `extra`; a value of None removes the variable."""
    environment = snapshot()
    for name, value in extra.items():
        if value is None:
            environment.pop(name, None)
        else:
            environment[name] = str(value)
    return environment
