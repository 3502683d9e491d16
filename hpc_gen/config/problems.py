"""Pydantic's errors as our sentences: FILE:LINE, the key path, what is allowed, what was given, the nearest name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from hpc_gen.config import describe
from hpc_gen.config.errors import KeyProblem, closest


def sentences(
    error: ValidationError,
    model: type[BaseModel],
    tree: Mapping[str, Any],
    sources: Mapping[str, str],
    prefix: str,
    origin: str,
) -> list[str]:
    """One sentence per mistaken key, unknown keys first: a required key that was misspelt is then not asked for again.

    `tree` is what was validated by `model`, and stands at the key path `prefix` of the file `origin`.
    """
    found: dict[str, str] = {}
    misspelt: set[str] = set()
    for details in sorted(error.errors(include_url=False), key=lambda each: each["type"] != "extra_forbidden"):
        key, sentence = _sentence(details, model, tree, prefix)
        if details["type"] == "extra_forbidden":
            misspelt.add(sentence.rpartition("did you mean ")[2])
        if f"'{key}'?" not in misspelt:
            found.setdefault(key, f"{_place(key, sources, origin)}: {sentence}")
    return list(found.values())


def _sentence(details: ErrorDetails, model: type[BaseModel], tree: Mapping[str, Any], prefix: str) -> tuple[str, str]:
    """The key path that the problem is about, and the sentence without its place."""
    cause = details.get("ctx", {}).get("error")
    if isinstance(cause, KeyProblem):
        return cause.key, str(cause)
    place = details["loc"]
    if details["type"] == "missing" and isinstance(place[-1], int):
        place = place[:-1]  # too short a list: the list is wrong, no key is missing
    path, annotation, metadata = describe.resolve(model, place)
    key = _join(prefix, *path)
    if details["type"] == "extra_forbidden":
        wrong = str(details["loc"][len(path)])
        return _join(key, wrong), _unknown(wrong, key, annotation, model, prefix)
    if details["type"] == "missing" and place == details["loc"]:
        return key, f"key '{key}' is required: {describe.allowed(annotation, metadata)}{_meaning(model, path)}"
    if isinstance(cause, ValueError):
        return key, f"'{key}' is refused: {cause}" if key else str(cause)
    if details["loc"][-1:] == ("[key]",):
        return key, f"'{key}' is not a name that this section allows; use letters, digits, '_' and '-'"
    given = _value(tree, path)
    guess = None
    if isinstance(given, str):
        guess = closest(given, describe.choices(annotation))
    hint = f"; did you mean '{guess}'?" if guess else ""
    if describe.is_number(given) and "integer" in describe.allowed(annotation) and given == int(given):
        hint = f"; write {int(given)}"
    return key, (
        f"'{key}' must be {describe.allowed(annotation, metadata)}, not {describe.show(given)} "
        f"({describe.kind(given)}){hint}"
    )


def _unknown(wrong: str, section: str, annotation: Any, model: type[BaseModel], prefix: str) -> str:
    """The sentence about an unknown key: the nearest in its section, else the same word elsewhere, else all of them."""
    owner = describe.section_of(annotation)
    names = list(owner.model_fields) if owner is not None else []
    start = f"unknown key '{_join(section, wrong)}'"
    guess = closest(wrong, names)
    if guess is not None:
        return f"{start}; did you mean '{_join(section, guess)}'?"
    elsewhere = [_join(prefix, facts.key) for facts in describe.keys(model) if facts.key.split(".")[-1] == wrong]
    if elsewhere:
        return f"{start}; did you mean '{elsewhere[0]}'?"
    where = f"'{section}'" if section else "an experiment"
    return f"{start}; known keys of {where}: {', '.join(names)}"


def _place(key: str, sources: Mapping[str, str], origin: str) -> str:
    """Where the key stands, or the nearest section around it that does."""
    parts = key.split(".")
    while parts:
        place = sources.get(".".join(parts))
        if place is not None:
            return place
        parts.pop()
    return f"{origin}:1"


def _meaning(model: type[BaseModel], path: list[str]) -> str:
    owner = describe.section_of(describe.resolve(model, path[:-1])[1])
    field = owner.model_fields.get(path[-1]) if owner is not None else None
    text = " ".join((field.description or "").split()).rstrip(".") if field is not None else ""
    return f" ({text[0].lower()}{text[1:]})" if text else ""


def _value(tree: Any, path: list[str]) -> Any:
    for part in path:
        tree = tree[int(part)] if isinstance(tree, list) else tree[part]
    return tree


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
