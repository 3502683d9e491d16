"""Previews: the same picture from any number of ranks, equal padded shares, one picture on rank 0."""

import numpy as np
import pytest
import torch
from torch import nn

from hpc_gen.runtime.errors import UserError
from hpc_gen.runtime.randomness import Draw
from hpc_gen.sampling.preview import preview


class OneOf:
    """A rank of several that run one after the other: what it gathers is kept for rank 0."""

    def __init__(self, rank: int, world_size: int, shared: dict[int, torch.Tensor]) -> None:
        self.rank, self.world_size, self.shared = rank, world_size, shared

    def gather_objects(self, obj):
        self.shared[self.rank] = obj
        return [self.shared[rank] for rank in range(self.world_size)] if self.rank == 0 else None


class Dots:
    """An image = its label as brightness, a pixel of noise of its id."""

    def __init__(self) -> None:
        self.network = nn.Linear(1, 1)
        self.sizes: list[int] = []

    def roles(self):
        return {"generator": self.network}

    def conditions(self, ids, plan):
        return {"labels": plan.labels(ids)}

    def generate(self, conditions, draws, settings, poll):
        poll()
        labels = conditions["labels"]
        self.sizes.append(len(labels))
        images = (labels * 20).to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 4, 4)
        images[:, :, 0, 0] = (draws.take("x", Draw(())).abs().clamp(0, 1) * 255).to(torch.uint8).view(-1, 1)
        return images


def _picture(world_size: int, labels: list[int]) -> tuple[np.ndarray, list[int]]:
    shared: dict[int, torch.Tensor] = {}
    method = Dots()
    for rank in reversed(range(world_size)):
        picture = preview(method, labels, 3, None, OneOf(rank, world_size, shared), lambda: None)
        assert (picture is None) == (rank != 0)
    return np.asarray(picture), method.sizes


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_same_picture_from_any_number_of_ranks(world_size):
    labels = [0, 1, 2, 3, 4, 5, 6]
    alone, _ = _picture(1, labels)
    together, sizes = _picture(world_size, labels)
    assert np.array_equal(alone, together)
    assert sizes == [-(-7 // world_size)] * world_size


def test_more_ranks_than_images():
    picture, sizes = _picture(4, [9, 1])
    assert sizes == [1, 1, 1, 1]
    assert np.array_equal(picture, _picture(1, [9, 1])[0])


def test_small_images_are_enlarged():
    picture, _ = _picture(1, [1])
    assert picture.shape == (64 + 4, 64 + 4, 3)


def test_no_labels_no_preview():
    with pytest.raises(UserError, match=r"train\.preview\.labels is empty"):
        preview(Dots(), [], 3, None, OneOf(0, 1, {}), lambda: None)
