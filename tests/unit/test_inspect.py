"""`shards info` and `shards verify`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hpc_gen.data.index import TableIndex
from hpc_gen.data.write import write_table
from hpc_gen.runtime.errors import DataError
from shard_tools.inspect import format_info, info, verify


def make_table(folder: Path) -> TableIndex:
    columns = {"pixels": torch.zeros(10, 1, 4, 4, dtype=torch.uint8), "labels": torch.arange(10) % 3}
    return write_table(folder, columns, shard_rows=4, num_classes=3, recipe={"source": "test"})


def test_info(tmp_path: Path) -> None:
    index = make_table(tmp_path / "t")
    facts = info(tmp_path / "t")
    assert facts["rows"] == 10 and facts["num_shards"] == 3 and facts["rows_per_shard"] == [2, 4]
    assert facts["identity"] == index.identity and facts["bytes"] == sum(shard.bytes for shard in index.shards)
    assert json.loads(json.dumps(facts)) == facts
    text = "\n".join(format_info(facts))
    assert "10 in 3 shards of 2 to 4 rows" in text and "pixels: uint8 [1, 4, 4]" in text and index.identity in text


def test_info_shows_classes_statistics_and_what_was_left_out(tmp_path: Path) -> None:
    index = make_table(tmp_path)
    full = TableIndex(
        index.columns,
        index.shards,
        num_classes=20,
        class_names=tuple(f"class {i}" for i in range(20)),
        statistics={
            "columns": {"pixels": {"mean": [1.25], "std": [0.5]}},
            "label_histogram": {"0": 10},
            "skipped": {"unreadable": 7},
        },
        bad_images=tuple(f"train/{i}.png: broken" for i in range(7)),
    )
    full.write(tmp_path)
    text = "\n".join(format_info(info(tmp_path)))
    for wanted in (
        "mean 1.25, std 0.50",
        "0  class 0: 10",
        "... and 8 more",
        "left out  7: unreadable",
        "... and 2 more",
    ):
        assert wanted in text


def test_verify(tmp_path: Path) -> None:
    make_table(tmp_path)
    assert verify(tmp_path) == []
    path = tmp_path / "shard_00001.pt"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (tmp_path / "shard_00000.pt").unlink()
    problems = verify(tmp_path)
    assert len(problems) == 2 and "shard_00000.pt" in problems[0] and "shard_00001.pt" in problems[1]
    assert len(verify(tmp_path, full=False)) <= 2
    (tmp_path / "index.json").unlink()
    (problem,) = verify(tmp_path)
    assert "holds shards but no index.json" in problem
    with pytest.raises(DataError, match=r"no index\.json"):
        info(tmp_path)
