"""The health probe at the start of a job: an ill node is left before it costs hours, not after.

Each task looks at its own node: the run folder can be written and read and its clock is ours, there is memory, the GPUs
that were asked for are there, free, and compute. What it finds are sentences; with any of them the attempt ends with
ExitCode.REQUEUE_ELSEWHERE, and the batch body excludes the node and requeues (slurm/task.py). It takes at most
`LIMIT_S` beyond the import of torch: a file system or driver that does not answer by then is ill, too.
"""

from __future__ import annotations

import re
import secrets
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from hpc_gen.runtime import clock, commit
from hpc_gen.runtime.errors import HpcGenError
from hpc_gen.runtime.run_folder import RunFolder

LIMIT_S = 5.0  # for all checks together
FILE_BYTES = 1 << 20  # written to the run folder and read back
MAX_SKEW_S = 30.0  # between this node's clock and the file system's; the journal is merged by these times
MIN_MEMORY_BYTES = 1 << 30  # that may still be used on the node, and below the memory limit of the job
MIN_FREE_GPU = 0.9  # share of a GPU's memory that nobody else holds

Check = Callable[[], list[str]]


def probe(run: RunFolder, gpus: int, limit_s: float = LIMIT_S) -> list[str]:
    """What is wrong with this node, one sentence each; empty: nothing was found.

    `gpus`: how many this process must see; 0: none is looked for. Checks that have not answered after `limit_s` are
    failures. Changes nothing but a file of its own in the run folder, which it removes.
    """
    if gpus > 0:
        import torch  # noqa: F401 - its import is no part of the limit: the training needs it anyway
    checks: dict[str, Check] = {"the file system": lambda: check_files(run.path), "memory": check_memory}
    if gpus > 0:
        checks["the GPU driver"] = lambda: check_gpus(gpus)
    host = socket.gethostname()
    return [f"node {host}: {sentence}" for sentence in _within(limit_s, checks)]


def _within(limit_s: float, checks: dict[str, Check]) -> list[str]:
    """Run the checks side by side; one that hangs is left behind in its daemon thread, and told."""
    found: dict[str, list[str]] = {}

    def run(name: str, check: Check) -> None:
        try:
            found[name] = check()
        except Exception as error:  # whatever keeps a check from its answer is what it was to find
            found[name] = [f"{name} fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"]

    threads = {name: threading.Thread(target=run, args=(name, checks[name]), daemon=True) for name in checks}
    for thread in threads.values():
        thread.start()
    due = clock.monotonic() + limit_s
    for thread in threads.values():
        thread.join(max(0.0, due - clock.monotonic()))
    late = {name: [f"{name} did not answer within {limit_s:g} s"] for name in threads}
    return [sentence for name in checks for sentence in found.get(name, late[name])]


def check_files(folder: Path, size: int = FILE_BYTES) -> list[str]:
    """Write a file durably, read it back, and compare the file system's clock with ours."""
    path = commit.staging_path(folder / "probe")  # a name that `commit.sweep` removes, should we be killed
    content = secrets.token_bytes(size)
    before = clock.now()
    try:
        commit.write_bytes(path, content)
        after = clock.now()
        wrong = [] if path.read_bytes() == content else [f"what was written to {folder} is not what is read back"]
        written = path.stat().st_mtime
    except (OSError, HpcGenError) as error:
        return [f"{folder} cannot be written and read ({' '.join(str(error).split())[:200]})"]
    finally:
        _remove(path)
    skew_s = max(before - written, written - after, 0.0)
    if skew_s > MAX_SKEW_S:
        wrong.append(f"its clock and that of the file system of {folder} differ by {skew_s:.0f} s")
    return wrong


def _remove(path: Path) -> None:
    try:
        commit.ops.unlink(path)
    except OSError:
        pass  # not there, or the file system is ill, which has been told


def check_memory(root: Path = Path("/")) -> list[str]:
    """Memory that the node has left, and that the job's control group allows; `root` is for tests."""
    wrong = []
    try:
        text = (root / "proc/meminfo").read_text()
    except OSError:
        return []  # not Linux
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", text, re.MULTILINE)
    if found is not None and int(found[1]) * 1024 < MIN_MEMORY_BYTES:
        wrong.append(f"only {int(found[1]) * 1024 / 1e9:.2f} GB of memory are free")
    room = _group_room(root)
    if room is not None and room < MIN_MEMORY_BYTES:
        wrong.append(f"the memory limit of the job leaves only {max(room, 0) / 1e9:.2f} GB; ask for more memory")
    return wrong


def _group_room(root: Path) -> int | None:
    """Bytes below the memory limit of our control group, by either version; None where there is no limit to see."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            folder, names = root / "sys/fs/cgroup" / name.lstrip("/"), ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            folder = root / "sys/fs/cgroup/memory" / name.lstrip("/")
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        try:
            limit, used = ((folder / each).read_text().strip() for each in names)
        except OSError:
            continue
        if limit.isdigit() and used.isdigit():  # "max": no limit
            return int(limit) - int(used)
    return None


def check_gpus(gpus: int) -> list[str]:
    """The GPUs that this process sees: their number, free memory, and a product that must be right on each."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < gpus:
        return [f"{count} of {gpus} GPUs are visible; the driver or a card has failed"]
    wrong = []
    for number in range(gpus):
        name = f"GPU {number} ({torch.cuda.get_device_name(number)})"
        free, total = torch.cuda.mem_get_info(number)
        if free < MIN_FREE_GPU * total:
            wrong.append(f"{name} is not free: {(total - free) / 1e9:.1f} of {total / 1e9:.1f} GB are held by others")
        ones = torch.ones(1024, 1024, device=torch.device("cuda", number))
        if not bool(((ones @ ones) == 1024).all()):  # sums of ones are exact in every mode
            wrong.append(f"{name} computes wrong numbers")
    return wrong
