"""Every golden case and every official key list against our code. Run alone: pytest tests/parity/test_golden.py

HPC_GEN_GOLDEN=FOLDER runs the METHOD/CASE files below FOLDER instead.
"""

from __future__ import annotations

from typing import Any

import pytest
from expected_failures import case_reason, official_reason
from golden_compare import compare
from golden_files import Case, OfficialModel, cases, official_models, roots
from golden_handling import NotHandled, case_handler, load_handlers, official_differences, official_handler

load_handlers()


def _marks(reason: str | None) -> list[Any]:
    # Only a missing handler is expected: a handler that crashes or compares wrong is red also where the list has it.
    return [pytest.mark.xfail(strict=True, raises=NotHandled, reason=reason)] if reason else []


FOUND_CASES = [pytest.param(case, id=case.id, marks=_marks(case_reason(case))) for case in cases(roots())]
FOUND_MODELS = [pytest.param(m, id=m.id, marks=_marks(official_reason(m))) for m in official_models(roots())]


def test_there_are_golden_cases() -> None:
    """An empty or mistyped folder must not pass as a suite with nothing to do."""
    assert FOUND_CASES or FOUND_MODELS, f"no golden case below {[str(root) for root in roots()]}"


@pytest.mark.parametrize("case", FOUND_CASES)
def test_case(case: Case) -> None:
    """Our numbers are within the case's rules."""
    if case.problem:
        pytest.fail(case.problem, pytrace=False)
    handler = case_handler(case)
    failures = compare(handler(case), case.tensors(), case.rules, case.record)
    if failures:
        pytest.fail(f"{case.id}: {len(failures)} differ\n" + "\n".join(failures), pytrace=False)


@pytest.mark.parametrize("model", FOUND_MODELS)
def test_official(model: OfficialModel) -> None:
    """Keys, shapes, buffers, frozen parameters and counts of a full-size model are the published ones."""
    if model.problem:
        pytest.fail(model.problem, pytrace=False)
    facts = official_handler(model)(model)
    differences = official_differences(facts, model.record)
    if differences:
        pytest.fail(f"{model.id}:\n" + "\n".join(differences), pytrace=False)
