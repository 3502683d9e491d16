"""Tables and shards for the tests of formats, and ways in which a file can be wrong."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from hpc_gen.runtime.file_operations import ops


def latents(rows: int = 20, classes: int = 4) -> dict[str, Tensor]:
    """Two columns of halves and labels; row i is known by its values."""
    values = torch.arange(rows * 8, dtype=torch.float32).reshape(rows, 2, 2, 2)
    return {
        "moments": (values / 16).half(),
        "moments_flip": (-values / 16).half(),
        "labels": torch.arange(rows) * 7 % classes,
    }


def flip_bit(path: Path, at: float = 0.5) -> None:
    """Change one bit of the byte at that part of the file."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 4
    path.write_bytes(bytes(data))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: len(path.read_bytes()) * 2 // 3]),
    "missing": lambda path: path.unlink(),
    "oversized": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "bit-flipped": flip_bit,
    "foreign": lambda path: path.write_bytes(b"\x89PNG\r\n" + bytes(4000)),
}


def killed_at(operation: int, work: Callable[[], object]) -> bool:
    """Run `work` in a child that dies by SIGKILL before its file operation number `operation`; False: it ended first."""
    child = os.fork()
    if child == 0:
        left = [operation]

        def observer(name: str, path: Path) -> None:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1

        code = 1
        try:
            ops.observer = observer
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the child failed"
    return False


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
