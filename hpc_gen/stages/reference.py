"""The real images and statistics that samples are compared with, opened and checked before any feature is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from hpc_gen.config.experiment import EvaluateConfig
from hpc_gen.data.table import Table
from hpc_gen.metrics import statistics, suite
from hpc_gen.metrics.extractors import ExtractorSpec
from hpc_gen.metrics.statistics import Statistics
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.stages.build import open_table

PIXELS = "pixels"


@dataclass(frozen=True)
class ReferenceImages:
    """The first `rows` images of a table of pixels."""

    table: Table
    rows: int

    def read(self, ids: range | Sequence[int]) -> Tensor:
        """Images uint8 [n, 3, H, W] by row; grey ones become colour ones."""
        pixels = self.table.read(np.asarray(ids, dtype=np.int64), [PIXELS])[PIXELS]
        return pixels.expand(-1, 3, -1, -1).contiguous()

    def name(self, row: int) -> str:
        """One image, for messages."""
        return f"row {row} of {self.table.folder}"


@dataclass(frozen=True)
class OpenedReference:
    """What `evaluate.reference` names; images None: none of the metrics needs them, or there are none."""

    images: ReferenceImages | None
    statistics: Statistics | None


def open_reference(
    config: EvaluateConfig, workspace: Path, extractor: ExtractorSpec, image_shape: Sequence[int] | None
) -> OpenedReference:
    """Open what the metrics of `config` need. `image_shape` [3, H, W] of the samples, None where it is not known yet.

    Raises UserError or DataError for a table without pixels or of another size, and statistics of another extractor.
    """
    named = config.reference
    stored: Statistics | None = None
    if named.statistics is not None:
        path = workspace / named.statistics
        stored = statistics.read(path, named.statistics_sha256)
        statistics.check_extractor(stored, extractor.description, path)
        made_at = (stored.provenance or {}).get("image_shape")
        if image_shape is not None and made_at is not None:
            _check_size(made_at, image_shape, str(path))
    images: ReferenceImages | None = None
    if named.table is not None and suite.needs_images(config.metrics, stored is not None):
        images = open_images(workspace, named.table, named.rows, "evaluate.reference")
        if image_shape is not None:
            check_image_size(images, image_shape)
    return OpenedReference(images, stored)


def open_images(workspace: Path, path: str, rows: int | None, key: str) -> ReferenceImages:
    """The first `rows` (None: all) images of the table at `path`; `key` names its section in messages."""
    table = open_table(workspace, path)
    column = table.index.columns.get(PIXELS)
    if column is None or column.dtype != "uint8":
        have = ", ".join(f"{name} {info.dtype}" for name, info in table.index.columns.items())
        raise DataError(
            f"{table.folder} has no column '{PIXELS}' of uint8 (it has: {have}); name a table of pixels in {key}.table"
        )
    if rows is not None and rows > table.rows:
        raise UserError(f"{key}.rows is {rows}, but {path} has {table.rows} rows; lower it")
    return ReferenceImages(table, rows or table.rows)


def check_image_size(images: ReferenceImages, image_shape: Sequence[int]) -> None:
    """Raise DataError when the samples [3, H, W] have another size than the images."""
    _check_size(images.table.index.columns[PIXELS].shape, image_shape, str(images.table.folder))


def _check_size(theirs: Sequence[int], samples: Sequence[int], where: str) -> None:
    if tuple(theirs[1:]) != tuple(samples[1:]):
        raise DataError(
            f"the samples are {samples[-1]} x {samples[-2]} pixels and the images of {where} {theirs[-1]} x "
            f"{theirs[-2]}: a score across sizes means nothing; encode the reference at the samples' size"
        )
