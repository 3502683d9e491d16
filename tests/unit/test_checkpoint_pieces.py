"""How one logical tensor lies over ranks: boxes that cover it once, whatever cut it, and what is read back from them."""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from hpc_gen.runtime.errors import CheckpointError
from hpc_gen.training.checkpoint import storage
from hpc_gen.training.checkpoint.pieces import Below, Box, Pieces, copy_from, of_flat_slice, read_into, whole


def numbered(shape: Sequence[int]) -> Tensor:
    """A tensor whose every element is another number."""
    return torch.arange(math.prod(shape), dtype=torch.float64).reshape(tuple(shape))


def covered(shape: Sequence[int], parts: Sequence[Pieces]) -> Tensor:
    """How often each element is held."""
    counts = torch.zeros(tuple(shape), dtype=torch.int64)
    for pieces in parts:
        for box in pieces.boxes:
            counts[box.slices] += 1
    return counts


def some_shapes(draw: random.Random, number: int) -> list[tuple[int, ...]]:
    return [tuple(draw.randint(1, 6) for _ in range(draw.randint(0, 4))) for _ in range(number)]


def test_flat_slices_cover_the_tensor_once_and_hold_its_values() -> None:
    """Any shape, cut anywhere into any number of stretches, some of them empty."""
    draw = random.Random(0)
    for shape in some_shapes(draw, 400):
        full = numbered(shape)
        flat = full.reshape(-1)
        cuts = sorted([0, flat.numel(), *(draw.randint(0, flat.numel()) for _ in range(draw.randint(0, 4)))])
        parts = [of_flat_slice(shape, a, flat[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
        assert bool((covered(shape, parts) == 1).all()), (shape, cuts)
        for pieces in parts:
            assert pieces.shape == shape and len(pieces.boxes) <= max(1, 2 * len(shape) - 1)
            for box in pieces.boxes:
                assert torch.equal(box.tensor, full[box.slices]), (shape, cuts)


def test_every_stretch_of_small_tensors() -> None:
    for shape in ((), (1,), (5,), (1, 1), (2, 3), (3, 1, 2), (2, 2, 2)):
        full = numbered(shape)
        for start in range(full.numel() + 1):
            for end in range(start, full.numel() + 1):
                pieces = of_flat_slice(shape, start, full.reshape(-1)[start:end])
                held = covered(shape, [pieces]).reshape(-1)
                assert held[start:end].eq(1).all() and int(held.sum()) == end - start


def test_boxes_of_a_flat_slice_are_views_so_a_load_fills_the_partition() -> None:
    """As deepspeed holds its masters: many tensors in one flat buffer, cut at places that know nothing of shapes."""
    full = numbered((4, 5))
    partition = torch.zeros(11, dtype=torch.float64)
    copy_from(of_flat_slice((4, 5), 3, partition), full)
    assert torch.equal(partition, full.reshape(-1)[3:14])


def test_copy_from_converts_and_refuses_another_shape() -> None:
    target = whole(torch.zeros(2, 3, dtype=torch.bfloat16))
    copy_from(target, numbered((2, 3)))
    assert torch.equal(target.boxes[0].tensor.double(), numbered((2, 3)))
    with pytest.raises(CheckpointError, match=r"a tensor of shape \(3, 2\) does not fit one of shape \(2, 3\)"):
        copy_from(target, numbered((3, 2)))
    empty = Pieces((2, 3), torch.float64, ())
    copy_from(empty, numbered((2, 3)))
    assert empty.nbytes == 0 and whole(torch.zeros(2, 3)).nbytes == 24 and whole(torch.zeros(0, 3)).boxes == ()


def test_boxes_that_do_not_fit_their_tensor_are_our_bug() -> None:
    for offsets, shape in (((1, 0), (2, 3)), ((-1, 0), (1, 3)), ((0,), (2,))):
        with pytest.raises(AssertionError):
            Pieces((2, 3), torch.float64, (Box(offsets, numbered(shape)),))
    with pytest.raises(AssertionError):
        Pieces((2, 3), torch.float32, (Box((0, 0), numbered((2, 3))),))


# -- stored and read back ------------------------------------------------------------------------------------------


@pytest.fixture
def stored() -> Any:
    """A checkpoint of one writer that holds a tensor in several boxes, beside whole ones."""
    with tempfile.TemporaryDirectory() as folder:
        full = numbered((4, 5))
        boxes = [of_flat_slice((4, 5), a, full.reshape(-1)[a:b]).boxes for a, b in ((0, 3), (3, 14), (14, 20))]
        state = {
            "model/net/cut": Pieces((4, 5), torch.float64, tuple(box for part in boxes for box in part)),
            "model/net/whole": torch.arange(3),
            "train/images_seen": torch.tensor(8),
            "train/empty": torch.empty(0, 2),
        }
        storage.save(state, Path(folder), None)
        yield Path(folder)


def test_a_tensor_in_boxes_is_read_whole_or_in_part(stored: Path) -> None:
    tensors = storage.StoredTensors(stored)
    assert sorted(tensors) == ["model/net/cut", "model/net/whole", "train/empty", "train/images_seen"]
    assert torch.equal(tensors["model/net/cut"], numbered((4, 5)))
    assert int(tensors["train/images_seen"]) == 8 and tensors["train/empty"].shape == (0, 2)
    assert tensors.kind("model/net/cut") == (torch.float64, (4, 5))
    full = numbered((4, 5))
    for top in range(4):
        for left in range(5):
            for height in range(1, 5 - top):
                part = tensors.box("model/net/cut", (top, left), (height, 5 - left))
                assert torch.equal(part, full[top : top + height, left:])
    assert tensors.get("model/net/other") is None
    with pytest.raises(KeyError):
        tensors["model/net/other"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_what_was_written_in_boxes(stored: Path) -> None:
    """The layout is torch's own: its loader, with its own unpickler, finds the same values."""
    state: dict[str, Any] = {"model/net/cut": torch.zeros(4, 5, dtype=torch.float64)}
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp.load(state, checkpoint_id=stored, planner=planner, no_dist=True)
    assert torch.equal(state["model/net/cut"], numbered((4, 5)))


def test_only_what_is_asked_for_is_read(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state larger than memory must pass through the largest of its tensors; a filter by name reads nothing."""
    reads: list[str] = []
    chunk = storage.StoredTensors._chunk

    def counted(self: storage.StoredTensors, name: str, *rest: Any) -> Tensor:
        reads.append(name)
        return chunk(self, name, *rest)

    monkeypatch.setattr(storage.StoredTensors, "_chunk", counted)
    tensors = storage.StoredTensors(stored)
    below = Below(tensors, "model/net/")
    assert set(below) == {"cut", "whole"} and len(below) == 2 and "cut" in below and "model/net/cut" not in below
    assert "model/net/cut" in tensors and reads == []
    assert torch.equal(below["whole"], torch.arange(3)) and reads == ["model/net/whole"]
    tensors.box("model/net/cut", (2, 0), (1, 5))
    assert reads == ["model/net/whole", "model/net/cut", "model/net/cut"]  # two of the five boxes touch this row


def test_a_rank_reads_its_own_parts_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same cut each rank reads its share of the files, not all of them: a resume of 512 ranks reads once."""
    full, ranks = numbered((8, 5)), 4
    parts = [Pieces((8, 5), full.dtype, (Box((2 * rank, 0), full[2 * rank : 2 * rank + 2]),)) for rank in range(ranks)]
    flats = [
        of_flat_slice((8, 5), 10 * rank + 3, full.reshape(-1)[10 * rank + 3 : 10 * rank + 13]) for rank in range(3)
    ]
    boxes = tuple(box for part in parts for box in part.boxes)
    storage.save({"model/net/cut": Pieces((8, 5), full.dtype, boxes)}, tmp_path, None)
    reads: list[tuple[int, ...]] = []
    chunk = storage.StoredTensors._chunk

    def counted(self: storage.StoredTensors, name: str, of: Any, dtype: torch.dtype) -> Tensor:
        reads.append(tuple(of.offsets))
        return chunk(self, name, of, dtype)

    monkeypatch.setattr(storage.StoredTensors, "_chunk", counted)
    below = Below(storage.StoredTensors(tmp_path), "model/")
    assert below.kind("net/cut") == (torch.float64, (8, 5))
    for rank, part in enumerate(parts):
        mine = Pieces((8, 5), full.dtype, tuple(Box(box.offsets, torch.zeros_like(box.tensor)) for box in part.boxes))
        reads.clear()
        read_into(mine, below, "net/cut")
        assert torch.equal(mine.boxes[0].tensor, part.boxes[0].tensor) and reads == [(2 * rank, 0)]
    for rank, part in enumerate(flats):  # another cut: two stored parts each, none of them twice
        mine = Pieces((8, 5), full.dtype, tuple(Box(box.offsets, torch.zeros_like(box.tensor)) for box in part.boxes))
        reads.clear()
        read_into(mine, Below(storage.StoredTensors(tmp_path), "model/"), "net/cut")
        assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(mine.boxes, part.boxes, strict=True))
        assert set(reads) == {(2 * rank, 0), (2 * rank + 2, 0)} and len(reads) <= 3
    with pytest.raises(CheckpointError, match=r"'net/cut' has shape \(8, 5\) and does not fit one of shape \(5, 8\)"):
        read_into(Pieces((5, 8), full.dtype, ()), below, "net/cut")


def test_boxes_with_a_hole_or_an_overlap_are_not_saved(tmp_path: Path) -> None:
    full = numbered((4, 5))
    for name, (first, second) in {"hole": ((0, 2), (3, 4)), "overlap": ((0, 3), (2, 4))}.items():
        folder = tmp_path / name
        folder.mkdir()
        boxes = tuple(Box((a, 0), full[a:b]) for a, b in (first, second))
        words = {"hole": "the ranks hold 15 of the 20 elements of 'model/net/cut'", "overlap": "overlapping chunks"}
        with pytest.raises(CheckpointError, match=words[name]):
            storage.save({"model/net/cut": Pieces((4, 5), torch.float64, boxes)}, folder, None)


def test_stored_parts_that_do_not_cover_their_tensor_are_refused(stored: Path) -> None:
    tensors = storage.StoredTensors(stored)
    tensors._entries["model/net/cut"].chunks.pop()
    with pytest.raises(CheckpointError, match=r"the parts of 'model/net/cut' do not cover it; choose another"):
        tensors["model/net/cut"]
