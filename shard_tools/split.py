"""What every source of images is: splits with ids, labels and one image at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image

from hpc_gen.data.images import decode_image

TRAIN, VALIDATION = "train", "validation"
SPLIT_NAMES = {"train": TRAIN, "validation": VALIDATION, "val": VALIDATION}  # of folders, archives and files

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Images of one split in the source's own order: ids are stable, path-like, and free of this machine's paths.

    `read` gives the encoded bytes of an image where the source holds files; then another decoder may be used.
    """

    ids: Sequence[str]
    labels: Int64Array
    load: Callable[[int], Image.Image]
    read: Callable[[int], bytes] | None = None

    @classmethod
    def of_files(
        cls, ids: Sequence[str], labels: Sequence[int], read: Callable[[int], bytes], background: Sequence[int]
    ) -> Split:
        """A split of encoded images: `read` raises DataError when one cannot be had."""
        return cls(ids, np.array(labels, dtype=np.int64), lambda i: decode_image(read(i), background), read)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.ids)

    def item(self, i: int) -> tuple[Image.Image, int, str]:
        """(image, label, id) of image `i`. Raises DataError when it cannot be read."""
        return self.load(i), int(self.labels[i]), self.ids[i]


@dataclass(frozen=True)
class Source:
    """An opened source. `content` is a hash of its listing; `skipped` counts what was left out, by reason."""

    name: str
    class_names: tuple[str, ...]
    splits: dict[str, Split]
    content: str
    skipped: dict[str, int] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """Number of classes; labels are 0 .. num_classes - 1."""
        return len(self.class_names)
