"""The encode stage: images of a source become the shards of a table, one shard (or that many files) per unit.

Beside the shards lies a small JSON of facts per unit (rows, hashes, sums, bad images); `finish` merges them in order
into `index.json`, so the index does not depend on which task did which unit, or when. A killed stage loses the units
in hand: what is done is in the ledger, unit by unit, so the reference's `last_idx.txt` (one number that all its
processes race to write, and that empties a second run into the folder) has no counterpart here.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from contextlib import closing, suppress
from functools import cached_property
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from hpc_gen import tokenizers
from hpc_gen.config.errors import KeyProblem
from hpc_gen.config.experiment import EncodeConfig
from hpc_gen.config.tokenizer import TokenizerConfig
from hpc_gen.data.index import INDEX_NAME, LABELS, ROW_ID, ColumnInfo, TableIndex
from hpc_gen.data.row_files import ROW_LAYOUTS, stored
from hpc_gen.runtime import clock, commit
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.stages.device import task_device
from hpc_gen.stages.forecast import Need
from hpc_gen.stages.units import StageContext, Unit
from hpc_gen.tokenizers import CPU, FullPrecision, Tokenizer
from hpc_gen.tokenizers.several import Several
from hpc_gen.training.precision import set_determinism
from shard_tools.output import (
    Output,
    files_of,
    make_facts,
    names_of,
    read_facts,
    shards_of,
    statistics,
    whole_unit,
    with_names,
    with_shards,
)
from shard_tools.pixels import ahead, squares
from shard_tools.recipe import recipe_of, refuse_other_recipe, row_names, row_order
from shard_tools.sources import open_source
from shard_tools.split import TRAIN, VALIDATION, Source

IMAGES_PER_POLL = 8  # a forward pass; a stop is looked for between them
LABEL_BYTES = 8
ROW_FILE_BYTES = 1500  # what pt and npz add to a row's tensors
UNIT_FILES = 3  # the shard, its facts, the names of its rows
FILE_BLOCK = 4096  # a small file takes whole blocks of the disk
SHOWN_BAD_IMAGES = 3  # named in an error message; index.json lists all


def worker(context: StageContext) -> EncodeWorker:
    """Factory of the stage `encode`. Raises UserError when the experiment has no encode section."""
    encode = context.experiment.encode
    if encode is None:
        raise UserError(f"experiment {context.experiment.name!r} has no section 'encode'; add one, or skip the stage")
    data = context.experiment.data
    folders = {TRAIN: data.table}
    if encode.validation and data.validation_table is not None:
        folders[VALIDATION] = data.validation_table
    return EncodeWorker(encode, context.workspace, folders, task_device(context.task))


def extra_worker(context: StageContext) -> EncodeWorker:
    """Factory of an extra stage that encodes a table of its own, as the features that centroids are fitted to.

    Its options: `encode` as the section of that name, `table` and, where `encode.validation` is true,
    `validation_table`. Raises UserError for others.
    """
    options = dict(context.experiment.extra_stages[context.stage].options)
    where = f"extra_stages.{context.stage}.options"
    section, table, held_out = (options.pop(key, None) for key in ("encode", "table", "validation_table"))
    if options or not isinstance(table, str) or not isinstance(section, dict):
        raise UserError(f"'{where}' needs 'encode' (a section) and 'table' (a folder), may have 'validation_table'")
    try:
        encode = EncodeConfig.model_validate(section)
    except (ValidationError, KeyProblem) as error:
        raise UserError(f"'{where}.encode' is refused: {_first_problem(error)}") from error
    if encode.validation != (held_out is not None):
        raise UserError(f"'{where}' needs 'validation_table' exactly where encode.validation is true")
    folders = {TRAIN: table} | ({VALIDATION: str(held_out)} if held_out is not None else {})
    return EncodeWorker(encode, context.workspace, folders, task_device(context.task))


def _first_problem(error: ValidationError | KeyProblem) -> str:
    if isinstance(error, KeyProblem):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


class EncodeWorker:
    """A UnitWorker; units are the shards of the training table, then those of the validation table."""

    stage = "encode"

    def __init__(
        self, encode: EncodeConfig, workspace: Path, tables: dict[str, str], device: torch.device = CPU
    ) -> None:
        """`tables`: folder of each split's table, relative to the workspace; `device`: of the tokenizer's network."""
        self.encode = encode
        self.workspace = workspace
        self.tables = tables
        self.device = device
        self.tokenizer = self._build()
        self.network_s = 0.0
        """Seconds in the tokenizer's network so far; decoding is overlapped with it."""

    def _build(self) -> Tokenizer:
        """The tokenizer of the section, with those of `also`."""

        def build(config: TokenizerConfig) -> Tokenizer:
            return tokenizers.build(config.name, workspace=self.workspace, device=self.device, **config.settings())

        first = build(self.encode.tokenizer)
        others = {name: build(config) for name, config in (self.encode.also or {}).items()}
        return Several(first, others) if others else first

    @property
    def computes(self) -> bool:
        """Whether a network is at work, whose last bits depend on threads and device."""
        return any(each.name != "identity" for each in (self.encode.tokenizer, *(self.encode.also or {}).values()))

    @cached_property
    def source(self) -> Source:
        """The opened source. Raises UserError when it is not there or lacks a split."""
        path = self.encode.source_path or f"downloads/{self.encode.source}"
        source = open_source(self.encode.source, self.workspace / path, self.encode.background)
        for split in self.tables:
            if split not in source.splits:
                raise UserError(
                    f"source {source.name!r} in {self.workspace / path} has no split {split!r} (it has "
                    f"{sorted(source.splits)}); add the folder {split}/, or set encode.{split}=false"
                )
        return source

    @cached_property
    def outputs(self) -> dict[str, Output]:
        """The tables to make, by split. Raises UserError when a folder holds something made by another recipe."""
        outputs: dict[str, Output] = {}
        layout = self.encode.format
        for split, table in self.tables.items():
            recipe = recipe_of(self.encode, self.source, split, self.tokenizer.identity)
            if isinstance(self.tokenizer, Several):
                recipe["also"] = self.tokenizer.others
            if self.computes:
                recipe["computed"] = {"threads": self.encode.threads, "device": self.device.type}
            order = row_order(self.source, split, recipe["classes"], recipe["limit"])
            folder = self.workspace / table
            refuse_other_recipe(folder, recipe)
            names = row_names(self.source, split, layout) if layout in ROW_LAYOUTS else ()
            outputs[split] = Output(split, folder, recipe, order, self.encode.shard_rows, layout, names)
        return outputs

    def units(self) -> list[Unit]:
        """One unit per shard: `train-00000`, ..., then `validation-00000`, ..."""
        names = [f"{o.split}-{shard:05d}" for o in self.outputs.values() for shard in range(o.num_units)]
        return [Unit(name, index) for index, name in enumerate(names)]

    def fingerprint(self) -> str:
        """Hash of the recipes and of the tables' names (a table asked for under another name is made again)."""
        facts = {split: [self.tables[split], output.recipe] for split, output in self.outputs.items()}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def do(self, unit: Unit, staging: Path, poll: Callable[[], None]) -> dict[str, Path]:
        """Encode one unit into `staging`; a whole one that another run has committed is taken over instead.

        Raises DataError when the bad images of this unit alone exceed what the whole split may have.
        """
        split, _, text = unit.name.rpartition("-")
        output, number = self.outputs[split], int(text)
        facts = whole_unit(output, number)
        if facts is not None:
            for info in shards_of(facts):
                commit.write_bytes(staging / info.file, (output.folder / info.file).read_bytes())
            items = output.items(number)  # all of them: a unit with bad images is not taken over
        else:
            columns, items, bad = self._encode(output, number, poll)
            infos = output.write(staging, number, columns, items) if columns else []
            facts = with_shards(make_facts(output.recipe, columns, bad), infos)
        ids = self.source.splits[split].ids
        facts = with_names(facts, staging, number, [ids[item] for item in items])
        facts_path = output.facts_path(number)
        commit.write_json(staging / facts_path.name, facts)
        # The facts first: a folder of shards without any is taken for another program's (data/foreign.py).
        files = {str(facts_path): staging / facts_path.name}
        return files | {str(output.folder / file): staging / file for file in files_of(facts)}

    def forecast(self) -> Need:
        """What the missing units will write: the bytes of a row, times their rows."""
        missing = [(o, unit) for o in self.outputs.values() for unit in range(o.num_units)]
        missing = [(o, unit) for o, unit in missing if not o.facts_path(unit).is_file()]
        if not missing:
            return Need(0, 0)
        row = self._row_bytes()
        rows = sum(len(o.items(unit)) for o, unit in missing)
        if self.encode.format not in ROW_LAYOUTS:
            return Need(rows * row, UNIT_FILES * len(missing))
        blocks = -(-(row + ROW_FILE_BYTES) // FILE_BLOCK)
        return Need(rows * blocks * FILE_BLOCK, rows + (UNIT_FILES - 1) * len(missing))

    def _row_bytes(self) -> int:
        """Of a row as a finished unit tells of it; before there is one, as the tokenizer makes it of a black image.

        A forward pass of a large network takes half a minute on a CPU: a task that goes on does without.
        """
        done = [(o, unit) for o in self.outputs.values() for unit in range(o.num_units) if o.facts_path(unit).is_file()]
        for output, unit in done:
            with suppress(DataError):  # damaged, which is somebody else's to tell
                columns = read_facts(output, unit).get("columns", {}).values()
                sizes = [math.prod(each["shape"]) * getattr(torch, each["dtype"]).itemsize for each in columns]
                if sizes:
                    return sum(sizes)
        side = self.encode.image_size
        black = torch.zeros(self.encode.channels, side, side, dtype=torch.uint8)
        made = self._tokenize([black]).values()
        return sum(column.numel() * column.element_size() for column in made) + LABEL_BYTES

    def _encode(
        self, output: Output, unit: int, poll: Callable[[], None]
    ) -> tuple[dict[str, Tensor], list[int], list[str]]:
        """Columns of one unit (empty when no image could be read), its items, and its bad images as "id: reason"."""
        parts: list[dict[str, Tensor]] = []
        waiting: list[Tensor] = []
        items: list[int] = []
        bad: list[str] = []
        split = self.source.splits[output.split]
        pixels = squares(split, output.items(unit), self.encode, self.device.index or 0)
        with closing(ahead(pixels)) as images:
            for item, image in images:
                poll()
                if isinstance(image, DataError):
                    bad.append(f"{split.ids[item]}: {image}")
                    self._check_bad(bad, output)
                    continue
                waiting.append(image)
                items.append(item)
                if len(waiting) == IMAGES_PER_POLL:
                    parts.append(self._tokenize(waiting))
                    waiting = []
        if waiting:
            parts.append(self._tokenize(waiting))
        if not parts:
            return {}, [], bad
        columns = {name: torch.cat([part[name] for part in parts]) for name in self.tokenizer.columns}
        columns[LABELS] = torch.from_numpy(split.labels[items]).to(torch.int64)
        if self.encode.row_ids:
            columns[ROW_ID] = torch.tensor(items, dtype=torch.int64)
        return columns, items, bad

    def _tokenize(self, pixels: list[Tensor]) -> dict[str, Tensor]:
        """What is stored of these images, {column: [N, ...]} on the CPU. Raises DataError where it is not finite."""
        begun = clock.monotonic()
        if self.computes:
            set_determinism(True, self.encode.threads)
        encode = self.tokenizer.encode
        if self.encode.format == "npz" and isinstance(self.tokenizer, FullPrecision):
            encode = self.tokenizer.encode_float32
        columns = encode(torch.stack(pixels))
        for name, column in columns.items():
            if not bool(torch.isfinite(column).all()):
                raise DataError(f"tokenizer {self.tokenizer.name!r} makes non-finite {name}; check its weights")
        columns = {name: stored(self.encode.format, columns[name]) for name in self.tokenizer.columns}
        self.network_s += clock.monotonic() - begun
        return columns

    def _check_bad(self, bad: list[str], output: Output) -> None:
        """Raise DataError when there are more bad images than the split may have."""
        allowed = self.encode.max_bad_fraction * len(output.order)
        if len(bad) > allowed:
            shown = "; ".join(bad[:SHOWN_BAD_IMAGES])
            raise DataError(
                f"source {self.source.name!r}, split {output.split!r}: at least {len(bad)} of {len(output.order)} "
                f"images cannot be read, encode.max_bad_fraction={self.encode.max_bad_fraction:g} allows "
                f"{int(allowed)}: {shown}"
            )

    def finish(self) -> None:
        """Write `index.json` of each table, last; one that says the same already is left alone.

        Raises DataError when a shard or its facts are missing or another recipe's, or too many images were bad.
        """
        for output in self.outputs.values():
            index = self._index(output)
            there = (output.folder / INDEX_NAME).is_file()
            if not (there and TableIndex.read(output.folder).to_json() == index.to_json()):
                index.write(output.folder)

    def _index(self, output: Output) -> TableIndex:
        facts = [read_facts(output, unit) for unit in range(output.num_units)]
        bad = [line for fact in facts for line in fact["bad_images"]]
        self._check_bad(bad, output)
        full = [fact for fact in facts if fact["rows"]]
        if not full:
            raise DataError(
                f"table {output.folder}: not one of {len(output.order)} images could be read; check the source"
            )
        columns = {
            name: ColumnInfo(str(column["dtype"]), tuple(column["shape"]))
            for name, column in full[0]["columns"].items()
        }
        shards = tuple(info for fact in full for info in shards_of(fact))
        for info in shards:
            path = output.folder / info.file
            if not path.is_file() or path.stat().st_size != info.bytes:
                raise DataError(f"shard {path} is missing or not {info.bytes} bytes long; run the stage encode again")
        skipped = dict(self.source.skipped) | ({"unreadable": len(bad)} if bad else {})
        return TableIndex(
            columns=columns,
            shards=shards,
            num_classes=self.source.num_classes,
            class_names=self.source.class_names,
            tokenizer=self.tokenizer.identity,
            statistics=statistics(full, self.source.num_classes, skipped),
            recipe=output.recipe,
            bad_images=tuple(bad),
            layout=output.layout,
            names=names_of(full),
        )
