"""Moments of features: exact against numpy, merged in any grouping, NaN named."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_gen.metrics.moments import Moments, merge_all
from hpc_gen.runtime.errors import DataError, UserError


def _features(count: int, length: int = 5, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, length, generator=generator) + shift


def test_equals_numpy():
    features = _features(40)
    moments = Moments.of(features)
    values = features.double().numpy()
    assert moments.mean.dtype == torch.float64
    np.testing.assert_allclose(moments.mean.numpy(), values.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(moments.covariance.numpy(), np.cov(values, rowvar=False), rtol=1e-12, atol=1e-14)


def test_a_large_mean_does_not_eat_the_covariance():
    features = _features(64, seed=1).double()
    shifted = merge_all([Moments.of(features[:10] + 1e6), Moments.of(features[10:] + 1e6)])
    torch.testing.assert_close(shifted.covariance, Moments.of(features).covariance, rtol=1e-6, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_merging_is_free_of_order_and_grouping(sizes, random):
    features = _features(sum(sizes), seed=len(sizes))
    parts = [Moments.of(part) for part in features.split(sizes)]
    whole = Moments.of(features)
    random.shuffle(parts)
    while len(parts) > 1:
        one, other = parts.pop(random.randrange(len(parts))), parts.pop(random.randrange(len(parts)))
        parts.append(one.merged(other))
    assert parts[0].count == whole.count
    torch.testing.assert_close(parts[0].mean, whole.mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(parts[0].scatter, whole.scatter, rtol=0, atol=1e-10)


def test_one_order_gives_the_same_bits():
    parts = [Moments.of(part) for part in _features(30).split(7)]
    assert torch.equal(merge_all(parts).scatter, merge_all(parts).scatter)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_name_the_image(bad):
    features = _features(4)
    features[2, 1] = bad
    with pytest.raises(DataError, match=r"features of c\.png are not finite \(1 of 4 images\)"):
        Moments.of(features, ["a.png", "b.png", "c.png", "d.png"])
    with pytest.raises(DataError, match="features of row 2"):
        Moments.of(features)


def test_one_image_has_no_covariance():
    moments = Moments.of(_features(1))
    with pytest.raises(UserError, match="at least 2 images, not 1"):
        _ = moments.covariance


def test_features_of_other_lengths_are_refused():
    with pytest.raises(UserError, match="length 5 and 6"):
        Moments.of(_features(3)).merged(Moments.of(_features(3, length=6)))
