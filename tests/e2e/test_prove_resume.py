"""`hpc-gen prove-resume` as typed: an experiment killed and resumed, on the same and on another number of ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import experiments
import pytest

from hpc_gen.runtime.journal import attempts
from hpc_gen.runtime.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(600)  # 45 s on two idle cores
def test_an_experiment_of_a_user(tmp_path: Path) -> None:
    experiments.make_tables(tmp_path)
    (tmp_path / "mine.yaml").write_text(experiments.TINY)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HPC_GEN_WORKSPACE": str(tmp_path)}
    words = ["prove-resume", "mine.yaml", "--kills", "1", "--images", "64", "--world-sizes", "2,1", "--seed", "2"]
    command = [sys.executable, "-P", "-m", "hpc_gen.cli", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    page = (tmp_path / "runs" / "tiny-proof" / "proof.md").read_text()
    for told in (done.stdout, page):
        assert "Verdict: equal. Killed 1 time and resumed on 2 ranks" in told
        assert "| equal bytes |" in told and "| equal digest |" in told
        assert "On 2, 1 ranks by turns it saw the same rows and draws" in told
    killed, resized = (RunFolder(tmp_path / "runs" / f"tiny-proof-{name}") for name in ("killed", "resized"))
    assert {each.world_size for each in attempts(killed)} <= {0, 2}  # 0: killed before it could say
    assert attempts(killed)[-1].world_size == 2 and attempts(resized)[-1].world_size == 2
