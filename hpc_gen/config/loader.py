"""An experiment from a YAML file and `key.path=value` overrides, with the place of every key, and its two hashes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from hpc_gen.config import describe, yaml_tree
from hpc_gen.config.base import plain, split, without_unset
from hpc_gen.config.errors import ConfigError
from hpc_gen.config.experiment import Experiment
from hpc_gen.config.problems import sentences

COMMAND_LINE = "command line"
HASH_VERSION = 1  # raised when the same keys come to mean other numbers

_Model = TypeVar("_Model", bound=BaseModel)


@dataclass(frozen=True)
class Resolved:
    """A validated experiment with where each key came from.

    `identity` (SHA-256 hex) covers what changes numbers, `operation` the rest; `sources` maps key paths to
    "FILE:LINE" or "command line" (a key that is absent has its default).
    """

    experiment: Experiment
    identity: str
    operation: str
    sources: Mapping[str, str]
    origin: str = "experiment"

    def to_yaml(self) -> str:
        """The whole experiment, defaults filled in, as YAML text that `load` reads back to the same hashes."""
        return dump(self)

    def identity_of(self, *sections: str) -> str:
        """SHA-256 hex of the identity part of the named sections, as in identity_of("seed", "method", "train")."""
        tree = split(self.experiment)[0]
        return _sha256({name: tree[name] for name in sections})


def load(path: str | Path, overrides: Sequence[str] = ()) -> Resolved:
    """Read an experiment file and apply overrides such as "train.optimizer.lr=1e-4".

    Raises ConfigError: one sentence per mistake, with file:line or "command line", the key and what is allowed.
    """
    name = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"experiment file '{name}' cannot be read: {reason}; give the path of a YAML file") from error
    return loads(text, overrides, name)


def loads(text: str, overrides: Sequence[str] = (), name: str = "experiment") -> Resolved:
    """`load` of text; `name` stands for the file in errors and sources."""
    tree, sources = yaml_tree.parse(text, name)
    for override in overrides:
        _apply(tree, sources, override)
    experiment = _validate(Experiment, tree, sources, "", name)
    return _resolved(experiment, sources, name)


def load_section(
    model: type[_Model], text: str, overrides: Sequence[str], name: str, variables: Mapping[str, str] | None = None
) -> _Model:
    """A typed mapping of its own, such as a cluster profile, by the rules of an experiment file.

    `variables`: what ${NAME} in its texts stands for; None leaves them as they are. Raises ConfigError, also naming the
    place of a variable that is not there.
    """
    tree, sources = yaml_tree.parse(text, name)
    for override in overrides:
        _apply(tree, sources, override)
    if variables is not None:
        tree = _filled_in(tree, "", variables, sources, name)
    return _validate(model, tree, sources, "", name)


def _filled_in(value: Any, path: str, variables: Mapping[str, str], sources: Mapping[str, str], name: str) -> Any:
    """The value with every ${NAME} in its texts replaced."""
    if isinstance(value, dict):
        return {key: _filled_in(v, f"{path}.{key}".lstrip("."), variables, sources, name) for key, v in value.items()}
    if isinstance(value, list):
        return [_filled_in(inner, f"{path}.{i}", variables, sources, name) for i, inner in enumerate(value)]
    if not isinstance(value, str):
        return value

    def text_of(match: re.Match[str]) -> str:
        found = variables.get(match[1])
        if not found:
            raise ConfigError(
                f"{sources.get(path, f'{name}:1')}: '{path}' needs the environment variable {match[1]}, which is not "
                f"set; export it, or give --set {path}=..."
            )
        return found

    return re.sub(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}", text_of, value)


def type_method(
    resolved: Resolved, config_class: type[BaseModel], settings_class: type[BaseModel] | None = None
) -> Resolved:
    """Second pass: validate the `method` section and the sampler settings by the method's own models.

    Fills in their defaults, so the identity covers them. Raises ConfigError with the places of the first pass.
    """
    experiment, sources, origin = resolved.experiment, resolved.sources, resolved.origin
    section = {key: value for key, value in experiment.method.items() if key != "name"}
    typed = _validate(config_class, section, sources, "method", origin)
    changes: dict[str, Any] = {"method": {"name": experiment.method["name"], **without_unset(typed)}}
    if settings_class is not None:
        if experiment.sample is not None:
            settings = _validate(settings_class, experiment.sample.settings, sources, "sample.settings", origin)
            changes["sample"] = experiment.sample.model_copy(update={"settings": plain(settings)})
        train = experiment.train
        for name in ("preview", "evaluate"):
            chosen = getattr(train, name, None)
            if train is not None and chosen is not None:
                settings = _validate(settings_class, chosen.settings, sources, f"train.{name}.settings", origin)
                chosen = chosen.model_copy(update={"settings": plain(settings)})
                changes["train"] = train = train.model_copy(update={name: chosen})
    return _resolved(experiment.model_copy(update=changes), sources, origin)


def with_changes(resolved: Resolved, changes: Mapping[str, Any]) -> Resolved:
    """A copy with keys replaced, as {"train.stop_at_images": 6400}; checked as if given on the command line."""
    tree = plain(resolved.experiment)
    sources = dict(resolved.sources)
    for key, value in changes.items():
        _put(tree, sources, key, value)
    return _resolved(_validate(Experiment, tree, sources, "", resolved.origin), sources, resolved.origin)


def dump(resolved: Resolved) -> str:
    """The experiment with all defaults as YAML text."""
    return yaml_tree.dump(plain(resolved.experiment))


def flat(resolved: Resolved) -> dict[str, Any]:
    """{key path: value} of every leaf; lists are leaves."""
    return dict(_leaves(plain(resolved.experiment), ""))


def diff(a: Resolved, b: Resolved) -> list[tuple[str, Any, Any]]:
    """Keys whose values differ, as (key path, value in a, value in b); None stands for an absent key too."""
    left, right = flat(a), flat(b)
    names = list(left) + [name for name in right if name not in left]
    return [(name, left.get(name), right.get(name)) for name in names if left.get(name) != right.get(name)]


def identity_diff(a: Resolved, b: Resolved, sections: Sequence[str]) -> list[tuple[str, Any, Any]]:
    """`diff` over the identity part of the named sections: what makes `identity_of` of them differ."""
    left, right = (dict(_leaves({name: split(each.experiment)[0][name] for name in sections}, "")) for each in (a, b))
    names = list(left) + [name for name in right if name not in left]
    return [(name, left.get(name), right.get(name)) for name in names if left.get(name) != right.get(name)]


def schema() -> dict[str, Any]:
    """JSON schema of an experiment file, with the meaning of each key; the method's section is open."""
    return Experiment.model_json_schema()


