"""Golden cases that may not pass yet, by name, each with its reason: the one list of them.

They are strict: one that passes makes the suite red until its line goes. Names are globs (case sensitive). Besides
this list, cases whose owner has no folder in hpc_gen/methods are expected to fail, unless they have a handler already
(tokenizers, crops and whatever else does not wait for the method). Everything else must pass.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from golden_files import Case, OfficialModel
from golden_handling import NotHandled, case_handler, has_method_folder, official_handler

# (METHOD, name of the case, reason)
CASES: list[tuple[str, str, str]] = []

# (METHOD, name of the official model, reason)
OFFICIAL: list[tuple[str, str, str]] = [
    ("energy", "mar_*", "the MAR family is an issue of its own"),
]


def case_reason(case: Case) -> str | None:
    """Why this case is expected to fail, or None."""
    if case.problem is None and not has_method_folder(case.owner) and not _handled(case_handler, case):
        return f"hpc_gen/methods/{case.owner} does not exist yet"
    return _listed(CASES, case.method, case.name)


def official_reason(model: OfficialModel) -> str | None:
    """Why this official model is expected to fail, or None."""
    if model.problem is None and not has_method_folder(model.method) and not _handled(official_handler, model):
        return f"hpc_gen/methods/{model.method} does not exist yet"
    return _listed(OFFICIAL, model.method, model.name)


def _handled(find: Callable[[Any], object], item: Case | OfficialModel) -> bool:
    try:
        find(item)
    except NotHandled:
        return False
    return True


def _listed(entries: list[tuple[str, str, str]], method: str, name: str) -> str | None:
    return next((why for owner, glob, why in entries if owner == method and fnmatchcase(name, glob)), None)
