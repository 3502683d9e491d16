"""All metrics of a set of features, with what each record must say: for the evaluate stage and in training alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import hpc_gen
from hpc_gen.metrics import fidelity, isc, kid, prc
from hpc_gen.metrics.frechet import frechet_distance
from hpc_gen.metrics.moments import Moments, merge_all
from hpc_gen.metrics.results import MetricRecord
from hpc_gen.metrics.statistics import Statistics
from hpc_gen.runtime.errors import UserError

NO_IMAGES = "not available: the reference has statistics only; set evaluate.reference.table"
UNKNOWN_EXTRACTOR = "the statistics do not say which extractor made them"


@dataclass(frozen=True)
class Reference:
    """What samples are compared with: features of real images in blocks, stored statistics, or both.

    `facts` say which images (table identity, rows); with statistics the Frechet distance uses these.
    """

    features: Sequence[Tensor] | None = None
    statistics: Statistics | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def facts_of(self, metric: str) -> dict[str, Any]:
        """The reference of one metric, for its record; nothing for the inception score, which has none."""
        if metric == "isc":
            return {}
        if metric == "fid" and self.statistics is not None:
            return {"reference": {"statistics_sha256": self.statistics.sha256, "rows": self.statistics.count}}
        return {"reference": dict(self.facts)}


@dataclass(frozen=True)
class Number:
    """One metric before it has its provenance; `value` None: `note` says why there is none."""

    name: str
    value: float | None
    std: float | None = None
    note: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def needs_images(metrics: Sequence[str], statistics: bool) -> bool:
    """Whether features of the reference's images are needed for these metrics, given statistics or not."""
    return "kid" in metrics or "prc" in metrics or ("fid" in metrics and not statistics)


def check_counts(metrics: Sequence[str], num_samples: int, num_reference: int | None, kid_subset_size: int) -> None:
    """Refuse now what the metrics would refuse after an hour of features; `num_reference` None: no images.

    Raises UserError naming the metric and the counts.
    """
    sets = {"samples": num_samples, **({"reference images": num_reference} if num_reference is not None else {})}
    counts = " and ".join(f"{number} {name}" for name, number in sets.items())
    wanted = {"fid": 2, "prc": prc.NEIGHBORHOOD + 1, "kid": kid_subset_size}
    for metric, number in wanted.items():
        if metric not in metrics or (metric != "fid" and num_reference is None):
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
    kid_subset_size: int,
) -> list[Number]:
    """Every metric asked for, in the order of `metrics`; `samples`: features in blocks, each float32 [n, D]."""
    found: list[Number] = []
    generated = torch.cat(list(samples))
    real = torch.cat(list(reference.features)) if reference.features is not None else None
    for metric in metrics:
        if metric == "fid":
            found.append(_frechet(samples, generated, reference))
        elif metric == "isc":
            found.append(_inception_score(logits))
        elif real is None:
            names = ("precision", "recall") if metric == "prc" else (metric,)
            found += [Number(name, None, None, NO_IMAGES) for name in names]
        elif metric == "kid":
            mean, std = kid.kernel_distance(generated, real, kid_subset_size)
            settings = {
                "kernel": "polynomial, degree 3",
                "subsets": kid.SUBSETS,
                "subset_size": kid_subset_size,
                "seed": kid.SEED,
            }
            found.append(Number("kid", mean, std, None, settings))
        else:
            precision, recall = prc.precision_recall(generated, real)
            settings = {"neighborhood": prc.NEIGHBORHOOD}
            found += [Number("precision", precision, settings=settings), Number("recall", recall, settings=settings)]
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
) -> MetricRecord:
    """A number with how it was measured, and of what (`subject`, to which versions are added)."""
    measure: dict[str, Any] = {
        "settings": dict(number.settings),
        "extractor": dict(extractor),
        "num_images": num_images,
        "image_shape": list(image_shape),
        "classes": classes,
        "num_classes": num_classes,
        **reference.facts_of(number.name),
    }
    return MetricRecord(
        number.name, number.value, number.std, number.note, measure, {**subject, "versions": versions()}
    )


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


def _frechet(samples: Sequence[Tensor], generated: Tensor, reference: Reference) -> Number:
    moments = merge_all([Moments.of(block) for block in samples])
    settings = {"covariance": "unbiased, float64"}
    if reference.statistics is not None:
        value = frechet_distance(moments, reference.statistics)
        known = [len(generated), *([reference.statistics.count] if reference.statistics.count is not None else [])]
        note = _rank_note(min(known), generated.shape[1])
        if reference.statistics.provenance is None:
            note = UNKNOWN_EXTRACTOR if note is None else f"{note}; {UNKNOWN_EXTRACTOR}"
        return Number("fid", value, None, note, settings)
    assert reference.features is not None, "a Frechet distance needs images or statistics to compare with"
    value = frechet_distance(moments, merge_all([Moments.of(block) for block in reference.features]))
    fewest = min(len(generated), sum(len(block) for block in reference.features))
    return Number("fid", value, None, _rank_note(fewest, generated.shape[1]), settings)


def _inception_score(logits: Tensor | None) -> Number:
    if logits is None:
        return Number("isc", None, None, isc.NO_LOGITS)
    mean, std = isc.inception_score(logits)
    return Number("isc", mean, std, None, {"splits": isc.SPLITS, "seed": isc.SEED})


def _rank_note(fewest: int, length: int) -> str | None:
    if fewest > length:
        return None
    return f"{fewest} images give {length} features a singular covariance: compare only at the same counts"