def key_facts() -> list[describe.KeyFacts]:
    """Every key of an experiment with what it allows, its default and its meaning, for `config schema`."""
    return list(describe.keys(Experiment))


def _resolved(experiment: Experiment, sources: Mapping[str, str], origin: str) -> Resolved:
    identity, operation = split(experiment)
    return Resolved(experiment, _sha256(identity), _sha256(operation), dict(sources), origin)


def _sha256(tree: Any) -> str:
    text = json.dumps({"version": HASH_VERSION, "tree": tree}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _validate(
    model: type[_Model], tree: Mapping[str, Any], sources: Mapping[str, str], prefix: str, origin: str
) -> _Model:
    """Validate strictly ("3" is no number, 1.0 no integer); through JSON, where lists may become tuples."""
    try:
        return model.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        raise ConfigError(*sentences(error, model, tree, sources, prefix, origin)) from error


def _apply(tree: dict[str, Any], sources: dict[str, str], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip() or any(not part for part in key.strip().split(".")):
        raise ConfigError(
            f"{COMMAND_LINE}: '{override}' is not of the form key.path=value, as in train.optimizer.lr=1e-4"
        )
    _put(tree, sources, key.strip(), yaml_tree.parse_scalar(text, key.strip()))


def _put(tree: dict[str, Any], sources: dict[str, str], key: str, value: Any) -> None:
    """Set a key path, making sections that are absent or null on the way."""
    *sections, last = key.split(".")
    here, path = tree, ""
    for part in sections:
        path = f"{path}.{part}" if path else part
        if here.get(part) is None:
            here[part] = {}
            sources[path] = COMMAND_LINE
        inner = here[part]
        if isinstance(inner, list):
            raise ConfigError(
                f"{COMMAND_LINE}: '{key}' reaches into the list '{path}'; give the whole list, as in '{path}=[...]'"
            )
        if not isinstance(inner, dict):
            raise ConfigError(
                f"{COMMAND_LINE}: '{key}' reaches into '{path}', which is {describe.show(inner)} and has no keys"
            )
        here = inner
    here[last] = value
    for known in [name for name in sources if name.startswith(f"{key}.")]:
        del sources[known]
    for name, _ in _leaves(value, key):
        sources[name] = COMMAND_LINE
    sources[key] = COMMAND_LINE
