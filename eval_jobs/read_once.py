"""Images decoded once for all networks that look at them in a row."""

from __future__ import annotations

from torch import Tensor

from hpc_gen.sampling.index import SampleIndex
from hpc_gen.stages.reference import ReferenceImages

Source = SampleIndex | ReferenceImages


class ReadOnce:
    """Remembers what was read last, and nothing older: one block of features and one of samples."""

    def __init__(self) -> None:
        self._source: Source | None = None
        self._ids = range(0)
        self._images: Tensor | None = None
        self._whole: dict[str, Tensor] = {}

    def read(self, source: Source, ids: range) -> Tensor:
        """Images uint8 [n, 3, H, W] of consecutive ids; do not write into them. Raises as `source.read`."""
        if source is not self._source:
            self._source, self._images = source, None
            self._whole.clear()  # another point's blocks have the same names
        if self._images is None or ids != self._ids:
            self._images = None
            found = source.read(ids, self._whole) if isinstance(source, SampleIndex) else source.read(ids)
            self._ids, self._images = ids, found
        return self._images
