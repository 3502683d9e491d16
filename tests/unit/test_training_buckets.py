"""Gradient buckets: the same buckets and the same order of reductions in every run, whatever the backward pass does."""

from __future__ import annotations

import pytest
import torch
from solo import RecordingRanks
from torch import nn

from hpc_gen.training.engines.buckets import GradientBuckets

FLOAT = 4  # bytes


class Three(nn.Module):
    """Three vectors of 2, 3 and 4 elements; `use` says which of them the result depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.ones(n)) for n in (2, 3, 4))

    def forward(self, x: float, use: str = "abc") -> torch.Tensor:
        total = torch.zeros(())
        for name in use:
            total = total + getattr(self, name).sum() * x
        return total


def made(bucket_bytes: int = FLOAT) -> tuple[Three, GradientBuckets, RecordingRanks]:
    net, ranks = Three(), RecordingRanks()
    return net, GradientBuckets([net.a, net.b, net.c], ranks, bucket_bytes), ranks


def places(buckets: GradientBuckets, tensors: list[torch.Tensor]) -> list[int]:
    """Numbers of the buckets that these tensors are."""
    return [next(i for i, flat in enumerate(buckets.flats) if flat is tensor) for tensor in tensors]


@pytest.mark.parametrize(
    ("bucket_bytes", "sizes"),
    [
        (0, [4, 3, 2]),  # the last parameter lies in bucket 0
        (FLOAT, [4, 3, 2]),
        (5 * FLOAT, [7, 2]),  # closed once it is as large as that, so a bucket may be larger
        (7 * FLOAT, [7, 2]),
        (8 * FLOAT, [9]),
        (2**30, [9]),
    ],
)
def test_buckets_are_a_function_of_the_parameter_list(bucket_bytes: int, sizes: list[int]) -> None:
    net, buckets, _ = made(bucket_bytes)
    assert [flat.numel() for flat in buckets.flats] == sizes
    buckets.begin()
    net(1.0).backward()
    buckets.finish()
    assert [flat.numel() for flat in buckets.flats] == sizes  # a backward pass rebuilds nothing


def test_gradients_are_views_of_the_buckets() -> None:
    net, buckets, _ = made(5 * FLOAT)
    buckets.begin()
    (net.a.sum() * 2 + net.b.sum() * 3 + net.c.sum() * 5).backward()
    assert buckets.flats[0].tolist() == [5.0] * 4 + [3.0] * 3
    assert buckets.flats[1].tolist() == [2.0] * 2
    buckets.flats[0].mul_(10)  # what a reduction does
    assert net.c.grad is not None and net.c.grad.tolist() == [50.0] * 4
    assert buckets.norm().item() == pytest.approx((4 * 50**2 + 3 * 30**2 + 2 * 2**2) ** 0.5)
    buckets.scale(torch.tensor(0.5))
    assert net.a.grad is not None and net.a.grad.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("order", ["abc", "cba", "bca", "acb"])
def test_reductions_start_in_one_order_whatever_the_backward_order(order: str) -> None:
    """Gradients arrive in the order of `order`; a bucket that is full early waits for the ones before it."""
    net, buckets, ranks = made()
    buckets.begin()
    buckets.arm()
    seen: list[int] = []
    for name in order:
        net(1.0, name).backward()
        seen.append(len(ranks.launched))
    assert seen == {"abc": [0, 0, 3], "cba": [1, 2, 3], "bca": [0, 2, 3], "acb": [0, 1, 3]}[order]
    buckets.finish()
    assert places(buckets, ranks.launched) == [0, 1, 2]
    assert places(buckets, ranks.waited) == [0, 1, 2]


def test_only_the_armed_backward_reduces_and_the_sum_covers_all() -> None:
    net, buckets, ranks = made()
    buckets.begin()
    net(1.0).backward()
    net(2.0).backward()
    assert ranks.launched == []
    buckets.arm()
    net(4.0).backward()
    assert places(buckets, ranks.launched) == [0, 1, 2]
    buckets.finish()
    assert places(buckets, ranks.launched) == [0, 1, 2]  # each once
    assert net.a.grad is not None and net.a.grad.tolist() == [7.0, 7.0]
    buckets.begin()  # the next step starts from nothing, not armed
    assert all(flat.count_nonzero() == 0 for flat in buckets.flats)
    net(1.0).backward()
    assert len(ranks.launched) == 3


def test_parameters_nobody_used_keep_no_gradient_but_are_reduced() -> None:
    """Another rank may have touched them, so every rank reduces every bucket."""
    net, buckets, ranks = made()
    buckets.begin()
    net(1.0, "b").backward()  # an earlier micro-batch alone reaches b
    buckets.arm()
    net(1.0, "c").backward()
    assert places(buckets, ranks.launched) == [0]
    buckets.finish()
    assert places(buckets, ranks.launched) == [0, 1, 2]
    assert buckets.touched == {net.b, net.c}
    buckets.detach_untouched(buckets.touched)
    assert net.a.grad is None and net.b.grad is not None and net.c.grad is not None
    buckets.begin()
    assert net.a.grad is not None and buckets.touched == set()


def test_a_gradient_that_left_its_bucket_is_noticed() -> None:
    net, buckets, _ = made()
    buckets.begin()
    net.b.grad = None  # what optimizer.zero_grad() would do
    with pytest.raises(AssertionError, match="left its bucket"):
        net(1.0).backward()


def test_masters_are_fp32() -> None:
    with pytest.raises(AssertionError, match="fp32"):
        GradientBuckets([nn.Parameter(torch.ones(2, dtype=torch.bfloat16))], RecordingRanks(), FLOAT)
