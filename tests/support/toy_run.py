"""A tiny real run for tests of the stages after training: a table of grey squares, an energy model, one checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from hpc_gen.config import loader
from hpc_gen.config.loader import Resolved
from hpc_gen.data import ptshard
from hpc_gen.data.index import ShardInfo, TableIndex
from hpc_gen.runtime import commit
from hpc_gen.runtime.journal import Journal
from hpc_gen.runtime.ranks import Ranks
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import run_setup
from hpc_gen.stages.build import build_method, open_table, table_facts
from hpc_gen.stages.units import Ledger, StageContext, Unit, UnitWorker
from hpc_gen.training.checkpoint.chain import CheckpointChain, Retention

CLASSES = 4
IMAGES_SEEN = 64
EXPERIMENT = """
name: toy
seed: 3
method: {name: energy, input: pixels, image_size: 8, channels: 1, patch_size: 4, hidden: 8, depth: 1, heads: 2}
data: {table: tables/train}
train:
  total_images: 64
  global_batch: 8
  optimizer: {lr: 0.001}
  log_every: 8
  save_every: 32
sample: {num_images: 20, block_images: 8, batch: 4, settings: {steps: 2}, seed: 11}
evaluate:
  metrics: [fid, kid, prc, isc]
  extractor: {name: random-conv}
  reference: {table: tables/train, rows: 24}
  batch: 4
  block_images: 10
  kid_subset_size: 10
"""


def write_table(folder: Path, rows: int = 32, shard_rows: int = 20, size: int = 8, channels: int = 1) -> None:
    """A table of uint8 pixels and labels."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    columns = {
        "pixels": torch.randint(0, 256, (rows, channels, size, size), generator=generator, dtype=torch.uint8),
        "labels": torch.arange(rows) % CLASSES,
    }
    shards = []
    for number, start in enumerate(range(0, rows, shard_rows)):
        part = {name: tensor[start : start + shard_rows].clone() for name, tensor in columns.items()}
        path = folder / f"shard_{number:06d}.pt"
        ptshard.write_shard(path, part)
        content, sha256 = ptshard.content_sha256(part), commit.sha256_file(path)
        shards.append(ShardInfo(path.name, len(part["labels"]), path.stat().st_size, sha256, content))
    index = TableIndex(
        columns=ptshard.columns_of(columns),
        shards=tuple(shards),
        num_classes=CLASSES,
        class_names=tuple("abcd"),
        tokenizer={"name": "identity"},
    )
    index.write(folder)


def write_checkpoint(run: RunFolder, resolved: Resolved, workspace: Path, images_seen: int = IMAGES_SEEN) -> None:
    """A checkpoint of the initial weights, with an average that differs from them."""
    method = build_method(resolved.experiment, table_facts(open_table(workspace, resolved.experiment.data.table)))
    state = {}
    for role, module in method.roles().items():
        generator = torch.Generator().manual_seed(images_seen)
        for name, tensor in module.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator) * 0.05 if tensor.is_floating_point() else 0
            state[f"model/{role}/{name}"] = tensor + noise
            if tensor.is_floating_point():
                state[f"ema/{role}/main/{name}"] = tensor + 2 * noise
    chain = CheckpointChain(run, Ranks.start(), None, Journal(run, 1, "train"), Retention(9), lambda line: None)
    chain.write(images_seen, state, {"identity": resolved.identity})


def make_run(
    workspace: Path, *overrides: str, checkpoint: bool = True, name: str = "toy"
) -> tuple[RunFolder, Resolved]:
    """A run folder with config, table and checkpoint below `workspace`."""
    resolved = run_setup.typed(loader.loads(EXPERIMENT, overrides))
    run = RunFolder(workspace / "runs" / name)
    run.journal.mkdir(parents=True)
    commit.write_text(run.config_path, resolved.to_yaml())
    hashes = {"identity": resolved.identity, "operation": resolved.operation, "version": "0"}
    commit.write_json(run.hashes_path, hashes)
    if not (workspace / "tables" / "train").exists():
        write_table(workspace / "tables" / "train")
    if checkpoint:
        write_checkpoint(run, resolved, workspace)
    return run, resolved


def context(
    run: RunFolder, resolved: Resolved, workspace: Path, stage: str, task: int = 0, tasks: int = 1
) -> StageContext:
    """What a worker of that stage is given."""
    return StageContext(run, resolved, stage, workspace, task, tasks)


def no_poll() -> None:
    """Nobody asks to stop."""


def do_units(
    run: RunFolder, worker: UnitWorker, units: list[Unit] | None = None, poll: Callable[[], None] = no_poll
) -> list[str]:
    """Do the missing units as the stage runner does; returns their names."""
    ledger, done = Ledger(run.ledger(worker.stage), run.path), []
    for unit in ledger.missing(worker.units() if units is None else units, worker.fingerprint()):
        staging = commit.staging_path(run.path / "staging" / f"{worker.stage}-{unit.name}")
        commit.make_folder(staging)
        ledger.commit(unit, worker.do(unit, staging, poll), worker.fingerprint())
        commit.remove_tree(staging)
        done.append(unit.name)
    return done
