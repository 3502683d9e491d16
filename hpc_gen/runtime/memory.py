"""The most memory that this process has held."""

from __future__ import annotations

import re
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_host_bytes() -> int | None:
    """Largest resident size of this process so far, in bytes; None where the system does not tell (not Linux).

    Not getrusage: its value is inherited from the parent at fork and survives exec.
    """
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found is not None else None
