"""YAML in and out: plain values with the line of every key, by the rules of YAML 1.2 (1e-4 is a number, `off` a word).

PyYAML follows YAML 1.1, in which `1e-4` is a string and `off` is false: both have cost people days of training.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from hpc_gen.config.errors import ConfigError

_FLOAT = re.compile(
    r"^[-+]?(?:(?:[0-9][0-9_]*)(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$"
    r"|^\.(?:nan|NaN|NAN)$"
)
_INT = re.compile(r"^[-+]?[0-9][0-9_]*$|^0x[0-9a-fA-F]+$|^0o[0-7]+$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")


class _Loader(yaml.SafeLoader):
    """A safe loader that resolves plain words as YAML 1.2 does."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or our loader would read as something else than a string."""


for _tag, _pattern, _first in (
    ("bool", _BOOL, list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+0123456789.")),
    ("null", _NULL, ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))

_LINE_BREAKS = re.compile("[\x85\u2028\u2029]")  # PyYAML writes them plainly and reads them back as a space


def _write_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = '"' if _LINE_BREAKS.search(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _write_text)


def parse(text: str, name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Parse one YAML document that is a mapping.

    Returns its plain value and {key path: "name:line"}. Raises ConfigError with name:line on bad syntax, duplicate
    keys, keys that are no strings or hold a dot, values with tags, and anchors that contain themselves.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else 1
        raise ConfigError(f"{name}:{line}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}:1: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            f"{name}:1: an experiment is a mapping of sections such as 'train:', this file holds something else"
        )
    sources: dict[str, str] = {}
    value = _plain(node, "", name, sources, ())
    assert isinstance(value, dict)
    return value, sources


def parse_scalar(text: str, key: str) -> Any:
    """The value of a command-line override, by the same rules as in a file: `3`, `1e-4`, `[1, 2]`, `{a: 1}`, text."""
    place = "command line"
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ConfigError(f"{place}: the value of '{key}' is not valid YAML: {text!r}; quote it") from error
    if node is None:
        return None if text.strip() else ""
    return _plain(node, key, place, {}, ())


def dump(value: Any) -> str:
    """The value as YAML text that `parse` reads back to an equal value; keys keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _place(node: yaml.Node, name: str) -> str:
    return name if name == "command line" else f"{name}:{node.start_mark.line + 1}"


def _plain(node: yaml.Node, path: str, name: str, sources: dict[str, str], above: tuple[int, ...]) -> Any:
    """The value of a node; `above` holds the ids of the nodes around it, to find anchors that contain themselves."""
    place = _place(node, name)
    if path:
        sources.setdefault(path, place)
    if id(node) in above:
        raise ConfigError(f"{place}: the anchor at '{path}' contains itself; write the value out")
    above = (*above, id(node))
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = _key(key_node, path, name)
            inner = f"{path}.{key}" if path else key
            here = _place(key_node, name)
            if key in found:
                raise ConfigError(
                    f"{here}: key '{inner}' is given twice (first at {sources.get(inner, place)}); keep one"
                )
            sources[inner] = here
            found[key] = _plain(value_node, inner, name, sources, above)
        return found
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, f"{path}.{i}", name, sources, above) for i, item in enumerate(node.value)]
    return _scalar(node, path, place)


def _key(node: yaml.Node, path: str, name: str) -> str:
    place, inside = _place(node, name), f" in '{path}'" if path else ""
    if not isinstance(node, yaml.ScalarNode) or node.tag != "tag:yaml.org,2002:str":
        shown = repr(node.value) if isinstance(node, yaml.ScalarNode) else "(a list or mapping)"
        raise ConfigError(f"{place}: the key {shown}{inside} is not a word; put it in quotes")
    if "." in node.value or not node.value:
        raise ConfigError(
            f"{place}: the key '{node.value}'{inside} is empty or holds a dot, which separates key paths; rename it"
        )
    return str(node.value)


def _scalar(node: yaml.Node, path: str, place: str) -> Any:
    kind, text = node.tag.removeprefix("tag:yaml.org,2002:"), str(node.value)
    if kind == "str":
        return text
    if kind == "null":
        return None
    digits = text.replace("_", "")
    try:
        if kind == "bool":
            return {"true": True, "false": False}[text.lower()]
        if kind == "int":
            lowered = digits.lower()
            return int(lowered, 16 if lowered.startswith("0x") else 8 if lowered.startswith("0o") else 10)
        if kind == "float":
            return float(digits.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{place}: the value of '{path}' is not a {kind}: {text!r}") from error
    raise ConfigError(
        f"{place}: the value of '{path}' has the YAML tag '{node.tag}', which is not allowed; write it plainly"
    )
