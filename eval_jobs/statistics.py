"""Statistics of a set of images for the Frechet distance: `hpc-gen metrics stats`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hpc_gen.data.image_files import EXTENSIONS
from hpc_gen.data.index import INDEX_NAME
from hpc_gen.metrics import statistics, suite
from hpc_gen.metrics.extractors import joined
from hpc_gen.metrics.moments import Moments
from hpc_gen.runtime.errors import UserError
from hpc_gen.runtime.progress import Progress
from hpc_gen.sampling.plan import PLAN_NAME
from hpc_gen.stages.device import task_device
from hpc_gen.stages.networks import extractor_spec
from hpc_gen.stages.reference import ReferenceImages, file_images, open_images
from hpc_gen.training.precision import set_determinism

BLOCK_BATCHES = 8  # batches whose features are added to the moments at once


@dataclass(frozen=True)
class StatisticsJob:
    """What is asked for; `rows` None: all. Paths are relative to the workspace, but for `output`.

    `table`: a table of pixels, a folder of images or an .npz with arr_0; `spatial`: those of sFID, too.
    """

    table: str
    output: Path
    extractor: str = "inception"
    weights: str | None = None
    sha256: str | None = None
    rows: int | None = None
    batch: int = 32
    threads: int = 1
    spatial: bool = False


def make_statistics(job: StatisticsJob, workspace: Path, say: Callable[[str], None]) -> Path:
    """Mean and covariance of our features of a set of images, in one pass; writes `job.output`.

    The file says how it was made: extractor and its weights, table, rows, batch. Raises UserError or DataError before
    any feature is computed, and DataError for features that are not finite.
    """
    if job.output.suffix != ".npz":
        raise UserError(f"the file of statistics {job.output} does not end in .npz; name one that does")
    spec = extractor_spec(job.extractor, job.weights, job.sha256, workspace)
    images = _source(workspace, job)
    if images.rows < 2:
        raise UserError(f"{job.table} has {images.rows} images; a covariance needs at least 2")
    set_determinism(True, job.threads)
    network = spec.built(task_device(0), spatial=job.spatial)
    progress = Progress(images.rows, "statistics", "images")
    total: Moments | None = None
    spatial: Moments | None = None
    block = job.batch * BLOCK_BATCHES
    for start in range(0, images.rows, block):
        rows = range(start, min(start + block, images.rows))
        pixels = images.read(rows)
        found = joined([network(part) for part in pixels.split(job.batch)])
        names = [images.name(row) for row in rows]
        total = _added(total, found.features, names)
        if found.spatial is not None:
            spatial = _added(spatial, found.spatial, names)
        progress.update(rows.stop)
    progress.close()
    assert total is not None, "a table has rows"
    provenance = {
        "extractor": dict(spec.description),
        **images.facts(),
        "image_shape": list(images.shape),
        "batch": job.batch,
        "threads": job.threads,
        "device": task_device(0).type,
        "versions": suite.versions(),
    }
    sha256 = statistics.write(job.output, total, provenance, spatial)
    lengths = f"{len(total.mean)} features" + (f" and {len(spatial.mean)} spatial ones" if spatial is not None else "")
    say(f"{job.output}: mean and covariance of {images.rows} images, {lengths}, SHA-256 {sha256}")
    return job.output


def _source(workspace: Path, job: StatisticsJob) -> ReferenceImages:
    """A table where the folder is one, else a folder of images or an .npz."""
    path = workspace / job.table
    loose = (
        path.is_dir()
        and not (path / INDEX_NAME).exists()
        and any(file.suffix.lower() in EXTENSIONS for file in path.rglob("*"))
    )
    if path.is_file() or loose or (path / PLAN_NAME).exists():
        return file_images(path, job.rows, "metrics stats")
    return open_images(workspace, job.table, job.rows, "metrics stats")


def _added(total: Moments | None, features: Tensor, names: Sequence[str]) -> Moments:
    part = Moments.of(features, names)
    return part if total is None else total.merged(part)


def facts_of(path: Path) -> dict[str, Any]:
    """What a file of statistics holds, for `hpc-gen metrics show`. Raises as statistics.read."""
    found = statistics.read(path)
    facts: dict[str, Any] = {
        "file": str(path),
        "sha256": found.sha256,
        "features": len(found.mean),
        "spatial": len(found.spatial.mean) if found.spatial is not None else None,
        "images": found.count,
    }
    if found.provenance is None:
        return {**facts, "made by": "it does not say: make sure yourself that its extractor is yours"}
    for name, value in found.provenance.items():
        if isinstance(value, Mapping):
            facts |= {f"{name}.{inner}": fact for inner, fact in value.items()}
        elif name not in ("count", "format"):
            facts[name] = value
    return facts
