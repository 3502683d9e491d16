"""The same latents in the same batches by every way of storing them; by size of a row; cuts into shards; decode.

The rows are those of specs/dependencies.md section 7: a latent and its flip, 16 KiB per row, of which one, 8 KiB, is
delivered in batches of 64. All without workers, the page cache warm. Every way writes its batches into memory that it
asks for anew, memcpy included, and goes through rows of its own, so that none finds those of another in the processor's
caches.
"""

from __future__ import annotations

import io
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from format_peers import SEED, Way, peers
from measure import Spread, Table, by_turns
from PIL import Image
from torch import Tensor

from hpc_gen.data import decode
from hpc_gen.data import table as reading
from hpc_gen.data.crops import crop
from hpc_gen.data.order import BlockShuffle
from hpc_gen.data.ordered import OrderedReader
from hpc_gen.data.write import write_table

SHAPE = (16, 16, 16)  # float16: 8 KiB
BATCH = 64
PIECE, SLOW_PIECE = 8, 2  # batches of one turn
OURS = {"ptshard": "ptshard", "WebDataset tar": "webdataset", "safetensors": "safetensors"}
SAME_ROWS = "limit: memcpy of the same bytes: row after row in the same order, from memory"
STRAIGHT = "limit: memcpy of as many bytes, front to back"
ROW_KIB = (4, 8, 16, 32, 64)


def bench(quick: bool) -> list[Table]:
    """Four tables: formats, sizes of a row, cuts, decode."""
    torch.set_num_threads(1)
    rows, rounds = (2_048, 2) if quick else (20_000, 5)
    with tempfile.TemporaryDirectory(prefix="hpc-gen-bench-") as name:
        folder = Path(name)
        columns = _columns(rows, SHAPE)
        tables = [_formats(folder, columns, rows, rounds), _cuts(folder, columns, rows, rounds)]
    with tempfile.TemporaryDirectory(prefix="hpc-gen-bench-") as name:
        tables.insert(1, _sizes(Path(name), 8 if quick else 160, rounds))
    return [*tables, _decode(200 if quick else 600, rounds)]


