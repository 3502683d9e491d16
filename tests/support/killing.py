"""What `hpc-gen prove-resume` kills with, for tests (test_kills.py, prove.py); runs find the methods of this folder."""

from __future__ import annotations

import os
from pathlib import Path

from hpc_gen.stages.prove_kills import (
    KINDS,
    NODE,
    Kill,
    Launched,
    Plan,
    broken,
    disturb,
    finish,
    manifests,
    plan,
)

_HERE = str(Path(__file__).resolve().parent)
if _HERE not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
    os.environ["PYTHONPATH"] = os.pathsep.join([_HERE, *filter(None, [os.environ.get("PYTHONPATH")])])

__all__ = ["KINDS", "NODE", "Kill", "Launched", "Plan", "broken", "disturb", "finish", "manifests", "plan"]
