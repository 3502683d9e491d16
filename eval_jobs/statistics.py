"""Statistics of a table of images for the Frechet distance: `hpc-gen metrics stats`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from hpc_gen.metrics import extractors, statistics, suite
from hpc_gen.metrics.extractors import NetworkExtractor
from hpc_gen.metrics.moments import Moments
from hpc_gen.runtime.errors import UserError
from hpc_gen.runtime.progress import Progress
from hpc_gen.stages.device import task_device
from hpc_gen.stages.reference import PIXELS, open_images
from hpc_gen.training.precision import set_determinism

BLOCK_BATCHES = 8  # batches whose features are added to the moments at once


@dataclass(frozen=True)
class StatisticsJob:
    """What is asked for; `rows` None: all. Paths are relative to the workspace, but for `output`."""

    table: str
    output: Path
    extractor: str = "inception"
    weights: str | None = None
    sha256: str | None = None
    rows: int | None = None
    batch: int = 32
    threads: int = 1


def make_statistics(job: StatisticsJob, workspace: Path, say: Callable[[str], None]) -> Path:
    """Mean and covariance of our features of a table's images, in one pass; writes `job.output`.

    The file says how it was made: extractor and its weights, table, rows, batch. Raises UserError or DataError before
    any feature is computed, and DataError for features that are not finite.
    """
    if job.output.suffix != ".npz":
        raise UserError(f"the file of statistics {job.output} does not end in .npz; name one that does")
    spec = extractors.spec(job.extractor, job.weights, job.sha256, workspace)
    images = open_images(workspace, job.table, job.rows, "metrics stats")
    if images.rows < 2:
        raise UserError(f"{job.table} has {images.rows} images; a covariance needs at least 2")
    set_determinism(True, job.threads)
    network = spec.build()
    if isinstance(network, NetworkExtractor):
        network.to(task_device(0))
    progress, total = Progress(images.rows, "statistics", "images"), None
    block = job.batch * BLOCK_BATCHES
    for start in range(0, images.rows, block):
        rows = range(start, min(start + block, images.rows))
        pixels = images.read(rows)
        features = torch.cat([network(part).features for part in pixels.split(job.batch)])
        part = Moments.of(features, [images.name(row) for row in rows])
        total = part if total is None else total.merged(part)
        progress.update(rows.stop)
    progress.close()
    assert total is not None, "a table has rows"
    shape = images.table.index.columns[PIXELS].shape
    provenance = {
        "extractor": dict(spec.description),
        "table": images.table.identity,
        "rows": images.rows,
        "image_shape": [3, *shape[1:]],
        "batch": job.batch,
        "threads": job.threads,
        "device": task_device(0).type,
        "versions": suite.versions(),
    }
    sha256 = statistics.write(job.output, total, provenance)
    say(f"{job.output}: mean and covariance of {images.rows} images, {len(total.mean)} features, SHA-256 {sha256}")
    return job.output
