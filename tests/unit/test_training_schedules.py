"""The learning rate as a function of progress."""

from __future__ import annotations

import math

import pytest

from hpc_gen.training.schedules import learning_rate, peak_learning_rate


def rate(images: float, kind: str = "cosine", warmup: float = 100, total: float = 1100, min_lr: float = 0.1) -> float:
    return learning_rate(images, peak=2.0, warmup_images=warmup, total_images=total, kind=kind, min_lr=min_lr)


def test_the_warm_up_begins_at_exactly_nothing_and_ends_at_the_peak() -> None:
    assert rate(0) == 0.0
    assert rate(25) == 0.5
    assert rate(100) == rate(100, "constant") == 2.0


def test_without_a_warm_up_the_first_step_has_the_peak() -> None:
    assert rate(0, warmup=0) == rate(0, "constant", warmup=0) == 2.0


def test_the_cosine_falls_to_its_floor_and_stays_there() -> None:
    assert rate(600) == pytest.approx(0.1 + 1.9 / 2)
    assert rate(350) == pytest.approx(0.1 + 1.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rate(1100) == pytest.approx(0.1)
    assert rate(5000) == pytest.approx(0.1)
    values = [rate(images) for images in range(100, 1101, 10)]
    assert values == sorted(values, reverse=True)


def test_constant_stays() -> None:
    assert {rate(images, "constant") for images in (100, 600, 9999)} == {2.0}


def test_a_warm_up_as_long_as_the_training() -> None:
    assert rate(1000, warmup=1000, total=1000) == 2.0


def test_only_ratios_matter() -> None:
    assert rate(0.35, warmup=0.1, total=1.1) == pytest.approx(rate(350))


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown schedule 'linear'"):
        rate(0, "linear")


def test_the_peak_scales_with_the_batch() -> None:
    assert peak_learning_rate(lr=3.0, blr=None, global_batch=512) == 3.0
    assert peak_learning_rate(lr=None, blr=3.0, global_batch=512) == 6.0
    with pytest.raises(ValueError, match="lr and optimizer.blr"):
        peak_learning_rate(lr=None, blr=None, global_batch=512)
