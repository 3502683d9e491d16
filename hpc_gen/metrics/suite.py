"""All metrics of a set of features, with what each record must say: for the evaluate stage and in training alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import hpc_gen
from hpc_gen.metrics import fidelity, isc, kid, prc, resampling
from hpc_gen.metrics.frechet import Gaussian, frechet_distance
from hpc_gen.metrics.moments import Moments, merge_all
from hpc_gen.metrics.results import MetricRecord
from hpc_gen.metrics.statistics import Statistics
from hpc_gen.runtime.errors import UserError

NO_IMAGES = "not available: the reference has statistics only; set evaluate.reference.table"
NO_SPATIAL = "not available: the statistics have no mu_s and sigma_s; name a file that has, or reference images"
UNKNOWN_EXTRACTOR = "the statistics do not say which extractor made them"
FRECHET = ("fid", "sfid", "clip_fid", "fd_dinov2")
NEEDS_IMAGES = ("kid", "prc", "density_coverage")
PARTS = {"prc": ("precision", "recall"), "density_coverage": ("density", "coverage")}
JACKKNIFE = f"jackknife over {resampling.GROUPS} random groups of images"
FIXED_MANIFOLDS = "standard error over images, the manifolds being fixed"


@dataclass(frozen=True)
class Reference:
    """What samples are compared with: features of real images in blocks, stored statistics, or both.

    `facts` say which images (identity, rows); with statistics the Frechet distances use these. `spatial` are the
    features of sFID, in blocks, where they were asked for.
    """

    features: Sequence[Tensor] | None = None
    statistics: Statistics | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    spatial: Sequence[Tensor] | None = None

    def facts_of(self, metric: str) -> dict[str, Any]:
        """The reference of one metric, for its record; nothing for the inception score, which has none."""
        if metric == "isc":
            return {}
        if self.statistics is not None and metric.removesuffix("_infinity") in FRECHET:
            return {"reference": {"statistics_sha256": self.statistics.sha256, "rows": self.statistics.count}}
        return {"reference": dict(self.facts)}


@dataclass(frozen=True)
class Number:
    """One metric before it has its provenance; `value` None: `note` says why there is none; `spread`: what `std` is."""

    name: str
    value: float | None
    std: float | None = None
    note: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    spread: str | None = None


@dataclass(frozen=True)
class Choices:
    """How the metrics are computed. `errors`: the Frechet distances get an error and are extrapolated."""

    kid_subset_size: int
    isc_split_images: int | None = None
    errors: bool = True
    device: torch.device = torch.device("cpu")


def needs_images(metrics: Sequence[str], statistics: bool) -> bool:
    """Whether features of the reference's images are needed for these metrics, given statistics or not."""
    return any(name in metrics for name in NEEDS_IMAGES) or (not statistics and bool({"fid", "sfid"} & set(metrics)))


def check_counts(metrics: Sequence[str], num_samples: int, num_reference: int | None, kid_subset_size: int) -> None:
    """Refuse now what the metrics would refuse after an hour of features; `num_reference` None: no images.

    Raises UserError naming the metric and the counts.
    """
    sets = {"samples": num_samples, **({"reference images": num_reference} if num_reference is not None else {})}
    counts = " and ".join(f"{number} {name}" for name, number in sets.items())
    wanted = dict.fromkeys(FRECHET, 2)
    wanted |= {"prc": prc.NEIGHBORHOOD + 1, "density_coverage": prc.DENSITY_NEIGHBORHOOD + 1, "kid": kid_subset_size}
    for metric, number in wanted.items():
        if metric not in metrics or (metric not in FRECHET and num_reference is None):
            continue
        if min(sets.values()) < number:
            lower = ", or lower evaluate.kid_subset_size" if metric == "kid" else ""
            raise UserError(f"metric '{metric}' needs {number} images, but there are {counts}; use more{lower}")
    if "isc" in metrics and num_samples < isc.SPLITS:
        raise UserError(f"metric 'isc' needs {isc.SPLITS} images, but there are {num_samples} samples; sample more")


def numbers(
    metrics: Sequence[str],
    samples: Sequence[Tensor],
    logits: Tensor | None,
    reference: Reference,
    choices: Choices,
    spatial: Sequence[Tensor] | None = None,
) -> list[Number]:
    """Every metric asked for, in the order of `metrics`; `samples`: features in blocks, each float32 [n, D].

    Metrics that look through a network of their own (clip_fid, fd_dinov2) are given its features in calls of their own.
    """
    found: list[Number] = []
    generated = torch.cat(list(samples)).to(choices.device)
    real = torch.cat(list(reference.features)).to(choices.device) if reference.features is not None else None
    manifolds: prc.Manifolds | None = None
    for metric in metrics:
        if metric == "sfid":
            assert spatial is not None, "sfid was asked for without spatial features"
            found += _spatial_frechet(spatial, reference, choices)
        elif metric in FRECHET:
            found += _frechet(metric, samples, _gaussian(reference), reference.statistics, choices)
        elif metric == "isc":
            found.append(_inception_score(logits, choices))
        elif real is None:
            found += [Number(name, None, None, NO_IMAGES) for name in PARTS.get(metric, (metric,))]
        elif metric == "kid":
            found.append(_kernel_distance(generated, real, choices))
        else:
            density = "density_coverage" in metrics  # one pass gives both pairs
            reach = prc.DENSITY_NEIGHBORHOOD if density else prc.NEIGHBORHOOD
            manifolds = manifolds or prc.compare(generated, real, prc.NEIGHBORHOOD, reach)
            found += _shares(metric, manifolds)
    return found


