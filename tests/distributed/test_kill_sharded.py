"""Ranks killed, and disks filled, at any file operation of a sharded save: the chain holds the last commit, whole.

The work is done by tests/support/kill_sharded.py in a process of its own: it must fork, and pytest has threads.
Single-rank attempts, with power cuts, are in tests/unit/test_kill_points.py; together they make more than a thousand.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DRIVER = ROOT / "tests" / "support" / "kill_sharded.py"


@pytest.mark.timeout(600)  # 45 s on two idle cores
def test_no_kill_of_a_rank_or_a_node_loses_or_damages_a_sharded_commit(counts: Any, record_property: Any) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(DRIVER.parent)]), "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "HPC_GEN_ATTEMPT"):
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "-P", str(DRIVER)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    record_property("operations", found["operations"])
    assert found["problems"] == []
    parts = {"rank 0", "rank 1", "node", "disk of rank 0", "disk of rank 1"}
    assert set(found["operations"]) == parts and min(found["operations"].values()) >= 10
    assert found["kills"] >= 120 and found["ended"] >= 40
    counts.add("kills", found["kills"])
