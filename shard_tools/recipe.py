"""The recipe of a table: what was asked for, free of paths, so that a table is never mixed from two wishes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpc_gen.config.experiment import EncodeConfig
from hpc_gen.data.foreign import shard_files
from hpc_gen.data.index import FACTS_FOLDER, INDEX_NAME, LAYOUTS, Layout, TableIndex, differences
from hpc_gen.runtime.errors import DataError, UserError, nearest
from hpc_gen.runtime.randomness import permutation
from shard_tools.split import Source, Split

ROW_ORDER = "shuffled-1"  # the name of `row_order`; a new number if that function ever changes

Recipe = dict[str, Any]


def recipe_of(encode: EncodeConfig, source: Source, split: str, tokenizer: dict[str, Any]) -> Recipe:
    """The recipe of one split, JSON-ready."""
    recipe: Recipe = {
        "source": source.name,
        "source_content": source.content,
        "split": split,
        "classes": kept_classes(encode, source),
        "limit": encode.limit,
        "row_order": ROW_ORDER,
        "image_size": encode.image_size,
        "channels": encode.channels,
        "background": list(encode.background),
        "shard_rows": encode.shard_rows,
        "tokenizer": tokenizer,
    }
    # Keys of later versions stand only where they say something: tables of pixels keep their recipe.
    if encode.crop_size is not None:
        recipe["crop_size"] = encode.crop_size
    for key in ("crop", "short_side", "decode", "row_ids"):
        if getattr(encode, key) is not None:
            recipe[key] = getattr(encode, key)
    if encode.format != "ptshard":
        recipe["format"] = encode.format
    return recipe


def kept_classes(encode: EncodeConfig, source: Source) -> list[int]:
    """Numbers of the classes to keep, sorted. Raises UserError for a class the source does not have."""
    if encode.classes is None:
        return list(range(source.num_classes))
    kept: set[int] = set()
    for wanted in encode.classes:
        if isinstance(wanted, int) and 0 <= wanted < source.num_classes:
            kept.add(wanted)
        elif isinstance(wanted, str) and wanted in source.class_names:
            kept.add(source.class_names.index(wanted))
        else:
            hint = nearest(str(wanted), source.class_names)
            raise UserError(
                f"encode.classes: source {source.name!r} has no class {wanted!r}{hint}; it has {source.num_classes}, "
                f"0 to {source.num_classes - 1}: {', '.join(source.class_names[:12])}"
            )
    return sorted(kept)


def row_order(source: Source, split_name: str, classes: list[int], limit: int | None) -> npt.NDArray[np.int64]:
    """Items of the split in the order of the table's rows, int64.

    Shuffled once, with a fixed seed: sources list class after class, and neither the block shuffle of training nor
    "the first N rows" of an evaluation would mix classes that lie in far-away shards.
    """
    split: Split = source.splits[split_name]
    kept = np.flatnonzero(np.isin(split.labels, classes)).astype(np.int64)
    if not kept.size:
        raise UserError(f"encode.classes leaves no image of source {source.name!r}, split {split_name!r}")
    order: npt.NDArray[np.int64] = kept[permutation(0, f"encode/{source.name}/{split_name}", 0, kept.size)]
    return order[:limit]


def row_names(source: Source, split_name: str, layout: Layout) -> list[str]:
    """File of every item of the split in a layout of one row per file: CLASS/NAME.layout, as the reference names them.

    NAME is the image's own file name, extension included. Where two images of a class have the same one (emoji of two
    sets, folders inside class folders), the names of the whole split carry the path below the class, joined by "-".
    Raises UserError when a class cannot be a folder's name or two images still share a file.
    """
    split: Split = source.splits[split_name]
    for name in source.class_names:
        if "/" in name or name.startswith(".") or name == FACTS_FOLDER or not name:
            raise UserError(f"class {name!r} of source {source.name!r} is no folder name; use encode.format=ptshard")
    classes = [source.class_names[label] for label in split.labels.tolist()]
    for name_of in (_own_name, _path_name):
        files = [f"{name}/{name_of(each, name)}.{layout}" for each, name in zip(split.ids, classes, strict=True)]
        if len(set(files)) == len(files):
            return files
    twice = next(file for file, count in Counter(files).items() if count > 1)
    raise UserError(f"two images of source {source.name!r} would both become {twice}; use encode.format=ptshard")


def _own_name(image_id: str, class_name: str) -> str:
    return image_id.rpartition("/")[2]


def _path_name(image_id: str, class_name: str) -> str:
    """The id without its first part (the split or the source) and its class folder, in one name."""
    parts = image_id.split("/")[1:]
    return "-".join(parts[1:] if parts[0] == class_name and len(parts) > 1 else parts)


def refuse_other_recipe(folder: Path, asked: Recipe) -> None:
    """Raise UserError when `folder` holds a table, or shards of an unfinished one, made by another recipe."""
    found = found_recipe(folder)
    if found is None:
        for layout in LAYOUTS if folder.is_dir() else ():
            for file in shard_files(folder, layout)[:1]:
                raise UserError(
                    f"{folder} holds shards that this stage did not write ({file}); "
                    "choose another data.table (or data.validation_table)"
                )
        return
    for key, old, new in differences(found, asked):
        raise UserError(
            f"table {folder} was encoded with {key} = {old!r}, asked is {new!r}; "
            "choose another data.table (or data.validation_table), or delete the folder"
        )


def found_recipe(folder: Path) -> Recipe | None:
    """The recipe of what lies in `folder`: from its index, or from the facts of a first shard; None when empty."""
    if (folder / INDEX_NAME).is_file():
        return dict(TableIndex.read(folder).recipe)
    for path in sorted((folder / FACTS_FOLDER).glob("*.json")):
        try:
            recipe: Recipe = json.loads(path.read_text())["recipe"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} does not hold the facts of a shard ({error!r}); delete the folder {folder}"
            ) from error
        return recipe
    return None
