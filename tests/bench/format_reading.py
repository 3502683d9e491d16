"""The same latents in the same batches by every way of storing them; decode of photographs; cuts into shards.

The rows are those of specs/dependencies.md section 7: a latent and its flip, 16 KiB per row, of which one, 8 KiB, is
delivered in batches of 64. Peers are read as their own programs read them: a sample at a time, stacked. All in this
process, without workers, the page cache warm; slow ways go through fewer rows, all numbers are per second.
"""

from __future__ import annotations

import importlib
import io
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Table, by_turns
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hpc_gen.data import decode
from hpc_gen.data import table as reading
from hpc_gen.data.crops import crop
from hpc_gen.data.order import BlockShuffle
from hpc_gen.data.ordered import OrderedReader
from hpc_gen.data.write import write_table

SHAPE = (16, 16, 16)  # float16: 8 KiB
BATCH, SEED = 64, 0
PIECE, SLOW_PIECE = 8, 2  # batches of one turn
SLOW_ROWS = 2_048  # of ways that need a file or a parser per row
OURS = {"ptshard": "ptshard", "WebDataset tar": "webdataset", "safetensors": "safetensors"}


def bench(quick: bool) -> list[Table]:
    """Three tables: formats, cuts, decode."""
    torch.set_num_threads(1)
    rows, rounds = (2_048, 2) if quick else (20_000, 5)
    with tempfile.TemporaryDirectory(prefix="hpc-gen-bench-") as name:
        folder = Path(name)
        moments = torch.randn((rows, *SHAPE), generator=torch.Generator().manual_seed(SEED)).half()
        flipped = moments.flip(-1).contiguous()
        columns = {"moments": moments, "moments_flip": flipped, "labels": torch.arange(rows) % 1000}
        return [
            _formats(folder, columns, rows, rounds),
            _cuts(folder, columns, rows, rounds),
            _decode(200 if quick else 600, rounds),
        ]


