"""Synthetic tables and tiny experiments for tests of training: real runs, a few kilobytes large.

Importable as `experiments` (tests/conftest.py puts this folder on the path; scripts beside it find it anyway).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from hpc_gen.config import loader
from hpc_gen.config.loader import Resolved
from hpc_gen.data.write import write_table
from hpc_gen.runtime import clock, commit
from hpc_gen.runtime.errors import ExitCode
from hpc_gen.runtime.journal import history
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.runtime.stop import StopToken
from hpc_gen.stages import run_setup

CLASSES = 4
TABLE, HELD_OUT = "tables/toy", "tables/toyval"

# one rank, a few milliseconds per step; all intervals are multiples of the batch of 8 images
TINY = """
name: tiny
seed: 7
method:
  {name: energy, input: pixels, image_size: 8, channels: 1, patch_size: 4, hidden: 16, depth: 1, heads: 2,
   diffusion_timesteps: 50}
data: {table: tables/toy, validation_table: tables/toyval, shuffle_shards: 2}
train:
  total_images: 96
  global_batch: 8
  optimizer: {lr: 1.0e-3}
  ema: {main: {decay: 0.9}}
  log_every: 16
  save_every: 16
"""

# the same with the smallest method there is (tiny_method.py): few tensors, so a save is quick
LINEAR = TINY.replace(
    TINY[TINY.index("  {name: energy") : TINY.index("data:")], '  {name: "tiny_method:ENTRY"}\n'
).replace("decay: 0.9", "decay: 0.5")


def make_tables(workspace: Path, rows: int = 192, size: int = 8, channels: int = 1) -> None:
    """A training table whose images tell their class by brightness, and a small held-out one; uint8 pixels."""
    for path, count, seed in ((TABLE, rows, 0), (HELD_OUT, 32, 1)):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, CLASSES, (count,), generator=generator)
        noise = torch.rand(count, channels, size, size, generator=generator) * 60
        pixels = (noise + labels.view(-1, 1, 1, 1) * 60).to(torch.uint8)
        write_table(workspace / path, {"pixels": pixels, "labels": labels}, shard_rows=64, num_classes=CLASSES)


def resolved(*overrides: str, text: str = TINY) -> Resolved:
    """The experiment with `key.path=value` overrides, its method section typed."""
    return run_setup.typed(loader.loads(text, overrides))


@dataclass(frozen=True)
class Workspace:
    """A folder with the two tables, in which runs are made."""

    path: Path

    def run(self, name: str, *overrides: str, text: str = TINY) -> RunFolder:
        """A run folder without a copy of the code (that copy is a hundred fsyncs, and tests import the source)."""
        run = RunFolder(self.path / "runs" / name)
        found = resolved(*overrides, text=text)
        commit.make_folder(run.journal)
        commit.make_folder(run.logs)
        commit.write_text(run.config_path, found.to_yaml())
        hashes = {"identity": found.identity, "operation": found.operation, "version": "0"}
        commit.write_json(run.hashes_path, hashes)
        return run

    def train(self, run: RunFolder, *overrides: str, stop: StopToken | None = None) -> ExitCode:
        """One attempt of the train stage in this process, as the only rank. `overrides` are laid over the run's config."""
        from hpc_gen.stages.train import run_train

        found = run_setup.typed(loader.load(run.config_path, overrides))
        return run_train(run, found, self.path, StopToken(run) if stop is None else stop)


def make_workspace(path: Path) -> Workspace:
    """A workspace with both tables."""
    make_tables(path)
    return Workspace(path)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder, in memory where that is possible: thousands of fsyncs cost minutes on a slow disk."""
    memory = Path("/dev/shm")
    usable = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2**29
    folder = Path(tempfile.mkdtemp(prefix="hpc-gen-test-", dir=memory if usable else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def begin_anew() -> None:
    """For a forked child: its own start is that of the process, not its parent's."""
    clock.process_start.cache_clear()
    clock._IMPORTED_AT = clock.now()


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder: relative path -> SHA-256; equal dictionaries are equal folders, byte for byte."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def rows(run: RunFolder) -> list[tuple[int, dict[str, float]]]:
    """The history of a run as (images_seen, values): what survived of all its attempts."""
    return [(row.images_seen, row.data) for row in history(run)]


def leftovers(run: RunFolder) -> list[str]:
    """Staging and trash that lie about in a run folder."""
    prefixes = (commit.STAGING_PREFIX, commit.TRASH_PREFIX)
    return [str(path.relative_to(run.path)) for path in run.path.rglob(".t*") if path.name.startswith(prefixes)]
