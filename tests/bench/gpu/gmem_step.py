"""Train GMem-XL/1 (LightningDiT, 256 tokens) in bf16 on GPUs: our engines and a plain re-statement, compiled and not.

    python tests/bench/gpu/gmem_step.py                  one GPU, ten minutes at most
    torchrun --nproc-per-node 4 tests/bench/gpu/gmem_step.py
    python tests/bench/gpu/gmem_step.py --self-check     tiny shapes on the CPU: does every cell run, do losses agree?

Needs a checkout of hpc-gen, torch (2.11 and 2.13 were tried) and numpy, and nothing else: where pydantic is missing,
bare.py stands in for it. With torch 2.6 our ddp and the plain step run, and the other cells say what they lack.

The page with the table goes to docs/benchmarks and is rewritten after every cell, so what was measured survives a kill.
Batches of a rank grow until the memory is full; a compiled step begins at the largest batch that its uncompiled twin
could hold. What the time does not allow is listed as not run. FLOPs are counted by hpc_gen/training/fake_step.py; the
peaks are those of hpc_gen/training/device_peak.py.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

BEGUN = time.perf_counter()
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import bare  # noqa: E402 - after the path that makes it importable

STOOD_IN = bare.make_importable()

import gmem_page  # noqa: E402
import torch  # noqa: E402
from gmem_sides import (  # noqa: E402
    TINY,
    XL,
    Setting,
    Sides,
    Step,
    allocated,
    device_name,
    flops_per_image,
    memory,
    release,
    storages,
    timed,
)

from hpc_gen.runtime.ranks import Ranks  # noqa: E402
from hpc_gen.training.device_peak import mfu, peak_of  # noqa: E402

WARM_UP = 2
TOLERANCE = 0.02  # of first losses: bf16 in other orders
FULL = 0.92  # share of the memory that several ranks dare to fill
GUESS_S = {False: 20.0, True: 90.0}  # a cell, before one of its kind was seen


@dataclass(frozen=True)
class Cell:
    """One line of the table: what was trained, and the numbers or why there are none."""

    side: str
    engine: str
    compiled: bool
    batch: int = 0
    told: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.side} {self.engine}{' compile' if self.compiled else ''}"


CELLS = tuple(
    Cell(side, engine, compiled)
    for compiled in (False, True)
    for side, engine in (("hpc-gen", "ddp"), ("hpc-gen", "fsdp"), ("plain", "ddp"))
)


class Clock:
    """The time that is left; rank 0's word counts."""

    def __init__(self, minutes: float, ranks: Ranks) -> None:
        self._end, self._ranks = BEGUN + 60 * minutes, ranks
        self._longest: dict[bool, float] = {}
        self._share = self._end

    def left(self) -> float:
        return self._end - time.perf_counter()

    def divide(self, ways: int) -> None:
        """What begins now may use one share of what is left."""
        self._share = time.perf_counter() + self.left() / ways

    def allows(self, compiled: bool, first: bool) -> bool:
        """Whether a cell may begin: it must end in time, and all but the first of a sweep within the share."""
        needed = self._longest.get(compiled, GUESS_S[compiled])
        end = self._end if first else self._share
        return bool(self._ranks.broadcast_object(time.perf_counter() + needed < end))

    def took(self, compiled: bool, seconds: float) -> None:
        self._longest[compiled] = max(self._longest.get(compiled, 0.0), seconds)


