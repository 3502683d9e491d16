"""A checkpoint file as the references write theirs, in both formats of torch.save."""

from __future__ import annotations

import argparse
import collections
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hpc_gen.runtime.errors import HpcGenError

WRITERS = {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}}


def official(path: Path, writer: str = "zip") -> dict[str, Any]:
    """A checkpoint as the references write them: two state dicts, optimizer, numbers, a pickled Namespace."""
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    content = {
        "model": network.state_dict(),
        "model_ema": collections.OrderedDict((k, v * 2) for k, v in network.state_dict().items()),
        "optimizer": optimizer.state_dict(),
        "epoch": 7,
        "scaler": {"scale": 65536.0, "growth": [1, 2]},
        "args": argparse.Namespace(model="base", device=torch.device("cpu")),
        "best": np.float64(1.5),
        "seen": {"a", "b"},
        "log": collections.defaultdict(list, {"loss": [0.5]}),
    }
    torch.save(content, path, **WRITERS[writer])
    return content


def refuses(kind: type[HpcGenError], action: Callable[[], Any], part: str) -> str:
    """`action` raises exactly `kind` with one sentence that holds `part`."""
    with pytest.raises(kind, match=re.escape(part)) as info:
        action()
    assert type(info.value) is kind and "\n" not in str(info.value)
    return str(info.value)
