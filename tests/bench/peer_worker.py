"""A peer of reading in an environment of its own. Started by format_peers.py, never by hand.

    python peer_worker.py streaming|litdata ROWS.npy FOLDER BATCH

ROWS.npy: float16 [rows, 2, ...], a latent and its flip. They are written below FOLDER as the package stores them, then
`ready ROWS` is printed. Each line `BATCHES` on stdin is answered by the seconds per row that the next so many batches
took by the clock, and those of the processor, all threads of the process counted. The package reads them in its own
shuffle, a sample at a time, and one of the two arrays is stacked. It ends with stdin.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

SEED = 0


def main(package: str, rows_file: str, folder: str, batch: int) -> None:
    """Write, say so, then read as much as each line asks for."""
    torch.set_num_threads(1)
    both = np.load(rows_file, mmap_mode="r")
    dataset = {"streaming": _streaming, "litdata": _litdata}[package](Path(folder), both, batch)
    reading = _batches(dataset, batch)
    latents, numbers = next(reading)  # what is opened and filled once
    if not np.array_equal(latents.numpy(), both[numbers, 0]):
        sys.exit("the rows that were read are not those that were written")
    print(f"ready {len(both)}", flush=True)
    for line in sys.stdin:
        next(reading)  # not counted, as with the ways in the other process: what they have pushed out of the caches
        wall, processor = time.perf_counter(), time.process_time()
        rows = sum(len(next(reading)[1]) for _ in range(int(line)))
        print((time.perf_counter() - wall) / rows, (time.process_time() - processor) / rows, flush=True)


def _streaming(folder: Path, both: np.ndarray[Any, Any], batch: int) -> Iterable[dict[str, Any]]:
    if torch.version.cuda is None:
        # torchvision, which it imports, is built for CUDA: beside torch for CPUs it misses two operators that nobody
        # calls here. They stay declared as long as the library lives.
        global _DECLARED
        _DECLARED = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            _DECLARED.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from streaming import MDSWriter, StreamingDataset

    kind = "ndarray:float16:" + ",".join(str(size) for size in both.shape[2:])
    columns = {"moments": kind, "moments_flip": kind, "row": "int"}
    with MDSWriter(out=str(folder), columns=columns) as writer:
        for row, (latent, flipped) in enumerate(both):
            arrays = {"moments": np.ascontiguousarray(latent), "moments_flip": np.ascontiguousarray(flipped)}
            writer.write({**arrays, "row": row})
    return StreamingDataset(local=str(folder), shuffle=True, shuffle_seed=SEED, batch_size=batch)


def _litdata(folder: Path, both: np.ndarray[Any, Any], batch: int) -> Iterable[dict[str, Any]]:
    from litdata import StreamingDataset
    from litdata.streaming import Cache

    folder.mkdir(parents=True)
    cache = Cache(str(folder), chunk_bytes="16MB")
    for row, (latent, flipped) in enumerate(both):
        arrays = {"moments": torch.from_numpy(latent.copy()), "moments_flip": torch.from_numpy(flipped.copy())}
        cache[row] = {**arrays, "row": row}
    cache.done()
    cache.merge(1)
    return StreamingDataset(str(folder), shuffle=True)


def _batches(dataset: Iterable[dict[str, Any]], batch: int) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """Epoch after epoch, whole batches: latents [batch, ...] and the numbers of their rows."""
    while True:
        latents: list[Any] = []
        numbers: list[int] = []
        for sample in dataset:
            latents.append(sample["moments"])
            numbers.append(int(sample["row"]))
            if len(numbers) == batch:
                stack: Any = torch.stack if isinstance(latents[0], torch.Tensor) else np.stack
                yield torch.as_tensor(stack(latents)), numbers
                latents, numbers = [], []


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
