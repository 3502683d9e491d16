"""The stage `assign`: codes of a table of features, in units, the same however they were made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpc_gen.data.index import LABELS, ROW_ID, ColumnInfo, ShardInfo, TableIndex
from hpc_gen.data.ptshard import columns_of, content_sha256, write_shard
from hpc_gen.data.row_names import write_names
from hpc_gen.data.table import Table
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.stages.units import Ledger
from hpc_gen.tokenizers.kmeans import Centroids
from shard_tools.assign import AssignOptions, AssignWorker

ROWS, TOKENS, WIDTH, CODES = 22, 4, 6, 5
NAMES = [f"train/{row}.png" for row in range(ROWS)]


@pytest.fixture
def features(tmp_path: Path) -> dict[str, torch.Tensor]:
    """A table of features in shards of 8 rows, and centroids."""
    generator = torch.Generator().manual_seed(0)
    columns = {
        name: torch.randn(ROWS, TOKENS, WIDTH, generator=generator).half() for name in ("features", "features_flip")
    }
    columns[LABELS] = torch.randint(0, 3, (ROWS,), generator=generator)
    columns[ROW_ID] = torch.randperm(ROWS, generator=generator)
    infos = []
    for number, begin in enumerate(range(0, ROWS, 8)):
        part = {name: column[begin : begin + 8].contiguous() for name, column in columns.items()}
        path = tmp_path / "f" / f"shard_{number:05d}.pt"
        write_shard(path, part)
        size, sha256 = path.stat().st_size, commit.sha256_file(path)
        infos.append(ShardInfo(path.name, len(part[LABELS]), size, sha256, content_sha256(part)))
    made_by = {"name": "dinov2", "weights_sha256": "w"}
    names = [write_names(tmp_path / "f", n, NAMES[8 * n : 8 * n + 8]) for n in range(3)]
    index = TableIndex(columns_of(columns), tuple(infos), num_classes=3, tokenizer=made_by, names=tuple(names))
    index.write(tmp_path / "f")
    Centroids(torch.randn(CODES, WIDTH, generator=generator)).write(tmp_path / "km.npy")
    return columns


def make_worker(workspace: Path, **changes: Any) -> AssignWorker:
    options = {"table": "f", "centroids": "km.npy", "output": "codes"} | changes
    return AssignWorker(AssignOptions.model_validate(options), workspace)


def run(workspace: Path, worker: AssignWorker, order: list[int] | None = None, ledger: str = "l") -> list[str]:
    book, done, units = Ledger(workspace / ledger, workspace), [], worker.units()
    wanted = [units[i] for i in order] if order is not None else units
    for unit in book.missing(wanted, worker.fingerprint()):
        staging = commit.make_folder(commit.staging_path(workspace / "staging" / unit.name))
        book.commit(unit, worker.do(unit, staging, lambda: None), worker.fingerprint())
        commit.remove_tree(staging)
        done.append(unit.name)
    if order is None:
        worker.finish()
    return done


def test_codes_of_a_table(tmp_path: Path, features: dict[str, torch.Tensor]) -> None:
    assert run(tmp_path, make_worker(tmp_path)) == ["shard-00000", "shard-00001", "shard-00002"]
    table = Table.open(tmp_path / "codes", verify=True)
    found = table.read(np.arange(ROWS), tuple(table.index.columns))
    vectors = torch.from_numpy(np.load(tmp_path / "km.npy")).double()
    for code, feature in (("codes", "features"), ("codes_flip", "features_flip")):
        nearest = torch.cdist(features[feature].double(), vectors.expand(ROWS, -1, -1)).argmin(-1)
        assert found[code].dtype == torch.int32 and torch.equal(found[code].long(), nearest), code
    assert torch.equal(found[LABELS], features[LABELS]) and torch.equal(found[ROW_ID], features[ROW_ID])
    assert table.index.tokenizer["name"] == "dinov2" and table.index.tokenizer["centroids"]["codes"] == CODES
    assert table.index.columns["codes"] == ColumnInfo("int32", (TOKENS,)) and table.shard_rows == [8, 8, 6]
    assert table.names(np.arange(ROWS)) == NAMES
    assert run(tmp_path, make_worker(tmp_path)) == []


@pytest.mark.parametrize("order", [[2, 0, 1], [1]])
def test_the_order_of_units_does_not_matter(tmp_path: Path, features: object, order: list[int]) -> None:
    run(tmp_path, make_worker(tmp_path, output="a"), ledger="la")
    run(tmp_path, make_worker(tmp_path, output="b"), order, ledger="lb")
    run(tmp_path, make_worker(tmp_path, output="b"), ledger="lb")
    contents = [
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in ("a", "b")
    ]
    assert contents[0] == contents[1]


def test_refusals(tmp_path: Path, features: object) -> None:
    with pytest.raises(UserError, match="column 'x': no such column, but codes are of floats .* it has: features"):
        make_worker(tmp_path, column="x").units()
    with pytest.raises(UserError, match="column 'labels': int64"):
        make_worker(tmp_path, column=LABELS).units()
    with pytest.raises(UserError, match="there are no centroids"):
        make_worker(tmp_path, centroids="none.npy").units()
    with pytest.raises(DataError, match="SHA-256"):
        make_worker(tmp_path, centroids_sha256="0" * 64).units()
    run(tmp_path, make_worker(tmp_path))
    Centroids(torch.randn(CODES, WIDTH)).write(tmp_path / "km.npy")
    with pytest.raises(UserError, match="table .*codes was encoded with centroids.content"):
        make_worker(tmp_path).units()
