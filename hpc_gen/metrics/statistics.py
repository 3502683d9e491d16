"""Stored statistics of a set of images: mean and covariance of its features in an .npz file, for the Frechet distance.

Keys `mu` [D] and `sigma` [D, D], float32 or float64, as in the files that are published (ADM, EDM, MAR, the seed's
fid_stats), and `mu_s`, `sigma_s` of the spatial features of sFID where there are some (ADM). Ours also hold
`provenance`: a JSON text that names the extractor, the images and their count. torch-fidelity's caches (.pt) are read,
too. No array of objects is ever read, so no pickle is executed.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpc_gen.metrics.foreign_statistics import read_cache
from hpc_gen.metrics.moments import Moments
from hpc_gen.metrics.results import differing_fields
from hpc_gen.runtime import commit
from hpc_gen.runtime.commit import sha256_file
from hpc_gen.runtime.errors import DataError, UserError

FORMAT = "hpc-gen-statistics-1"
SYMMETRY = 1e-4  # tolerated difference of sigma and its transpose, of its largest entry: float32 files are rounded


@dataclass(frozen=True)
class Statistics:
    """Mean float64 [D] and covariance float64 [D, D]; `provenance` None: the file does not say how it was made."""

    mean: Tensor
    covariance: Tensor
    sha256: str
    provenance: Mapping[str, Any] | None = None
    spatial: Statistics | None = None
    images: int | None = None

    @property
    def count(self) -> int | None:
        """Images behind the statistics, where that is known."""
        found = (self.provenance or {}).get("count")
        return int(found) if isinstance(found, int) else self.images


def write(path: Path, moments: Moments, provenance: Mapping[str, Any], spatial: Moments | None = None) -> str:
    """Write a file of statistics (float64, covariance with divisor N - 1), whole or not at all; returns its SHA-256."""
    text = json.dumps({"format": FORMAT, "count": moments.count, **provenance}, sort_keys=True, allow_nan=False)
    stream = io.BytesIO()
    np.savez(
        stream,
        mu=moments.mean.numpy(),
        sigma=moments.covariance.numpy(),
        provenance=np.array([text]),  # an array of text, not of objects
        **({"mu_s": spatial.mean.numpy(), "sigma_s": spatial.covariance.numpy()} if spatial is not None else {}),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    commit.write_bytes(path, stream.getvalue())
    return hashlib.sha256(stream.getvalue()).hexdigest()


def read(path: Path, sha256: str | None = None) -> Statistics:
    """Read and check a file of statistics; `sha256`: what the file must hash to.

    Raises UserError when there is no such file, DataError for another hash, a damaged file, missing keys, wrong shapes
    or dtypes, numbers that are not finite, and a sigma that is no covariance.
    """
    try:
        found = sha256_file(path)
    except OSError as error:
        raise UserError(
            f"no statistics at {path} ({error.strerror}); make them with: hpc-gen metrics stats TABLE -o {path.name}"
        ) from error
    if sha256 not in (None, found):
        raise DataError(
            f"{path} has SHA-256 {found}, not {sha256}; get the right file, or set evaluate.reference.statistics_sha256"
        )
    if path.suffix in (".pt", ".pth"):
        arrays, images = read_cache(path, found)
    else:
        arrays, images = _npz(path), None
    _check(path, arrays["mu"], arrays["sigma"])
    spatial = None
    if "mu_s" in arrays and "sigma_s" in arrays:
        _check(path, arrays["mu_s"], arrays["sigma_s"], "_s")
        spatial = Statistics(_mean(arrays["mu_s"]), _covariance(arrays["sigma_s"]), found)
    provenance = _provenance(path, arrays.get("provenance"))
    return Statistics(_mean(arrays["mu"]), _covariance(arrays["sigma"]), found, provenance, spatial, images)


def _npz(path: Path) -> dict[str, np.ndarray]:
    wanted = ("mu", "sigma", "mu_s", "sigma_s", "provenance")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in wanted if name in archive.files}
            have = ", ".join(archive.files) or "nothing"
    except Exception as error:  # zipfile, zlib and numpy each have errors of their own for a torn file
        raise DataError(f"{path} cannot be read as .npz ({error}); get or make it again") from error
    if "mu" not in arrays or "sigma" not in arrays:
        fix = (
            "it holds images: name it in evaluate.reference.images" if "arr_0" in have else "name a file of statistics"
        )
        raise DataError(f"{path} has no keys 'mu' and 'sigma' (it has: {have}); {fix}")
    return arrays


def _mean(mu: np.ndarray) -> Tensor:
    return torch.from_numpy(mu.astype(np.float64))


def check_extractor(statistics: Statistics, description: Mapping[str, Any], path: Path) -> None:
    """Refuse statistics of another extractor. Raises DataError naming the field; files without provenance pass,
    if the length of their features is right."""
    length = description.get("layer")
    if isinstance(length, str) and length.isdigit() and int(length) != len(statistics.mean):
        raise DataError(
            f"{path} holds statistics of {len(statistics.mean)} features, the extractor "
            f"'{description.get('name')}' has {length}; use statistics of this extractor"
        )
    made = (statistics.provenance or {}).get("extractor")
    if statistics.provenance is None or not isinstance(made, Mapping):
        return
    differing = differing_fields(made, description)
    if differing:
        field, theirs, ours = differing[0]
        raise DataError(
            f"{path} was made by another extractor: {field} is {theirs!r} there and {ours!r} here; "
            "make it again with: hpc-gen metrics stats"
        )


def _check(path: Path, mu: np.ndarray, sigma: np.ndarray, ending: str = "") -> None:
    if mu.ndim != 1 or len(mu) == 0 or sigma.shape != (len(mu), len(mu)):
        raise DataError(
            f"{path}: 'mu{ending}' has shape {list(mu.shape)} and 'sigma{ending}' {list(sigma.shape)}, not [D] and "
            "[D, D]; "
            "name a file of statistics"
        )
    for name, values in ((f"mu{ending}", mu), (f"sigma{ending}", sigma)):
        if values.dtype not in (np.float32, np.float64):
            raise DataError(f"{path}: '{name}' is {values.dtype}, not float32 or float64; store numbers")
        if not np.isfinite(values).all():
            raise DataError(f"{path}: '{name}' holds NaN or infinity; make the statistics again")
    if np.abs(sigma - sigma.T).max() > SYMMETRY * max(np.abs(sigma).max(), 1e-30) or np.diag(sigma).min() < 0:
        raise DataError(f"{path}: 'sigma{ending}' is not a covariance (not symmetric, or negative on its diagonal)")


def _covariance(sigma: np.ndarray) -> Tensor:
    """Symmetric float64; rounding to float32 makes eigenvalues negative, and a distance with them: these become 0."""
    covariance = torch.from_numpy(sigma.astype(np.float64))
    covariance = (covariance + covariance.T) / 2
    if sigma.dtype == np.float32:
        values, vectors = torch.linalg.eigh(covariance)
        covariance = (vectors * values.clamp_min(0.0)) @ vectors.T
    return covariance


def _provenance(path: Path, stored: np.ndarray | None) -> dict[str, Any] | None:
    if stored is None:
        return None
    try:
        document = json.loads(str(stored.reshape(-1)[0]))
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']!r}")
        return dict(document)
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: its provenance cannot be read ({error}); make the statistics again") from error
