"""All images of a set in one .npz, as ADM's evaluator takes them: arr_0 uint8 [N, H, W, 3], arr_1 int64 [N] classes.

Written block by block: the set need not fit into memory.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import torch

from hpc_gen.runtime import commit
from hpc_gen.sampling.index import SampleIndex, read_block

NPZ_NAME = "samples.npz"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same bytes whenever it is written


def write_npz(index: SampleIndex) -> Path:
    """Write `samples.npz` beside the index, whole or not at all; arr_1 is left out without classes.

    Raises DataError for images that are not those that were sampled.
    """
    path = index.folder / NPZ_NAME
    staged = commit.staging_path(path)
    _, height, width = index.image_shape
    with commit.CommitStream(staged) as stream, zipfile.ZipFile(_Forward(stream), "w") as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy", _EPOCH), "w", force_zip64=True) as member:
            member.write(_header((index.num_images, height, width, 3), np.dtype(np.uint8)))
            for block in index.blocks:
                images = read_block(index.folder, block)
                member.write(images.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
        if index.plan.num_classes:
            labels = index.plan.labels(torch.arange(index.num_images)).numpy()
            with archive.open(zipfile.ZipInfo("arr_1.npy", _EPOCH), "w", force_zip64=True) as member:
                member.write(_header(labels.shape, labels.dtype) + labels.tobytes())
    commit.commit_file(staged, path)
    return path


class _Forward:
    """A stream as zipfile takes it where it cannot go back to fill in sizes: it writes them behind each member."""

    def __init__(self, stream: commit.CommitStream) -> None:
        self.write, self.flush = stream.write, stream.flush

    def tell(self) -> int:
        """There is no place to tell of, which is what makes zipfile write forward only."""
        raise io.UnsupportedOperation("tell")


def _header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    stream = io.BytesIO()
    facts = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, facts)
    return stream.getvalue()
