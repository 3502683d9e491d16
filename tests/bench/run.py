"""Measurements of this machine: `make bench`. Nothing here passes or fails; each number stands beside its peer.

    .venv/bin/python tests/bench/run.py                   all of them, tables on the terminal
    .venv/bin/python tests/bench/run.py loop save         some
    .venv/bin/python tests/bench/run.py --write           also docs/benchmarks/cpu_DATE.md
    .venv/bin/python tests/bench/run.py formats --write   also docs/benchmarks/reading_formats.md, its own page
    .venv/bin/python tests/bench/run.py --quick draws     a few seconds, to see that it works; not for keeping

Run it on a machine that does nothing else: the head of the page tells how busy it was.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import sys
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(path) for path in (HERE, ROOT) if str(path) not in sys.path]

import facts  # noqa: E402 - after the path that makes it importable
from measure import Table  # noqa: E402

# name on the command line -> module with bench(quick) -> tables
BENCHES = {
    "loop": "training_loop",
    "tables": "table_reading",
    "formats": "format_reading",
    "save": "checkpoint_save",
    "cli": "command_line",
    "draws": "random_draws",
    "energy": "second_order",
    "engines": "engines",
    "gmem": "flow_transformer",
    "encode": "encoding",
    "evaluate": "evaluation",
}
# name -> page and title, where a benchmark has a page of its own
PAGES = {
    "formats": ("reading_formats.md", "Reading the same latents by format"),
    "encode": ("encoding.md", "Encoding: decode, and the share of a task's time in the network"),
    "evaluate": ("evaluation.md", "Evaluation beside torch-fidelity"),
}


def main(argv: list[str] | None = None) -> int:
    """Run the chosen benchmarks; 0 unless one of them broke."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHES)}; none: all")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: shows that it works")
    parser.add_argument("--write", action="store_true", help="write the page cpu_DATE.md, or the one benchmark's own")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "benchmarks", help="where --write writes")
    given = parser.parse_args(argv)
    unknown = sorted(set(given.names) - set(BENCHES))
    if unknown:
        parser.error(f"unknown benchmark '{unknown[0]}'; there are: {', '.join(BENCHES)}")
    head = [("date", datetime.date.today().isoformat()), *facts.hardware(), ("load before", facts.load())]
    for name, value in head:
        print(f"{name:12} {value}", flush=True)
    sections: list[str] = []
    for name in given.names or BENCHES:
        begun = time.perf_counter()
        command = f"python tests/bench/run.py {'--quick ' if given.quick else ''}{name}"
        tables: Iterable[Table] = importlib.import_module(BENCHES[name]).bench(given.quick)
        for table in tables:  # a long benchmark gives each as soon as it is there
            print(f"\n{table.text()}", flush=True)
            sections.append(table.markdown(command))
        print(f"# {name}: {time.perf_counter() - begun:.0f} s", flush=True)
    if given.write:
        print(f"written: {write_page(given.folder, given.names, head, sections, given.quick)}")
    return 0


def write_page(folder: Path, names: list[str], head: list[tuple[str, str]], sections: list[str], quick: bool) -> Path:
    """The page of one run: where, with what, and the tables; a later run replaces it.

    One benchmark that has a page of its own writes that one; any others, one page per day and machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    date = head[0][1]
    name, title, made_by = f"cpu_{date}.md", f"Benchmarks, {date}", "`make bench` (`tests/bench/run.py --write`)"
    if len(names) == 1 and names[0] in PAGES:
        name, title = PAGES[names[0]]
        made_by = f"`python tests/bench/run.py {names[0]} --write`"
    rows = "\n".join(f"| {what} | {value} |" for what, value in head)
    warning = "**Made with --quick: it shows that the benchmarks run, its numbers mean nothing.**\n\n" if quick else ""
    path = folder / name
    path.write_text(
        f"# {title}\n\n{warning}"
        f"Made by {made_by}. Numbers are medians over rounds, [lowest - highest] in\n"
        "brackets; what is compared ran by turns in the same process or pair of processes.\n\n"
        f"| | |\n|---|---|\n{rows}\n\n" + "\n".join(sections)
    )
    return path


if __name__ == "__main__":
    sys.exit(main())
