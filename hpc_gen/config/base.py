"""What all sections of the experiment share: frozen, unknown keys refused, and the mark of operation-only keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from pydantic.fields import FieldInfo


@dataclass(frozen=True)
class Words:
    """How errors and `config schema` call what a pattern allows."""

    text: str


# Names that become folder or file names of the run: no separators, no leading dot.
FolderName = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"),
    Words("a name of letters, digits, '_', '-' and '.' that begins with a letter or digit"),
]
# Names that are a part of a key path, so without a dot.
KeyName = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$"), Words("a name of letters, digits, '_' and '-'")
]
EntryName = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*$"),
    Words("an entry of the form 'module:name'"),
]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$"), Words("64 hexadecimal digits")]
NonEmpty = Annotated[str, StringConstraints(min_length=1), Words("text that is not empty")]
PositiveInt = Annotated[int, Field(ge=1)]

OPERATION: dict[str, Any] = {"operation": True}
"""`json_schema_extra` of keys that say how and where work runs but never change a number (not in the identity)."""
WHEN_SET: dict[str, Any] = {"when_set": True}
"""`json_schema_extra` of keys that are part of the identity only when not null: experiments without keep theirs."""


class Section(BaseModel):
    """Base of every section: immutable, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


def is_operation(field: FieldInfo) -> bool:
    """Whether a field is marked as operation only."""
    return _is_marked(field, "operation")


def _is_marked(field: FieldInfo, mark: str) -> bool:
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get(mark))


def split(value: Any) -> tuple[Any, Any]:
    """Cut a section (or a mapping of sections) into its identity part and its operation part, JSON-ready."""
    if isinstance(value, BaseModel):
        identity: dict[str, Any] = {}
        operation: dict[str, Any] = {}
        for name, field in type(value).model_fields.items():
            inner = getattr(value, name)
            if is_operation(field):
                operation[name] = plain(inner)
                continue
            if inner is None and _is_marked(field, "when_set"):
                continue
            inner_identity, inner_operation = split(inner)
            if inner_operation:
                operation[name] = inner_operation
            if not (_is_marked(field, "when_set") and inner_operation and not inner_identity):
                identity[name] = inner_identity  # a section of operation keys alone changes no number by being there
        return identity, operation
    if isinstance(value, dict):
        parts = {key: split(inner) for key, inner in value.items()}
        return (
            {key: part[0] for key, part in parts.items()},
            {key: part[1] for key, part in parts.items() if part[1]},
        )
    return plain(value), {}


def without_unset(section: BaseModel) -> dict[str, Any]:
    """`plain` of a section without the keys marked WHEN_SET that are null; sections inside it are left as they are.

    For sections that are hashed as mappings (a method's), where `split` cannot see the marks.
    """
    return {
        name: plain(getattr(section, name))
        for name, field in type(section).model_fields.items()
        if not (getattr(section, name) is None and _is_marked(field, "when_set"))
    }


def plain(value: Any) -> Any:
    """The value as JSON types: models become mappings, tuples become lists."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return value
