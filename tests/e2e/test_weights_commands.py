"""`hpc-gen weights ...` as typed: a checkpoint of the reference is verified, imported, sampled, trained on, exported."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from experiments import TINY, make_tables, resolved

from hpc_gen.methods.materialise import materialise
from hpc_gen.runtime.commit import sha256_file
from hpc_gen.runtime.errors import ExitCode
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.runtime.tensor_files import metadata_of, read_tensors
from hpc_gen.stages.build import meta_method, open_table, table_facts
from hpc_gen.training.checkpoint import manifest, read

REPOSITORY = Path(__file__).resolve().parents[2]
ENERGY = TINY.replace("diffusion_timesteps: 50", "diffusion_timesteps: 50, variant: energy, energy: {step_size: 0.02}")
ENERGY += "sample: {num_images: 4, block_images: 4, batch: 4, settings: {steps: 3, inner_loop: true, inner_steps: 2}}\n"


class Shell:
    """Commands in a workspace, as a user types them."""

    def __init__(self, workspace: Path) -> None:
        self.workspace = workspace

    def __call__(self, *words: str, code: int = 0) -> str:
        """Output of one command, which must end with `code`."""
        path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "hpc_gen.cli", *words],
            capture_output=True,
            text=True,
            cwd=self.workspace,
            env=environment,
            check=False,
        )
        said = done.stdout + done.stderr
        assert done.returncode == code, said
        assert "Traceback" not in said
        return said


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """A workspace with a table, an experiment, and a checkpoint as mar_ebwm writes it (pickled Namespace and all)."""
    make_tables(tmp_path)
    (tmp_path / "tiny.yaml").write_text(ENERGY)
    experiment = resolved(text=ENERGY).experiment
    method = meta_method(experiment, table_facts(open_table(tmp_path, experiment.data.table)))
    state = {name: value + 0.1 for name, value in materialise(method, 3)["denoiser"].state_dict().items()}
    state["alpha"] = torch.tensor(0.5)
    averages = {name: value - 0.05 if name != "alpha" else value for name, value in state.items()}
    content = {"model": state, "model_ema": averages, "epoch": 7, "args": argparse.Namespace(mcmc_step_size=0.5)}
    torch.save(content, tmp_path / "checkpoint-last.pth")
    return Shell(tmp_path)


def images(run: RunFolder) -> list[bytes]:
    return [path.read_bytes() for path in sorted(run.samples("main").rglob("*.png"))]


@pytest.mark.timeout(300)
def test_a_checkpoint_of_the_reference_is_verified_imported_sampled_and_exported(shell: Shell) -> None:
    digest = sha256_file(shell.workspace / "checkpoint-last.pth")
    said = shell("weights", "verify", "checkpoint-last.pth", "tiny.yaml", "--sha256", digest)
    assert digest in said and "'model_ema'" in said and "checkpoint-last.pth: fits" in said

    said = shell("weights", "import", "tiny.yaml", "checkpoint-last.pth", "--dry-run")
    assert "would write a checkpoint at 0 images" in said and not (shell.workspace / "runs").exists()
    said = shell("weights", "import", "tiny.yaml", "checkpoint-last.pth", "--sha256", digest, "name=theirs")
    assert "alpha = 0.5, replaces method.energy.step_size = 0.02" in said and "from 'model_ema' of the file" in said
    run = RunFolder(shell.workspace / "runs" / "theirs")
    assert manifest.read(read.newest(run).path).facts["imported"]["sha256"] == digest

    shell("sample", "theirs")
    shell("weights", "export", "theirs", "--to", "ours.safetensors")
    exported = read_tensors(shell.workspace / "ours.safetensors")
    averages = read_tensors(shell.workspace / "checkpoint-last.pth", key="model_ema")
    assert exported.keys() == averages.keys()
    assert all(torch.equal(exported[name], value) for name, value in averages.items())
    assert metadata_of(shell.workspace / "ours.safetensors")["hpc_gen.images_seen"] == "0"

    shell("weights", "import", "tiny.yaml", "ours.safetensors", "name=again")
    shell("sample", "again")
    again = images(RunFolder(shell.workspace / "runs" / "again"))
    assert len(again) == 4 and again == images(run)

    shell("resume", "again", "--stages", "train")
    assert read.newest(RunFolder(shell.workspace / "runs" / "again")).images_seen == 96
    said = shell("weights", "import", "tiny.yaml", "checkpoint-last.pth", "name=again", code=ExitCode.USER)
    assert "is at 96 images" in said
    said = shell("status", "again")
    assert "import" in said and "train from 0 images" in said


@pytest.mark.timeout(120)
def test_what_does_not_fit_is_said_and_ends_with_64(shell: Shell) -> None:
    said = shell("weights", "verify", "checkpoint-last.pth", "tiny.yaml", "method.depth=2", code=ExitCode.DATA)
    assert "lacks 'dit.blocks.1." in said and "differences" in said
    said = shell("weights", "import", "tiny.yaml", "checkpoint-last.pth", "method.hidden=32", code=ExitCode.DATA)
    assert "the model needs" in said and "hpc-gen weights verify" in said and not (shell.workspace / "runs").exists()