def _columns(rows: int, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Latents, their flips and labels of so many rows."""
    moments = torch.randn((rows, *shape), generator=torch.Generator().manual_seed(SEED)).half()
    return {"moments": moments, "moments_flip": moments.flip(-1).contiguous(), "labels": torch.arange(rows) % 1000}


def _formats(folder: Path, columns: dict[str, Tensor], rows: int, rounds: int) -> Table:
    moments = columns["moments"]
    ways: dict[str, Way] = {}
    for name, layout in OURS.items():
        write_table(folder / layout, columns, shard_rows=1024, num_classes=1000, layout=layout)  # type: ignore[arg-type]
        ways[f"ours: {name}"] = _ours(folder / layout, moments)
    ways[SAME_ROWS] = _from_memory(folder / "ptshard", moments)
    ways[STRAIGHT] = _front_to_back(moments)
    actions = {name: _in_pieces(way, PIECE) for name, way in ways.items()}
    others = peers(folder, columns, BATCH)
    try:
        actions |= {name: _in_pieces(way, SLOW_PIECE) for name, way in others.ways.items()}
        actions |= {name: _Turns(lambda ask=ask: ask(SLOW_PIECE)) for name, ask in others.asked.items()}  # type: ignore[misc]
        found = by_turns(actions, 8 * rounds)
    finally:
        others.close()
    result = Table(
        "Reading the same latents by format",
        f"{rows:,} rows of 16 KiB (latent and flip, float16), 8 KiB delivered, batch {BATCH}; ours in training order from "
        f"shards of 1024 rows; {8 * rounds} rounds of {PIECE} batches ({SLOW_PIECE} of peers) by turns, a batch before "
        f"each turn not counted, page cache warm, one thread, no workers, every batch in memory of its own. Ratios are "
        "of processor time, the threads of a process included: they hold on a machine that does other things, too, where the "
        f"clock's samples/s do not. {others.told()}",
        (
            "way",
            "samples/s by the clock",
            "samples per second of processor time",
            "times memcpy of the same bytes",
            "times memcpy front to back",
            "ours (ptshard) over it",
        ),
    )
    first = next(iter(ways))
    for name in actions:
        ratios = [found[other].over(found[name]).show("{:.3f}") for other in (SAME_ROWS, STRAIGHT)]
        rates = [seconds.per(1.0).show("{:,.0f}") for seconds in (actions[name].walls, found[name])]
        result.add(name, *rates, *ratios, found[name].over(found[first]).show("{:,.2f}"))
    return result


def _sizes(folder: Path, column_mib: int, rounds: int) -> Table:
    """Ours beside both kinds of memcpy, from small rows to large ones, by the time of the processor."""
    result = Table(
        "Reading by the size of a row",
        f"ptshard in training order beside memcpy, {column_mib} MiB of each size, batches of {BATCH}; {16 * rounds} rounds "
        f"of {PIECE} batches by turns, a batch before each turn not counted. By processor time, so that "
        "other programs count less.",
        ("rows of", "ours, GB/s", "times memcpy of the same bytes", "times memcpy front to back"),
    )
    for kib in ROW_KIB:
        place = folder / f"{kib}"
        columns = _columns(column_mib * 1024 // kib, (kib, 512))
        write_table(place, columns, shard_rows=1024, num_classes=1000)
        moments = columns["moments"]
        ways = {
            "ours": _ours(place, moments),
            SAME_ROWS: _from_memory(place, moments),
            STRAIGHT: _front_to_back(moments),
        }
        found = by_turns({name: _in_pieces(way, PIECE) for name, way in ways.items()}, 16 * rounds)
        ratios = [found[other].over(found["ours"]).show("{:.3f}") for other in (SAME_ROWS, STRAIGHT)]
        result.add(f"{kib} KiB", found["ours"].per(kib * 1024 / 1e9).show("{:.1f}"), *ratios)
        shutil.rmtree(place)
    return result


class _Turns:
    """An action that tells the processor's seconds per row of a turn, and keeps those by the clock."""

    def __init__(self, turn: Callable[[], tuple[float, float]]) -> None:
        """`turn`: seconds per row of one turn, by the clock and of the process with all its threads."""
        self._turn = turn
        self._walls: list[float] = []

    def __call__(self) -> float:
        wall, processor = self._turn()
        self._walls.append(wall)
        return processor

    @property
    def walls(self) -> Spread:
        """Seconds per row by the clock; the first turn was to warm up."""
        return Spread.of(self._walls[1:])


def _in_pieces(way: Way, batches: int) -> _Turns:
    """The next so many batches, over and over: short turns, so that all see the same machine."""
    going = _endless(way)
    next(going)  # what is opened and filled once

    def turn() -> tuple[float, float]:
        next(going)  # the code and the memory for batches, which other ways have pushed out of the caches
        wall, processor = time.perf_counter(), time.process_time()
        rows = sum(len(next(going)) for _ in range(batches))
        return (time.perf_counter() - wall) / rows, (time.process_time() - processor) / rows

    return _Turns(turn)


def _endless(way: Way) -> Iterator[Tensor]:
    while True:
        yield from way()


def _timed(way: Way, rows: int) -> Callable[[], float]:
    """Seconds per row."""

    def action() -> float:
        begun = time.perf_counter()
        for _ in way():
            pass
        return (time.perf_counter() - begun) / rows

    return action


def _ours(folder: Path, moments: Tensor) -> Way:
    table = reading.Table.open(folder)
    picked = [table.rows - 1, 0, 77]
    assert torch.equal(table.read(picked, ("moments",))["moments"], moments[picked])  # what is timed is right

    def way() -> Iterator[Tensor]:
        reader = OrderedReader(table, BlockShuffle(table.shard_rows, SEED, 16), ("moments",))
        for begin in range(0, table.rows // BATCH * BATCH, BATCH):
            yield reader.read(begin, begin + BATCH)[1]["moments"]

    return way


def _from_memory(folder: Path, moments: Tensor) -> Way:
    """One memcpy per row, in the order in which ours reads them: numpy's indexing of rows that are one item each."""
    table = reading.Table.open(folder)
    rows = BlockShuffle(table.shard_rows, SEED, 16).rows(np.arange(table.rows // BATCH * BATCH))
    shape = moments.shape[1:]
    held = moments.numpy().reshape(len(moments), -1).view(f"V{moments[0].nbytes}").reshape(-1)

    def way() -> Iterator[Tensor]:
        for begin in range(0, len(rows), BATCH):
            yield torch.from_numpy(held[rows[begin : begin + BATCH]].view(np.float16).reshape(-1, *shape))

    return way


def _front_to_back(moments: Tensor) -> Way:
    """One memcpy per batch, of rows that follow each other."""
    plain = moments.numpy()

    def way() -> Iterator[Tensor]:
        for begin in range(0, len(plain) // BATCH * BATCH, BATCH):
            yield torch.from_numpy(plain[begin : begin + BATCH].copy())

    return way


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


def _epoch(table: reading.Table, shuffle_shards: int) -> Way:
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
