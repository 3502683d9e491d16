"""Killed before any file operation of any attempt, with or without a power cut, the chain holds the last commit, whole.

The work is done by tests/support/kill_points.py in a process of its own: it must fork, and pytest has threads.
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
DRIVER = ROOT / "tests" / "support" / "kill_points.py"
LEAST = 500  # kill points of each family


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the driver of each family found; the two run side by side."""
    folder = tmp_path_factory.mktemp("kill_points")
    path = os.pathsep.join([str(ROOT), str(DRIVER.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "HPC_GEN_ATTEMPT"):
        environment.pop(name, None)
    drivers = {}
    for family in ("kill", "cut"):
        with (folder / f"{family}.log").open("w") as log:
            command = [sys.executable, "-P", str(DRIVER), family]
            drivers[family] = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log)
    found = {}
    try:
        for family, driver in drivers.items():
            output = driver.communicate()[0]
            assert driver.returncode == 0, (folder / f"{family}.log").read_text()[-4000:]
            found[family] = json.loads(output)
    finally:
        for driver in drivers.values():
            driver.kill()
    return found


@pytest.mark.timeout(600)  # 80 s on two idle cores
@pytest.mark.parametrize("family", ["kill", "cut"])
def test_no_kill_point_loses_or_damages_a_commit(
    families: dict[str, dict[str, Any]], family: str, counts: Any, record_property: Any
) -> None:
    found = families[family]
    record_property("operations", found["operations"])
    assert found["problems"] == []
    assert set(found["operations"]) == {"fresh", "resumed", "preempted", "fallback"}
    assert found["kills"] >= LEAST and found["ended"] >= 50
    counts.add("kills", found["kills"])
