"""The axes of `hpc-gen submit --array`: texts such as "seed=1,2,3" become the overrides of each run."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from hpc_gen.runtime.errors import UserError
from hpc_gen.runtime.run_folder import check_name


def expand(name: str, axes: Sequence[str], overrides: Sequence[str]) -> list[list[str]]:
    """Overrides of each run, its name among them, from axes such as "seed=1,2,3"; several axes make a grid.

    `name`: of the experiment; a run is called NAME-KEY-VALUE, with the last part of the key. Raises UserError.
    """
    choices = [_choices(axis) for axis in axes]
    keys = [key for key, _ in choices]
    double = next((key for key in keys if keys.count(key) > 1), None)
    if double is not None:
        raise UserError(f"--array names '{double}' twice; give all its values at once, as in {double}=1,2,3")
    own = [each for each in overrides if each.partition("=")[0] not in (*keys, "name")]
    found: dict[str, list[str]] = {}
    for values in itertools.product(*(values for _, values in choices)):
        pairs = list(zip(keys, values, strict=True))
        run = "-".join([name, *(f"{key.rpartition('.')[2]}-{_plain(value)}" for key, value in pairs)])
        check_name(run, "run")
        if run in found:
            raise UserError(f"--array gives two runs the name '{run}'; leave out values that are there twice")
        found[run] = [*own, *(f"{key}={value}" for key, value in pairs), f"name={run}"]
    return list(found.values())


def _choices(axis: str) -> tuple[str, list[str]]:
    """Key and values of one axis; commas within brackets or quotes belong to the value."""
    key, equals, text = axis.partition("=")
    values = [value.strip() for value in re.findall(r"""(?:[^,\[{"']|\[[^\]]*\]|\{[^}]*\}|"[^"]*"|'[^']*')+""", text)]
    if not equals or not re.fullmatch(r"[A-Za-z_][\w.]*", key) or not all(values) or not values:
        raise UserError(f"--array {axis!r} is not KEY.PATH=VALUE,VALUE; as in --array seed=1,2,3")
    if key == "name":
        raise UserError("--array cannot vary 'name': each run is named after its values, as in NAME-seed-1")
    return key, values


def _plain(value: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+]+", "-", value).strip("-") or "empty"
