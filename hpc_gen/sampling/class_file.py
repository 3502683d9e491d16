"""Class plans from files: which class each image has, a number per image."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hpc_gen.runtime.errors import DataError, UserError

LABELS_KEY = "arr_1"  # of an .npz of images as ADM's samplers write it


def read_classes(path: Path, num_images: int, num_classes: int) -> tuple[int, ...]:
    """The class of each of `num_images` images: a line each of a text file, a .npy, or arr_1 of an .npz.

    Raises UserError for a file that is missing or lists another number of images, DataError for one that cannot be read
    or names a class that there is not.
    """
    labels = _read(path)
    if len(labels) != num_images:
        raise UserError(
            f"{path} lists the classes of {len(labels)} images, but sample.num_images is {num_images}; give the same"
        )
    wrong = [i for i, label in enumerate(labels) if not 0 <= label < max(num_classes, 1)]
    if wrong:
        raise DataError(
            f"{path} gives image {wrong[0]} the class {labels[wrong[0]]}, but the table has {num_classes} classes "
            f"({len(wrong)} such images); correct the list"
        )
    return labels


def classes_sha256(labels: Sequence[int]) -> str:
    """SHA-256 of a list of classes, whatever file it came from."""
    return hashlib.sha256(json.dumps(list(labels), separators=(",", ":")).encode()).hexdigest()


def unequal(labels: Sequence[int], num_classes: int) -> str | None:
    """A sentence where classes do not have equal counts (published scores are over equal ones); None where they do."""
    counts = Counter(labels)
    few, many = min(counts.get(c, 0) for c in range(max(num_classes, 1))), max(counts.values())
    if few == many:
        return None
    return f"its classes have {few} to {many} images: not the equal counts that published scores are over"


def _read(path: Path) -> tuple[int, ...]:
    try:
        if path.suffix == ".npy":
            found = np.load(path, allow_pickle=False)
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                found = arrays[LABELS_KEY]
        else:
            found = np.array([int(line) for line in path.read_text().split("\n") if line.strip()], dtype=np.int64)
    except FileNotFoundError:
        raise UserError(f"sample.class_file: {path} does not exist; name a file of class numbers") from None
    except KeyError:
        raise DataError(f"{path} has no '{LABELS_KEY}', so it lists no classes; give a text file or a .npy") from None
    except Exception as error:  # text that is no number, and what numpy and zipfile have for torn files
        raise DataError(f"{path} cannot be read as class numbers ({error}); write one number per line") from error
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer) or not len(found):
        raise DataError(f"{path} holds {found.dtype} {list(found.shape)}, not class numbers [N]; give integers")
    return tuple(int(label) for label in found)
