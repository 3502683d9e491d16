"""Damaged and unfitting tables as a training meets them: one sentence, and the run goes on once they are whole."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import experiments
import numpy as np
import pytest
import torch
from experiments import LINEAR, TABLE, Workspace

from hpc_gen.data.index import ShardInfo, TableIndex
from hpc_gen.data.ptshard import columns_of, content_sha256
from hpc_gen.data.table import Table
from hpc_gen.data.write import write_table
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError, ExitCode, UserError

SHARD = "shard_00001.pt"
AGAIN = "restore it or encode the table again"


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: write(path, b""), rf"shard \S+{SHARD} has 0 bytes, the index says \d+; {AGAIN}"),
    "truncated": (
        lambda path: write(path, path.read_bytes()[:-700]),
        rf"shard \S+{SHARD} has \d+ bytes, the index says \d+; {AGAIN}",
    ),
    "missing": (
        lambda path: path.unlink(),
        rf"shard \S+{SHARD} cannot be opened \(No such file or directory\); {AGAIN}",
    ),
    "a folder": (
        lambda path: (path.unlink(), path.mkdir()),
        rf"shard \S+{SHARD} has \d+ bytes, the index says \d+; {AGAIN}",
    ),
    "bytes of something else": (
        lambda path: write(path, bytes(len(path.read_bytes()))),
        rf"shard \S+{SHARD} cannot be read \(.*\); {AGAIN}",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_shard_that_is_damaged(workspace: Workspace, name: str) -> None:
    damage, sentence = DAMAGES[name]
    path = workspace.path / TABLE / SHARD
    whole = path.read_bytes()
    run = workspace.run("a", text=LINEAR)
    damage(path)
    with pytest.raises(DataError) as caught:
        workspace.train(run)
    assert re.fullmatch(sentence, str(caught.value)), str(caught.value)
    assert caught.value.exit_code == ExitCode.DATA
    if path.is_dir():
        path.rmdir()
    path.write_bytes(whole)
    assert workspace.train(run) == ExitCode.DONE
    other = workspace.run("b", text=LINEAR)
    assert workspace.train(other) == ExitCode.DONE
    assert experiments.contents(run.checkpoints / f"{96:012d}") == experiments.contents(
        other.checkpoints / f"{96:012d}"
    )


def test_a_flipped_bit_is_found_by_verify_and_reading_never_ends_otherwise_than_in_a_sentence(tmp_path: Path) -> None:
    """Reading trusts bytes of the right size (hashing all of a table at each start takes hours); `verify` does not."""
    columns = {"x": torch.arange(24.0).reshape(8, 3), "labels": torch.arange(8) % 4}
    write_table(tmp_path / "t", columns, shard_rows=8, num_classes=4)
    path = tmp_path / "t" / TableIndex.read(tmp_path / "t").shards[0].file
    good = path.read_bytes()
    told = 0
    for place in range(0, len(good), 3):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        try:
            batch = Table.open(tmp_path / "t").read(np.arange(8), ("x", "labels"))
            assert batch["x"].shape == (8, 3)
        except DataError as error:
            told += 1
            assert str(error).startswith(f"shard {path}") and "again" in str(error)
        (problem,) = Table.open(tmp_path / "t").verify()
        assert str(path) in problem
    assert told > 50


def relabelled(folder: Path, label: int) -> None:
    """One label changed by a writer that made the index fit again."""
    index = TableIndex.read(folder)
    path = folder / SHARD
    shard = {name: column.clone() for name, column in torch.load(path, weights_only=True).items()}
    shard["labels"][5] = label
    path.unlink()
    torch.save(shard, path)
    facts = ShardInfo(SHARD, 64, path.stat().st_size, commit.sha256_file(path), content_sha256(shard))
    shards = tuple(facts if info.file == SHARD else info for info in index.shards)
    TableIndex(columns_of(shard), shards, index.num_classes).write(folder)


@pytest.mark.parametrize("label", [4, -1, 2**40])
def test_a_label_out_of_range(workspace: Workspace, label: int) -> None:
    relabelled(workspace.path / TABLE, label)
    with pytest.raises(DataError) as caught:
        workspace.train(workspace.run("a", text=LINEAR))
    low, high = min(0, label), max(3, label)
    assert re.fullmatch(
        rf"shard \S+{SHARD}, column 'labels': labels run from {low} to {high}, the index has 4 classes; encode the "
        "table again",
        str(caught.value),
    )


def test_latents_of_another_size(workspace: Workspace) -> None:
    """The table holds 8 x 8 latents; the method is made for 16 x 16 ones."""
    moments = torch.randn(16, 8, 8, 8).half()
    columns = {"moments": moments, "moments_flip": moments.flip(-1).contiguous(), "labels": torch.arange(16) % 4}
    tokenizer = {"name": "kl_vae", "architecture": {}, "weights_sha256": "0" * 64, "scale": 1.0, "shift": 0.0}
    index = write_table(workspace.path / "tables/latents", columns, shard_rows=8, num_classes=4)
    replace(index, tokenizer=tokenizer).write(workspace.path / "tables/latents")
    latents = ("data.table=tables/latents", "data.validation_table=null")
    run = workspace.run("a", *latents, "method.input=moments", "method.channels=4", "method.image_size=256")
    with pytest.raises(UserError) as caught:
        workspace.train(run)
    assert str(caught.value) == (
        "column 'moments' of the training table has rows of shape [8, 8, 8], but method.image_size = 256 and "
        "method.channels = 4 with method.tokenizer_stride = 16 need [8, 16, 16]; change these keys or encode the table anew"
    )
    run = workspace.run("b", *latents)
    with pytest.raises(
        UserError, match=r"method\.input is 'pixels', but the training table has no column 'pixels' \(it has "
    ):
        workspace.train(run)
