"""The stage `assign`: a table of features becomes one of codes, shard by shard, without the network that made it.

`encode` makes codes of images, running the network anew; this is for features that are there already. Labels and row
ids go along, so the codes can be joined to other columns of the same rows (`hpc-gen shards join`).

    extra_stages:
      codes:
        worker: "shard_tools.assign:worker"
        after: [centroids]
        options: {table: tables/features, centroids: centroids/km_8k.npy, output: tables/codes}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError

from hpc_gen.config.base import NonEmpty, PositiveInt, Section, Sha256
from hpc_gen.data.index import INDEX_NAME, LABELS, ROW_ID, ColumnInfo, TableIndex
from hpc_gen.data.table import Table
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import UserError
from hpc_gen.stages.device import task_device
from hpc_gen.stages.forecast import Need
from hpc_gen.stages.units import StageContext, Unit
from hpc_gen.tokenizers.kmeans import Centroids
from hpc_gen.training.precision import set_determinism
from shard_tools.output import (
    Output,
    files_of,
    make_facts,
    names_of,
    read_facts,
    shards_of,
    statistics,
    with_names,
    with_shards,
)
from shard_tools.recipe import refuse_other_recipe

CODES, FLIP = "codes", "_flip"
ROWS_AT_ONCE = 16  # between two looks for a stop
CODE_BYTES = 4


class AssignOptions(Section):
    """Options of the stage."""

    table: NonEmpty
    """Folder of the table with the features, relative to the workspace."""
    centroids: NonEmpty
    """File .npy of the centroids, float32 [codes, width], relative to the workspace."""
    centroids_sha256: Sha256 | None = None
    """SHA-256 that this file must have; null = any."""
    output: NonEmpty
    """Folder of the table of codes to make, relative to the workspace."""
    column: NonEmpty = "features"
    """Column of features, which becomes `codes`; one of the same name with _flip becomes `codes_flip`."""
    threads: PositiveInt = 1
    """CPU threads; belongs to the identity."""


def worker(context: StageContext) -> AssignWorker:
    """Factory of the stage. Raises UserError for options that it does not have."""
    options = context.experiment.extra_stages[context.stage].options
    try:
        typed = AssignOptions.model_validate(options)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["extra_stages", context.stage, "options", *map(str, first["loc"])])
        known = ", ".join(AssignOptions.model_fields)
        raise UserError(f"'{where}' is refused: {first['msg']}; the stage has: {known}") from error
    return AssignWorker(typed, context.workspace, task_device(context.task))


class AssignWorker:
    """A UnitWorker; units are the shards of the table, as many rows as those of the features."""

    def __init__(self, options: AssignOptions, workspace: Path, device: torch.device | None = None) -> None:
        self.options = options
        self.workspace = workspace
        self.device = device or torch.device("cpu")

    @cached_property
    def table(self) -> Table:
        """The table of features. Raises DataError when it is not whole, UserError when the column cannot be used."""
        table = Table.open(self.workspace / self.options.table)
        for name in (self.options.column, self.options.column + FLIP):
            column = table.index.columns.get(name)
            if column is None and name.endswith(FLIP):
                continue
            if column is None or "float" not in column.dtype or not column.shape:
                said = "no such column" if column is None else f"{column.dtype} {list(column.shape)}"
                raise UserError(
                    f"table {table.folder}, column '{name}': {said}, but codes are of floats [..., width]; it has: "
                    f"{', '.join(sorted(table.index.columns))}"
                )
        return table

    @cached_property
    def centroids(self) -> Centroids:
        """The centroids. Raises UserError and DataError as `Centroids.read`."""
        width = self.table.index.columns[self.options.column].shape[-1]
        path = self.workspace / self.options.centroids
        return Centroids.read(path, width, self.options.centroids_sha256, self.device)

    @cached_property
    def columns(self) -> dict[str, str]:
        """{column to make: column of features}."""
        pairs = {CODES + ending: self.options.column + ending for ending in ("", FLIP)}
        return {code: feature for code, feature in pairs.items() if feature in self.table.index.columns}

    @cached_property
    def output(self) -> Output:
        """The table to make. Raises UserError when its folder holds something made otherwise."""
        recipe = {
            "assigned": self.table.identity,
            "columns": self.columns,
            "centroids": {"codes": len(self.centroids), "content": self.centroids.content},
            "computed": {"threads": self.options.threads, "device": self.device.type},
        }
        folder = self.workspace / self.options.output
        refuse_other_recipe(folder, recipe)
        order = np.arange(self.table.rows, dtype=np.int64)
        return Output("", folder, recipe, order, self.table.shard_rows[0], "ptshard")

    def units(self) -> list[Unit]:
        """`shard-00000`, ..."""
        return [Unit(f"shard-{number:05d}", number) for number in range(self.output.num_units)]

    def fingerprint(self) -> str:
        """Hash of the recipe and of the table's name."""
        facts = {"recipe": self.output.recipe, "output": self.options.output}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def do(self, unit: Unit, staging: Path, poll: Callable[[], None]) -> dict[str, Path]:
        """Assign the rows of one shard."""
        set_determinism(True, self.options.threads)
        rows = np.array(self.output.items(unit.index))
        kept = [name for name in (LABELS, ROW_ID) if name in self.table.index.columns]
        columns = self.table.read(rows, kept) if kept else {}
        for code, feature in self.columns.items():
            parts = []
            for begin in range(0, len(rows), ROWS_AT_ONCE):
                poll()
                found = self.table.read(rows[begin : begin + ROWS_AT_ONCE], (feature,))[feature]
                # row by row: the place of a vector among all would decide the last bits of its distances
                parts += [self.centroids.assign(row.to(self.device)).cpu() for row in found]
            columns[code] = torch.stack(parts).to(torch.int32)
        infos = self.output.write(staging, unit.index, columns, rows.tolist())
        facts_path = self.output.facts_path(unit.index)
        facts = with_shards(make_facts(self.output.recipe, columns, []), infos)
        facts = with_names(facts, staging, unit.index, self.table.names(rows))
        commit.write_json(staging / facts_path.name, facts)
        # The facts first: a folder of shards without any is taken for another program's (data/foreign.py).
        files = {str(facts_path): staging / facts_path.name}
        return files | {str(self.output.folder / file): staging / file for file in files_of(facts)}

    def forecast(self) -> Need:
        """Codes of all rows."""
        per_row = sum(
            int(np.prod(self.table.index.columns[feature].shape[:-1])) * CODE_BYTES for feature in self.columns.values()
        )
        return Need(self.table.rows * (per_row + 2 * 8), (3 if self.table.has_names else 2) * self.output.num_units)

    def finish(self) -> None:
        """Write `index.json`, last; one that says the same already is left alone."""
        index = self._index()
        there = (self.output.folder / INDEX_NAME).is_file()
        if not (there and TableIndex.read(self.output.folder).to_json() == index.to_json()):
            index.write(self.output.folder)

    def _index(self) -> TableIndex:
        facts = [read_facts(self.output, unit) for unit in range(self.output.num_units)]
        old = self.table.index
        made = {"centroids": dict(self.output.recipe["centroids"])}
        return TableIndex(
            columns={
                name: ColumnInfo(str(column["dtype"]), tuple(column["shape"]))
                for name, column in facts[0]["columns"].items()
            },
            shards=tuple(info for fact in facts for info in shards_of(fact)),
            num_classes=old.num_classes,
            class_names=old.class_names,
            tokenizer={**old.tokenizer, **made} if old.tokenizer else {},
            statistics=statistics(facts, old.num_classes, dict(old.statistics.get("skipped", {}))),
            recipe=self.output.recipe,
            bad_images=old.bad_images,
            names=names_of(facts),
        )
