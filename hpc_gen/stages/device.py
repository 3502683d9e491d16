"""Where a task of units computes."""

from __future__ import annotations

import torch


def task_device(task: int) -> torch.device:
    """The GPU whose turn it is among those this process sees, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", task % torch.cuda.device_count())
    return torch.device("cpu")
