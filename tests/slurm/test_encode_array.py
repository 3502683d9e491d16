"""Encode as an array of a real Slurm, its tasks killed at random, one image corrupted: the table of an undisturbed run.

Always: photograph-like images of its own making, two classes. With HPC_GEN_REAL_IMAGES=FOLDER each folder below it is
encoded, too (FOLDER/SET/CLASS/*.png); docs/proofs/encode_array.md tells of such a run and how its images were had.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_tokenizers import write_dinov2, write_vqgan

from hpc_gen.config.vqgan import VqganConfig
from hpc_gen.data.index import TableIndex
from hpc_gen.data.table import Table
from hpc_gen.runtime import env, journal
from hpc_gen.runtime.run_folder import RunFolder
from slurm.lab import Lab

pytestmark = pytest.mark.slurm_real

Until = Callable[..., None]
ROOT = Path(__file__).resolve().parents[2]
REAL = env.get("HPC_GEN_REAL_IMAGES")
SETS = ["generated", *(sorted(path.name for path in Path(REAL).iterdir() if path.is_dir()) if REAL else [])]
SIDE, TASKS, KILLS, SEED = 56, 3, 4, 7
SIZES = VqganConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=8, codes=16)
EXPERIMENT = f"""
name: NAME
method: {{name: energy, input: pixels, image_size: 8, channels: 3, patch_size: 4, hidden: 16, depth: 1, heads: 2}}
data: {{table: tables/NAME}}
encode:
  source: folder
  source_path: images
  image_size: {SIDE}
  shard_rows: ROWS
  limit: 1200
  validation: false
  max_bad_fraction: 0.2
  tasks: {TASKS}
  tokenizer: {{name: vqgan, weights: vqgan.safetensors}}
  also: {{snippets: {{name: dinov2, weights: dinov2.safetensors, dinov2: {{grid: 4, positions: digit}}}}}}
