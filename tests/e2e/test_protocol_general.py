"""The protocol is general: three toy methods train, resume and sample with training/ and sampling/ as they are."""

from __future__ import annotations

import filecmp
import os
from pathlib import Path

import pytest
import torch
import yaml

from hpc_gen.config import loader
from hpc_gen.data.table import Table
from hpc_gen.data.write import write_table
from hpc_gen.runtime.journal import history
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.sampling.images import read_png
from hpc_gen.stages import run_setup, runner
from hpc_gen.training.checkpoint import read, storage

SUPPORT = Path(__file__).resolve().parents[1] / "support"
ROWS = 192


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with one table that serves all toys; children find the toys on PYTHONPATH."""
    generator = torch.Generator().manual_seed(3)
    code = torch.randn(ROWS, 3, generator=generator)
    pixels = (
        ((torch.tanh(code @ torch.randn(3, 16, generator=generator)) + 1) * 127).to(torch.uint8).view(ROWS, 1, 4, 4)
    )
    tokens = torch.randint(0, 3, (ROWS, 1), generator=generator).repeat(1, 16)
    tokens[:, 1::2] = (tokens[:, 1::2] + 1) % 3  # alternating, so the next token can be learnt
    write_table(tmp_path / "tables" / "toy", {"pixels": pixels, "code": code, "tokens": tokens}, shard_rows=64)
    monkeypatch.setenv("HPC_GEN_WORKSPACE", str(tmp_path))
    root = SUPPORT.parents[1]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SUPPORT), str(root)]))
    return tmp_path


def experiment(workspace: Path, name: str, method: str, **more: object) -> RunFolder:
    """A run folder of a small experiment of a toy; `more` replaces top-level sections."""
    content: dict[str, object] = {
        "name": name,
        "seed": 5,
        "method": {"name": f"toys:{method}"},
        "data": {"table": "tables/toy", "shuffle_shards": 2},
        "train": {
            "total_images": 512,
            "global_batch": 16,
            "ranks": 2,
            "optimizer": {"lr": 0.02, "clip": None},
            "ema": {"main": {"decay": 0.5}},
            "log_every": 64,
            "save_every": 256,
        },
        "sample": {"num_images": 8, "block_images": 4, "batch": 4, "classes": "uniform", "tasks": 2},
        "stages": ["train", "sample"],
        **more,
    }
    path = workspace / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return run_setup.prepare_run(loader.load(path), workspace)


def run_all(run: RunFolder) -> list[str]:
    """Run the experiment's stages through the real launcher; the lines it printed."""
    lines: list[str] = []
    assert runner.run_stages(run, None, lines.append) == 0, lines
    return lines


def same_folder(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    return names == sorted(path.name for path in other.iterdir()) and not any(
        filecmp.cmpfiles(one, other, names, shallow=False)[1:]
    )


@pytest.mark.timeout(240)
def test_two_players_with_r1_and_buffers(workspace: Path) -> None:
    """G, D and R1 turns with a buffer that batches change: trains, resumes byte-equal on two ranks, samples."""
    whole = experiment(workspace, "whole", "TWO_PLAYER")
    run_all(whole)
    train = loader.load(workspace / "whole.yaml")
    cut = run_setup.prepare_run(loader.with_changes(train, {"train.stop_at_images": 208}), workspace, "cut")
    assert runner.run_stages(cut, ["train"], print) == 0
    run_setup.prepare_run(train, workspace, "cut")
    assert runner.run_stages(cut, ["train"], print) == 0
    assert same_folder(read.newest(whole).path, read.newest(cut).path)

    keys = storage.keys(read.newest(whole).path)
    assert "model/discriminator/power" in keys and "optim/generator/0.weight/exp_avg" in keys
    start = torch.ones(12)
    assert not torch.equal(read.load_role(read.newest(whole).path, "discriminator")["power"], start)
    rows = history(whole)
    assert {"g/loss", "d/loss", "d/fake", "d/real"} <= rows[-1].data.keys()
    assert any("r1/penalty" in row.data for row in rows)
    images = sorted((whole.samples("main")).rglob("*.png"))
    assert len(images) == 8 and read_png(images[0]).shape == (3, 4, 4)


@pytest.mark.timeout(120)
def test_no_labels_but_a_table_condition(workspace: Path) -> None:
    """The table has no labels; image `id` is conditioned on row `id`, and comes out like that row's image."""
    changes = {"optimizer": {"lr": 0.05, "clip": None}, "total_images": 8192, "ranks": 1, "save_every": 8192}
    train = {"global_batch": 16, "ema": {}, "log_every": 256, **changes}
    sample = {"num_images": 8, "block_images": 8, "batch": 8, "classes": "uniform", "ema": None}
    run = experiment(workspace, "condition", "TABLE_CONDITION", train=train, sample=sample)
    run_all(run)
    rows = history(run)
    assert rows[-1].data["loss"] < 0.5 * rows[0].data["loss"]
    real = Table.open(workspace / "tables" / "toy").read(torch.arange(8), ("pixels",))["pixels"].float()
    made = torch.stack([read_png(path)[:1] for path in sorted(run.samples("main").rglob("*.png"))]).float()
    own = (made - real).square().mean()
    other = (made - real.roll(1, 0)).square().mean()
    assert own < 0.5 * other


@pytest.mark.timeout(180)
def test_token_chain_of_two_stages(workspace: Path) -> None:
    """tokens -> stage 1 -> codec (a stage of the user's own) -> table -> stage 2 -> images, as stages over tables."""
    train = {
        "total_images": 4096,
        "global_batch": 16,
        "optimizer": {"lr": 0.05, "clip": None},
        "ema": {"main": {"decay": 0.5}},
        "log_every": 256,
        "save_every": 4096,
    }
    options = {"table": "tables/refined"}
    extra = {"codec": {"worker": "toys:codec", "after": ["train"], "options": options}}
    first = experiment(workspace, "first", "FIRST_TOKENS", train=train, extra_stages=extra, stages=["train", "codec"])
    run_all(first)
    refined = Table.open(workspace / "tables" / "refined", verify=True)
    assert refined.rows == ROWS and list(refined.index.columns) == ["refined"]
    again = run_all(first)
    assert len(again) == 2  # both stages find their work done

    second = experiment(workspace, "second", "REFINED_TOKENS", train=train, data={"table": "tables/refined"})
    run_all(second)
    losses = [row.data["loss"] for row in history(second)]
    assert losses[-1] < 0.5 * losses[0]
    assert len(sorted(second.samples("main").rglob("*.png"))) == 8
