"""Each seeded mistake of tests/mutants.py still has its text: one that went stale would prove nothing, and be seen late."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def mutants() -> Any:
    """The module, which is a script and lies in no package."""
    spec = importlib.util.spec_from_file_location("mutants_script", ROOT / "tests" / "mutants.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("mutant", mutants().MUTANTS, ids=lambda mutant: mutant.name)
def test_the_text_stands_once_and_its_tests_exist(mutant: Any) -> None:
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1, f"{mutant.name}: update tests/mutants.py"
    assert mutant.new != mutant.old
    for word in mutant.tests:
        assert not word.startswith("tests/") or (ROOT / word).exists(), f"{mutant.name}: {word} is not there"