def _formats(folder: Path, columns: dict[str, Tensor], rows: int, rounds: int) -> Table:
    moments = columns["moments"]
    ways: dict[str, Callable[[], Iterator[Tensor]]] = {}
    for name, layout in OURS.items():
        write_table(folder / layout, columns, shard_rows=1024, num_classes=1000, layout=layout)  # type: ignore[arg-type]
        ways[f"ours: {name}"] = _ours(folder / layout, moments)
    plain = moments.numpy()
    ways["limit: memcpy of the same number of bytes, front to back"] = lambda: (
        torch.from_numpy(plain[begin : begin + BATCH].copy()) for begin in range(0, rows // BATCH * BATCH, BATCH)
    )
    ways["limit: the same rows in the same order, from memory"] = _from_memory(folder / "ptshard", moments)
    peers, absent = _peers(folder, columns, rows)
    ways |= peers
    pieces = {name: PIECE if name.startswith(("ours", "limit")) else SLOW_PIECE for name in ways}
    found = by_turns({name: _in_pieces(way, pieces[name]) for name, way in ways.items()}, 8 * rounds)
    limit = next(name for name in ways if "memcpy" in name)
    result = Table(
        "Reading the same latents by format",
        f"{rows:,} rows of 16 KiB (latent and flip, float16), 8 KiB delivered, batch {BATCH}; ours in training order from "
        f"shards of 1024 rows; {8 * rounds} rounds of {PIECE} batches ({SLOW_PIECE} of peers) by turns, page cache warm, one "
        "thread, no workers. " + absent,
        ("way", "samples/s", "times memcpy", "times ours (ptshard)"),
    )
    first = next(iter(ways))
    for name in ways:
        rate = found[name].per(1.0).show("{:,.0f}")
        result.add(
            name, rate, found[limit].over(found[name]).show("{:.3f}"), found[first].over(found[name]).show("{:.3f}")
        )
    return result


def _in_pieces(way: Callable[[], Iterator[Tensor]], batches: int) -> Callable[[], float]:
    """Seconds per row of the next so many batches, over and over: short turns, so that all see the same machine."""
    going = _endless(way)
    next(going)  # what is opened and filled once

    def action() -> float:
        begun = time.perf_counter()
        rows = sum(len(next(going)) for _ in range(batches))
        return (time.perf_counter() - begun) / rows

    return action


def _endless(way: Callable[[], Iterator[Tensor]]) -> Iterator[Tensor]:
    while True:
        yield from way()


def _timed(way: Callable[[], Iterator[Tensor]], rows: int) -> Callable[[], float]:
    """Seconds per row."""

    def action() -> float:
        begun = time.perf_counter()
        for _ in way():
            pass
        return (time.perf_counter() - begun) / rows

    return action


def _ours(folder: Path, moments: Tensor) -> Callable[[], Iterator[Tensor]]:
    table = reading.Table.open(folder)
    picked = [table.rows - 1, 0, 77]
    assert torch.equal(table.read(picked, ("moments",))["moments"], moments[picked])  # what is timed is right

    def way() -> Iterator[Tensor]:
        reader = OrderedReader(table, BlockShuffle(table.shard_rows, SEED, 16), ("moments",))
        for begin in range(0, table.rows // BATCH * BATCH, BATCH):
            yield reader.read(begin, begin + BATCH)[1]["moments"]

    return way


def _from_memory(folder: Path, moments: Tensor) -> Callable[[], Iterator[Tensor]]:
    table = reading.Table.open(folder)
    rows = BlockShuffle(table.shard_rows, SEED, 16).rows(np.arange(table.rows // BATCH * BATCH))
    held = moments.numpy().reshape(len(moments), -1).view("V8192").reshape(-1)

    def way() -> Iterator[Tensor]:
        for begin in range(0, len(rows), BATCH):
            yield torch.from_numpy(held[rows[begin : begin + BATCH]].view(np.float16).reshape(-1, *SHAPE))

    return way


def _peers(
    folder: Path, columns: dict[str, Tensor], rows: int
) -> tuple[dict[str, Callable[[], Iterator[Tensor]]], str]:
    """Other ways, and a sentence on those that are not here."""
    ways = {
        "peer: a .npz per sample (MAR, DiM)": _npz(folder / "npz", columns),
        "peer: ptshard of 64 rows, as its first reader reads it": _first_reader(folder / "first", columns, rows),
        "peer: safetensors, a slice per sample (LightningDiT's reader)": _slices(folder / "lightning", columns, rows),
    }
    absent: list[str] = []
    makers = {"webdataset": _webdataset, "litdata": _litdata}
    for name, make in makers.items():
        try:
            importlib.import_module(name)
        except ImportError:
            absent.append(f"{name} is not installed, so its row is missing.")
            continue
        ways |= make(folder / name, columns, rows)
    absent.append("mosaicml-streaming is left out: its pins do not fit ours (specs/dependencies.md section 2).")
    return ways, " ".join(absent)


def _shuffled(rows: int, seed: int = SEED) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).permutation(rows)


def _stacked(read: Callable[[int], Tensor], rows: int) -> Callable[[], Iterator[Tensor]]:
    """Batches of samples that are read one at a time, at random."""

    def way() -> Iterator[Tensor]:
        order = _shuffled(rows)
        for begin in range(0, rows // BATCH * BATCH, BATCH):
            yield torch.stack([read(row) for row in order[begin : begin + BATCH].tolist()])

    return way


def _npz(folder: Path, columns: dict[str, Tensor]) -> Callable[[], Iterator[Tensor]]:
    folder.mkdir()
    rows = min(SLOW_ROWS, len(columns["moments"]))
    for row in range(rows):
        arrays = {name: columns[name][row].numpy() for name in ("moments", "moments_flip")}
        np.savez(folder / f"{row}.npz", **arrays)
    return _stacked(lambda row: torch.from_numpy(np.load(folder / f"{row}.npz")["moments"]), rows)


def _first_reader(folder: Path, columns: dict[str, Tensor], rows: int) -> Callable[[], Iterator[Tensor]]:
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

    return _stacked(read, min(rows, SLOW_ROWS))


def _slices(folder: Path, columns: dict[str, Tensor], rows: int) -> Callable[[], Iterator[Tensor]]:
    """A file is opened for each sample, and a slice of each tensor taken."""
    folder.mkdir()
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

    return _stacked(read, min(rows, SLOW_ROWS))


def _webdataset(folder: Path, columns: dict[str, Tensor], rows: int) -> dict[str, Callable[[], Iterator[Tensor]]]:
    """Our tars, read by the plain package: a decoder per file and its buffer of 1,000 samples."""
    import webdataset

    write_table(folder, columns, shard_rows=1024, num_classes=1000, layout="webdataset")
    urls = [str(path) for path in sorted(folder.glob("*.tar"))][: max(1, 2 * SLOW_ROWS // 1024)]

    def way() -> Iterator[Tensor]:
        stream = webdataset.WebDataset(urls, shardshuffle=False).shuffle(1000).decode().to_tuple("moments.npy")
        for (batch,) in stream.batched(BATCH, partial=False):
            yield torch.from_numpy(np.asarray(batch))

    return {"peer: webdataset, the same tars by the plain package": way}


def _litdata(folder: Path, columns: dict[str, Tensor], rows: int) -> dict[str, Callable[[], Iterator[Tensor]]]:
    from litdata import StreamingDataset
    from litdata.streaming import Cache

    cache = Cache(str(folder), chunk_bytes="16MB")
    for row in range(rows):
        cache[row] = {"moments": columns["moments"][row], "moments_flip": columns["moments_flip"][row], "label": row}
    cache.done()
    cache.merge(1)
    dataset = StreamingDataset(str(folder), shuffle=True)

    def way() -> Iterator[Tensor]:
        waiting: list[Tensor] = []
        for sample in dataset:
            waiting.append(sample["moments"])
            if len(waiting) == BATCH:
                yield torch.stack(waiting)
                waiting = []

    return {"peer: litdata, its own chunks and shuffle": way}


def _cuts(folder: Path, columns: dict[str, Tensor], rows: int, rounds: int) -> Table:
    """How many rows a shard should have, shuffled in blocks of the same number of rows."""
    block = 16_384
    ways: dict[str, Callable[[], float]] = {}
    opened: dict[str, float] = {}
    for shard_rows in (64, 256, 1024, 4096):
        name = f"{shard_rows} rows"
        write_table(folder / name, columns, shard_rows=shard_rows, num_classes=1000)
        begun = time.perf_counter()
        table = reading.Table.open(folder / name)
        opened[name] = time.perf_counter() - begun
        ways[name] = _timed(_epoch(table, max(1, block // shard_rows)), rows // BATCH * BATCH)
    found = by_turns(ways, rounds)
    result = Table(
        "Rows per shard",
        f"The same table cut otherwise, shuffled in blocks of {block:,} rows; each round opens every shard anew, as an "
        f"epoch over a large table does; {rounds} rounds by turns.",
        ("shards of", "samples/s", "times 64 rows", "ms to open the table"),
    )
    for name in ways:
        rate = found[name].per(1.0).show("{:,.0f}")
        result.add(name, rate, found["64 rows"].over(found[name]).show(), f"{1e3 * opened[name]:.1f}")
    return result


def _epoch(table: reading.Table, shuffle_shards: int) -> Callable[[], Iterator[Tensor]]:
    folder = table.folder

    def way() -> Iterator[Tensor]:
        fresh = reading.Table.open(folder)
        reader = OrderedReader(fresh, BlockShuffle(fresh.shard_rows, SEED, shuffle_shards), ("moments",))
        for begin in range(0, fresh.rows // BATCH * BATCH, BATCH):
            yield reader.read(begin, begin + BATCH)[1]["moments"]

    return way


def _decode(images: int, rounds: int) -> Table:
    """Photograph-like JPEGs of at most 400 x 300, decoded and cropped to 256 by the ADM crop."""
    random = np.random.default_rng(SEED)
    encoded = [_photograph(random) for _ in range(images)]
    ways: dict[str, Callable[[], None]] = {}
    names: list[tuple[str, decode.DecoderName, int]] = [("Pillow", "pillow", 1), ("DALI, 1 thread", "dali", 1)]
    names.append(("DALI, 2 threads", "dali", 2))
    try:
        decode.import_dali()
    except Exception:  # the sentence is in the table's text
        names = names[:1]
    for name, decoder, threads in names:
        ways[name] = _decoding(decode.build(decoder, threads=threads), encoded)
    found = by_turns(ways, rounds)
    result = Table(
        "Decode and crop of JPEGs",
        f"{images} images of at most 400 x 300 (smooth waves and noise), decoded eight at a time as the stage encode does, "
        f"cropped by Pillow in all ways; {rounds} rounds by turns."
        + ("" if len(ways) > 1 else " DALI is not installed, so its rows are missing."),
        ("decoder", "images/s", "times Pillow"),
    )
    for name in ways:
        result.add(name, found[name].per(images).show("{:,.0f}"), found["Pillow"].over(found[name]).show())
    return result


def _decoding(decoder: decode.ImageDecoder, encoded: list[bytes]) -> Callable[[], None]:
    def action() -> None:
        for begin in range(0, len(encoded), 8):
            for image in decoder.decode(encoded[begin : begin + 8]):
                assert isinstance(image, Image.Image)
                crop("adm", image, 256)

    return action


def _photograph(random: np.random.Generator) -> bytes:
    width, height = int(random.integers(280, 401)), int(random.integers(260, 301))
    wave = np.sin(np.linspace(0, 9, width)[None, :, None] + np.linspace(0, 5, height)[:, None, None] + np.arange(3))
    pixels = (127 + 90 * wave + random.normal(0, 9, (height, width, 3))).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
