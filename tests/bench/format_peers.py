"""The peers of reading: the same rows as other programs store them, read as those programs read them.

A sample at a time, stacked. Slow ways go through fewer rows; all numbers are per second. A peer that cannot be measured
here is left out, counted, and said loudly.
"""

from __future__ import annotations

import importlib
import sys
import tomllib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from own_environment import ROOT, Conversation, UnavailableError, environment
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hpc_gen.data.write import write_table

Way = Callable[[], Iterator[Tensor]]  # batches of an epoch

SEED = 0
SLOW_ROWS = 2_048  # of ways that need a file or a parser per row
WORKER = Path(__file__).resolve().parent / "peer_worker.py"
WORKERS = {  # package -> name of its row; each in the environment of [tool.hpc-gen] in pyproject.toml
    "litdata": "peer: litdata, its own chunks and shuffle",
    "streaming": "peer: mosaicml-streaming, MDS and its own shuffle",
}


@dataclass
class Peers:
    """`ways`: batches in this process. `asked`: seconds per row of so many batches, by the clock
    and of the processor, told by another process.

    `absent`: a sentence for each peer that could not be measured.
    """

    ways: dict[str, Way] = field(default_factory=dict)
    asked: dict[str, Callable[[int], tuple[float, float]]] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    _talks: list[Conversation] = field(default_factory=list)

    def told(self) -> str:
        """How many are here and which are not, and why."""
        here = len(self.ways) + len(self.asked)
        if not self.absent:
            return f"All {here} peers were measured."
        return f"{here} peers were measured, {len(self.absent)} could not be: {' '.join(self.absent)}"

    def close(self) -> None:
        """End the programs of other environments."""
        for talk in self._talks:
            talk.close()


def peers(folder: Path, columns: dict[str, Tensor], batch: int) -> Peers:
    """Every peer that can be had, its files written below `folder`; `columns`: moments, moments_flip, labels."""
    found = Peers()
    found.ways["peer: a .npz per sample (MAR, DiM)"] = _npz(folder / "npz", columns, batch)
    found.ways["peer: ptshard of 64 rows, as its first reader reads it"] = _first_reader(
        folder / "first", columns, batch
    )
    found.ways["peer: safetensors, a slice per sample (LightningDiT's reader)"] = _slices(
        folder / "lightning", columns, batch
    )
    try:
        importlib.import_module("webdataset")
        found.ways["peer: webdataset, the same tars by the plain package"] = _webdataset(
            folder / "tars", columns, batch
        )
    except ImportError:
        found.absent.append("webdataset is not installed.")
    for package, name in WORKERS.items():
        try:
            talk = _elsewhere(package, folder / package, columns, batch)
            found._talks.append(talk)
            found.asked[name] = lambda batches, talk=talk: _seconds(talk, batches)  # type: ignore[misc]
        except UnavailableError as error:
            found.absent.append(f"{error}.")
    for sentence in found.absent:
        print(f"A PEER IS LEFT OUT: {sentence}", file=sys.stderr, flush=True)
    return found


def _seconds(talk: Conversation, batches: int) -> tuple[float, float]:
    wall, processor = talk.ask(str(batches)).split()
    return float(wall), float(processor)


def _stacked(read: Callable[[int], Tensor], rows: int, batch: int) -> Way:
    """Batches of samples that are read one at a time, at random."""

    def way() -> Iterator[Tensor]:
        order = np.random.default_rng(SEED).permutation(rows)
        for begin in range(0, rows // batch * batch, batch):
            yield torch.stack([read(row) for row in order[begin : begin + batch].tolist()])

    return way


def _npz(folder: Path, columns: dict[str, Tensor], batch: int) -> Way:
    folder.mkdir()
    rows = min(SLOW_ROWS, len(columns["moments"]))
    for row in range(rows):
        arrays = {name: columns[name][row].numpy() for name in ("moments", "moments_flip")}
        np.savez(folder / f"{row}.npz", **arrays)
    return _stacked(lambda row: torch.from_numpy(np.load(folder / f"{row}.npz")["moments"]), rows, batch)


def _first_reader(folder: Path, columns: dict[str, Tensor], batch: int) -> Way:
    """Random access to shards of 64 rows with the four last ones kept open, as the energy reference has it."""
    write_table(folder, columns, shard_rows=64, num_classes=1000)
    kept: OrderedDict[int, Any] = OrderedDict()

    def read(row: int) -> Tensor:
        shard = row // 64
        if shard not in kept:
            kept[shard] = torch.load(folder / f"shard_{shard:05d}.pt", mmap=True, weights_only=True)
            while len(kept) > 4:
                kept.popitem(last=False)
        kept.move_to_end(shard)
        return kept[shard]["moments"][row % 64].clone()

    return _stacked(read, min(len(columns["moments"]), SLOW_ROWS), batch)


def _slices(folder: Path, columns: dict[str, Tensor], batch: int) -> Way:
    """A file is opened for each sample, and a slice of each tensor taken."""
    folder.mkdir()
    rows = len(columns["moments"])
    for number, begin in enumerate(range(0, rows, 10_000)):
        part = {name: column[begin : begin + 10_000].contiguous() for name, column in columns.items()}
        save_file(part, folder / f"latents_rank00_shard{number:03d}.safetensors")

    def read(row: int) -> Tensor:
        path = folder / f"latents_rank00_shard{row // 10_000:03d}.safetensors"
        opened: Any
        with safe_open(path, framework="pt", device="cpu") as opened:
            place = row % 10_000
            opened.get_slice("labels")[place : place + 1]
            return opened.get_slice("moments")[place : place + 1][0]

    return _stacked(read, min(rows, SLOW_ROWS), batch)


def _webdataset(folder: Path, columns: dict[str, Tensor], batch: int) -> Way:
    """Our tars, read by the plain package: a decoder per file and its buffer of 1,000 samples."""
    import webdataset

    write_table(folder, columns, shard_rows=1024, num_classes=1000, layout="webdataset")
    urls = [str(path) for path in sorted(folder.glob("*.tar"))][: max(1, 2 * SLOW_ROWS // 1024)]

    def way() -> Iterator[Tensor]:
        stream = webdataset.WebDataset(urls, shardshuffle=False).shuffle(1000).decode().to_tuple("moments.npy")
        for (found,) in stream.batched(batch, partial=False):
            yield torch.from_numpy(np.asarray(found))

    return way


def _pins() -> list[str]:
    """What the environment of peers holds: torch as ours, and the packages whose pins do not fit ours."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (torch_pin,) = [line for line in project["project"]["dependencies"] if line.startswith("torch==")]
    return [torch_pin, *project["tool"]["hpc-gen"]["peers"]]


def _elsewhere(package: str, folder: Path, columns: dict[str, Tensor], batch: int) -> Conversation:
    """A process in an environment of its own that has written the first rows its way and waits to be asked for batches."""
    python = environment("reading", _pins())
    folder.mkdir()
    rows = min(SLOW_ROWS, len(columns["moments"]))
    np.save(
        folder / "rows.npy", torch.stack([columns["moments"][:rows], columns["moments_flip"][:rows]], dim=1).numpy()
    )
    command = [str(python), str(WORKER), package, str(folder / "rows.npy"), str(folder / "shards"), str(batch)]
    return Conversation(package, command, folder / "log")
