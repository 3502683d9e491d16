"""Latents as the reference's caching program stores them: its files are read to the last bit, ours are like them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import toy_tokenizer
from golden_files import samples
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from hpc_gen import tokenizers
from hpc_gen.config.experiment import EncodeConfig
from hpc_gen.data.index import LABELS
from hpc_gen.data.table import Table
from hpc_gen.runtime import commit
from hpc_gen.stages.units import Ledger
from shard_tools.encode import EncodeWorker

SAMPLES = samples("energy", "cache_sample")
KEYS = ("moments", "moments_flip")
DTYPES = {"ptshard": torch.float16, "pt": torch.float16, "npz": torch.float32}


def expected_rows(sample: Path) -> dict[str, dict[str, Tensor]]:
    """{image name: {key: float32 [2C, h, w]}} in the sorted order of the names."""
    stored = load_file(sample / "expected.safetensors")
    names = sorted(key.removeprefix("moments.") for key in stored if key.startswith("moments."))
    return {name: {key: stored[f"{key}.{name}"] for key in KEYS} for name in names}


@pytest.mark.parametrize("layout", DTYPES)
@pytest.mark.parametrize("sample", SAMPLES, ids=range(len(SAMPLES)))
def test_the_references_files_are_read_exactly(sample: Path, layout: str) -> None:
    rows = expected_rows(sample)
    classes = sorted({name.partition("_")[0] for name in rows})
    table = Table.open(sample / layout)
    assert table.rows == len(rows) and table.verify() == [] and not table.index.indexed
    assert table.index.layout == layout and table.index.num_classes == len(classes)
    assert table.index.class_names == (() if layout == "ptshard" else tuple(classes))
    found = table.read(np.arange(table.rows), (*KEYS, LABELS))
    assert found[LABELS].tolist() == [classes.index(name.partition("_")[0]) for name in rows]
    for key in KEYS:
        wanted = torch.stack([row[key] for row in rows.values()]).to(DTYPES[layout])
        assert found[key].dtype == DTYPES[layout] and torch.equal(found[key], wanted), key


def encode(workspace: Path, layout: str, rows: dict[str, dict[str, Tensor]], shard_rows: int) -> Path:
    """Run the stage over images named as the sample's; image i is grey of value i and stands for row i."""
    for i, name in enumerate(rows):
        folder = workspace / "images" / name.partition("_")[0]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, i, i)).save(folder / f"{name}.png")
    section = {
        "source": "folder", "source_path": "images", "image_size": 8, "shard_rows": shard_rows, "format": layout,
        "tokenizer": {"name": "kl_vae", "weights": "toy"},
    }  # fmt: skip
    worker = EncodeWorker(EncodeConfig.model_validate(section), workspace, {"train": "table"})
    book = Ledger(workspace / "ledger", workspace)
    for unit in worker.units():
        staging = commit.make_folder(workspace / "staging" / unit.name)
        book.commit(unit, worker.do(unit, staging, lambda: None), worker.fingerprint())
    worker.finish()
    return workspace / "table"


def shard_files(folder: Path) -> dict[str, Path]:
    found = [path for path in folder.rglob("*") if path.suffix in (".pt", ".npz")]
    return {path.relative_to(folder).as_posix(): path for path in sorted(found)}


def load(path: Path) -> dict[str, Tensor]:
    """A file as the reference's readers load it."""
    if path.suffix == ".npz":
        return {key: torch.from_numpy(array) for key, array in np.load(path).items()}
    return torch.load(path, mmap=True, weights_only=True)


@pytest.mark.parametrize("layout", DTYPES)
@pytest.mark.parametrize("sample", SAMPLES, ids=range(len(SAMPLES)))
def test_our_files_are_like_the_references(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sample: Path, layout: str
) -> None:
    rows = expected_rows(sample)
    monkeypatch.setitem(tokenizers.TOKENIZERS, "kl_vae", toy_tokenizer.of_rows(dict(enumerate(rows.values()))))
    theirs = shard_files(sample / layout)
    first = load(next(iter(theirs.values())))
    ours = shard_files(encode(tmp_path, layout, rows, len(first.get(LABELS, [0]))))
    assert list(ours) == list(theirs), "file names"
    for name, path in ours.items():
        mine, wanted = load(path), load(theirs[name])
        assert list(mine) == list(wanted), "keys and their order"
        assert {k: (t.dtype, t.shape) for k, t in mine.items()} == {k: (t.dtype, t.shape) for k, t in wanted.items()}
        if layout != "ptshard":
            assert all(torch.equal(mine[key], wanted[key]) for key in KEYS)
        if layout == "npz":
            assert path.read_bytes() == theirs[name].read_bytes()
    # Our shards are shuffled once, theirs are in sorted path order: the same rows with the same labels all the same.
    assert row_set(ours.values()) == row_set(theirs.values())


def row_set(paths: object) -> set[tuple[bytes, ...]]:
    """Every row's bytes and, where the file has it, its label."""
    found: set[tuple[bytes, ...]] = set()
    for path in paths:  # type: ignore[attr-defined]
        columns = load(path)
        if LABELS not in columns:
            columns = {key: tensor.unsqueeze(0) for key, tensor in columns.items()}
        count = len(columns["moments"])
        found |= {tuple(columns[key][i].numpy().tobytes() for key in sorted(columns)) for i in range(count)}
    return found
