"""What a rank imports before its first step; the compiler alone would take it more than a second of CPU time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from experiments import make_workspace

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
from pathlib import Path
from experiments import Workspace

workspace = Workspace(Path(sys.argv[1]))
assert workspace.train(workspace.run("a"), "train.stop_at_images=32") == 0
assert workspace.train(workspace.run("a")) == 0
found = [name for name in ("torch._dynamo", "torch._inductor", "torchvision", "wandb", "scipy") if name in sys.modules]
sys.exit(f"imported on the way: {found}" if found else 0)
"""


def test_a_training_does_not_import_the_compiler(tmp_path: Path) -> None:
    """Start, steps, saves and a resume; torch's AdamW, its switch for determinism and nn.Embedding each would."""
    make_workspace(tmp_path)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
