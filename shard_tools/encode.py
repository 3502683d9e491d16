"""The encode stage: images of a source become the shards of a table, one shard per unit.

Beside each shard lies a small JSON of its facts (rows, hashes, sums, bad images); `finish` merges them in shard order
into `index.json`, so the index does not depend on which task did which shard, or when.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpc_gen import tokenizers
from hpc_gen.config.experiment import EncodeConfig
from hpc_gen.data.images import center_crop, to_pixels
from hpc_gen.data.index import INDEX_NAME, ColumnInfo, ShardInfo, TableIndex
from hpc_gen.data.ptshard import columns_of, content_sha256, write_shard
from hpc_gen.data.statistics import ChannelSums
from hpc_gen.data.table import LABELS
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.stages.units import StageContext, Unit
from shard_tools.recipe import FACTS_FOLDER, Recipe, recipe_of, refuse_other_recipe, row_order
from shard_tools.sources import TRAIN, VALIDATION, Source, open_source

SHOWN_BAD_IMAGES = 3  # named in an error message; index.json lists all


@dataclass(frozen=True)
class _Output:
    """One table to be made: `order` lists the items of the split in row order."""

    split: str
    folder: Path
    recipe: Recipe
    order: npt.NDArray[np.int64]
    shard_rows: int

    @property
    def num_shards(self) -> int:
        return -(-len(self.order) // self.shard_rows)

    def files(self, shard: int) -> tuple[Path, Path]:
        """(shard, its facts)."""
        return self.folder / f"shard_{shard:05d}.pt", self.folder / FACTS_FOLDER / f"shard_{shard:05d}.json"


def worker(context: StageContext) -> EncodeWorker:
    """Factory of the stage `encode`. Raises UserError when the experiment has no encode section."""
    encode = context.experiment.encode
    if encode is None:
        raise UserError(
            f"experiment {context.experiment.name!r} has no section 'encode'; add one, or skip the stage"
        )
    data = context.experiment.data
    folders = {TRAIN: data.table}
    if encode.validation and data.validation_table is not None:
        folders[VALIDATION] = data.validation_table
    return EncodeWorker(encode, context.workspace, folders)


class EncodeWorker:
    """A UnitWorker; units are the shards of the training table, then those of the validation table."""

    stage = "encode"

    def __init__(self, encode: EncodeConfig, workspace: Path, tables: dict[str, str]) -> None:
        """`tables`: folder of each split's table, relative to the workspace."""
        self.encode = encode
        self.workspace = workspace
        self.tables = tables
        settings = encode.tokenizer.model_dump()
        self.tokenizer = tokenizers.build(settings.pop("name"), **settings)

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
    def outputs(self) -> dict[str, _Output]:
        """The tables to make, by split. Raises UserError when a folder holds something made by another recipe."""
        outputs: dict[str, _Output] = {}
        for split, table in self.tables.items():
            recipe = recipe_of(self.encode, self.source, split, self.tokenizer.identity)
            order = row_order(self.source, split, recipe["classes"], recipe["limit"])
            folder = self.workspace / table
            refuse_other_recipe(folder, recipe)
            outputs[split] = _Output(split, folder, recipe, order, self.encode.shard_rows)
        return outputs

    def units(self) -> list[Unit]:
        """One unit per shard: `train-00000`, ..., then `validation-00000`, ..."""
        names = [f"{o.split}-{shard:05d}" for o in self.outputs.values() for shard in range(o.num_shards)]
        return [Unit(name, index) for index, name in enumerate(names)]

    def fingerprint(self) -> str:
        """Hash of the recipes and of the tables' names (a table asked for under another name is made again)."""
        facts = {split: [self.tables[split], output.recipe] for split, output in self.outputs.items()}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def do(self, unit: Unit, staging: Path, poll: Callable[[], None]) -> dict[str, Path]:
        """Encode one shard into `staging`; a whole one that another run has committed is taken over instead.

        Raises DataError when the bad images of this shard alone exceed what the whole split may have.
        """
        split, _, number = unit.name.rpartition("-")
        output, shard = self.outputs[split], int(number)
        shard_path, facts_path = output.files(shard)
        staged_shard, staged_facts = staging / shard_path.name, staging / facts_path.name
        facts = _whole_shard(output, shard)
        if facts is not None:
            if facts["rows"]:
                commit.write_bytes(staged_shard, shard_path.read_bytes())
        else:
            columns, bad = self._encode(output, shard, poll)
            facts = _facts(output.recipe, columns, bad)
            if columns:
                with commit.CommitStream(staged_shard) as stream:
                    write_shard(stream, columns)
                facts |= {"bytes": stream.bytes, "sha256": stream.sha256, "content": content_sha256(columns)}
        commit.write_json(staged_facts, facts)
        files = {str(facts_path): staged_facts}
        return {str(shard_path): staged_shard, **files} if facts["rows"] else files

    def _encode(
        self, output: _Output, shard: int, poll: Callable[[], None]
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Columns of one shard (empty when no image could be read) and its bad images as "id: reason"."""
        pixels: list[Tensor] = []
        labels: list[int] = []
        bad: list[str] = []
        split = self.source.splits[output.split]
        for i in output.order[shard * output.shard_rows : (shard + 1) * output.shard_rows].tolist():
            poll()
            try:
                image, label, _ = split.item(i)
            except DataError as error:
                bad.append(f"{split.ids[i]}: {error}")
                self._check_bad(bad, output)
                continue
            pixels.append(to_pixels(center_crop(image, self.encode.image_size), self.encode.channels))
            labels.append(label)
        if not pixels:
            return {}, bad
        encoded = self.tokenizer.encode(torch.stack(pixels))
        return {self.tokenizer.column: encoded, LABELS: torch.tensor(labels, dtype=torch.int64)}, bad

    def _check_bad(self, bad: list[str], output: _Output) -> None:
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

    def _index(self, output: _Output) -> TableIndex:
        facts = [_read_facts(output, shard) for shard in range(output.num_shards)]
        bad = [line for fact in facts for line in fact["bad_images"]]
        self._check_bad(bad, output)
        full = [(shard, fact) for shard, fact in enumerate(facts) if fact["rows"]]
        if not full:
            raise DataError(
                f"table {output.folder}: not one of {len(output.order)} images could be read; check the source"
            )
        columns = {
            name: ColumnInfo(str(column["dtype"]), tuple(column["shape"]))
            for name, column in full[0][1]["columns"].items()
        }
        shards = tuple(
            ShardInfo(
                output.files(shard)[0].name, fact["rows"], fact["bytes"], fact["sha256"], fact["content"]
            )
            for shard, fact in full
        )
        for info in shards:
            path = output.folder / info.file
            if not path.is_file() or path.stat().st_size != info.bytes:
                raise DataError(
                    f"shard {path} is missing or not {info.bytes} bytes long; run the stage encode again"
                )
        return TableIndex(
            columns=columns,
            shards=shards,
            num_classes=self.source.num_classes,
            class_names=self.source.class_names,
            tokenizer=self.tokenizer.identity,
            statistics=_statistics((fact for _, fact in full), self.source, len(bad)),
            recipe=output.recipe,
            bad_images=tuple(bad),
        )


def _facts(recipe: Recipe, columns: dict[str, Tensor], bad: list[str]) -> dict[str, Any]:
    """Facts of one shard, without the file's own (bytes and hashes)."""
    facts: dict[str, Any] = {"recipe": recipe, "bad_images": bad, "rows": 0}
    if columns:
        labels = columns[LABELS]
        facts["rows"] = len(labels)
        facts["columns"] = {
            name: {"dtype": column.dtype, "shape": list(column.shape)}
            for name, column in columns_of(columns).items()
        }
        facts["sums"] = {name: ChannelSums.of(t).to_json() for name, t in columns.items() if t.ndim > 1}
        facts["histogram"] = {str(label): count for label, count in sorted(Counter(labels.tolist()).items())}
    return facts


def _read_facts(output: _Output, shard: int) -> dict[str, Any]:
    """Facts that a unit committed. Raises DataError when they are missing, damaged or of another recipe."""
    _, path = output.files(shard)
    again = f"run the stage encode again, or delete the folder {output.folder}"
    try:
        facts: dict[str, Any] = json.loads(path.read_text())
        rows, recipe = int(facts["rows"]), facts["recipe"]
        needed = ("bytes", "sha256", "content", "columns", "sums", "histogram") if rows else ()
        missing = [key for key in (*needed, "bad_images") if key not in facts]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} does not hold the facts of a shard ({error!r}); {again}") from error
    if missing or recipe != output.recipe:
        why = f"it lacks {missing}" if missing else "it belongs to another recipe"
        raise DataError(f"{path} does not hold the facts of a shard ({why}); {again}")
    return facts