def record(
    number: Number,
    reference: Reference,
    *,
    extractor: Mapping[str, Any],
    num_images: int,
    image_shape: Sequence[int],
    classes: str,
    num_classes: int,
    subject: Mapping[str, Any],
    note: str | None = None,
) -> MetricRecord:
    """A number with how it was measured, and of what (`subject`, to which versions are added); `note` is added to its
    own."""
    measure: dict[str, Any] = {
        "settings": dict(number.settings),
        "extractor": dict(extractor),
        "num_images": num_images,
        "image_shape": list(image_shape),
        "classes": classes,
        "num_classes": num_classes,
        **reference.facts_of(number.name),
    }
    notes = "; ".join(each for each in (number.note, note) if each) or None
    what = {**subject, "versions": versions()}
    return MetricRecord(number.name, number.value, number.std, notes, measure, what, number.spread)


def versions() -> dict[str, str]:
    """Versions of what computes metrics."""
    return {
        "hpc_gen": hpc_gen.__version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "torch_fidelity": fidelity.version(),
    }


def row_values(found: Sequence[Number]) -> dict[str, float]:
    """`evaluate/NAME` -> value, under the names of the seed; what is not available is left out."""
    values: dict[str, float] = {}
    for number in found:
        if number.value is None:
            continue
        if number.name == "kid":
            values["evaluate/kid_mean"] = number.value
            if number.std is not None:
                values["evaluate/kid_std"] = number.std
        else:
            values[f"evaluate/{'inception_score' if number.name == 'isc' else number.name}"] = number.value
    return values


def _gaussian(reference: Reference) -> Gaussian:
    if reference.statistics is not None:
        return reference.statistics
    assert reference.features is not None, "a Frechet distance needs images or statistics to compare with"
    return merge_all([Moments.of(block) for block in reference.features])


def _spatial_frechet(spatial: Sequence[Tensor], reference: Reference, choices: Choices) -> list[Number]:
    if reference.statistics is None:
        assert reference.spatial is not None, "sfid needs images or statistics to compare with"
        against: Gaussian = merge_all([Moments.of(block) for block in reference.spatial])
    elif reference.statistics.spatial is None:
        return [Number("sfid", None, None, NO_SPATIAL)]
    else:
        against = reference.statistics.spatial
    return _frechet("sfid", spatial, against, reference.statistics, choices)


def _frechet(
    name: str, samples: Sequence[Tensor], against: Gaussian, stored: Statistics | None, choices: Choices
) -> list[Number]:
    """The distance; with errors, and then what it would be of infinitely many samples."""
    count, length = sum(len(block) for block in samples), samples[0].shape[1]
    known = [count, *([stored.count] if stored is not None and stored.count is not None else [])]
    if isinstance(against, Moments):
        known.append(against.count)
    note = _rank_note(min(known), length)
    if stored is not None and stored.provenance is None:
        note = UNKNOWN_EXTRACTOR if note is None else f"{note}; {UNKNOWN_EXTRACTOR}"
    settings = {"covariance": "unbiased, float64"}
    if not choices.errors or count < resampling.FEWEST:
        value = frechet_distance(merge_all([Moments.of(block) for block in samples]), against)
        return [Number(name, value, None, note, settings)]
    found = resampling.frechet_estimate(torch.cat(list(samples)).to(choices.device), against)
    extrapolated = {**settings, "extrapolated": "line over 1/N from N/2 to N, reference held fixed"}
    return [
        Number(name, found.value, found.std, note, settings, JACKKNIFE),
        Number(f"{name}_infinity", found.infinity, found.infinity_std, note, extrapolated, f"fit, and {JACKKNIFE}"),
    ]


def _kernel_distance(generated: Tensor, real: Tensor, choices: Choices) -> Number:
    mean, std = kid.kernel_distance(generated, real, choices.kid_subset_size)
    settings = {
        "kernel": "polynomial, degree 3",
        "subsets": kid.SUBSETS,
        "subset_size": choices.kid_subset_size,
        "seed": kid.SEED,
    }
    return Number("kid", mean, std, None, settings, "standard deviation over subsets")


def _shares(metric: str, found: prc.Manifolds) -> list[Number]:
    reach = prc.NEIGHBORHOOD if metric == "prc" else prc.DENSITY_NEIGHBORHOOD
    shares = [(name, getattr(found, name)) for name in PARTS[metric]]
    return [
        Number(name, share.value, share.std, None, {"neighborhood": reach}, FIXED_MANIFOLDS) for name, share in shares
    ]


def _inception_score(logits: Tensor | None, choices: Choices) -> Number:
    if logits is None:
        return Number("isc", None, None, isc.NO_LOGITS)
    spread = "standard deviation over splits"
    if choices.isc_split_images is not None:
        mean, std = isc.inception_score_in_order(logits, choices.isc_split_images)
        return Number("isc", mean, std, None, {"split_images": choices.isc_split_images, "shuffled": False}, spread)
    mean, std = isc.inception_score(logits)
    return Number("isc", mean, std, None, {"splits": isc.SPLITS, "seed": isc.SEED}, spread)


def _rank_note(fewest: int, length: int) -> str | None:
    if fewest > length:
        return None
    return f"{fewest} images give {length} features a singular covariance: compare only at the same counts"
