"""The real images and statistics that samples are compared with, opened and checked before any feature is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from hpc_gen.config.experiment import EvaluateConfig
from hpc_gen.data import image_files
from hpc_gen.data.image_files import ImageSet
from hpc_gen.data.table import Table
from hpc_gen.metrics import statistics, suite
from hpc_gen.metrics.extractors import ExtractorSpec
from hpc_gen.metrics.statistics import Statistics
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.stages.build import open_table

PIXELS = "pixels"


class TableImages:
    """The pixels of a table as a set of images."""

    def __init__(self, table: Table) -> None:
        self.table = table

    @property
    def rows(self) -> int:
        """How many."""
        return self.table.rows

    @property
    def shape(self) -> tuple[int, ...]:
        """[3, H, W]."""
        return (3, *self.table.index.columns[PIXELS].shape[1:])

    @property
    def identity(self) -> str:
        """Of the table."""
        return self.table.identity

    def read(self, ids: Sequence[int]) -> Tensor:
        """Images uint8 [n, 3, H, W]; grey ones become colour ones."""
        pixels = self.table.read(np.asarray(ids, dtype=np.int64), [PIXELS])[PIXELS]
        return pixels.expand(-1, 3, -1, -1).contiguous()

    def name(self, row: int) -> str:
        """One image, for messages."""
        return f"row {row} of {self.table.folder}"


@dataclass(frozen=True)
class ReferenceImages:
    """The first `rows` images of a set; `where` names it in messages."""

    source: ImageSet
    rows: int
    where: str

    def read(self, ids: range | Sequence[int]) -> Tensor:
        """Images uint8 [n, 3, H, W] by row."""
        return self.source.read(ids)

    def name(self, row: int) -> str:
        """One image, for messages."""
        return self.source.name(row)

    @property
    def shape(self) -> tuple[int, ...]:
        """[3, H, W]."""
        return self.source.shape

    def facts(self) -> dict[str, Any]:
        """Which images these are, for records and fingerprints."""
        kind = "table" if isinstance(self.source, TableImages) else "images"
        return {kind: self.source.identity, "rows": self.rows}


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
    if named.has_images and suite.needs_images(config.metrics, stored is not None):
        images = reference_images(config, workspace)
        if image_shape is not None:
            check_image_size(images, image_shape)
    return OpenedReference(images, stored)


def reference_images(config: EvaluateConfig, workspace: Path) -> ReferenceImages:
    """The images that `evaluate.reference` names. Raises UserError or DataError."""
    named = config.reference
    if named.images is not None:
        return file_images(workspace / named.images, named.rows, "evaluate.reference")
    assert named.table is not None, "a reference without images has statistics"
    return open_images(workspace, named.table, named.rows, "evaluate.reference")


def file_images(path: Path, rows: int | None, key: str) -> ReferenceImages:
    """The first `rows` (None: all) images of a folder or an .npz file; `key` names its section in messages."""
    found = image_files.open_images(path)
    if rows is not None and rows > found.rows:
        raise UserError(f"{key}.rows is {rows}, but {path} has {found.rows} images; lower it")
    return ReferenceImages(found, rows or found.rows, str(path))


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
    return ReferenceImages(TableImages(table), rows or table.rows, str(table.folder))


def check_image_size(images: ReferenceImages, image_shape: Sequence[int]) -> None:
    """Raise DataError when the samples [3, H, W] have another size than the images."""
    _check_size(images.shape, image_shape, images.where)


def _check_size(theirs: Sequence[int], samples: Sequence[int], where: str) -> None:
    if tuple(theirs[1:]) != tuple(samples[1:]):
        raise DataError(
            f"the samples are {samples[-1]} x {samples[-2]} pixels and the images of {where} {theirs[-1]} x "
            f"{theirs[-2]}: a score across sizes means nothing; encode the reference at the samples' size"
        )
