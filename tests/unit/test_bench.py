"""The benchmarks run: one of them in quick mode, and the page that it writes. No time is asserted."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "tests" / "bench" / "run.py"


def load(name: str) -> Any:
    """A module of tests/bench."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", RUN.parent / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(RUN), *arguments], capture_output=True, text=True, timeout=110)


@pytest.mark.timeout(120)
def test_quick_draws_print_a_table_and_write_a_page(tmp_path: Path) -> None:
    done = run("--quick", "draws", "--write", "--folder", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "== Draws per second" in done.stdout and "256 normals" in done.stdout
    (page,) = tmp_path.iterdir()
    text = page.read_text()
    assert page.name.startswith("cpu_20") and page.suffix == ".md"
    command = "`python tests/bench/run.py --quick draws`"
    for needed in ("processor", "cores usable", "torch", "commit", command, "Made with --quick"):
        assert needed in text, needed
    rows = [line for line in text.splitlines() if line.startswith("| 256 normals")]
    assert len(rows) == 1 and rows[0].count("[") == 3  # a rate and two ratios, each with its range


def test_a_benchmark_with_a_page_of_its_own_writes_that_one_and_leaves_the_page_of_the_day(tmp_path: Path) -> None:
    bench = load("run")
    head = [("date", "2026-01-02"), ("processor", "P")]
    pages = {
        bench.write_page(tmp_path, names, head, ["## T\n"], quick=False).name: names
        for names in ([], ["formats"], ["encode"], ["formats", "encode"], ["draws"])
    }
    assert pages == {"cpu_2026-01-02.md": ["draws"], "reading_formats.md": ["formats"], "encoding.md": ["encode"]}
    text = (tmp_path / "encoding.md").read_text()
    assert (
        text.startswith("# Encoding")
        and "`python tests/bench/run.py encode --write`" in text
        and "| processor | P |" in text
    )
    assert "2026-01-02" in text


def test_every_benchmark_named_on_the_command_line_exists() -> None:
    done = run("--help")
    assert done.returncode == 0, done.stderr
    assert "loop, tables, formats, save, cli, draws" in " ".join(done.stdout.split())
    unknown = run("lop")
    assert unknown.returncode == 2 and "unknown benchmark 'lop'" in unknown.stderr
    folder = RUN.parent
    for module in (
        "training_loop",
        "table_reading",
        "format_reading",
        "checkpoint_save",
        "command_line",
        "random_draws",
    ):
        assert "def bench(quick: bool) -> list[Table]:" in (folder / f"{module}.py").read_text(), module
