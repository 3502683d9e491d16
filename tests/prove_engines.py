"""The whole matrix of engines as a table (`make prove`): every engine, 1, 2 and 4 ranks, both variants.

    .venv/bin/python tests/prove_engines.py                  all cells; those that a stopped call has done are kept
    .venv/bin/python tests/prove_engines.py --seconds 200    as many cells as that allows, and says so

Each cell is a training of four steps (tests/support/engine_matrix.py): undisturbed, against one process of ddp; twice
ended (preempted, then killed) and resumed, against the undisturbed one, byte for byte; and moved to another number of
ranks in the middle. The table is written to docs/proofs/engines.md once all cells are done.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import engine_matrix as matrix  # noqa: E402
import experiments  # noqa: E402
import torch  # noqa: E402
from warm_ranks import WarmRanks  # noqa: E402

from hpc_gen.runtime import clock, commit  # noqa: E402
from hpc_gen.runtime.progress import Progress  # noqa: E402
from hpc_gen.runtime.run_folder import RunFolder  # noqa: E402

TABLE = ROOT / "docs" / "proofs" / "engines.md"
THEN = {1: 2, 2: 4, 4: 2}  # where a run of so many ranks is moved to
PACKAGES = ("torch", "deepspeed", "megatron-core", "numpy")


@dataclass(frozen=True)
class Cell:
    """One line of the table; `broken`: what failed outright."""

    engine: str
    variant: str
    size: int
    worst: float = float("nan")
    order: bool = False
    same_bytes: bool = False
    then: int = 0
    moved_worst: float = float("nan")
    moved_order: bool = False
    broken: str = ""

    @property
    def holds(self) -> bool:
        """Whether everything is as it must be."""
        limit = matrix.TOLERANCE[self.variant]
        close = self.worst <= limit and self.moved_worst <= limit
        return not self.broken and self.order and self.same_bytes and self.moved_order and close


def cells() -> list[tuple[str, str, int]]:
    """Every cell that is to be tried, in order."""
    return [
        (engine, variant, size)
        for variant in matrix.VARIANTS
        for engine in matrix.ENGINES
        for size in matrix.SIZES
        if (engine, variant) not in matrix.REFUSED and size >= matrix.FEWEST.get(engine, 1)
    ]


def try_cell(warm: WarmRanks, space: experiments.Workspace, engine: str, variant: str, size: int) -> Cell:
    """Run one cell; a failed attempt is the cell's result, not the end of the proof."""
    then = THEN[size]
    try:
        reference = reference_of(warm, space, variant)
        whole = matrix.undisturbed(warm, space, variant, engine, size)
        straight = matrix.compare(whole, reference)
        same = matrix.same_bytes(matrix.killed(warm, space, variant, engine, size), whole)
        moved = matrix.compare(matrix.moved(warm, space, variant, engine, size, then), reference)
    except AssertionError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return Cell(engine, variant, size, broken=lines[-1][:200] if lines else "an attempt failed")
    order, moved_order = (each.order_equal and each.rows_equal for each in (straight, moved))
    return Cell(engine, variant, size, straight.worst, order, same, then, moved.worst, moved_order)


def reference_of(warm: WarmRanks, space: experiments.Workspace, variant: str) -> RunFolder:
    """ddp in one process, made once."""
    run = RunFolder(space.path / "runs" / f"reference-{variant}")
    if not (run.checkpoints / matrix.END).is_dir():
        made = matrix.undisturbed(warm, space, variant, "ddp", 1)
        shutil.move(made.path, run.path)
    return run