@dataclass
class Bench:
    """One run over all cells."""

    given: argparse.Namespace
    setting: Setting
    flops: float
    clock: Clock
    write: Callable[[Bench], None]
    found: list[Cell] = field(default_factory=list)
    samplers: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Every combination, then the samplers."""
        sides, chosen = Sides(self.setting), [cell for cell in CELLS if self.given.only in cell.name]
        for number, cell in enumerate(chosen):
            self.clock.divide(len(chosen) - number)
            before = {storage.data_ptr() for storage in storages(self.setting.device)}
            self._sweep(sides, cell)
            release(self.setting.device, before)
        if self.given.only in "sampler" and self.clock.allows(False, first=True):
            self._sample(sides)
        elif self.given.only in "sampler":
            self.notes.append("The samplers were not run: the time was up.")
        self.write(self)

    def add(self, cell: Cell) -> None:
        """One more line: printed, and on the page."""
        self.found.append(cell)
        if self.setting.ranks.is_main:
            print(gmem_page.line(cell), flush=True)
        self.write(self)

    def _sweep(self, sides: Sides, cell: Cell) -> None:
        """One engine, built once, over batches that grow."""
        sizes = self._sizes(cell)
        if not self.clock.allows(cell.compiled, first=True):
            self.add(replace(cell, told="not run: the time was up"))
            return
        begun, held = time.perf_counter(), allocated(self.setting.device)
        if held > 2**29:
            self.notes.append(f"{held / 2**30:.1f} GiB of earlier cells were still held when '{cell.name}' began.")
        built = self._guarded(lambda: self._build(sides, cell))
        for number, size in enumerate(sizes):
            if isinstance(built, str):
                self.add(replace(cell, batch=size, told=built))
                return
            if number and not self.clock.allows(cell.compiled, first=False):
                self.add(replace(cell, batch=size, told="not run: its share of the time was up"))
                return
            if number and self._too_large(size / sizes[number - 1]):
                self.add(replace(cell, batch=size, told="not run: it would not fit, and one rank must not stop alone"))
                return
            numbers = self._guarded(lambda size=size: self._cell(sides, cell, built, size))  # type: ignore[misc]
            self.clock.took(cell.compiled, time.perf_counter() - begun)
            if isinstance(numbers, str):
                self.add(replace(cell, batch=size, told=numbers))
                return
            self.add(replace(cell, batch=size, numbers=numbers))
            begun = time.perf_counter()

    def _sizes(self, cell: Cell) -> list[int]:
        sizes = sorted(self.given.batches)
        twin = [c.batch for c in self.found if c.numbers and replace(cell, compiled=False).name == c.name]
        return [size for size in sizes if size >= max(twin)] if cell.compiled and twin else sizes

    def _build(self, sides: Sides, cell: Cell) -> Step:
        return sides.plain(cell.compiled) if cell.side == "plain" else sides.ours(cell.engine, cell.compiled)

    def _guarded(self, action: Callable[[], Any]) -> Any:
        """What it returns, or why it could not. Several ranks must fail alike, so there only memory may run out."""
        try:
            return action()
        except torch.OutOfMemoryError:
            return "out of memory"
        except Exception as error:
            if "out of memory" in str(error):  # the compiler and NCCL tell it their own way
                return "out of memory"
            if self.setting.ranks.world_size > 1:
                raise
            return f"failed: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"

    def _too_large(self, growth: float) -> bool:
        """With several ranks: whether activations that grow so would fill the memory of some."""
        ranks, device = self.setting.ranks, self.setting.device
        if ranks.world_size == 1 or device.type != "cuda":
            return False
        state = allocated(device)
        wanted = state + growth * (torch.cuda.max_memory_allocated(device) - state)
        return max(ranks.all_gather_objects(wanted)) > FULL * torch.cuda.get_device_properties(device).total_memory

    def _cell(self, sides: Sides, cell: Cell, step: Step, size: int) -> dict[str, Any]:
        """The numbers of one batch size."""
        device, ranks = self.setting.device, self.setting.ranks
        batches = sides.batches(cell.side, size)
        if cell.compiled:
            torch._dynamo.reset()  # shapes are static in training; a second one would make the compiler generalise
            torch._dynamo.utils.counters.clear()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        losses: list[float] = []

        def steps(number: int) -> None:
            for _ in range(number):
                losses.append(step(batches[len(losses) % len(batches)]))

        first = timed(lambda: steps(1), device)
        warm = min(timed(lambda: steps(1), device) for _ in range(WARM_UP))
        wanted = max(2, min(self.given.steps, math.ceil(min(self.given.seconds, self.clock.left()) / warm)))
        number = ranks.broadcast_object(wanted)
        seconds = timed(lambda: steps(number), device)
        over_ranks = zip(*ranks.all_gather_objects(losses[:4]))  # the plain one tells the loss of its own rows
        images, peak = number * size * ranks.world_size, peak_of(device_name(device))
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] if cell.compiled else None
        return {
            "images_per_s": images / seconds,
            "step_ms": 1000 * seconds / number,
            "tflops": self.flops * images / seconds / ranks.world_size / 1e12,
            "mfu": mfu(self.flops, images, seconds, ranks.world_size, peak) if peak else None,
            "allocated_gib": memory("max_memory_allocated", device),
            "reserved_gib": memory("max_memory_reserved", device),
            "compile_s": max(0.0, first - seconds / number) if cell.compiled else None,
            "graphs": graphs,
            "steps": number,
            "losses": [math.fsum(each) / ranks.world_size for each in over_ranks],
        }

    def _sample(self, sides: Sides) -> None:
        """Seconds of each sampler, after a warm-up."""
        told = self._guarded(lambda: self._samplers(sides))
        if told is not None:
            self.notes.append(f"The samplers: {told}.")

    def _samplers(self, sides: Sides) -> None:
        images, points = (2, 4) if self.given.self_check else (32, 10)
        last = []
        for name, action in sides.samplers(images, points).items():
            last.append(action())
            self.samplers[name] = timed(action, self.setting.device)
        ours, plain, _ = last
        apart = float((ours - plain).abs().max() / plain.abs().max())
        self.notes += [
            f"Samplers: {images} images a rank, {points} points of Heun's SDE, fp32; no TF32 but where it is said.",
            f"Images of the first two samplers differ by {apart:.1e} of the largest value.",
        ]


@contextlib.contextmanager
def no_code_generator(wanted: bool) -> Iterator[None]:
    """Compile by tracing alone: a check on a CPU needs no C++ compiler, and half a minute less."""
    original = torch.compile
    if wanted:
        torch.compile = functools.partial(original, backend="aot_eager")
    try:
        yield
    finally:
        torch.compile = original


# ---------------------------------------------------------------- what is said about it


def apart(found: list[Cell]) -> list[str]:
    """First losses of uncompiled cells that differ more than rounding explains; they began at the same weights."""
    firsts: dict[str, Cell] = {}
    for cell in found:
        if cell.numbers:
            firsts.setdefault(cell.name, cell)
    wrong = []
    for a in firsts.values():
        for b in firsts.values():
            x, y = a.numbers["losses"], b.numbers["losses"]
            if a.name < b.name and a.batch == b.batch and abs(x[0] - y[0]) > TOLERANCE * abs(x[0]):
                wrong.append(f"first losses differ: {a.name} {x[0]:.5f}, {b.name} {y[0]:.5f}")
    return wrong


def faults(bench: Bench, check: bool) -> list[str]:
    """What must not be: cells that broke, losses that are not finite or differ; in a check, cells that did not run."""
    wrong = apart(bench.found)
    for cell in bench.found:
        if cell.told.startswith("failed") or (check and cell.told):
            wrong.append(f"{cell.name}, batch {cell.batch}: {cell.told}")
        if not all(map(math.isfinite, cell.numbers.get("losses", []))):
            wrong.append(f"{cell.name}, batch {cell.batch}: losses {cell.numbers['losses']}")
    return wrong


def arguments(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--self-check", action="store_true", help="tiny shapes on the CPU, two steps per cell")
    parser.add_argument("--minutes", type=float, default=10.0, help="of the whole run; what does not fit is not begun")
    parser.add_argument("--seconds", type=float, default=6.0, help="timed part of each cell")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64, 128, 256], help="images of a rank")
    parser.add_argument("--only", default="", help="only cells whose name holds this (sampler: the samplers)")
    parser.add_argument("--deterministic", action=argparse.BooleanOptionalAction, default=True, help="ours: as trained")
    parser.add_argument("--folder", type=Path, help="where the page goes; default docs/benchmarks, in a check nowhere")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    given = parser.parse_args(argv)
    given.steps = 2 if given.self_check else 500
    if given.self_check:
        given.batches, given.minutes = given.batches if given.batches != [32, 64, 128, 256] else [4], math.inf
    elif given.folder is None:
        given.folder = bare.ROOT / "docs" / "benchmarks"
    return parser, given


def main(argv: list[str] | None = None) -> int:
    """0: whatever could run has run, and losses agree."""
    parser, given = arguments(argv)
    if not given.self_check and not torch.cuda.is_available():
        parser.error("there is no GPU here; --self-check tries the script on the CPU")
    ranks = Ranks.start(timeout_s=180.0)  # one that died must not use up the whole time
    if given.self_check:
        ranks.device = torch.device("cpu")
    try:
        ranks.mesh((ranks.world_size,), ("bench",))  # a process group of one where there is no other
        setting = Setting(TINY if given.self_check else XL, ranks, given.deterministic)
        bench = Bench(given, setting, flops_per_image(setting), Clock(given.minutes, ranks), write)
        if ranks.is_main:
            print(gmem_page.heading(bench), flush=True)
        with no_code_generator(given.self_check):
            bench.run()
    finally:
        ranks.stop()
    wrong = faults(bench, given.self_check)
    if ranks.is_main:
        print("\n".join(wrong) if wrong else "every cell that could run has run, and first losses agree")
    return 1 if wrong else 0


def write(bench: Bench) -> None:
    """The page and the numbers, as far as they are known."""
    given = bench.given
    if not bench.setting.ranks.is_main:
        return
    if given.folder is not None:
        given.folder.mkdir(parents=True, exist_ok=True)
        (given.folder / gmem_page.file_name(bench)).write_text(gmem_page.page(bench, apart(bench.found), STOOD_IN))
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(cell) for cell in bench.found], indent=1))


if __name__ == "__main__":
    sys.exit(main())
