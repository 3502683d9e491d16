"""Tables joined by row: columns are added without rewriting; what is not of the same rows is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from shard_files import latents

from hpc_gen.data.feed import Feed, FeedPlan
from hpc_gen.data.index import LABELS, ROW_ID
from hpc_gen.data.joined import JOIN_NAME, JoinedTable, join
from hpc_gen.data.order import BlockShuffle
from hpc_gen.data.table import Table
from hpc_gen.data.write import write_table
from hpc_gen.runtime.errors import DataError, UserError
from shard_tools.convert import Wish, convert, open_rows
from shard_tools.inspect import format_info, info

ROWS = 20
RECIPE = {
    "source": "folder",
    "source_content": "abc",
    "split": "train",
    "classes": [0],
    "limit": None,
    "row_order": "s",
}


def make(folder: Path, rows: int = ROWS, **recipe: object) -> Path:
    write_table(folder, latents(rows), shard_rows=8, num_classes=4, recipe=RECIPE | recipe)
    return folder


def snippets(folder: Path, rows: int = ROWS, labels: bool = True, layout: str = "ptshard", **recipe: object) -> Path:
    columns = {"snippets": torch.arange(rows * 3.0).reshape(rows, 3)}
    columns |= {LABELS: latents(rows)[LABELS]} if labels else {}
    write_table(folder, columns, shard_rows=6, num_classes=4 if labels else 0, layout=layout, recipe=RECIPE | recipe)  # type: ignore[arg-type]
    return folder


@pytest.mark.parametrize("layout", ["ptshard", "webdataset"])
def test_columns_are_added_without_rewriting(tmp_path: Path, layout: str) -> None:
    one, two = make(tmp_path / "latents"), snippets(tmp_path / "snippets", layout=layout)
    made = join(tmp_path / "both", [one, two])
    assert [path.name for path in (tmp_path / "both").iterdir()] == [JOIN_NAME]
    table = Table.open(tmp_path / "both", verify=True)
    assert isinstance(table, JoinedTable) and table.identity == made.identity != Table.open(one).identity
    assert set(table.index.columns) == {"moments", "moments_flip", LABELS, "snippets"}
    picked = [19, 0, 7, 8, 7]
    found = table.read(picked, ("snippets", LABELS, "moments"))
    assert list(found) == ["snippets", LABELS, "moments"]
    assert found["snippets"][:, 0].tolist() == [3.0 * row for row in picked]
    assert torch.equal(found["moments"], latents()["moments"][picked])
    assert table.shard_rows == [8, 8, 4] and table.index.num_classes == 4
    assert "both" in "\n".join(format_info(info(tmp_path / "both")))


def batches(table: Table, columns: tuple[str, ...]) -> list[tuple[list[int], torch.Tensor]]:
    plan = FeedPlan(0, 4, 4, rank=0, world_size=1, columns=columns)
    with Feed(table, BlockShuffle(table.shard_rows, 0, 2), plan, lambda images_seen: [], 0, end_images=40) as feed:
        return [(i.micro_batches[0].rows.tolist(), i.micro_batches[0].batch["moments"]) for i in feed]


def test_training_goes_through_it_as_through_the_first_table(tmp_path: Path) -> None:
    one, two = make(tmp_path / "latents"), snippets(tmp_path / "snippets")
    join(tmp_path / "both", [one, two])
    plain, both = (
        batches(Table.open(one), ("moments",)),
        batches(Table.open(tmp_path / "both"), ("moments", "snippets")),
    )
    assert [rows for rows, _ in plain] == [rows for rows, _ in both]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(plain, both, strict=True))


def test_the_joined_folder_moves_with_its_tables_and_can_be_converted(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    one, two = make(tmp_path / "old" / "latents"), snippets(tmp_path / "old" / "snippets")
    identity = join(tmp_path / "old" / "both", [one, two]).identity
    (tmp_path / "old").rename(tmp_path / "new")
    assert Table.open(tmp_path / "new" / "both").identity == identity
    convert(open_rows(tmp_path / "new" / "both"), tmp_path / "one", Wish(), print)
    table = Table.open(tmp_path / "one", verify=True)
    assert set(table.index.columns) == {"moments", "moments_flip", LABELS, "snippets"}
    assert table.read([19], ("snippets",))["snippets"][0].tolist() == [57.0, 58.0, 59.0]


def test_rows_meet_by_id_in_any_order_and_number(tmp_path: Path) -> None:
    ids = torch.arange(ROWS) * 3 + 5
    write_table(tmp_path / "a", latents() | {ROW_ID: ids}, shard_rows=8, num_classes=4)
    more = torch.cat([torch.tensor([1000, 2]), ids.flip(0)])
    write_table(tmp_path / "b", {"snippets": more.float()[:, None], ROW_ID: more}, shard_rows=6)
    table = join(tmp_path / "both", [tmp_path / "a", tmp_path / "b"])
    found = table.read(np.arange(ROWS), ("snippets", ROW_ID))
    assert torch.equal(found["snippets"][:, 0].long(), ids) and torch.equal(found[ROW_ID], ids)
    write_table(tmp_path / "c", {"snippets": more.float()[3:, None], ROW_ID: more[3:]}, shard_rows=6)
    with pytest.raises(
        UserError, match=r"c lacks 1 of the 20 rows of \S+a, the first with row_id 62; encode it of the same"
    ):
        join(tmp_path / "x", [tmp_path / "a", tmp_path / "c"])
    write_table(tmp_path / "d", {"snippets": more.float()[:, None], ROW_ID: more * 0 + 5}, shard_rows=6)
    with pytest.raises(UserError, match="d has the row_id 5 twice; encode it again"):
        join(tmp_path / "x", [tmp_path / "a", tmp_path / "d"])


def test_tables_that_are_not_of_the_same_rows(tmp_path: Path) -> None:
    one = make(tmp_path / "a")
    cases = {
        "another number": (snippets(tmp_path / "b", rows=19), "b has 19 rows, .*a 20; encode both of the same images"),
        "another source": (snippets(tmp_path / "c", source_content="x"), "source_content = 'abc' and 'x'"),
        "the same column": (make(tmp_path / "d"), "d has the column 'moments', which another of these has too"),
    }
    for name, (other, sentence) in cases.items():
        with pytest.raises(UserError, match=sentence):
            join(tmp_path / "x", [one, other])
        assert not (tmp_path / "x").exists(), name
    write_table(tmp_path / "e", {"s": torch.zeros(ROWS, 1), LABELS: torch.zeros(ROWS, dtype=torch.int64)}, shard_rows=8)
    with pytest.raises(UserError, match="row 1 has the label 3 in .*a and 0 in .*e: they are not of the same rows"):
        join(tmp_path / "x", [one, tmp_path / "e"])
    write_table(tmp_path / "f", {"s": torch.zeros(ROWS, 1)}, shard_rows=8)
    with pytest.raises(UserError, match="nothing shows that the rows of .*; say --trust-order if you know"):
        join(tmp_path / "x", [one, tmp_path / "f"])
    assert join(tmp_path / "trusted", [one, tmp_path / "f"], trust_order=True).rows == ROWS
    with pytest.raises(UserError, match="a join needs at least two tables"):
        join(tmp_path / "x", [one])
    with pytest.raises(UserError, match="a is not empty; name a new folder for the joined table"):
        join(one, [one, snippets(tmp_path / "g")])
    join(tmp_path / "dry", [one, tmp_path / "g"], dry_run=True)
    assert not (tmp_path / "dry").exists()


def test_a_part_that_changed_or_went(tmp_path: Path) -> None:
    one, two = make(tmp_path / "a"), snippets(tmp_path / "b")
    join(tmp_path / "both", [one, two])
    two.rename(tmp_path / "kept")
    with pytest.raises(DataError, match="b is not a folder"):
        Table.open(tmp_path / "both")
    snippets(tmp_path / "b", limit=20)
    with pytest.raises(
        DataError, match=r"join.json: table \S+b is not the one that was joined \(identity .*\); restore it, or"
    ):
        Table.open(tmp_path / "both")
    path = tmp_path / "both" / JOIN_NAME
    document = json.loads(path.read_text())
    for damaged in ("", "{}", json.dumps(document | {"by": "luck"}), json.dumps(document | {"tables": []})):
        path.write_text(damaged)
        with pytest.raises(DataError, match=r"join.json does not say a join of tables .*; join them again"):
            Table.open(tmp_path / "both")