def page(found: list[Cell]) -> str:
    """The page that is kept in docs/."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    dirty = " with uncommitted changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    cpu = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), "unknown")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    good = sum(cell.holds for cell in found)
    limits = ", ".join(f"{limit:g} ({variant})" for variant, limit in matrix.TOLERANCE.items())
    lines = [
        "# The matrix of engines",
        "",
        f"Verdict: **{good} of {len(found)} cells hold**. Each is a training of four steps on gloo, with clipping, "
        "accumulation, averages and validation: undisturbed; preempted, killed and resumed twice; and moved to another "
        "number of ranks half-way.",
        "",
        f"- date: {datetime.date.today().isoformat()}",
        f"- commit: {git('rev-parse', 'HEAD') or 'unknown'}{dirty}",
        f"- hardware: {os.cpu_count()} cores, {cpu.partition(':')[2].strip()}",
        f"- versions: Python {platform.python_version()}, {versions}",
        "- command: `python tests/prove_engines.py` (part of `make prove`)",
        "",
        "`difference`: the largest relative one of any value of any row (losses, gradient norm, validation of the "
        f"average) from ddp in one process; it holds up to {limits}. `order`: the digest over the order of rows and "
        "all draws is that of one process. `resumed`: the last checkpoint is that of the undisturbed run, byte for "
        "byte. `moved to`: the same run, ended on so many ranks.",
        "",
        "| engine | variant | ranks | difference | order | resumed | moved to | difference | order | verdict |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in found:
        name = f"| {cell.engine} | {cell.variant} | {cell.size} |"
        if cell.broken:
            lines.append(f"{name} {cell.broken.replace('|', '/')} | | | | | | BROKEN |")
            continue
        verdict = "holds" if cell.holds else "DIFFERS"
        lines.append(
            f"{name} {cell.worst:.1e} | {word(cell.order)} | {word(cell.same_bytes)} | {cell.then} | "
            f"{cell.moved_worst:.1e} | {word(cell.moved_order)} | {verdict} |"
        )
    lines += ["", "Not in the table:", ""]
    lines += [f"- {engine}, {variant}: {why}." for (engine, variant), why in matrix.REFUSED.items()]
    lines += [
        f"- {engine} on fewer than {size} ranks: it has no meaning there." for engine, size in matrix.FEWEST.items()
    ]
    lines += [
        "- fp16, bf16 parameters and offload: tests/distributed/test_engines.py tries them, to the precision that they have.",
    ]
    return "\n".join(lines) + "\n"


def word(same: bool) -> str:
    """How the table says it."""
    return "equal" if same else "UNEQUAL"


def done_before(record: Path) -> dict[tuple[str, str, int], Cell]:
    """Cells of earlier calls."""
    found: dict[tuple[str, str, int], Cell] = {}
    for line in record.read_text().splitlines() if record.exists() else []:
        try:
            cell = Cell(**json.loads(line))
        except (ValueError, TypeError):  # torn by a kill: done again
            continue
        if not cell.broken:
            found[(cell.engine, cell.variant, cell.size)] = cell
    return found


def main() -> int:
    """Run or go on with the proof; 0 when every cell holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=None, help="begin no cell after so long")
    parser.add_argument("--work", type=Path, default=ROOT / "prove" / "engines", help="where a stopped proof goes on")
    parser.add_argument("--table", type=Path, default=TABLE, help="page to write [docs/proofs/engines.md]")
    given = parser.parse_args()
    record = given.work / "cells.jsonl"
    commit.make_folder(given.work)
    found = done_before(record)
    wanted = cells()
    begun = clock.monotonic()
    progress = Progress(len(wanted), "prove engines", "cells", start=len(found))
    with experiments.scratch_folder() as folder, WarmRanks(matrix.WARM) as warm:
        space = experiments.make_workspace(folder)
        for engine, variant, size in wanted:
            if (engine, variant, size) in found:
                continue
            if given.seconds is not None and clock.monotonic() - begun > given.seconds:
                break
            cell = found[(engine, variant, size)] = try_cell(warm, space, engine, variant, size)
            commit.write_text(record, "".join(json.dumps(asdict(each)) + "\n" for each in found.values()))
            progress.update(len(found), engine=engine, variant=variant, ranks=size, holds=cell.holds)
            for run in (space.path / "runs").iterdir():
                if not run.name.startswith("reference"):
                    shutil.rmtree(run)
    progress.close()
    made = [found[key] for key in wanted if key in found]
    good = sum(cell.holds for cell in made)
    for cell in made:
        if not cell.holds:
            print(f"{cell.engine}, {cell.variant}, {cell.size} ranks: {cell.broken or cell}")
    print(f"{good} of {len(made)} cells hold; {len(wanted) - len(made)} are left")
    if len(made) == len(wanted):
        given.table.parent.mkdir(parents=True, exist_ok=True)
        given.table.write_text(page(made))
        print(f"table: {given.table}")
    return 0 if good == len(wanted) else 1


if __name__ == "__main__":
    assert torch.distributed.is_available()
    sys.exit(main())
