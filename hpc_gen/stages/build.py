"""From an experiment to a method: typed config, facts of the table, weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hpc_gen.config.experiment import Experiment
from hpc_gen.data.table import Table
from hpc_gen.methods import registry
from hpc_gen.methods.materialise import materialise
from hpc_gen.methods.protocol import Method, TableFacts
from hpc_gen.runtime.errors import CheckpointError, DataError


def table_facts(table: Table) -> TableFacts:
    """What a method may know of a table when it is built."""
    columns = {name: (column.dtype, tuple(column.shape)) for name, column in table.index.columns.items()}
    return TableFacts(num_classes=table.index.num_classes, columns=columns)


def open_table(workspace: Path, path: str) -> Table:
    """The table at `path`, relative to the workspace. Raises DataError when it is not a whole table."""
    return Table.open(workspace / path)


def meta_method(experiment: Experiment, facts: TableFacts) -> Method:
    """The method on the meta device. Raises UserError for an unknown name or a config that does not fit the table."""
    entry, config = registry.typed_config(experiment.method)
    return entry.build(config, facts)


def settings_of(experiment: Experiment, settings: Mapping[str, Any]) -> Any:
    """Sampler settings typed by the experiment's method."""
    entry, _ = registry.typed_config(experiment.method)
    return entry.settings.model_validate(dict(settings))


def build_method(
    experiment: Experiment, facts: TableFacts, weights: Callable[[str], Mapping[str, Tensor]] | None = None
) -> Method:
    """The method on the CPU in eval mode: initial values of the experiment's seed, or `weights(role)`.

    Raises CheckpointError when the weights of a role do not have the role's keys and shapes exactly.
    """
    method = meta_method(experiment, facts)
    for role, module in materialise(method, experiment.seed).items():
        if weights is not None:
            try:
                module.load_state_dict(dict(weights(role)), strict=True)
            except RuntimeError as error:
                first = str(error).strip().splitlines()[-1].strip()
                raise CheckpointError(
                    f"weights of role '{role}' do not fit the method: {first}; was the method section changed?"
                ) from error
        module.eval()
        module.requires_grad_(False)
    return method


def check_columns(method: Method, table: Table) -> None:
    """Refuse a table that the method cannot train on. Raises DataError naming the column and the fix."""
    for name, spec in method.columns().items():
        column = table.index.columns.get(name)
        if column is None:
            have = ", ".join(sorted(table.index.columns))
            raise DataError(f"{table.folder} has no column '{name}' (it has: {have}); encode it, or name another table")
        if column.dtype not in spec.dtypes:
            wanted = " or ".join(spec.dtypes)
            raise DataError(f"{table.folder}: column '{name}' is {column.dtype}, the method reads {wanted}")
        shape = tuple(column.shape)
        if len(shape) != len(spec.shape) or any(w not in (-1, s) for w, s in zip(spec.shape, shape, strict=True)):
            raise DataError(
                f"{table.folder}: a row of column '{name}' has shape {shape}, the method needs {spec.shape}; "
                "change the method's sizes or encode at another size"
            )
        if spec.max_value is not None and table.index.num_classes > spec.max_value + 1:
            raise DataError(
                f"{table.folder} has {table.index.num_classes} classes, the method's largest label is "
                f"{spec.max_value}; set method.num_classes"
            )
