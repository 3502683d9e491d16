"""What a key of the experiment allows, in words, read from the typed models: for errors and for `config schema`."""

from __future__ import annotations

import math
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hpc_gen.config.base import Words, is_operation, plain


class KeyFacts(NamedTuple):
    """One key of the schema: its path, what it allows, its default ("required" when it has none) and its meaning."""

    key: str
    allowed: str
    default: str
    operation: bool
    meaning: str


def resolve(root: type[BaseModel], path: Sequence[str | int]) -> tuple[list[str], Any, Sequence[Any]]:
    """Follow a pydantic error location from `root` as far as it names real keys.

    Pydantic adds parts that are no keys (the branch of a union); the walk ends there. Returns the key path, and the
    annotation and constraints of what stands there (the root's own class for an empty path).
    """
    found: list[str] = []
    annotation: Any = root
    metadata: Sequence[Any] = ()
    for part in path:
        step = _step(annotation, part)
        if step is None:
            break
        found.append(str(part))
        annotation, metadata = step
    return found, annotation, metadata


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The model class in an annotation such as `TrainConfig | None`, or None."""
    for option in _options(annotation):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def allowed(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What a value may be, in words: "an integer of at least 1", "one of 'fp32', 'bf16'", "a list of ..."."""
    words: list[str] = []
    literals: list[str] = []
    nullable = False
    for option, extra in _options_with_metadata(annotation, metadata):
        if option is type(None):
            nullable = True
        elif get_origin(option) is Literal:
            literals += [show(value) for value in get_args(option)]
        else:
            words.append(_one(option, extra))
    if literals:
        words.append(literals[0] if len(literals) == 1 else "one of " + ", ".join(literals))
    if nullable:
        words.append("null")
    return " or ".join(dict.fromkeys(words))


def choices(annotation: Any) -> list[str]:
    """The words among the allowed values."""
    literals = [option for option in _options(annotation) if get_origin(option) is Literal]
    return [value for option in literals for value in get_args(option) if isinstance(value, str)]


def is_number(value: Any) -> bool:
    """Whether a given value is a finite floating-point number."""
    return isinstance(value, float) and math.isfinite(value)


def show(value: Any, limit: int = 60) -> str:
    """A value as its user would write it in YAML, shortened."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        text = f"'{value}'"
    elif isinstance(value, Mapping):
        text = "{" + ", ".join(f"{key}: {show(inner)}" for key, inner in value.items()) + "}"
    elif isinstance(value, (list, tuple)):
        text = "[" + ", ".join(show(inner) for inner in value) + "]"
    else:
        text = str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def kind(value: Any) -> str:
    """The kind of a given value, in words."""
    if value is None:
        return "nothing"
    names = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "text",
        dict: "a mapping",
        list: "a list",
    }
    return names.get(type(value), type(value).__name__)


def keys(root: type[BaseModel], prefix: str = "") -> Iterator[KeyFacts]:
    """Every key below a section, depth first; keys of named entries are written with NAME."""
    for name, field in root.model_fields.items():
        path = f"{prefix}{name}"
        section = section_of(field.annotation)
        entries = _entry_section(field.annotation)
        yield KeyFacts(
            path,
            _allowed_field(field),
            _default(field),
            is_operation(field),
            " ".join((field.description or "").split()),
        )
        if section is not None:
            yield from keys(section, f"{path}.")
        elif entries is not None:
            yield from keys(entries, f"{path}.NAME.")


def _allowed_field(field: FieldInfo) -> str:
    return allowed(field.annotation, field.metadata)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    return "its own defaults" if isinstance(value, BaseModel) else show(plain(value))


def _strip(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    if get_origin(annotation) is Annotated:
        inner, *extra = get_args(annotation)
        return inner, tuple(extra)
    return annotation, ()


def _options_with_metadata(annotation: Any, metadata: Sequence[Any] = ()) -> list[tuple[Any, tuple[Any, ...]]]:
    inner, extra = _strip(annotation)
    extra = (*extra, *metadata)
    if get_origin(inner) in (Union, types.UnionType):
        return [pair for option in get_args(inner) for pair in _options_with_metadata(option, extra)]
    return [(inner, extra)]


def _options(annotation: Any) -> list[Any]:
    return [option for option, _ in _options_with_metadata(annotation)]


def _entry_section(annotation: Any) -> type[BaseModel] | None:
    for option in _options(annotation):
        if get_origin(option) is dict:
            return section_of(get_args(option)[1])
    return None


def _step(annotation: Any, part: str | int) -> tuple[Any, Sequence[Any]] | None:
    for option in _options(annotation):
        if isinstance(option, type) and issubclass(option, BaseModel):
            field = option.model_fields.get(str(part))
            if field is not None:
                return field.annotation, field.metadata
        elif get_origin(option) is dict and isinstance(part, str):
            return get_args(option)[1], ()
        elif get_origin(option) is list and isinstance(part, int):
            return get_args(option)[0], ()
        elif get_origin(option) is tuple and isinstance(part, int):
            inner = get_args(option)
            return inner[min(part, len(inner) - 1)], ()
    return None


def _one(option: Any, metadata: Sequence[Any]) -> str:
    origin, inner = get_origin(option), get_args(option)
    if option is int:
        return "an integer" + _bounds(metadata)
    if option is float:
        return "a number" + _bounds(metadata)
    if option is bool:
        return "true or false"
    if option is str:
        return next((item.text for item in _flat(metadata) if isinstance(item, Words)), "text")
    if origin is list:
        return f"a list, each item {allowed(inner[0])}"
    if origin is tuple:
        return f"a list of {len(inner)} items, each {allowed(inner[0])}"
    if origin is dict or (isinstance(option, type) and issubclass(option, BaseModel)):
        return "a mapping of keys"
    return getattr(option, "__name__", str(option))


def _bounds(metadata: Sequence[Any]) -> str:
    words: list[str] = []
    for item in _flat(metadata):
        for attribute, text in (("ge", "at least"), ("gt", "more than"), ("le", "at most"), ("lt", "less than")):
            bound = getattr(item, attribute, None)
            if bound is not None:
                words.append(f"{text} {bound:g}" if isinstance(bound, float) else f"{text} {bound}")
    return " of " + " and ".join(words) if words else ""


def _flat(metadata: Sequence[Any]) -> Iterator[Any]:
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from item.metadata
        else:
            yield item
