"""The zip of EDM's dataset tool is read to the last bit, and images are cut as the tool cuts them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_files import samples
from PIL import Image
from safetensors.torch import load_file

from hpc_gen.data.crops import crop
from hpc_gen.data.index import LABELS
from hpc_gen.data.table import Table
from shard_tools.convert import Wish, convert, open_rows
from shard_tools.sources import open_source

ZIPS = samples("gdd", "dataset_zip.zip")


@pytest.mark.parametrize("path", ZIPS, ids=range(len(ZIPS)))
def test_images_and_labels_as_a_source_and_as_a_table(path: Path, tmp_path: Path) -> None:
    golden = load_file(path.with_suffix(".safetensors"))
    config = json.loads(path.with_suffix(".json").read_text())["config"]
    images = sum(name.startswith("out.zip.image") for name in golden)
    images //= 2 if config["xflip"] else 1  # the others are their mirror images
    wanted = torch.stack([golden[f"out.zip.image{number:02d}"] for number in range(images)])
    labels = [int(golden[f"out.zip.label{number:02d}"].argmax()) for number in range(images)]
    source = open_source("edm_zip", path)
    split = source.splits["train"]
    assert len(split) == images == len(config["zip_listing"]) - 1 and source.num_classes == config["label_dim"]
    assert split.labels.tolist() == labels
    pixels = [torch.from_numpy(np.array(split.item(number)[0])).permute(2, 0, 1) for number in range(images)]
    assert torch.equal(torch.stack(pixels), wanted)
    convert(open_rows(path), tmp_path / "table", Wish(), print)
    found = Table.open(tmp_path / "table", verify=True).read(np.arange(images), ("pixels", LABELS))
    assert torch.equal(found["pixels"], wanted) and found[LABELS].tolist() == labels


@pytest.mark.parametrize("path", ZIPS, ids=range(len(ZIPS)))
def test_crops(path: Path) -> None:
    golden = load_file(path.with_suffix(".safetensors"))
    checked = 0
    for name, wanted in golden.items():
        found = re.fullmatch(r"out\.(center_crop|scale)_(\d+)_(\d+|gray)", name)
        if found is None:
            continue
        key = f"in.image{found[3]}" if found[3] != "gray" else "in.gray"
        image = Image.fromarray(golden[key].numpy()).convert("RGB")
        cut = crop({"center_crop": "edm_center", "scale": "edm_stretch"}[found[1]], image, int(found[2]))
        assert np.array_equal(np.asarray(cut), wanted.numpy()), name
        checked += 1
    assert checked
