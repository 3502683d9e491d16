"""GMem at toy size with representations stored or computed in training: its tables, its encoder, its experiment."""

from __future__ import annotations

from pathlib import Path

import torch
from experiments import TABLE, Workspace
from kl_vae_file import write_kl_vae
from threads import one_thread
from tiny_tokenizers import DINOV2, pixels, write_dinov2

from hpc_gen.data.write import write_table
from hpc_gen.tokenizers.dinov2 import Dinov2Tokenizer

SIDE = 16
ENCODER, DECODER = "weights/dino.safetensors", "weights/vae.safetensors"
# images of 16 pixels, latents of 4 x 4 x 2, representations of a 4 x 4 grid
STORED = f"""
name: gmem
seed: 5
method:
  {{name: gmem, image_size: {SIDE}, tokenizer_stride: 4, channels: 2, hidden: 16, depth: 2, heads: 2,
   snippet_dim: {DINOV2.width}, projector_hidden: 8, repr_dim: {DINOV2.width}, repr_after_block: 1}}
data: {{table: {TABLE}, shuffle_shards: 2}}
train:
  total_images: 64
  global_batch: 8
  micro_batch: 2
  ranks: 2
  optimizer: {{lr: 1.0e-3, clip: 1.0}}
  ema: {{main: {{decay: 0.9}}}}
  log_every: 8
  save_every: 16
  keep_last: 9
"""
DINO = f"{{name: dinov2, weights: {ENCODER}, dinov2: {{grid: 4, any_size: true}}}}"
ONLINE = ("method.representations=online", f"train.frozen.representations={DINO}")


def make_space(path: Path, rows: int = 48) -> Workspace:
    """A table of latents, snippets, representations and the pixels that they are of; files of encoder and decoder."""
    (path / "weights").mkdir(parents=True)
    write_dinov2(path / ENCODER)
    write_kl_vae(path / DECODER)
    encoder = Dinov2Tokenizer(path / ENCODER, dinov2={"grid": 4, "any_size": True})
    images = pixels(rows, SIDE)
    generator = torch.Generator().manual_seed(1)
    latents = {f"latents{end}": torch.randn(rows, 2, 4, 4, generator=generator) for end in ("", "_flip")}
    with one_thread():
        columns = {**latents, **encoder.encode(images), "pixels": images}
    write_table(path / TABLE, columns, shard_rows=16, num_classes=0)
    return Workspace(path)
