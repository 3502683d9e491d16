"""As typed: train an autoencoder on 2 ranks, export it, encode images with it, train on the moments, decode samples."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from experiments import make_tables
from PIL import Image

from hpc_gen.config import loader
from hpc_gen.data.table import Table
from hpc_gen.runtime.errors import UserError
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.runtime.tensor_files import metadata_of, read_tensors, write_tensors
from hpc_gen.sampling.images import read_png
from hpc_gen.stages.build import open_decoder
from hpc_gen.stages.run_setup import typed
from hpc_gen.tokenizers.kl_vae import KlVae

REPOSITORY = Path(__file__).resolve().parents[2]

AUTOENCODER = """
name: vae
method:
  name: autoencoder
  image_size: 8
  architecture: {ch: 32, ch_mult: [1, 1], num_res_blocks: 1, resolution: 8, z_channels: 2, embed_dim: 2}
  horizontal_flip: true
data: {table: tables/toy, validation_table: tables/toyval}
train:
  total_images: 192
  global_batch: 8
  ranks: 2
  optimizer: {lr: 3.0e-3, weight_decay: 0.0}
  ema: {main: {decay: 0.5}}
  log_every: 64
  save_every: 96
  validate: {every_images: 192, num_images: 16}
  preview: {every_images: 192, labels: [0, 1, 2, 3, 0], settings: {beside_original: true}}
sample: {num_images: 6, block_images: 4, batch: 4, classes: uniform}
"""

LATENT = """
name: latent
method:
  {name: energy, input: moments, image_size: 8, tokenizer_stride: 2, channels: 2, patch_size: 2, hidden: 16, depth: 1,
   heads: 2, diffusion_timesteps: 50, horizontal_flip: true}
data: {table: tables/latent}
encode:
  source: folder
  source_path: pictures
  image_size: 8
  shard_rows: 4
  validation: false
  tokenizer: {name: kl_vae, weights: runs/vae/exports/autoencoder.safetensors}
train: {total_images: 16, global_batch: 4, optimizer: {lr: 1.0e-3}, ema: {main: {decay: 0.5}}, log_every: 8, save_every: 8}
sample: {num_images: 4, block_images: 4, batch: 4, settings: {steps: 3}}
"""


def shell(workspace: Path, *words: str) -> None:
    """One command typed in the workspace, which must succeed."""
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hpc_gen.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=workspace, env=environment, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "Traceback" not in said, said


def samples(run: RunFolder) -> list[torch.Tensor]:
    return [read_png(path) for path in sorted(run.samples("main").rglob("*.png"))]


@pytest.mark.timeout(300)
def test_from_pixels_to_decoded_samples(tmp_path: Path) -> None:
    make_tables(tmp_path, channels=3)
    (tmp_path / "vae.yaml").write_text(AUTOENCODER)
    (tmp_path / "latent.yaml").write_text(LATENT)
    for number in range(6):
        folder = tmp_path / "pictures" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").resize((8, 8)).rotate(60 * number).convert("RGB").save(folder / f"{number}.png")

    shell(tmp_path, "run", "vae.yaml", "--stages", "train,sample")
    run = RunFolder(tmp_path / "runs" / "vae")
    previews = sorted(run.previews.rglob("*.png"))
    assert previews, "no preview of reconstructions"
    assert {path.name for path in previews if path.parent != run.previews} == {f"image_{i}.png" for i in range(5)}
    originals = Table.open(tmp_path / "tables/toy").read(torch.arange(6), ("pixels",))["pixels"]
    restored = torch.stack(samples(run))
    assert restored.shape == (6, 3, 8, 8)
    error = (restored.float() - originals.float()).abs().mean()
    assert error < (originals.float() - originals.float().mean()).abs().mean()  # closer than their mean: it has learned

    exported = "runs/vae/exports/autoencoder.safetensors"
    shell(tmp_path, "weights", "export", "vae", "--to", exported)
    tokenizer = KlVae(exported, workspace=tmp_path)
    # the sample stage and the tokenizer reconstruct alike: the same average of the weights, the same two networks
    latents = tokenizer.encode_float32(originals)["moments"][:, :2] * tokenizer.scale
    assert (tokenizer.decode(latents).int() - restored.int()).abs().max() <= 1

    shell(tmp_path, "run", "latent.yaml")
    table = Table.open(tmp_path / "tables/latent", verify=True)
    assert table.rows == 6 and table.index.tokenizer == tokenizer.identity
    assert {name: column.shape for name, column in table.index.columns.items()} == {
        "moments": (4, 4, 4), "moments_flip": (4, 4, 4), "labels": (),
    }  # fmt: skip
    decoded = samples(RunFolder(tmp_path / "runs" / "latent"))
    assert len(decoded) == 4 and all(image.shape == (3, 8, 8) for image in decoded)

    # other weights than the table was made with are refused, not discovered as bad pictures
    path = tmp_path / exported
    changed = {name: value * 0.5 for name, value in read_tensors(path).items()}
    write_tensors(path, changed, metadata_of(path))
    experiment = typed(loader.load(tmp_path / "latent.yaml")).experiment
    with pytest.raises(UserError, match="made by a tokenizer with weights_sha256"):
        open_decoder(experiment, table, tmp_path, torch.device("cpu"))
