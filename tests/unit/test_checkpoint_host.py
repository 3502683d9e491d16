"""Host copies: what a save writes is what the state was at the save, and the buffers are made once, ahead of it."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from hpc_gen.training.checkpoint import host
from hpc_gen.training.checkpoint.host import HostBuffers
from hpc_gen.training.checkpoint.pieces import Box, Pieces


def share(value: float) -> dict[str, Tensor | Pieces]:
    table = torch.full((4, 6), value)
    return {
        "whole": torch.full((3, 2), value, dtype=torch.bfloat16),
        "turned": torch.full((3, 2), value).t(),
        "step": torch.tensor(value),
        "cut": Pieces((8, 6), torch.float32, (Box((0, 0), table[:1]), Box((4, 2), table[1:3, 2:5]))),
        "none": Pieces((8, 6), torch.float32, ()),
    }


def tensors(of: dict[str, Tensor | Pieces]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in of.values():
        found += [box.tensor for box in value.boxes] if isinstance(value, Pieces) else [value]
    return found


def addresses(of: dict[str, Tensor | Pieces]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors(of)]


def test_a_copy_keeps_the_values_whatever_the_training_does_next() -> None:
    buffers, live = HostBuffers(), share(1.0)
    copied = buffers.copy(live)
    for tensor in tensors(live):
        tensor.fill_(9.0)
    assert all(bool((tensor == 1.0).all()) for tensor in tensors(copied))
    cut = copied["cut"]
    assert isinstance(cut, Pieces) and [box.offsets for box in cut.boxes] == [(0, 0), (4, 2)]
    assert cut.shape == (8, 6) and all(box.tensor.is_contiguous() for box in cut.boxes)
    assert isinstance(copied["none"], Pieces) and copied["none"].boxes == ()


def test_buffers_are_used_again_where_they_fit() -> None:
    buffers = HostBuffers()
    first = addresses(buffers.copy(share(1.0)))
    changed = share(2.0) | {"whole": torch.full((5,), 2.0)}
    second = buffers.copy(changed)
    assert addresses(second)[1:] == first[1:]
    assert all(bool((tensor == 2.0).all()) for tensor in tensors(second))
    assert isinstance(second["whole"], Tensor) and second["whole"].shape == (5,)


def test_what_is_reserved_is_what_the_first_save_fills(monkeypatch: pytest.MonkeyPatch) -> None:
    makers: list[str] = []
    make = host._buffer

    def noted(like: Tensor, pinned: bool) -> Tensor:
        makers.append(threading.current_thread().name)
        return make(like, pinned)

    monkeypatch.setattr(host, "_buffer", noted)
    buffers = HostBuffers()
    buffers.reserve(share(0.0))
    copied = buffers.copy(share(3.0))
    assert makers == ["checkpoint-buffers"] * 5  # none is made while the training waits
    assert all(bool((tensor == 3.0).all()) for tensor in tensors(copied))
    buffers.reserve(share(0.0))
    assert len(makers) == 5


def test_a_share_that_grows_is_made_by_the_save_that_needs_it() -> None:
    """A second optimizer, say, whose first step comes after the buffers were made."""
    buffers = HostBuffers()
    buffers.reserve({"whole": torch.zeros(2)})
    copied = buffers.copy({"whole": torch.ones(2), "late": torch.ones(3)})
    assert [tensor.tolist() for tensor in tensors(copied)] == [[1.0, 1.0], [1.0, 1.0, 1.0]]


def test_too_little_memory_ahead_is_tried_again_by_the_save(monkeypatch: pytest.MonkeyPatch) -> None:
    make = host._buffer

    def out_of_memory(like: Tensor, pinned: bool) -> Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    buffers = HostBuffers()
    monkeypatch.setattr(host, "_buffer", out_of_memory)
    buffers.reserve(share(0.0))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        buffers.copy(share(1.0))
    monkeypatch.setattr(host, "_buffer", make)
    assert all(bool((tensor == 1.0).all()) for tensor in tensors(buffers.copy(share(1.0))))
