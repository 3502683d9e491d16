"""Errors of the configuration, each one sentence with the place (file:line or command line), the key and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """The experiment file or an override is wrong; `problems` holds one sentence per mistake.

    Carries the exit code of a user's mistake itself, because `config` and `runtime` do not import each other.
    """

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(problems))


class KeyProblem(ValueError):
    """Raised by checks inside the models: `key` is the full key path whose line is to be named."""

    def __init__(self, key: str, sentence: str) -> None:
        self.key = key
        super().__init__(sentence)


def closest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that `name` was probably meant to be, or None."""
    found = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return found[0] if found else None
