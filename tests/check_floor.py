"""Compare a test run with the committed floor: fewer passed tests, kills or cells than before is a failure.

usage: check_floor.py build/junit.xml tests/floor.json .test-counts.json

The first is pytest's report, the second the floor {"passed": N, "kills": N, "cells": N}, the third what tests counted
themselves (process kills and kill points, cells of result tables; absent = none). Prints every skip with its reason;
the last line is "N passed, N failed, N skipped". Exit code 1 when something failed or lies below the floor.
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path


def results(junit: Path) -> tuple[dict[str, int], list[str]]:
    """Counts of passed, failed and skipped tests, and one line per skip with its reason."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    skips = []
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            counts["failed"] += 1
        elif skipped is not None:
            kind = "xfail" if "xfail" in skipped.get("type", "") else "skip"
            counts["skipped"] += 1
            skips.append(f"{kind}: {case.get('classname')}::{case.get('name')}: {skipped.get('message')}")
        else:
            counts["passed"] += 1
    return counts, skips


def main(arguments: list[str]) -> int:
    """Print the comparison; 0 when nothing failed and nothing lies below the floor."""
    junit, floor_file, counts_file = (Path(argument) for argument in arguments)
    if not junit.is_file():
        print(f"{junit} is missing: pytest ended before it could report")
        print("0 passed, 0 failed, 0 skipped")
        return 1
    counts, skips = results(junit)
    own = json.loads(counts_file.read_text()) if counts_file.is_file() else {}
    floor = json.loads(floor_file.read_text())
    print("\n".join(skips))
    good = counts["failed"] == 0
    for name, least in floor.items():
        found = counts[name] if name in counts else int(own.get(name, 0))
        good = good and found >= least
        print(f"{name}: {found} (floor {least}){'' if found >= least else '  BELOW THE FLOOR'}")
    print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
