"""Training equals a bare PyTorch loop that shares nothing with it but the table, the draws and the network class.

Byte-equal resume cannot see a mistake that both runs make: an average of the wrong step, a shifted label, a schedule one
step late. Here the whole recipe is written out once more, from specs/energy.md, and the checkpoints must agree.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from experiments import make_tables
from torch import Tensor

from hpc_gen.config import loader
from hpc_gen.data.order import BlockShuffle
from hpc_gen.data.table import Table
from hpc_gen.methods.energy.config import EnergyConfig
from hpc_gen.methods.energy.recipe import ENTRY
from hpc_gen.methods.materialise import materialise
from hpc_gen.methods.protocol import TableFacts
from hpc_gen.runtime.randomness import Draw, Integers, Normal, Stream, Uniform
from hpc_gen.stages import run_setup, runner
from hpc_gen.training.checkpoint import read

SEED, BATCH, STEPS, T = 11, 8, 10, 50
LR, WARMUP, TOTAL, DECAY, CLIP = 2e-3, 16, 80, 0.7, 0.5
EXPERIMENT = f"""
name: reference
seed: {SEED}
method:
  {{name: energy, input: pixels, image_size: 8, channels: 1, patch_size: 4, hidden: 16, depth: 2, heads: 2,
   diffusion_timesteps: {T}, label_dropout: 0.3}}
data: {{table: tables/toy, shuffle_shards: 2}}
train:
  total_images: {TOTAL}
  global_batch: {BATCH}
  micro_batch: 4
  optimizer: {{lr: {LR}, weight_decay: 0.1, clip: {CLIP}}}
  schedule: {{kind: cosine, warmup_images: {WARMUP}, min_lr: 1.0e-4}}
  ema: {{main: {{decay: {DECAY}}}}}
  log_every: 8
  save_every: {TOTAL}
"""


def bare_loop(table: Table) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """Weights, average and losses of the recipe, one batch at a time."""
    config = EnergyConfig(
        input="pixels", image_size=8, channels=1, patch_size=4, hidden=16, depth=2, heads=2,
        diffusion_timesteps=T, label_dropout=0.3,
    )  # fmt: skip
    method = ENTRY.build(config, TableFacts(num_classes=table.index.num_classes))
    (model,) = materialise(method, SEED).values()
    model.train()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in named.items() if p.ndim == 1 or n.endswith(".bias")], "weight_decay": 0.0},
            {"params": [p for n, p in named.items() if p.ndim != 1 and not n.endswith(".bias")], "weight_decay": 0.1},
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    betas = np.linspace(0.0001 * 1000 / T, 0.02 * 1000 / T, T)
    kept = torch.from_numpy(np.cumprod(1 - betas))
    order = BlockShuffle(table.shard_rows, SEED, 2)
    drawn = {
        "t": Draw((), Integers(0, T)),
        "noise": Draw((1, 8, 8), Normal()),
        "drop": Draw((), Uniform()),
    }
    losses = []
    for step in range(STEPS):
        positions = np.arange(step * BATCH, (step + 1) * BATCH)
        batch = table.read(order.rows(positions), ("pixels", "labels"))
        draws = {n: Stream(SEED, f"train/denoise/{n}").batch(d, positions.tolist()) for n, d in drawn.items()}
        x0 = batch["pixels"].float() / 127.5 - 1
        y = torch.where(draws["drop"] < 0.3, torch.tensor(table.index.num_classes), batch["labels"])
        signal = kept[draws["t"]].view(-1, 1, 1, 1)
        x_t = signal.sqrt().float() * x0 + (1 - signal).sqrt().float() * draws["noise"]
        loss = (draws["noise"] - model(x_t, draws["t"], y)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), CLIP)
        images = step * BATCH
        if images < WARMUP:
            rate = LR * images / WARMUP
        else:
            rate = 1e-4 + (LR - 1e-4) * 0.5 * (1 + math.cos(math.pi * (images - WARMUP) / (TOTAL - WARMUP)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        for name, p in named.items():
            average[name].mul_(DECAY).add_(p.detach(), alpha=1 - DECAY)
        losses.append(loss.item())
    return {n: p.detach() for n, p in model.state_dict().items()}, average, losses


@pytest.mark.timeout(120)
def test_training_equals_a_bare_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPC_GEN_WORKSPACE", str(tmp_path))
    make_tables(tmp_path)
    path = tmp_path / "reference.yaml"
    path.write_text(EXPERIMENT)
    run = run_setup.prepare_run(loader.load(path), tmp_path)
    assert runner.run_stage(run, "train") == 0
    weights, average, losses = bare_loop(Table.open(tmp_path / "tables" / "toy"))

    from hpc_gen.runtime.journal import history

    logged = [row.data["loss"] for row in history(run)]
    assert logged == pytest.approx(losses, rel=2e-5)
    found = read.newest(run)
    assert found.images_seen == TOTAL
    for name, value in read.load_role(found.path, "denoiser").items():
        # Adam turns the rounding of near-zero gradients into steps of up to the learning rate
        torch.testing.assert_close(value, weights[name], rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")
    moved = 0.0
    for name, value in read.load_role(found.path, "denoiser", "main").items():
        if name in average:
            torch.testing.assert_close(
                value, average[name], rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}"
            )
            moved = max(moved, float((average[name] - weights[name]).abs().max()))
    assert moved > 1e-3  # the average lags the weights by far more than the tolerance
