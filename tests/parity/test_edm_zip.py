"""The zip of EDM's dataset tool is read to the last bit, and images are cut as the tool cuts them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from golden_files import roots
from PIL import Image
from safetensors.torch import load_file

from hpc_gen.data.crops import crop
from hpc_gen.data.index import LABELS
from hpc_gen.data.table import Table
from shard_tools.convert import Wish, convert, open_rows
from shard_tools.sources import open_source

ZIPS = [root / "gdd" / "dataset_zip.zip" for root in roots() if (root / "gdd" / "dataset_zip.zip").is_file()]
IMAGES = 6  # the golden's others are their mirror images


def test_a_zip_is_there() -> None:
    assert ZIPS


@pytest.mark.parametrize("path", ZIPS, ids=range(len(ZIPS)))
def test_images_and_labels_as_a_source_and_as_a_table(path: Path, tmp_path: Path) -> None:
    golden = load_file(path.with_suffix(".safetensors"))
    wanted = torch.stack([golden[f"out.zip.image{number:02d}"] for number in range(IMAGES)])
    labels = [int(golden[f"out.zip.label{number:02d}"].argmax()) for number in range(IMAGES)]
    source = open_source("edm_zip", path)
    split = source.splits["train"]
    assert len(split) == IMAGES and source.num_classes == len(golden["out.zip.label00"])
    assert split.labels.tolist() == labels
    pixels = [torch.from_numpy(np.array(split.item(number)[0])).permute(2, 0, 1) for number in range(IMAGES)]
    assert torch.equal(torch.stack(pixels), wanted)
    convert(open_rows(path), tmp_path / "table", Wish(), print)
    found = Table.open(tmp_path / "table", verify=True).read(np.arange(IMAGES), ("pixels", LABELS))
    assert torch.equal(found["pixels"], wanted) and found[LABELS].tolist() == labels


@pytest.mark.parametrize("path", ZIPS, ids=range(len(ZIPS)))
def test_crops(path: Path) -> None:
    golden = load_file(path.with_suffix(".safetensors"))
    for number in range(3):
        image = Image.fromarray(golden[f"in.image{number}"].numpy())
        for name, key in (("edm_center", "center_crop"), ("edm_stretch", "scale")):
            assert np.array_equal(np.asarray(crop(name, image, 16)), golden[f"out.{key}_16_{number}"].numpy()), name
    grey = Image.fromarray(golden["in.gray"].numpy()).convert("RGB")
    assert np.array_equal(np.asarray(crop("edm_center", grey, 8)), golden["out.center_crop_8_gray"].numpy())
