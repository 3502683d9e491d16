"""DiGIT's chain as typed: images to features to centroids to codes, three stages of one experiment; and weights commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_tokenizers import DINOV2, write_dinov2, write_vqgan
from typer.testing import CliRunner

from hpc_gen.cli import app
from hpc_gen.data.table import Table
from hpc_gen.runtime.errors import ExitCode
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import runner
from hpc_gen.stages.run_setup import prepare_run

CHAIN = """
name: chain
method: {name: energy, input: pixels, image_size: 8, channels: 3, patch_size: 4, hidden: 16, depth: 1, heads: 2}
data: {table: tables/codes}
extra_stages:
  features:
    worker: "shard_tools.encode:extra_worker"
    options:
      table: tables/features
      encode:
        source: folder
        source_path: images
        image_size: 28
        crop: short_bicubic
        shard_rows: 8
        validation: false
        tokenizer:
          name: dinov2
          weights: dinov2.safetensors
          dinov2: {columns: [features], flip: false, positions: digit, grid: 2, precision: float32}
  centroids:
    worker: "shard_tools.centroids:worker"
    after: [features]
    options: {table: tables/features, codes: 6, output: centroids/km.npy, block_rows: 8}
encode:
  source: folder
  source_path: images
  image_size: 28
  crop: short_bicubic
  shard_rows: 8
  validation: false
  tokenizer: {name: vqgan, weights: vqgan.safetensors}
  also:
    codes:
      name: dinov2
      weights: dinov2.safetensors
      dinov2: {columns: [codes], positions: digit, grid: 2, centroids: centroids/km.npy}
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    write_dinov2(folder / "dinov2.safetensors")
    write_vqgan(folder / "vqgan.safetensors")
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(12):
            coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((40, 33)).save(folder / "images" / name / f"{i}.png")
    (folder / "chain.yaml").write_text(CHAIN)
    return folder


def test_the_chain_runs_in_order_and_again_does_nothing(workspace: Path) -> None:
    from hpc_gen.config import loader

    resolved = loader.load(workspace / "chain.yaml", [])
    assert resolved.experiment.stage_order()[:3] == ["features", "centroids", "encode"]
    run = prepare_run(resolved, workspace)
    said: list[str] = []
    assert runner.run_stages(run, ["features", "centroids", "encode"], said.append) == ExitCode.DONE
    facts = json.loads((workspace / "centroids/km.json").read_text())
    assert facts["codes"] == 6 and facts["width"] == DINOV2.width and facts["vectors"] == 96
    table = Table.open(workspace / "tables/codes", verify=True)
    rows = table.read(np.arange(24), ("codes", "vq_codes", "labels"))
    assert rows["codes"].shape == (24, 4) and rows["codes"].unique().numel() == 6
    assert rows["vq_codes"].dtype == torch.int32
    features = Table.open(workspace / "tables/features", verify=True)
    assert features.index.tokenizer["name"] == "dinov2" and facts["table"]["identity"] == features.identity
    before = {path: path.stat().st_mtime_ns for path in (workspace / "centroids").rglob("*")}
    assert runner.run_stages(RunFolder(run.path), ["centroids"], said.append) == ExitCode.DONE  # its sample was swept
    assert {path: path.stat().st_mtime_ns for path in (workspace / "centroids").rglob("*")} == before


def test_weights_commands_take_names_of_tokenizers(workspace: Path) -> None:
    listed = CliRunner().invoke(app, ["weights", "list", "--workspace", str(workspace)])
    assert listed.exit_code == 0 and "vitb14_reg4" in listed.output
    keys = CliRunner().invoke(app, ["weights", "list", "vitb14_reg4"])
    assert "register_tokens  [1, 4, 768]" in keys.output and "86,583,552 parameters" in keys.output
    for words, sentence in (
        (["weights", "import", "mage", str(workspace / "dinov2.safetensors")], "holds a DINOv2 network, not a VQGAN"),
        (["weights", "import", "mage", "x", "a.b=1"], "KEY.PATH=VALUE belongs to an experiment, 'mage' is a tokenizer"),
        (["weights", "verify", "x", "mage", "--role", "r"], "--role belongs to an experiment"),
        (["weights", "import", "vitb15", "x"], "vitb15"),
    ):
        refused = CliRunner().invoke(app, words)
        assert refused.exit_code != 0 and sentence in f"{refused.output} {refused.exception}", words
    assert not (workspace / "downloads").exists()
