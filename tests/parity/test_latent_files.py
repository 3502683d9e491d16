"""Latents that GMem and DiM leave on disk are read to the last bit, as they are and converted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from golden_files import samples
from safetensors.torch import load_file

from hpc_gen.data.index import LABELS
from hpc_gen.data.table import Table
from shard_tools.convert import Wish, convert, open_rows
from shard_tools.stats import channel_statistics

SHARDS = samples("gmem", "latent_shards")
FEATURES = samples("dim", "latent_feature_files")


@pytest.mark.parametrize("folder", SHARDS, ids=range(len(SHARDS)))
def test_the_shards_of_gmem(folder: Path, tmp_path: Path) -> None:
    """Rows in the order of the sorted files, every column, and the statistics of the golden case beside them."""
    files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    wanted = {name: torch.cat([file[name] for file in files]) for name in files[0]}
    table = Table.open(folder)
    rows = len(wanted[LABELS])
    assert table.rows == rows and table.index.layout == "safetensors" and table.verify() == []
    found = table.read(np.arange(rows), tuple(wanted))
    assert rows and len(wanted) == 7 and all(torch.equal(found[name], wanted[name]) for name in wanted)
    golden = load_file(folder.parent / "latent_dataset.safetensors")
    for item, row in enumerate(golden["in.item_index"].tolist()):
        latent, snippet, token = (
            "" if plain else "_flip" for plain in golden["in.use_unflipped(latent,repr,cls)"][item]
        )
        assert found[LABELS][row] == golden[f"out.item{item}.label"]
        assert torch.equal(found[f"representations{snippet}"][row], golden[f"out.item{item}.repr"])
        assert torch.equal(found[f"cls_tokens{token}"][row], golden[f"out.item{item}.cls"])
        latents = (found[f"latents{latent}"][row] - golden["out.mean"][0]) / golden["out.std"][0]
        assert torch.allclose(latents, golden[f"out.item{item}.latent"], rtol=0, atol=1e-5)
    statistics = channel_statistics(table, "latents")
    for key, name in (("mean", "mean"), ("std_unbiased", "std")):
        assert torch.allclose(torch.tensor(statistics[key]), golden[f"out.{name}"].flatten(), rtol=0, atol=1e-5)
    for layout in ("ptshard", "webdataset", "safetensors"):
        index = convert(open_rows(folder), tmp_path / layout, Wish(layout, shard_rows=5), print)
        made = Table.open(tmp_path / layout, verify=True)
        shards = [len(part) for part in torch.arange(rows).split(5)]
        assert index is not None and [shard.rows for shard in index.shards] == shards
        again = made.read(np.arange(rows), tuple(wanted))
        assert all(torch.equal(again[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("folder", FEATURES, ids=range(len(FEATURES)))
def test_the_features_of_dim(folder: Path, tmp_path: Path) -> None:
    """The sample is two files of one label each; a set of them, as the extraction numbers it, becomes a table."""
    arrays = [np.load(folder / f"{number}.npy.npz") for number in range(2)]
    features = tmp_path / "features"
    features.mkdir()
    for number, (image, mirrored) in enumerate([(0, False), (1, False), (0, True), (1, True)]):
        z = arrays[image]["z"] if not mirrored else -arrays[image]["z"]
        np.savez(features / f"{number}.npy.npz", z=z, label=arrays[image]["label"])
    convert(open_rows(features, feature_batch=2), tmp_path / "table", Wish(), print)
    found = Table.open(tmp_path / "table", verify=True).read([0, 1], ("moments", "moments_flip", LABELS))
    wanted = torch.from_numpy(np.stack([array["z"] for array in arrays]))
    assert torch.equal(found["moments"], wanted) and torch.equal(found["moments_flip"], -wanted)
    assert found[LABELS].tolist() == [int(np.ravel(array["label"])[0]) for array in arrays]
