"""The Frechet distance: agreement with scipy, torch-fidelity and closed forms; degenerate inputs."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_gen.metrics import fidelity
from hpc_gen.metrics.frechet import frechet_distance, trace_of_root
from hpc_gen.metrics.moments import Moments
from hpc_gen.runtime.errors import UserError


def _features(count: int, length: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(length, length, generator=generator) / length**0.5
    return (torch.randn(count, length, generator=generator) @ mixing).abs() * scale


def _fidelity(one: torch.Tensor, other: torch.Tensor) -> float:
    module = fidelity._module("metric_fid")
    statistics = [module.fid_features_to_statistics(features.double()) for features in (one, other)]
    return module.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


@pytest.mark.parametrize(("count", "length"), [(200, 16), (70, 64), (20, 64)])
def test_agrees_with_torch_fidelity_also_with_fewer_images_than_features(count, length):
    one, other = _features(count, length, 0), _features(count + 3, length, 1, scale=1.3)
    ours = frechet_distance(Moments.of(one), Moments.of(other))
    assert ours == pytest.approx(_fidelity(one, other), rel=1e-6)


def test_agrees_with_scipy_matrix_root():
    linalg = pytest.importorskip("scipy.linalg")
    one, other = Moments.of(_features(100, 12, 0)), Moments.of(_features(100, 12, 1))
    root = linalg.sqrtm(one.covariance.numpy() @ other.covariance.numpy())
    assert trace_of_root(one.covariance, other.covariance) == pytest.approx(np.trace(root).real, rel=1e-10)


def test_closed_form_of_commuting_gaussians():
    first, second = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 1.0, 0.0]).double()
    one = Moments(11, torch.zeros(3).double(), torch.diag(first) * 10)
    other = Moments(11, torch.tensor([3.0, 4.0, 0.0]).double(), torch.diag(second) * 10)
    expected = 25.0 + float(((first.sqrt() - second.sqrt()) ** 2).sum())
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(1, 24), st.integers(0, 1000))
def test_distance_of_a_set_to_itself_is_zero(count, length, seed):
    features = _features(count, length, seed, scale=3.0)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    assert frechet_distance(Moments.of(features), Moments.of(features)) == pytest.approx(0.0, abs=1e-6)
    assert frechet_distance(Moments.of(features), Moments.of(features[order])) == pytest.approx(0.0, abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 30), st.integers(2, 30), st.integers(0, 1000))
def test_is_symmetric_and_never_negative(one_count, other_count, seed):
    one, other = Moments.of(_features(one_count, 9, seed)), Moments.of(_features(other_count, 9, seed + 1))
    forth, back = frechet_distance(one, other), frechet_distance(other, one)
    assert forth >= 0.0
    assert forth == pytest.approx(back, rel=1e-6, abs=1e-7)


def test_constant_features_are_ordinary_input():
    constant = torch.full((5, 4), 2.0)
    spread = _features(50, 4, 3)
    assert frechet_distance(Moments.of(constant), Moments.of(constant)) == 0.0
    moments = Moments.of(spread)
    expected = float(((moments.mean - 2.0) ** 2).sum() + torch.trace(moments.covariance))
    for pair in ((Moments.of(constant), moments), (moments, Moments.of(constant))):
        assert frechet_distance(*pair) == pytest.approx(expected, rel=1e-12)


def test_too_few_images_and_other_lengths_are_refused():
    many = Moments.of(_features(5, 4, 0))
    with pytest.raises(UserError, match="at least 2 images, not 1"):
        frechet_distance(Moments.of(_features(1, 4, 0)), many)
    with pytest.raises(UserError, match="length 3 and 4"):
        frechet_distance(Moments.of(_features(5, 3, 0)), many)