"""


def generate(folder: Path) -> None:
    """JPEGs of several sizes and shapes, 24 of each class."""
    generator = np.random.default_rng(SEED)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(24):
            coarse = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
            size = (int(generator.integers(60, 300)), int(generator.integers(60, 300)))
            Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / name / f"{i:02d}.jpg")


def hpc_gen(workspace: Path, *words: str, variables: dict[str, str]) -> str:
    """Output of a command as typed, which must succeed."""
    command = [sys.executable, "-P", "-m", "hpc_gen.cli", *words, "--workspace", str(workspace)]
    done = subprocess.run(command, env=variables, cwd=workspace, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def begun(run: RunFolder) -> int:
    return sum(event.kind == "unit_begin" for event in journal.read(run))


def kill_one(run: RunFolder, draw: random.Random) -> bool:
    """Send SIGKILL or SIGTERM to a task that works on a unit now; whether there was one."""
    claims = list(run.claims("encode").glob("*.claim")) if run.claims("encode").is_dir() else []
    try:
        pid = json.loads(draw.choice(sorted(claims)).read_bytes())["pid"]
        os.kill(pid, draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
    except (IndexError, OSError, ValueError, KeyError):  # nobody at work, or it has just ended
        return False
    return True


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SETS)
def test_killed_at_random_and_still_the_same(
    lab: Lab, tmp_path_factory: pytest.TempPathFactory, until: Until, name: str
) -> None:
    workspace = tmp_path_factory.mktemp("array")
    images = workspace / "images"
    if name == "generated":
        generate(images)
    else:
        shutil.copytree(Path(str(REAL)) / name, images)
    victim = sorted(path for path in images.rglob("*") if path.is_file())[5]
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    write_vqgan(workspace / "vqgan.safetensors", config=SIZES)
    write_dinov2(workspace / "dinov2.safetensors")
    listed = {folder.name: sum(p.is_file() for p in folder.iterdir()) for folder in images.iterdir()}
    total = min(1200, sum(listed.values()))
    text = EXPERIMENT.replace("ROWS", str(max(2, total // 12)))
    variables = lab.environment(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    for run_name in ("undisturbed", "killed"):
        (workspace / f"{run_name}.yaml").write_text(text.replace("NAME", run_name))
    hpc_gen(workspace, "run", "undisturbed.yaml", "--stages", "encode", variables=variables)

    started = time.monotonic()
    submitted = ["submit", "killed.yaml", "--cluster", "lab", "--stages", "encode", "--set", "retries=9"]
    print(hpc_gen(workspace, *submitted, variables=variables))
    run, draw, kills = RunFolder(workspace / "runs" / "killed"), random.Random(SEED), 0
    index = workspace / "tables/killed/index.json"
    for _ in range(KILLS):
        before = begun(run)
        until(lambda before=before: begun(run) >= before + 2 or index.exists(), "work goes on", 240)
        until(lambda: kill_one(run, draw) or index.exists(), "a task to kill", 60)
        kills += not index.exists()
    until(index.exists, "the stage ends", 300)
    until(lambda: not lab.run(["squeue", "-h", "-n", "killed.encode"]).stdout.strip(), "its jobs end", 120)

    table, undisturbed = Table.open(workspace / "tables/killed"), Table.open(workspace / "tables/undisturbed")
    assert table.verify() == [] and kills >= 2
    assert table.identity == undisturbed.identity
    assert [info.sha256 for info in table.index.shards] == [info.sha256 for info in undisturbed.index.shards]
    assert table.index.names == undisturbed.index.names
    names = table.names(np.arange(table.rows)) or []
    assert len(set(names)) == table.rows and f"train/{victim.parent.name}/{victim.name}" not in names
    check_counts(TableIndex.read(table.folder), victim, listed, total)
    units = sum(1 for _ in run.ledger("encode").glob("*.json"))
    commits = Counter(event.fields["unit"] for event in journal.read(run) if event.kind == "unit_committed")
    assert units == len(table.index.shards) and set(commits.values()) == {1}, "one copy of each"
    print(
        f"{name}: {table.rows} rows of {total} images in {units} units, {kills} kills, "
        f"{len(journal.attempts(run))} attempts, {begun(run)} units begun, {time.monotonic() - started:.0f} s; "
        f"identity {table.identity}"
    )


def check_counts(index: TableIndex, victim: Path, listed: dict[str, int], total: int) -> None:
    """Exactly one image was left out, and it is said which."""
    histogram = {name: index.statistics["label_histogram"][str(i)] for i, name in enumerate(index.class_names)}
    assert sum(histogram.values()) == index.rows
    if sum(listed.values()) == total:
        assert index.rows == total - 1 and index.statistics["skipped"] == {"unreadable": 1}
        assert [line.split(":")[0] for line in index.bad_images] == [f"train/{victim.parent.name}/{victim.name}"]
        assert histogram == {n: count - (n == victim.parent.name) for n, count in listed.items()}
    assert set(index.columns) == {
        "vq_codes", "vq_codes_flip", "cls_tokens", "cls_tokens_flip", "representations", "representations_flip", "labels",
    }  # fmt: skip


@pytest.mark.timeout(600)
def test_a_bank_alone_is_an_array(lab: Lab, tmp_path_factory: pytest.TempPathFactory, until: Until) -> None:
    """The shipped experiment with a small network: two tasks killed, the same bank as on one machine, named row by row."""
    workspace = tmp_path_factory.mktemp("bank")
    generate(workspace / "images")
    write_dinov2(workspace / "dino.safetensors")
    variables = lab.environment(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    config = str(ROOT / "job_configs" / "gmem" / "bank.yaml")
    small = [f"encode.{each}" for each in ("source_path=images", "image_size=28", "shard_rows=3", f"tasks={TASKS}",
             "tokenizer.preset=null", "tokenizer.weights=dino.safetensors", "tokenizer.dinov2.grid=2")]  # fmt: skip
    hpc_gen(workspace, "run", config, *small, "name=alone", "data.table=tables/alone", variables=variables)
    words = [*small, "name=array", "data.table=tables/array", "--cluster", "lab", "--set", "retries=9"]
    hpc_gen(workspace, "submit", config, *words, variables=variables)
    run, draw, index = (
        RunFolder(workspace / "runs" / "array"),
        random.Random(SEED),
        workspace / "tables/array/index.json",
    )
    for _ in range(2):
        before = begun(run)
        until(lambda before=before: begun(run) >= before + 1 or index.exists(), "work goes on", 240)
        until(lambda: kill_one(run, draw) or index.exists(), "a task to kill", 60)
    until(index.exists, "the stage ends", 300)
    until(lambda: not lab.run(["squeue", "-h", "-n", "array.encode"]).stdout.strip(), "its jobs end", 120)
    table, alone = (Table.open(workspace / "tables" / name, verify=True) for name in ("array", "alone"))
    assert table.index.to_json() == alone.index.to_json() and len(table.index.names) == 16
    names = table.names(np.arange(table.rows)) or []
    assert set(names) == {f"train/{folder}/{i:02d}.jpg" for folder in ("cat", "dog") for i in range(24)}
