"""The comparison rules of the golden cases (golden/README.md), and nothing that knows a method.

`a` is what we produced, `b` what the case expects. Everything is compared in float64, integers in int64. Infinities
must be equal where they stand (difference 0); NaN on either side fails, whatever the rule. Only `info` checks nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from golden_files import GoldenError
from numpy.typing import NDArray
from torch import Tensor

Rule = Mapping[str, Any]
MUST_MATCH = ("out.", "grad.")

# Rule name -> numbers it needs.
PARAMETERS: dict[str, tuple[str, ...]] = {
    "allclose": ("rtol", "atol"),
    "max_rel": ("tol",),
    "exact": (),
    "quantile": ("q", "atol", "max_atol"),
    "uint8": ("max_levels", "max_fraction"),
    "info": (),
}


@dataclass
class Produced:
    """What a handler computed: tensors by their name in the case, and JSON values by their dotted path."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    json: dict[str, Any] = field(default_factory=dict)


def check_rules(rules: Sequence[Rule]) -> None:
    """Refuse unknown rules and missing or odd numbers; raises GoldenError."""
    for rule in rules:
        if ("tensors" in rule) == ("json" in rule) or not isinstance(rule.get("tensors", rule.get("json")), str):
            raise GoldenError(f"a rule must name either 'tensors' or 'json': {dict(rule)}")
        if rule.get("rule") not in PARAMETERS:
            raise GoldenError(f"unknown rule '{rule.get('rule')}'; known rules: {', '.join(PARAMETERS)}")
        for name in PARAMETERS[rule["rule"]]:
            value = rule.get(name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
                raise GoldenError(f"rule {dict(rule)} needs a number '{name}' of at least 0")


def compare(
    produced: Produced, expected: Mapping[str, Tensor], rules: Sequence[Rule], record: Mapping[str, Any]
) -> list[str]:
    """All differences, one line each; an empty list means that the case passes.

    Every `out.*` and `grad.*` of the case must have a rule and, unless that is `info`, must have been produced. Other
    tensors count only where a rule asks for their kind by name (`param.*`). Raises GoldenError for malformed rules and
    when there was nothing to compare at all.
    """
    check_rules(rules)
    failures: list[str] = []
    checked = 0
    for name in sorted(expected):
        rule = first_match(name, rules)
        if rule is None:
            if name.startswith(MUST_MATCH):
                checked += 1
                failures.append(f"{name}: no rule matches it")
            continue
        if not name.startswith(MUST_MATCH) and not _asks_for(rule["tensors"], name):
            continue
        checked += 1
        if rule["rule"] == "info":
            continue
        if name not in produced.tensors:
            failures.append(f"{name}: not produced by the handler")
            continue
        found = tensor_difference(produced.tensors[name], expected[name], rule)
        if found:
            failures.append(f"{name}: {found}")
    for path, rule, value in json_targets(record, rules):
        checked += 1
        if rule["rule"] == "info":
            continue
        ours = _produced_at(produced.json, path)
        if ours is _ABSENT:
            failures.append(f"json {path}: not produced by the handler")
            continue
        failures += [f"json {line}" for line in json_differences(ours, value, rule, path, rules)]
    if not checked:
        raise GoldenError("the case has nothing to compare: no out.* or grad.* tensors and no rule on its JSON")
    return failures


def first_match(name: str, rules: Sequence[Rule]) -> Rule | None:
    """The first tensor rule whose glob matches, case sensitive; `*` crosses dots."""
    return next((rule for rule in rules if "tensors" in rule and fnmatchcase(name, rule["tensors"])), None)


def _asks_for(glob: str, name: str) -> bool:
    """Whether a glob names the kind of the tensor (`param.`) itself and does not merely sweep it up."""
    return glob.startswith(name.partition(".")[0] + ".")


def json_targets(record: Mapping[str, Any], rules: Sequence[Rule]) -> Iterator[tuple[str, Rule, Any]]:
    """(path, rule, expected value) of every value that a JSON rule speaks of; the first matching rule wins.

    A value inside one that is already taken is not compared again; one that a rule before its parent's took keeps that
    rule in `json_differences`. Raises GoldenError when a rule names nothing.
    """
    paths = dict(_paths(record))
    taken: set[str] = set()
    for rule in rules:
        if "json" not in rule:
            continue
        matching = [path for path in paths if fnmatchcase(path, rule["json"])]
        if not matching:
            raise GoldenError(f"rule {dict(rule)} names nothing in the JSON of the case")
        for path in matching:
            parents = {path[:i] for i, letter in enumerate(path) if letter == "."} | {path}
            if not parents & taken:
                taken.add(path)
                yield path, rule, paths[path]


_ABSENT = object()


def _produced_at(produced: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path, given as such or inside an object that was produced as a whole; or _ABSENT."""
    if path in produced:
        return produced[path]
    for name, value in produced.items():
        if path.startswith(name + ".") and isinstance(value, Mapping):
            return _produced_at(value, path[len(name) + 1 :])
    return _ABSENT


def _paths(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted paths of all values below a JSON object, parents first."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            path = f"{prefix}.{key}" if prefix else str(key)
            yield path, inner
            yield from _paths(inner, path)


def tensor_difference(a: Tensor, b: Tensor, rule: Rule) -> str | None:
    """How `a` breaks the rule against `b`, or None. Shapes must be equal, also where broadcasting would do."""
    if a.shape != b.shape:
        return f"shape {list(a.shape)} instead of {list(b.shape)}"
    if rule["rule"] == "uint8" and (a.dtype != torch.uint8 or b.dtype != torch.uint8):
        return f"rule uint8 needs uint8 on both sides, got {a.dtype} and {b.dtype}"
    return _difference(_array(a), _array(b), rule)


def _array(tensor: Tensor) -> NDArray[Any]:
    tensor = tensor.detach().cpu()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return np.atleast_1d(tensor.to(torch.float64 if tensor.is_floating_point() else torch.int64).numpy())


def _difference(a: NDArray[Any], b: NDArray[Any], rule: Rule) -> str | None:
    if not a.size:
        return None
    if np.isnan(a).any() or np.isnan(b).any():
        return f"NaN ({int(np.isnan(a).sum())} produced, {int(np.isnan(b).sum())} expected)"
    if a.dtype == b.dtype == np.int64:
        # Not through float64: integers above 2^53 must not be rounded before they are compared.
        gap = np.maximum(a, b).view(np.uint64) - np.minimum(a, b).view(np.uint64)
        gap = gap.astype(np.float64)
    else:
        a, b = a.astype(np.float64), b.astype(np.float64)
        same = a == b
        with np.errstate(invalid="ignore", over="ignore"):
            gap = np.where(same, 0.0, np.abs(a - b))
        # An infinity that is not met by the same infinity differs by infinity, and no limit is as large as that.
        gap = np.where(~same & ~(np.isfinite(a) & np.isfinite(b)), np.inf, gap)
    broken = _broken(gap, b, rule)
    if broken is None:
        return None
    at = np.unravel_index(int(gap.argmax()), gap.shape)
    index = list(map(int, at))
    values = f"{a[at]!s} instead of {b[at]!s}"
    return f"{rule['rule']} broken: {broken}; largest difference {gap[at]:.4g} at {index} ({values})"


def _broken(gap: NDArray[np.float64], b: NDArray[Any], rule: Rule) -> str | None:
    """What the differences `gap` break of a rule, in words, or None."""
    size = np.abs(b.astype(np.float64))
    size = np.where(np.isfinite(size), size, 0.0)  # an infinite value widens no limit
    kind = rule["rule"]
    if kind == "exact":
        count = int((gap > 0).sum())
        return f"{count} of {gap.size} values differ" if count else None
    if kind == "allclose":
        count = int((gap > rule["atol"] + rule["rtol"] * size).sum())
        return f"{count} of {gap.size} values beyond atol {rule['atol']} + rtol {rule['rtol']}" if count else None
    if kind == "max_rel":
        limit = rule["tol"] * size.max()
        return f"limit {limit:.4g} = {rule['tol']} of the largest value" if gap.max() > limit else None
    if kind == "quantile":
        with np.errstate(invalid="ignore"):
            quantile = float(np.quantile(gap, rule["q"], method="linear"))
        if not quantile <= rule["atol"]:
            return f"quantile {rule['q']} is {quantile:.4g}, above {rule['atol']}"
        return f"maximum above {rule['max_atol']}" if gap.max() > rule["max_atol"] else None
    assert kind == "uint8", kind
    if gap.max() > rule["max_levels"]:
        return f"more than {rule['max_levels']} levels apart"
    fraction = float((gap > 0).mean())
    above = fraction > rule["max_fraction"]
    return f"{fraction:.4g} of the values differ, above {rule['max_fraction']}" if above else None


def json_differences(a: Any, b: Any, rule: Rule, path: str, rules: Sequence[Rule] = ()) -> list[str]:
    """Differences of two JSON values under a rule, recursively; keys and lengths must be equal, text exactly so.

    `rules`: all of the case; inside an object those that stand before `rule` and name a value take it.
    """
    if isinstance(b, Mapping):
        if not isinstance(a, Mapping):
            return [f"{path}: {_short(a)} instead of an object"]
        own = {key: _rule_inside(f"{path}.{key}", rule, rules) for key in b}
        free = {key for key, each in own.items() if each["rule"] == "info"}
        if set(a) | free != set(b):
            return [f"{path}: keys differ: {sorted(map(str, (set(a) | free) ^ set(b)))}"]
        checked = (key for key in b if key not in free)
        return [line for key in checked for line in json_differences(a[key], b[key], own[key], f"{path}.{key}", rules)]
    if isinstance(b, (list, tuple)):
        if not isinstance(a, (list, tuple)) or len(a) != len(b):
            return [f"{path}: {_short(a)} instead of a list of {len(b)}"]
        pairs = enumerate(zip(a, b, strict=True))
        return [line for i, (x, y) in pairs for line in json_differences(x, y, rule, f"{path}[{i}]")]
    if _is_number(a) and _is_number(b):
        if math.isnan(a) or math.isnan(b):
            return [f"{path}: NaN"]
        found = _difference(np.asarray([a]), np.asarray([b]), rule)
        return [f"{path}: {found}"] if found else []
    return [] if type(a) is type(b) and a == b else [f"{path}: {_short(a)} instead of {_short(b)}"]


def _rule_inside(path: str, rule: Rule, rules: Sequence[Rule]) -> Rule:
    """The rule of a value inside an object that `rule` took: an earlier one that names it, else the object's."""
    for each in rules:
        if each is rule:
            break
        if "json" in each and fnmatchcase(path, each["json"]):
            return each
    return rule


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
