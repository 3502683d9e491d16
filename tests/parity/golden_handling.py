"""Which function checks which golden case: handlers register themselves by (METHOD, kind) or official model name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from golden_compare import Produced
from golden_files import PARITY_FOLDER, REPOSITORY, Case, OfficialModel


class NotHandled(Exception):
    """There is no handler for this case, or it is of a variant that the code does not have yet."""


@dataclass(frozen=True)
class ModelFacts:
    """What we know of one of our full-size models, to be compared with the official list."""

    state_dict: dict[str, tuple[int, ...]]
    buffers: tuple[str, ...]
    frozen: tuple[str, ...]
    num_params: int
    num_trainable: int


CaseHandler = Callable[[Case], Produced]
OfficialHandler = Callable[[OfficialModel], ModelFacts]

_CASES: dict[tuple[str, str], CaseHandler] = {}
_OFFICIAL: dict[tuple[str, str], OfficialHandler] = {}


def handles(method: str, *kinds: str) -> Callable[[CaseHandler], CaseHandler]:
    """Register a handler for the kinds of a METHOD folder."""

    def register(handler: CaseHandler) -> CaseHandler:
        for kind in kinds:
            assert (method, kind) not in _CASES, f"two handlers for {method}/{kind}"
            _CASES[method, kind] = handler
        return handler

    return register


def handles_official(method: str, glob: str) -> Callable[[OfficialHandler], OfficialHandler]:
    """Register a handler for the official models of a METHOD folder whose name matches the glob."""

    def register(handler: OfficialHandler) -> OfficialHandler:
        _OFFICIAL[method, glob] = handler
        return handler

    return register


def case_handler(case: Case) -> CaseHandler:
    """The handler of a case; NotHandled when there is none."""
    try:
        return _CASES[case.method, case.kind]
    except KeyError:
        raise NotHandled(f"no handler for kind '{case.kind}' of {case.method}") from None


def official_handler(model: OfficialModel) -> OfficialHandler:
    """The handler of an official model; NotHandled when there is none."""
    for (method, glob), handler in _OFFICIAL.items():
        if method == model.method and fnmatchcase(model.name, glob):
            return handler
    raise NotHandled(f"no handler for official model '{model.name}' of {model.method}")


class UnreadWarning(UserWarning):
    """A case says something that its handler does not read. The numbers decide; pytest prints the sentence either way."""


def known_keys(words: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Warn of keys in a section of a case's config that its handler does not read.

    One that matters turns the numbers red; one that only describes the case must not.
    """
    if unknown := sorted(set(words) - set(known)):
        warnings.warn(f"{where} has {', '.join(map(repr, unknown))}, which its handler does not read", UnreadWarning, 2)


def constants(words: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> None:
    """Warn of a case that gives something else than we have built in (eps of a norm, groups)."""
    for key, ours in expected.items():
        if key in words and words[key] != ours:
            sentence = f"{where} says {key} = {words[key]!r}, ours is {ours!r} and cannot be chosen"
            warnings.warn(sentence, UnreadWarning, 2)


def has_method_folder(owner: str) -> bool:
    """Whether hpc_gen/methods/OWNER exists."""
    return (REPOSITORY / "hpc_gen" / "methods" / owner / "__init__.py").is_file()


def load_handlers() -> None:
    """Import every handlers_*.py of this folder."""
    import importlib

    for path in sorted(PARITY_FOLDER.glob("handlers_*.py")):
        importlib.import_module(path.stem)


def official_differences(facts: ModelFacts, record: dict[str, Any]) -> list[str]:
    """One line per difference between our model and the official record; order of keys included."""
    expected = {name: tuple(shape) for name, shape in record["state_dict"].items()}
    found = []
    if missing := [name for name in expected if name not in facts.state_dict]:
        found.append(f"keys we lack: {missing[:10]}")
    if unknown := [name for name in facts.state_dict if name not in expected]:
        found.append(f"keys only we have: {unknown[:10]}")
    for name, shape in expected.items():
        if name in facts.state_dict and facts.state_dict[name] != shape:
            found.append(f"{name}: shape {list(facts.state_dict[name])} instead of {list(shape)}")
    if not found and list(facts.state_dict) != list(expected):
        found.append("keys are the same but in another order")
    pairs = (
        ("params", facts.num_params),
        ("trainable", facts.num_trainable),
        ("trainable_params", facts.num_trainable),
        ("buffers", list(facts.buffers)),
        ("frozen", list(facts.frozen)),
    )
    found += [f"{key}: {ours} instead of {record[key]}" for key, ours in pairs if key in record and record[key] != ours]
    return found
