"""What the stage encode writes for one unit: the shard, or the files of one row each, and the facts about them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from hpc_gen.data.index import FACTS_FOLDER, LABELS, Layout, NamesInfo, ShardInfo
from hpc_gen.data.ptshard import columns_of, content_sha256
from hpc_gen.data.row_files import ROW_LAYOUTS, row_bytes
from hpc_gen.data.row_names import Name, write_names
from hpc_gen.data.shard_files import shard_name, write_columns
from hpc_gen.data.statistics import ChannelSums, has_channels
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError
from shard_tools.recipe import Recipe


@dataclass(frozen=True)
class Output:
    """One table to be made: `order` lists the items of the split in row order; a unit is `shard_rows` of them.

    `names` has, for the layouts of one row per file, each item's file below the table's folder.
    """

    split: str
    folder: Path
    recipe: Recipe
    order: npt.NDArray[np.int64]
    shard_rows: int
    layout: Layout
    names: Sequence[str] = ()

    @property
    def num_units(self) -> int:
        """Units of the table."""
        return -(-len(self.order) // self.shard_rows)

    def items(self, unit: int) -> list[int]:
        """Items of the split that a unit encodes, in row order."""
        items: list[int] = self.order[unit * self.shard_rows : (unit + 1) * self.shard_rows].tolist()
        return items

    def facts_path(self, unit: int) -> Path:
        """Where the facts of a unit lie."""
        return self.folder / FACTS_FOLDER / f"shard_{unit:05d}.json"

    def write(self, staging: Path, unit: int, columns: dict[str, Tensor], items: Sequence[int]) -> list[ShardInfo]:
        """Write the rows of `items` below `staging` under the names they have in the table; durable when it returns."""
        if self.layout not in ROW_LAYOUTS:
            file = shard_name(self.layout, unit)
            with commit.CommitStream(staging / file) as stream:
                write_columns(self.layout, stream, columns, unit * self.shard_rows)
            return [ShardInfo(file, len(items), stream.bytes, stream.sha256, content_sha256(columns))]
        infos: list[ShardInfo] = []
        for place, item in enumerate(items):
            row = {name: column[place] for name, column in columns.items()}
            content = content_sha256({name: column[place : place + 1] for name, column in columns.items()})
            row.pop(LABELS)  # the folder's name says it
            file = self.names[item]
            commit.make_folder((staging / file).parent)
            with commit.CommitStream(staging / file) as stream:
                stream.write(row_bytes(self.layout, row))
            infos.append(ShardInfo(file, 1, stream.bytes, stream.sha256, content))
        return infos


def with_names(facts: dict[str, Any], staging: Path, unit: int, names: Sequence[Name] | None) -> dict[str, Any]:
    """Facts of a unit that tell of its sidecar of names, written below `staging`; None: nobody knows them."""
    if names is None or not facts["rows"]:
        return facts
    assert len(names) == facts["rows"], f"{len(names)} names of {facts['rows']} rows"
    return facts | {"names": asdict(write_names(staging, unit, names))}


def names_of(facts: Iterable[dict[str, Any]]) -> tuple[NamesInfo, ...]:
    """Sidecars of all units; () unless each unit has one: units of before there were names have none."""
    told = [fact.get("names") for fact in facts if fact["rows"]]
    return () if None in told else tuple(NamesInfo(**each) for each in told if each is not None)


def files_of(facts: dict[str, Any]) -> list[str]:
    """All files of a unit below the table's folder, but for the facts: names, then shards."""
    names = [str(facts["names"]["file"])] if "names" in facts else []
    return [*names, *(info.file for info in shards_of(facts))]


def make_facts(recipe: Recipe, columns: dict[str, Tensor], bad: list[str]) -> dict[str, Any]:
    """Facts of one unit, without the files' own (`shards`); `columns` is empty when no image could be read."""
    facts: dict[str, Any] = {"recipe": recipe, "bad_images": bad, "rows": 0, "shards": []}
    if columns:
        facts["rows"] = len(next(iter(columns.values())))
        facts["columns"] = {
            name: {"dtype": column.dtype, "shape": list(column.shape)} for name, column in columns_of(columns).items()
        }
        facts |= column_facts(columns)
    return facts


def column_facts(columns: dict[str, Tensor]) -> dict[str, Any]:
    """What `statistics` merges: sums of every column with channels, histogram of the labels."""
    labels = Counter(columns[LABELS].tolist() if LABELS in columns else ())
    return {
        "sums": {name: ChannelSums.of(t).to_json() for name, t in columns.items() if has_channels(t)},
        "histogram": {str(label): count for label, count in sorted(labels.items())},
    }


def statistics(facts: Iterable[dict[str, Any]], num_classes: int, skipped: dict[str, int]) -> dict[str, Any]:
    """Per-channel mean and std of every image-like column, label histogram, and what was left out by reason."""
    all_facts = list(facts)
    columns = {
        name: ChannelSums.merge(ChannelSums.from_json(fact["sums"][name]) for fact in all_facts).mean_and_std()
        for name in all_facts[0]["sums"]
    }
    histogram: Counter[str] = Counter()
    for fact in all_facts:
        histogram.update(fact["histogram"])
    return {
        "columns": columns,
        "label_histogram": {str(label): histogram[str(label)] for label in range(num_classes)},
        "skipped": skipped,
    }


def read_facts(output: Output, unit: int) -> dict[str, Any]:
    """Facts that a unit committed. Raises DataError when they are missing, damaged or of another recipe."""
    path = output.facts_path(unit)
    again = f"run the stage encode again, or delete the folder {output.folder}"
    try:
        facts: dict[str, Any] = json.loads(path.read_text())
        rows, recipe = int(facts["rows"]), facts["recipe"]
        needed = ("shards", "columns", "sums", "histogram") if rows else ()
        missing = [key for key in (*needed, "bad_images") if key not in facts]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} does not hold the facts of a shard ({error!r}); {again}") from error
    if missing or recipe != output.recipe:
        why = f"it lacks {missing}" if missing else "it belongs to another recipe"
        raise DataError(f"{path} does not hold the facts of a shard ({why}); {again}")
    return facts


def shards_of(facts: dict[str, Any]) -> list[ShardInfo]:
    """The files that facts tell of."""
    return [ShardInfo(**shard) for shard in facts["shards"]]


def with_shards(facts: dict[str, Any], infos: Iterable[ShardInfo]) -> dict[str, Any]:
    """Facts with the files they tell of."""
    return facts | {"shards": [asdict(info) for info in infos]}


def whole_unit(output: Output, unit: int) -> dict[str, Any] | None:
    """Facts of a unit whose files are in place, whole and of this recipe; None when it has to be encoded."""
    if not output.facts_path(unit).is_file():
        return None
    try:
        facts = read_facts(output, unit)
    except DataError:
        return None
    if facts["bad_images"]:
        return None  # the images may have been repaired meanwhile
    for info in (*shards_of(facts), *names_of([facts])):
        path = output.folder / info.file
        if not path.is_file() or commit.sha256_file(path) != info.sha256:
            return None
    return facts
