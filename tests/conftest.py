"""For all tests: the modules of tests/support, a workspace, and counts of what tests did beside passing.

Counts (`counts.add("kills", 20)`) are printed at the end and written to .test-counts.json, where tests/check_floor.py
compares them with the committed floor.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from pathlib import Path

import hypothesis
import pytest

SUPPORT = Path(__file__).resolve().parent / "support"
sys.path.insert(0, str(SUPPORT))

COUNTS_FILE = ".test-counts.json"


class Counts:
    """What tests count themselves: process kills and kill points (`kills`), cells of result tables (`cells`)."""

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter()

    def add(self, name: str, number: int) -> None:
        """Add `number` to the total of `name`; call it after the assertions that make them count."""
        self.totals[name] += number


_counts = pytest.StashKey[Counts]()


def pytest_configure(config: pytest.Config) -> None:
    """One set of counts per test run; torch's checkpoint logger would fill pages under every failure."""
    logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)
    config.stash[_counts] = Counts()
    # The same examples in every run: what CI finds can be seen again, and a change is judged by what it changed.
    hypothesis.settings.register_profile("fixed", derandomize=True)
    hypothesis.settings.load_profile("fixed")


@pytest.fixture(scope="session")
def counts(pytestconfig: pytest.Config) -> Counts:
    """`counts.add(name, number)`: counted for the floor."""
    return pytestconfig.stash[_counts]


@pytest.fixture
def workspace(tmp_path: Path) -> object:
    """A folder with a tiny training table and a held-out one, in which runs are made (experiments.Workspace)."""
    import experiments  # torch: not before a test wants it

    return experiments.make_workspace(tmp_path)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the counts, none included: an absent file would look like a run that ended early."""
    if not session.config.option.collectonly:
        totals = session.config.stash[_counts].totals
        (session.config.rootpath / COUNTS_FILE).write_text(json.dumps(dict(totals), sort_keys=True) + "\n")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Every skip with its reason, and the counts."""
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped:
        terminalreporter.section(f"{len(skipped)} skipped")
        for report in skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            terminalreporter.write_line(f"{report.nodeid}: {reason}")
    totals = config.stash[_counts].totals
    if totals:
        terminalreporter.section("counted by the tests")
        for name, number in sorted(totals.items()):
            terminalreporter.write_line(f"{name}: {number}")