def _whole_shard(output: _Output, shard: int) -> dict[str, Any] | None:
    """Facts of a shard that is in place, whole and of this recipe; None when it has to be encoded."""
    shard_path, facts_path = output.files(shard)
    if not facts_path.is_file():
        return None
    try:
        facts = _read_facts(output, shard)
    except DataError:
        return None
    if facts["bad_images"]:
        return None  # the images may have been repaired meanwhile
    if not shard_path.is_file() or commit.sha256_file(shard_path) != facts["sha256"]:
        return None
    return facts


def _statistics(facts: Iterable[dict[str, Any]], source: Source, num_bad: int) -> dict[str, Any]:
    """Per-channel mean and std of every image-like column, label histogram, and what was left out."""
    all_facts = list(facts)
    columns = {
        name: ChannelSums.merge(
            ChannelSums.from_json(fact["sums"][name]) for fact in all_facts
        ).mean_and_std()
        for name in all_facts[0]["sums"]
    }
    histogram: Counter[str] = Counter()
    for fact in all_facts:
        histogram.update(fact["histogram"])
    return {
        "columns": columns,
        "label_histogram": {str(label): histogram[str(label)] for label in range(source.num_classes)},
        "skipped": dict(source.skipped) | ({"unreadable": num_bad} if num_bad else {}),
    }
