"""Previews: the same pictures from any number of ranks, equal padded shares, labels by name, captions, file names."""

import pytest
import torch
from torch import nn

from hpc_gen.data.table import Table
from hpc_gen.data.write import write_table
from hpc_gen.runtime.errors import UserError
from hpc_gen.runtime.randomness import Draw
from hpc_gen.sampling.preview import Chosen, caption, file_names, in_order, numbered, preview, share_of


class OneOf:
    """One rank of several that run one after the other."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size

    def gather_objects(self, obj):
        raise AssertionError("the caller gathers")


class Dots:
    """An image = its label as brightness, a pixel of noise of its id."""

    def __init__(self) -> None:
        self.network = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
        self.sizes: list[int] = []
        self.modes: set[bool] = set()

    def roles(self):
        return {"generator": self.network}

    def conditions(self, ids, plan):
        return {"labels": plan.labels(ids)}

    def generate(self, conditions, draws, settings, poll):
        poll()
        labels = conditions["labels"]
        self.sizes.append(len(labels))
        self.modes |= {module.training for module in self.network.modules()} | {torch.is_grad_enabled()}
        images = (labels * 20).to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 4, 4)
        images[:, :, 0, 0] = (draws.take("x", Draw(())).abs().clamp(0, 1) * 255).to(torch.uint8).view(-1, 1)
        return images


def _images(world_size: int, labels: list[int], batch: int | None = None, seed: int = 3) -> tuple[torch.Tensor, Dots]:
    method = Dots()
    parts = [
        preview(method, Chosen(labels, (), None), seed, None, OneOf(rank, world_size), lambda: None, batch=batch)
        for rank in range(world_size)
    ]
    return in_order(parts, len(labels)), method


@pytest.mark.parametrize("batch", [None, 1, 2, 3, 8])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_same_images_from_any_number_of_ranks(world_size, batch):
    labels = [0, 1, 2, 3, 4, 5, 6]
    alone, _ = _images(1, labels)
    together, method = _images(world_size, labels, batch)
    assert torch.equal(alone, together)
    assert len(set(method.sizes)) == 1 and len(method.sizes) % world_size == 0  # equal shares, full batches
    assert _images(world_size, labels, batch, seed=4)[0].ne(together).any()


def test_a_share_without_a_batch_is_cut_once():
    assert _images(3, list(range(7)))[1].sizes == [3, 3, 3]
    assert _images(4, [9, 1])[1].sizes == [1, 1, 1, 1]


def test_networks_are_in_eval_mode_without_gradients_and_come_back():
    _, method = _images(1, [1])
    assert method.modes == {False}
    assert all(module.training for module in method.network.modules())


@pytest.mark.parametrize(
    ("num_images", "batch", "world_size"), [(7, 2, 1), (7, 2, 3), (1, 4, 2), (16, 4, 2), (9, 64, 4)]
)
def test_shares_hold_every_image_once(num_images, batch, world_size):
    shares = [share_of(num_images, batch, rank, world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    ids = sorted(i for share in shares for part in share for i in part)
    assert ids == list(range(len(ids))) and len(ids) >= num_images
    assert len(ids) < num_images + batch * world_size
    parts = [[torch.tensor(list(part)) for part in share] for share in shares]
    assert in_order(parts, num_images).tolist() == list(range(num_images))


def test_no_labels_no_preview():
    with pytest.raises(UserError, match=r"train\.preview names no image; give at least one label or row"):
        preview(Dots(), Chosen((), (), None), 3, None, OneOf(0, 1), lambda: None)


class Rows(Dots):
    """An image = the value of its row as brightness."""

    def conditions(self, ids, plan):
        return {"labels": plan.rows(ids, ["value"])["value"]}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_same_rows_in_order_from_any_number_of_ranks(tmp_path, world_size):
    write_table(tmp_path, {"value": torch.arange(10)}, shard_rows=4)
    method = Rows()
    rows = [9, 0, 3, 3, 7]
    chosen = Chosen((), rows, Table.open(tmp_path))
    parts = [preview(method, chosen, 3, None, OneOf(rank, world_size), lambda: None) for rank in range(world_size)]
    images = in_order(parts, len(rows))
    assert images[:, 0, 2, 2].tolist() == [20 * row for row in rows]
    assert method.sizes == [-(-len(rows) // world_size)] * world_size, "one call per rank, not one per image"
    assert not torch.equal(images[2], images[3]), "a row that is named twice is drawn from other noise"


NAMES = ("cat", "dog", "smileys & emotion")


def test_labels_by_number_or_name():
    assert numbered([2, "cat", "smileys & emotion", 0], 3, NAMES) == [2, 0, 2, 0]
    assert numbered([0], 0, ()) == [0]  # a table without classes


@pytest.mark.parametrize(
    ("label", "classes", "names", "message"),
    [
        ("dgo", 3, NAMES, r"names class 'dgo' \(did you mean 'dog'\?\), but there are 3 names, as 'cat'"),
        ("cat", 3, (), "there are no class names; give one of these, or a number"),
        (3, 3, NAMES, "has class 3, but the table has 3 classes; use 0 to 2"),
        (-1, 3, NAMES, "has class -1"),
        (1, 0, (), "has class 1, but the table has 0 classes; use 0 to 0"),
    ],
)
def test_labels_that_are_no_class_are_refused(label, classes, names, message):
    with pytest.raises(UserError, match=message):
        numbered([0, label], classes, names)


def test_captions_and_files():
    assert caption(1, 3, NAMES) == "class 1: dog"
    assert caption(1, 3, ()) == "class 1" == caption(1, 3, ("a", "", "c"))
    assert caption(0, 0, ()) == ""
    assert file_names([3, 0, 3, 3]) == ["class_3.png", "class_0.png", "class_3_2.png", "class_3_3.png"]
