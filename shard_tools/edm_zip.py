"""EDM's dataset zip as rows of pixels, for `shards convert`: images that are square and of one size already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hpc_gen.data.images import to_pixels
from hpc_gen.data.index import LABELS, ColumnInfo, ShardInfo, TableIndex
from hpc_gen.data.mapped import Int64Array
from hpc_gen.data.row_names import Name
from hpc_gen.runtime.errors import DataError
from shard_tools.archives import open_edm_zip
from shard_tools.split import TRAIN, Split

PIXELS = "pixels"


@dataclass(frozen=True)
class EdmZip:
    """The images of a zip in its own order, with `pixels` uint8 [C, H, W] and `labels`."""

    path: Path
    split: Split
    index: TableIndex

    @classmethod
    def open(cls, path: Path) -> EdmZip:
        """Raises DataError for a zip that is not one, or whose first image is not square."""
        source = open_edm_zip(path, (255, 255, 255))
        split = source.splits[TRAIN]
        image, _, name = split.item(0)
        if image.width != image.height:
            raise DataError(f"{path}: {name} is {image.width} x {image.height}, not square; use encode.source=edm_zip")
        columns = {PIXELS: ColumnInfo("uint8", (3, image.height, image.width)), LABELS: ColumnInfo("int64", ())}
        index = TableIndex(
            columns,
            (ShardInfo(path.name, len(split), 1, "", source.content),),
            num_classes=source.num_classes,
            class_names=source.class_names,
            tokenizer={"name": "identity"},
            statistics={"skipped": source.skipped},
            recipe={"source": source.name, "source_content": source.content, "split": TRAIN, "row_order": "as it was"},
        )
        return cls(path, split, index)

    @property
    def rows(self) -> int:
        """Images."""
        return len(self.split)

    def names(self, rows: Int64Array) -> list[Name] | None:
        """Names of the images in the zip."""
        return [self.split.ids[row] for row in np.asarray(rows).tolist()]

    def read(self, rows: Int64Array, columns: Sequence[str]) -> dict[str, Tensor]:
        """Rows of the named columns. Raises DataError for an image that is damaged or of another size."""
        found: dict[str, Tensor] = {}
        if LABELS in columns:
            found[LABELS] = torch.from_numpy(self.split.labels[np.asarray(rows)])
        if PIXELS in columns:
            images: list[Tensor] = []
            for row in np.asarray(rows).tolist():
                pixels = to_pixels(self.split.load(row))
                if pixels.shape != self.index.columns[PIXELS].shape:
                    raise DataError(
                        f"{self.path}: {self.split.ids[row]} is {pixels.shape[2]} x {pixels.shape[1]}, the first image "
                        f"is {self.index.columns[PIXELS].shape[2]} wide; use encode.source=edm_zip, which crops"
                    )
                images.append(pixels)
            found[PIXELS] = torch.stack(images)
        return {name: found[name] for name in columns}
