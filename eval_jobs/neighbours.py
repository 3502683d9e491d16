"""The training images nearest to a few generated ones: whether a generator copies what it was shown.

By pixels, both brought to at most 32 x 32, over the first rows of the training table that has pixels (a table of
latents has none; then over the images of the reference, and it is said). What was found is kept beside the report.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eval_jobs.pictures import Picture, strip
from hpc_gen.config.loader import Resolved
from hpc_gen.runtime.errors import HpcGenError, UserError
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.sampling.index import SampleIndex
from hpc_gen.stages.reference import ReferenceImages, open_images, reference_images

IMAGES = 8  # generated images looked at
NEAREST = 3  # training images shown beside each
MAX_ROWS = 50_000
SIDE = 32
_CHUNK = 2048
_FORMAT = "hpc-gen-neighbours-1"
_SEARCHED: dict[str, dict[str, Any]] = {}  # by what was searched among what: the page and its file need it


@dataclass(frozen=True)
class Neighbours:
    """Pictures of an image with its nearest ones, and a sentence that says among which."""

    pictures: list[Picture]
    among: str


def neighbours_of(index: SampleIndex, run: RunFolder, resolved: Resolved) -> Neighbours | None:
    """The nearest ones of the first images of a set; None without images to compare with, or images kept."""
    if not index.has_images:
        return None
    try:
        images, where = _images(run, resolved)
    except HpcGenError:
        return None  # the tables are elsewhere: a run folder alone has a report, too
    if images.shape != index.image_shape:
        return None
    samples = _looked_at(index)
    found = _found(run, index, images)
    pictures = []
    for i, (rows, distances) in enumerate(zip(found["rows"], found["distances"], strict=True)):
        beside = torch.cat([samples[i : i + 1], torch.cat([images.read([row]) for row in rows])])
        told = ", ".join(f"{row} ({distance:.3g})" for row, distance in zip(rows, distances, strict=True))
        alt = f"Generated image {i}, then its {len(rows)} nearest {where}"
        pictures.append(strip(beside, alt, f"Image {i}; then rows {told}"))
    among = f"{where}, the first {images.rows:,} of them" if images.rows == MAX_ROWS else f"{images.rows:,} {where}"
    return Neighbours(pictures, among)


def file_of(index: SampleIndex, run: RunFolder, resolved: Resolved) -> tuple[str, str] | None:
    """Name and text of the file beside the report that keeps what was found; None where nothing is looked for."""
    try:
        images, _ = _images(run, resolved)
    except HpcGenError:
        return None
    if not index.has_images or images.shape != index.image_shape:
        return None
    document = {"format": _FORMAT, "of": _key(index, images), **_found(run, index, images)}
    return _path(run, index).name, json.dumps(document, sort_keys=True)


def _looked_at(index: SampleIndex) -> Tensor:
    return index.read(range(min(IMAGES, index.num_images)))


def _found(run: RunFolder, index: SampleIndex, images: ReferenceImages) -> dict[str, Any]:
    """From the last report, from this process, or searched now."""
    key = json.dumps(_key(index, images))
    if key not in _SEARCHED:
        _SEARCHED[key] = _kept(run, index, images) or _search(_looked_at(index), images)
    return _SEARCHED[key]


def _images(run: RunFolder, resolved: Resolved) -> tuple[ReferenceImages, str]:
    experiment = resolved.experiment
    try:
        found, where = open_images(run.workspace, experiment.data.table, None, "data"), "training images"
    except HpcGenError:
        if experiment.evaluate is None or not experiment.evaluate.reference.has_images:
            raise UserError("neither training nor reference images are there") from None
        found, where = reference_images(experiment.evaluate, run.workspace), "reference images (training ones lack)"
    return ReferenceImages(found.source, min(found.rows, MAX_ROWS), found.where), where


def _search(samples: Tensor, images: ReferenceImages) -> dict[str, Any]:
    """Rows and root-mean-square pixel distances (0 to 1) of the nearest ones of each sample."""
    wanted = _small(samples)
    nearest = min(NEAREST, images.rows)
    best = torch.full((len(samples), nearest), float("inf"))
    rows = torch.zeros((len(samples), nearest), dtype=torch.int64)
    for start in range(0, images.rows, _CHUNK):
        part = range(start, min(start + _CHUNK, images.rows))
        distances = torch.cdist(wanted, _small(images.read(part)), compute_mode="donot_use_mm_for_euclid_dist")
        both = torch.cat([best, distances], dim=1)
        numbers = torch.cat([rows, torch.arange(part.start, part.stop).expand(len(samples), -1)], dim=1)
        best, places = both.topk(nearest, dim=1, largest=False)
        rows = numbers.gather(1, places)
    scale = wanted.shape[1] ** 0.5
    return {"rows": rows.tolist(), "distances": [[round(float(d) / scale, 6) for d in line] for line in best]}


def _small(images: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] to float [N, d] in [0, 1], sides of at most SIDE."""
    pixels = images.float() / 255
    side = min(SIDE, *pixels.shape[2:])
    return F.adaptive_avg_pool2d(pixels, side).flatten(1)


def _path(run: RunFolder, index: SampleIndex) -> Path:
    return run.report.parent / f"neighbours-{index.folder.name}.json"


def _key(index: SampleIndex, images: ReferenceImages) -> list[Any]:
    return [index.sha256, images.source.identity, images.rows]


def _kept(run: RunFolder, index: SampleIndex, images: ReferenceImages) -> dict[str, Any] | None:
    try:
        document = json.loads(_path(run, index).read_text())
        if document["format"] == _FORMAT and document["of"] == _key(index, images):
            return {"rows": document["rows"], "distances": document["distances"]}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent or torn: searched again
    return None
