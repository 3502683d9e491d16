"""The encode stage: images of a source become the shards of a table, one shard (or that many files) per unit.

Beside the shards lies a small JSON of facts per unit (rows, hashes, sums, bad images); `finish` merges them in order
into `index.json`, so the index does not depend on which task did which unit, or when. A killed stage loses the units
in hand: what is done is in the ledger, unit by unit, so the reference's `last_idx.txt` (one number that all its
processes race to write, and that empties a second run into the folder) has no counterpart here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from hpc_gen import tokenizers
from hpc_gen.config.experiment import EncodeConfig
from hpc_gen.data import decode
from hpc_gen.data.crops import crop
from hpc_gen.data.images import resize, to_pixels
from hpc_gen.data.index import INDEX_NAME, LABELS, ROW_ID, ColumnInfo, TableIndex
from hpc_gen.data.row_files import stored
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.stages.device import task_device
from hpc_gen.stages.forecast import Need
from hpc_gen.stages.units import StageContext, Unit
from hpc_gen.tokenizers import CPU, FullPrecision
from hpc_gen.training.precision import set_determinism
from shard_tools.output import Output, make_facts, read_facts, shards_of, statistics, whole_unit, with_shards
from shard_tools.recipe import recipe_of, refuse_other_recipe, row_names, row_order
from shard_tools.sources import open_source
from shard_tools.split import TRAIN, VALIDATION, Source, Split

IMAGES_PER_POLL = 8  # a forward pass; a stop is looked for between them
LABEL_BYTES = 8
ROW_FILE_BYTES = 1500  # what pt and npz add to a row's tensors
FILE_BLOCK = 4096  # a small file takes whole blocks of the disk
SHOWN_BAD_IMAGES = 3  # named in an error message; index.json lists all


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
    return EncodeWorker(encode, context.workspace, folders, task_device(context.task))


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
        self.tokenizer = tokenizers.build(
            encode.tokenizer.name, workspace=workspace, device=device, **encode.tokenizer.settings()
        )

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
            recipe = recipe_of(self.encode, self.source, split, self.tokenizer.identity, self.device)
            order = row_order(self.source, split, recipe["classes"], recipe["limit"])
            folder = self.workspace / table
            refuse_other_recipe(folder, recipe)
            names = row_names(self.source, split, layout) if layout != "ptshard" else ()
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
        else:
            columns, items, bad = self._encode(output, number, poll)
            infos = output.write(staging, number, columns, items) if columns else []
            facts = with_shards(make_facts(output.recipe, columns, bad), infos)
        facts_path = output.facts_path(number)
        commit.write_json(staging / facts_path.name, facts)
        # The facts first: a folder of shards without any is taken for another program's (data/foreign.py).
        files = {str(facts_path): staging / facts_path.name}
        return files | {str(output.folder / info.file): staging / info.file for info in shards_of(facts)}

    def forecast(self) -> Need:
        """What the missing units will write: a row as the tokenizer makes it of a black image, times their rows."""
        missing = [(o, unit) for o in self.outputs.values() for unit in range(o.num_units)]
        missing = [(o, unit) for o, unit in missing if not o.facts_path(unit).is_file()]
        if not missing:
            return Need(0, 0)
        side = self.encode.image_size
        black = torch.zeros(self.encode.channels, side, side, dtype=torch.uint8)
        columns = self._tokenize([black], lambda: None)
        row = sum(column.numel() * column.element_size() for column in columns.values()) + LABEL_BYTES
        rows = sum(len(o.items(unit)) for o, unit in missing)
        if self.encode.format == "ptshard":
            return Need(rows * row, 2 * len(missing))
        blocks = -(-(row + ROW_FILE_BYTES) // FILE_BLOCK)
        return Need(rows * blocks * FILE_BLOCK, rows + len(missing))

    def _encode(
        self, output: Output, unit: int, poll: Callable[[], None]
    ) -> tuple[dict[str, Tensor], list[int], list[str]]:
        """Columns of one unit (empty when no image could be read), its items, and its bad images as "id: reason"."""
        pixels: list[Tensor] = []
        labels: list[int] = []
        items: list[int] = []
        bad: list[str] = []
        split = self.source.splits[output.split]
        for item, image in self._images(split, output.items(unit), poll):
            if isinstance(image, DataError):
                bad.append(f"{split.ids[item]}: {image}")
                self._check_bad(bad, output)
                continue
            pixels.append(self._cut(image))
            labels.append(int(split.labels[item]))
            items.append(item)
        if not pixels:
            return {}, [], bad
        columns = {**self._tokenize(pixels, poll), LABELS: torch.tensor(labels, dtype=torch.int64)}
        if self.encode.row_ids:
            columns[ROW_ID] = torch.tensor(items, dtype=torch.int64)
        return columns, items, bad

    def _images(
        self, split: Split, items: list[int], poll: Callable[[], None]
    ) -> Iterator[tuple[int, Image.Image | DataError]]:
        """Each item with its image, or with what is wrong with it."""
        if split.read is None or self.encode.decode in (None, "pillow"):
            for item in items:
                poll()
                try:
                    yield item, split.load(item)
                except DataError as error:
                    yield item, error
            return
        for begin in range(0, len(items), IMAGES_PER_POLL):
            poll()
            group: list[tuple[int, bytes | DataError]] = []
            for item in items[begin : begin + IMAGES_PER_POLL]:
                try:
                    group.append((item, split.read(item)))
                except DataError as error:
                    group.append((item, error))
            decoded = iter(self._decoder.decode([data for _, data in group if isinstance(data, bytes)]))
            for item, data in group:
                yield item, next(decoded) if isinstance(data, bytes) else data

    @cached_property
    def _decoder(self) -> decode.ImageDecoder:
        name = self.encode.decode or "pillow"
        return decode.build(name, self.encode.background, self.encode.threads, self.device.index or 0)

    def _cut(self, image: Image.Image) -> Tensor:
        """The square of an image that is stored or tokenized, uint8 [C, H, W]."""
        encode = self.encode
        image = crop(encode.crop or "adm", image, encode.crop_size or encode.image_size, encode.short_side)
        if image.size != (encode.image_size, encode.image_size):
            image = resize(image, encode.image_size)
        return to_pixels(image, encode.channels)

    def _tokenize(self, pixels: list[Tensor], poll: Callable[[], None]) -> dict[str, Tensor]:
        """What is stored of these images, {column: [N, ...]} on the CPU. Raises DataError where it is not finite."""
        if self.encode.tokenizer.name != "identity":
            set_determinism(True, self.encode.threads)
        encode = self.tokenizer.encode
        if self.encode.format == "npz" and isinstance(self.tokenizer, FullPrecision):
            encode = self.tokenizer.encode_float32
        parts: list[dict[str, Tensor]] = []
        for begin in range(0, len(pixels), IMAGES_PER_POLL):
            poll()
            parts.append(encode(torch.stack(pixels[begin : begin + IMAGES_PER_POLL])))
        columns = {name: torch.cat([part[name] for part in parts]) for name in self.tokenizer.columns}
        for name, column in columns.items():
            if not bool(torch.isfinite(column).all()):
                raise DataError(f"tokenizer {self.tokenizer.name!r} makes non-finite {name}; check its weights")
        return {name: stored(self.encode.format, column) for name, column in columns.items()}

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
                raise DataError(
                    f"shard {path} is missing or not {info.bytes} bytes long; run the stage encode again"
                )
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
        )
