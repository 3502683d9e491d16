"""What the pages in docs/ refer to exists: the tests that a weak point names, and files behind links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def test_names_of_tests_exist() -> None:
    """Cells such as `u/energy_inner::test_x, ::test_y` and `distributed/test_kills`, as docs/methods/energy.md has them."""
    named = 0
    for page in PAGES:
        file = None
        for place, test in re.findall(
            r"(?<!RUN/)\b((?:u/|distributed/|e2e/|slurm/)\w+)?(?:::(test_\w+))?", page.read_text()
        ):
            if place:
                folder, _, name = place.partition("/")
                file = ROOT / "tests" / (f"unit/test_{name}.py" if folder == "u" else f"{folder}/{name}.py")
                assert file.is_file(), f"{page.name} names {place}, but {file} is not there"
                named += 1
            if test:
                assert file is not None and f"def {test}(" in file.read_text(), f"{page.name}: no {test} in {file}"
    assert named > 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"
