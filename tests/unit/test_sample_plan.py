"""The sampling plan: blocks, class plans, its hash, and the file that guards a folder of samples."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpc_gen.data.write import write_table
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.sampling.plan import SamplePlan, method_hash, read_plan
from hpc_gen.stages.build import open_table
from tests.support import toy_run

PLAN = SamplePlan(
    run_identity="r" * 64,
    checkpoint_images_seen=64,
    checkpoint_manifest_sha256="m" * 64,
    ema="main",
    method_hash="h" * 64,
    seed=5,
    num_images=40,
    block_images=16,
    batch=8,
    threads=1,
    device="cpu",
    classes="balanced",
    num_classes=4,
    settings={"steps": 3},
)


@given(st.integers(1, 500), st.integers(1, 70))
def test_blocks_cover_every_image_once(num_images, block_images):
    plan = replace(PLAN, num_images=num_images, block_images=block_images, batch=1, num_classes=0)
    blocks = plan.blocks()
    assert [i for block in blocks for i in block.ids] == list(range(num_images))
    assert all(len(block.ids) == block_images for block in blocks[:-1])
    assert [block.name for block in blocks] == [f"{i:06d}" for i in range(len(blocks))]


@pytest.mark.parametrize("classes", ["balanced", "sorted"])
def test_every_class_has_the_same_count(classes):
    labels = replace(PLAN, classes=classes).labels(torch.arange(40))
    assert labels.dtype == torch.int64
    assert torch.bincount(labels).tolist() == [10, 10, 10, 10]
    assert labels[:5].tolist() == ([0, 1, 2, 3, 0] if classes == "balanced" else [0] * 5)


def test_uniform_labels_are_a_function_of_the_id():
    plan = replace(PLAN, classes="uniform", num_images=4001)
    labels = plan.labels(torch.arange(4000))
    assert torch.bincount(labels).min() > 900
    assert torch.equal(plan.labels(torch.tensor([77, 3])), labels[[77, 3]])
    assert not torch.equal(replace(plan, seed=6).labels(torch.arange(4000)), labels)


def test_without_classes_all_labels_are_zero():
    assert replace(PLAN, num_classes=0, num_images=41).labels(torch.arange(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize(("num_images", "fix"), [(41, "use 40 or 44"), (3, "use 4, or")])
def test_counts_that_do_not_divide_are_told(num_images, fix):
    with pytest.raises(UserError, match=f"num_images {num_images} is not a multiple of the 4 classes.*{fix}"):
        replace(PLAN, num_images=num_images)


@pytest.mark.parametrize(
    "change",
    [
        {"run_identity": "x"},
        {"checkpoint_images_seen": 65},
        {"checkpoint_manifest_sha256": "x"},
        {"ema": None},
        {"method_hash": "x"},
        {"seed": 6},
        {"num_images": 44},
        {"block_images": 8},
        {"batch": 4},
        {"threads": 2},
        {"device": "cuda"},
        {"classes": "sorted"},
        {"num_classes": 8},
        {"settings": {"steps": 4}},
        {"table_identity": "t"},
    ],
)
def test_every_field_is_in_the_hash_and_named_when_it_differs(change, tmp_path):
    PLAN.write(tmp_path)
    other = replace(PLAN, **change)
    assert other.hash != PLAN.hash
    with pytest.raises(UserError, match=f"is another plan: {next(iter(change))} is"):
        other.write(tmp_path)
    assert set(change) <= set(PLAN.to_json())


def test_all_fields_are_written_and_read_back(tmp_path):
    assert set(PLAN.to_json()) - {"format"} == set(SamplePlan.__dataclass_fields__) - {
        "table",
        "listed",
        "classes_sha256",
        "row_plan",
    }
    PLAN.write(tmp_path)
    PLAN.write(tmp_path)  # the same plan again is no problem
    assert read_plan(tmp_path) == PLAN
    assert json.loads((tmp_path / "plan.json").read_text())["hash"] == PLAN.hash


def test_damaged_and_missing_plans(tmp_path):
    with pytest.raises(UserError, match="run the sample stage first"):
        read_plan(tmp_path)
    PLAN.write(tmp_path)
    path = tmp_path / "plan.json"
    path.write_text(path.read_text().replace('"seed": 5', '"seed": 6'))
    with pytest.raises(DataError, match="its hash does not fit its fields"):
        read_plan(tmp_path)
    path.write_text("{")
    with pytest.raises(DataError, match="is not a sampling plan"):
        read_plan(tmp_path)


def test_rows_of_the_conditioning_table_wrap(tmp_path):
    toy_run.write_table(tmp_path / "table", rows=6, shard_rows=4)
    table = open_table(tmp_path, "table")
    rows = replace(PLAN, table=table).rows(torch.tensor([1, 7, 5]), ["pixels", "labels"])
    assert torch.equal(rows["pixels"][0], rows["pixels"][1])
    assert rows["labels"].tolist() == [1, 1, 1]
    assert replace(PLAN, table=table).hash == PLAN.hash
    with pytest.raises(UserError, match=r"table columns \(pixels\), but the plan has no table"):
        PLAN.rows(torch.tensor([0]), ["pixels"])


def test_method_hash_ignores_the_order_of_keys():
    assert method_hash({"name": "a", "depth": 1}) == method_hash({"depth": 1, "name": "a"})
    assert method_hash({"name": "a", "depth": 1}) != method_hash({"name": "a", "depth": 2})


def test_rows_drawn_at_random_are_a_function_of_the_id(tmp_path):
    """A bank is drawn from uniformly with replacement, the same on any number of tasks; plans in order keep their hash."""
    write_table(
        tmp_path / "bank",
        {"cls_tokens": torch.arange(50.0).view(50, 1), "labels": torch.zeros(50).long()},
        shard_rows=20,
        num_classes=1,
    )
    plan = replace(PLAN, table=open_table(tmp_path, "bank"), row_plan="uniform")
    ids = torch.arange(4000)
    rows = plan.rows(ids, ["cls_tokens"])["cls_tokens"].view(-1).long()
    assert torch.bincount(rows, minlength=50).min() > 40
    assert torch.equal(plan.rows(torch.tensor([77, 3]), ["cls_tokens"])["cls_tokens"].view(-1).long(), rows[[77, 3]])
    assert plan.hash != PLAN.hash and replace(plan, row_plan="in_order").hash == PLAN.hash
    assert type(plan).from_json(json.loads(json.dumps(plan.to_json()))) == replace(plan, table=None)
    in_order = replace(plan, row_plan="in_order").rows(torch.tensor([0, 51]), ["cls_tokens"])["cls_tokens"]
    assert in_order.view(-1).tolist() == [0, 1]
