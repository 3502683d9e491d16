"""Golden handlers of the metrics, which belong to no one method: cases of gdd, dim and gmem marked as shared."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from golden_compare import Produced
from golden_files import Case
from golden_handling import constants, handles, known_keys
from torch import Tensor

from hpc_gen.metrics import isc, prc, statistics
from hpc_gen.metrics.frechet import Gaussian, frechet_distance
from hpc_gen.metrics.moments import Moments, merge_all
from hpc_gen.training.ema import update_ema_


def _moments(features: Tensor) -> Moments:
    """In pieces, as the evaluate stage gathers them."""
    return merge_all([Moments.of(part) for part in features.split(64)])


def _stored(moments: Moments) -> Gaussian:
    """Through a file, as reference statistics come."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "statistics.npz"
        statistics.write(path, moments, {})
        return statistics.read(path)


@handles("gdd", "fid_stats")
def fid_stats(case: Case) -> Produced:
    """Statistics of both sets, and their distance with one of them read from a file."""
    tensors, config = case.tensors(), case.record["config"]
    known_keys(config, ("n", "dim"), "config")
    constants(config, dict(zip(("n", "dim"), tensors["in.features"].shape, strict=True)), "config")
    samples, reference = _moments(tensors["in.features"]), _moments(tensors["in.features_ref"])
    return Produced(
        {
            "out.mu": samples.mean,
            "out.sigma": samples.covariance,
            "out.mu_ref": reference.mean,
            "out.sigma_ref": reference.covariance,
            "out.fid": torch.tensor(frechet_distance(samples, _stored(reference)), dtype=torch.float64),
        }
    )


@handles("gdd", "is_precision_recall")
def inception_score_and_manifolds(case: Case) -> Produced:
    """ADM's inception score of probabilities, squared radii, precision and recall."""
    tensors, config = case.tensors(), case.record["config"]
    k = config["k"]
    samples, reference = tensors["in.sample"], tensors["in.ref"]
    known_keys(config, ("split_size", "k", "dim", "n_ref", "n_sample"), "config")
    sizes = {"dim": samples.shape[1], "n_ref": len(reference), "n_sample": len(samples)}
    constants(config, sizes, "config")
    score, _ = isc.score_in_order(tensors["in.probs"], config["split_size"])
    precision, recall = prc.precision_recall(samples, reference, k)
    found = {
        "out.inception_score": score,
        "out.precision": precision,
        "out.recall": recall,
    }
    return Produced(
        {
            **{name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()},
            "out.radii_sample": prc.radii(samples.double(), [k])[k].square(),
            "out.radii_ref": prc.radii(reference.double(), [k])[k].square(),
        }
    )


@handles("dim", "fid_distance")
def fid_distance(case: Case) -> Produced:
    """Pairs of sets, some with fewer images than features."""
    tensors = case.tensors()
    known_keys(case.record["config"], (), "config")
    found: dict[str, Tensor] = {}
    for name in sorted(name for name in tensors if name.startswith("in.features_a_")):
        number = name.removeprefix("in.features_a_")
        one, other = _moments(tensors[name]), _moments(tensors[f"in.features_b_{number}"])
        found[f"out.mu_a_{number}"] = one.mean
        found[f"out.sigma_a_{number}"] = one.covariance
        found[f"out.fid_{number}"] = torch.tensor(frechet_distance(one, other), dtype=torch.float64)
    return Produced(found)


@handles("gmem", "ema_and_frechet")
def ema_and_frechet(case: Case) -> Produced:
    """The average over the updates, statistics of a set, a distance."""
    tensors = case.tensors()
    known_keys(case.record["config"], ("decay",), "config")
    average, averages = tensors["in.ema0"].clone(), []
    for parameters in tensors["in.params"]:
        update_ema_([average], [parameters], case.record["config"]["decay"])
        averages.append(average.clone())
    one, other = _moments(tensors["in.feat_a"]), _moments(tensors["in.feat_b"])
    return Produced(
        {
            "out.ema": torch.stack(averages),
            "out.mu_a": one.mean,
            "out.sigma_a": one.covariance,
            "out.frechet": torch.tensor([frechet_distance(one, other)], dtype=torch.float64),
        }
    )
