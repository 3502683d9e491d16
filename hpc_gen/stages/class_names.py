"""Names of classes for captions: those of the table, or of a file with a line "ID NAME" per class."""

from __future__ import annotations

from pathlib import Path

from hpc_gen.config.experiment import Experiment
from hpc_gen.data.table import Table
from hpc_gen.runtime.errors import DataError, UserError


def class_names(experiment: Experiment, table: Table, workspace: Path) -> tuple[str, ...]:
    """Name of each class of `table` by number; "" where there is none, empty without any.

    Raises UserError when `data.class_names` names no readable file, DataError for a line that is not "ID NAME".
    """
    given = experiment.data.class_names
    if given is None:
        return tuple(table.index.class_names)
    path = workspace / given
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.class_names: {path} cannot be read ({error}); name a text file") from error
    numbers = {name: number for number, name in enumerate(table.index.class_names)}
    named: dict[int, str] = {}
    for place, line in enumerate(lines, 1):
        identifier, _, name = line.strip().partition(" ")
        if not identifier:
            continue
        number = int(identifier) if identifier.isascii() and identifier.isdigit() else numbers.get(identifier)
        if number is None or not name.strip():
            raise DataError(
                f"{path}:{place}: '{line}' is not 'ID NAME' with a class number or a class name of {table.folder}; "
                "correct the line"
            )
        named[number] = name.strip().strip(",")
    size = max(table.index.num_classes, max(named, default=-1) + 1)
    return tuple(named.get(number, "") for number in range(size))
