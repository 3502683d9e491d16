"""KID, precision and recall, inception score: torch-fidelity's numbers on the same features, and refused inputs."""

import math

import pytest
import torch

from hpc_gen.metrics import fidelity, isc, kid, prc
from hpc_gen.runtime.errors import DataError, UserError


def _features(count: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)) + shift


def test_kid_equals_torch_fidelity():
    one, other = _features(60, 0), _features(50, 1, shift=0.5)
    found = fidelity._module("metric_kid").kid_features_to_metric(one, other, kid_subset_size=20, verbose=False)
    mean, std = kid.kernel_distance(one, other, subset_size=20)
    assert mean == pytest.approx(found["kernel_inception_distance_mean"], rel=1e-4)
    assert std == pytest.approx(found["kernel_inception_distance_std"], rel=1e-4)


def test_kid_of_a_set_with_itself_is_about_zero_and_may_be_negative():
    features = _features(80, 3)
    mean, std = kid.kernel_distance(features, features, subset_size=40)
    assert abs(mean) < 3 * max(std, 0.02)


def test_kid_refuses_a_subset_larger_than_a_set():
    with pytest.raises(UserError, match=r"kid_subset_size is 31, but there are 40 samples and 30 .* between 2 and 30"):
        kid.kernel_distance(_features(40, 0), _features(30, 1), subset_size=31)


def test_prc_of_equal_and_of_distant_sets():
    features = _features(40, 0)
    assert prc.precision_recall(features, features) == (1.0, 1.0)
    assert prc.precision_recall(features, _features(40, 1, shift=100.0)) == (0.0, 0.0)


def test_prc_knows_which_set_is_generated():
    reference = _features(60, 0)
    narrow = reference[:1] + 0.01 * _features(30, 1)
    precision, recall = prc.precision_recall(narrow, reference)
    assert precision == 1.0
    assert recall < 0.2


def test_prc_of_constant_features():
    constant = torch.ones(10, 4)
    assert prc.precision_recall(constant, constant) == (1.0, 1.0)


def test_prc_needs_more_images_than_neighbours():
    with pytest.raises(UserError, match="more than 3 images in each set, not 3"):
        prc.precision_recall(_features(3, 0), _features(30, 1))


def test_isc_of_certain_and_of_uninformative_logits():
    certain = torch.eye(4).repeat(25, 1) * 50.0
    mean, _ = isc.inception_score(certain, splits=1)
    assert mean == pytest.approx(4.0, rel=1e-6)
    mean, std = isc.inception_score(torch.zeros(100, 4))
    assert mean == pytest.approx(1.0, rel=1e-9)
    assert std == pytest.approx(0.0, abs=1e-9)


def test_isc_equals_its_definition():
    logits = _features(30, 5)
    mean, _ = isc.inception_score(logits, splits=1)
    p = logits.double().softmax(dim=1)
    kl = (p * (p.log() - p.mean(dim=0, keepdim=True).log())).sum(dim=1).mean()
    assert mean == pytest.approx(math.exp(float(kl)), rel=1e-9)


def test_isc_needs_an_image_per_split():
    with pytest.raises(UserError, match="at least 10 images, not 9"):
        isc.inception_score(torch.zeros(9, 4))


def test_nan_features_are_refused_by_all():
    bad = _features(20, 0)
    bad[7, 0] = float("nan")
    good = _features(20, 1)
    for refused in (
        lambda: kid.kernel_distance(good, bad, subset_size=5),
        lambda: prc.precision_recall(bad, good),
        lambda: isc.inception_score(bad),
    ):
        with pytest.raises(DataError, match="row 7 are not finite"):
            refused()
