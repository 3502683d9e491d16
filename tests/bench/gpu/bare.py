"""Our library on a machine that has torch and numpy alone: a stand-in for the little that it needs of pydantic.

Sections of the config become plain objects: defaults are filled in, unknown and missing keys are refused, checks after
the filling run, and nothing is converted or tested for its type. That is enough for a bench whose sections are written
in Python; an experiment file must never be read with it.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
_NOTHING = object()


class FieldInfo:
    """Default and mark of one key."""

    def __init__(
        self, default: Any = _NOTHING, default_factory: Callable[[], Any] | None = None, json_schema_extra: Any = None
    ) -> None:
        self.default, self.default_factory, self.json_schema_extra = default, default_factory, json_schema_extra

    def value(self) -> Any:
        """The default; _NOTHING where the key must be given."""
        return self.default_factory() if self.default_factory is not None else self.default


def Field(default: Any = _NOTHING, **given: Any) -> FieldInfo:
    """A field; limits of values are not looked at."""
    return FieldInfo(default, given.get("default_factory"), given.get("json_schema_extra"))


class BaseModel:
    """What `hpc_gen.config.base.Section` is built on."""

    model_fields: dict[str, FieldInfo] = {}
    _checks: tuple[str, ...] = ()

    def __init_subclass__(cls) -> None:
        fields, checks = dict(cls.model_fields), list(cls._checks)
        for name, kind in inspect.get_annotations(cls).items():
            if name.startswith("_") or "ClassVar" in str(kind):
                continue
            found = cls.__dict__.get(name, _NOTHING)
            fields[name] = found if isinstance(found, FieldInfo) else FieldInfo(found)
        checks += [name for name, each in cls.__dict__.items() if getattr(each, "checks_after", False)]
        cls.model_fields, cls._checks = fields, tuple(dict.fromkeys(checks))

    def __init__(self, **given: Any) -> None:
        self.__dict__["model_fields_set"] = set(given)
        values = {name: given.pop(name) if name in given else each.value() for name, each in self.model_fields.items()}
        missing = [name for name, value in values.items() if value is _NOTHING]
        if given or missing:
            raise TypeError(f"{type(self).__name__} has no key {sorted(given)} and lacks {missing}")
        self.__dict__.update(values)
        for name in self._checks:
            getattr(self, name)()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return ((name, getattr(self, name)) for name in self.model_fields)

    def model_copy(self, update: Mapping[str, Any]) -> Any:
        """A copy with other values, not checked again."""
        copy = object.__new__(type(self))
        copy.__dict__.update({**self.__dict__, **update})
        return copy

    def model_dump(self, mode: str = "json") -> dict[str, Any]:
        """As JSON types."""
        return {name: _plain(getattr(self, name)) for name in self.model_fields}


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump()
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def model_validator(mode: str) -> Callable[[Any], Any]:
    """Checks after filling run; others need types and do not."""

    def mark(check: Any) -> Any:
        if mode == "after":
            check.checks_after = True
        return check

    return mark


def field_validator(*names: str, **how: Any) -> Callable[[Any], Any]:
    """Not run."""
    return lambda check: check


def make_importable() -> bool:
    """Put hpc_gen on the path, and the stand-in in pydantic's place where that is missing; whether it was."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    try:
        import pydantic  # noqa: F401
    except ImportError:
        module, fields = types.ModuleType("pydantic"), types.ModuleType("pydantic.fields")
        for each in (BaseModel, Field, model_validator, field_validator):
            setattr(module, each.__name__, each)
        for name in ("ConfigDict", "StringConstraints"):
            setattr(module, name, dict)
        module.StrictBool, fields.FieldInfo = bool, FieldInfo  # type: ignore[attr-defined]
        sys.modules["pydantic"], sys.modules["pydantic.fields"] = module, fields
        return True
    return False
