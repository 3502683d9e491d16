"""mosaicml-streaming, read in an environment of its own: its pins do not fit ours. Started by peers.py, never by hand.

    python peer_streaming.py ROWS.npy FOLDER BATCH

ROWS.npy: float16 [rows, 2, ...], a latent and its flip. They are written as MDS below FOLDER, then `ready ROWS` is
printed. Each line `BATCHES` on stdin is answered by the seconds per row that the next so many batches took, as the
program itself reads them: its own shuffle, a sample at a time, one of the two arrays stacked. It ends with stdin.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

# torchvision, which it imports, is built for CUDA: beside torch for CPUs it misses two operators that nobody calls here.
MISSING = torch.library.Library("torchvision", "FRAGMENT")
if not torch.cuda.is_available():
    MISSING.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    MISSING.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from streaming import MDSWriter, StreamingDataset  # noqa: E402 - after what makes it importable

SEED = 0


def main(rows_file: str, folder: str, batch: int) -> None:
    """Write, say so, then read as much as each line asks for."""
    torch.set_num_threads(1)
    both = np.load(rows_file, mmap_mode="r")
    _write(Path(folder), both)
    reading = _batches(StreamingDataset(local=folder, shuffle=True, shuffle_seed=SEED, batch_size=batch), batch)
    latents, numbers = next(reading)  # what is opened and filled once
    if not np.array_equal(latents.numpy(), both[numbers, 0]):
        sys.exit("the rows that were read are not those that were written")
    print(f"ready {len(both)}", flush=True)
    for line in sys.stdin:
        begun = time.perf_counter()
        rows = sum(len(next(reading)[1]) for _ in range(int(line)))
        print((time.perf_counter() - begun) / rows, flush=True)


def _write(folder: Path, both: np.ndarray[Any, Any]) -> None:
    kind = "ndarray:float16:" + ",".join(str(size) for size in both.shape[2:])
    columns = {"moments": kind, "moments_flip": kind, "row": "int"}
    with MDSWriter(out=str(folder), columns=columns) as writer:
        for row, (latent, flipped) in enumerate(both):
            arrays = {"moments": np.ascontiguousarray(latent), "moments_flip": np.ascontiguousarray(flipped)}
            writer.write({**arrays, "row": row})


def _batches(dataset: StreamingDataset, batch: int) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """Epoch after epoch, whole batches: latents [batch, ...] and the numbers of their rows."""
    while True:
        latents: list[torch.Tensor] = []
        numbers: list[int] = []
        for sample in dataset:
            latents.append(torch.from_numpy(sample["moments"]))
            numbers.append(int(sample["row"]))
            if len(numbers) == batch:
                yield torch.stack(latents), numbers
                latents, numbers = [], []


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
