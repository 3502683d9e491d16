"""Errors of Frechet distances and their extrapolation, against many independent sets; density and coverage."""

import numpy as np
import pytest
import torch

from hpc_gen.metrics import prc, resampling, suite
from hpc_gen.metrics.frechet import frechet_distance
from hpc_gen.metrics.moments import Moments
from hpc_gen.runtime.errors import DataError, UserError


def _features(count: int, seed: int, length: int = 24) -> torch.Tensor:
    return torch.randn(count, length, generator=torch.Generator().manual_seed(seed)).abs()


REFERENCE = Moments.of(_features(6000, 99) * 1.03)


@pytest.mark.parametrize("count", [20, 24, 25, 200])
def test_the_value_is_the_distance_by_either_square(count):
    features = _features(count, 1)
    found = resampling.frechet_estimate(features, REFERENCE)
    assert found.value == pytest.approx(frechet_distance(Moments.of(features), REFERENCE), rel=1e-9)


def test_a_leave_out_is_the_distance_of_what_is_left():
    features = _features(60, 2)
    sets = resampling._Subsets(features, REFERENCE)
    kept = torch.cat([sets._groups[g] for g in range(1, resampling.GROUPS)])
    expected = frechet_distance(Moments.of(features[kept]), REFERENCE)
    assert sets.distance(range(1, resampling.GROUPS)) == pytest.approx(expected, rel=1e-9)


def test_the_jackknife_error_is_the_spread_of_independent_sets():
    sets = [_features(200, seed) for seed in range(40)]
    spread = float(np.std([frechet_distance(Moments.of(each), REFERENCE) for each in sets]))
    told = float(np.mean([resampling.frechet_estimate(each, REFERENCE).std for each in sets[:12]]))
    assert 0.6 * spread < told < 1.6 * spread


def test_extrapolation_takes_the_bias_away():
    truth = frechet_distance(Moments.of(_features(100_000, 7)), REFERENCE)
    found = [resampling.frechet_estimate(_features(200, seed), REFERENCE) for seed in range(12)]
    biased = float(np.mean([each.value for each in found])) - truth
    left = float(np.mean([each.infinity for each in found])) - truth
    assert biased > 0.1 and abs(left) < 0.15 * biased
    assert all(each.infinity_std >= each.std for each in found)


def test_constant_sets_and_references_are_ordinary_input():
    constant = torch.ones(30, 24)
    found = resampling.frechet_estimate(constant, REFERENCE)
    assert (
        found.value == pytest.approx(frechet_distance(Moments.of(constant), REFERENCE), rel=1e-12) and found.std == 0.0
    )
    same = resampling.frechet_estimate(constant, Moments.of(constant))
    assert (same.value, same.std, same.infinity) == (0.0, 0.0, 0.0)


def test_features_that_are_not_finite_are_refused():
    bad = _features(30, 3)
    bad[4, 0] = float("inf")
    with pytest.raises(DataError, match="row 4 are not finite"):
        resampling.frechet_estimate(bad, REFERENCE)


def test_few_images_have_no_error():
    choices = suite.Choices(5)
    for count, names in ((19, ["fid"]), (20, ["fid", "fid_infinity"])):
        found = suite.numbers(["fid"], [_features(count, 4)], None, suite.Reference([_features(40, 5)]), choices)
        assert [number.name for number in found] == names
        assert (found[0].std is None) == (count < 20)
    assert (
        found[0].spread == "jackknife over 10 random groups of images"
        and "N/2 to N" in found[1].settings["extrapolated"]
    )


def test_density_and_coverage_equal_their_definition():
    samples, real, k = _features(30, 8, 5).double(), _features(40, 9, 5).double(), 5
    reach = torch.cdist(real, real).kthvalue(k + 1).values
    inside = torch.cdist(real, samples) < reach[:, None]
    found = prc.compare(samples, real)
    assert found.density.value == pytest.approx(float(inside.sum(0).double().mean()) / k, rel=1e-12)
    assert found.coverage.value == pytest.approx(float(inside.any(1).double().mean()), rel=1e-12)
    assert found.coverage.std == pytest.approx(
        (found.coverage.value * (1 - found.coverage.value) / 39) ** 0.5, rel=1e-9
    )


def test_shares_do_not_depend_on_the_stripes(monkeypatch):
    samples, real = _features(50, 10, 6), _features(45, 11, 6)
    whole = prc.compare(samples, real)
    monkeypatch.setattr(prc, "_STRIPE", 130)
    assert prc.compare(samples, real) == whole


def test_density_needs_more_images_than_neighbours():
    with pytest.raises(UserError, match="more than 5 images in each set, not 5"):
        prc.compare(_features(5, 0), _features(30, 1))
    with pytest.raises(UserError, match="metric 'density_coverage' needs 6 images, but there are 20 samples and 5 ref"):
        suite.check_counts(["density_coverage"], 20, 5, 10)
