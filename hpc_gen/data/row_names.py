"""From which image each row of a table came: a sidecar of each shard, `shard_00000.names.json`, told of in the index.

A name is the source's own id of an image: the path below a folder, the member of a tar or zip, the file, row group and
row of a Parquet set, the number in MNIST; free of this machine's paths. Rows of a bank that came from no image say what
they were made of. The file is a JSON list, a name per line (so grep finds one), null where nobody knows.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hpc_gen.data.index import NamesInfo
from hpc_gen.data.mapped import Int64Array
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError

Name = str | None
KEPT_FILES = 8  # sidecars held parsed: rows are mostly asked for in order


def names_file(unit: int) -> str:
    """How the sidecar of shard (or unit) number `unit` is called."""
    return f"shard_{unit:05d}.names.json"


def write_names(folder: Path, unit: int, names: Sequence[Name]) -> NamesInfo:
    """Write the sidecar of a unit, whole or not at all; equal names give equal bytes."""
    text = json.dumps(list(names), indent=0, ensure_ascii=False) + "\n"
    data = text.encode()
    commit.write_bytes(folder / names_file(unit), data)
    return NamesInfo(names_file(unit), len(names), len(data), hashlib.sha256(data).hexdigest())


def read_names(folder: Path, info: NamesInfo) -> list[Name]:
    """Names of one sidecar. Raises DataError when it is not the one that the index tells of."""
    path = folder / info.file
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); restore it or encode the table again") from error
    if hashlib.sha256(data).hexdigest() != info.sha256:
        raise DataError(f"{path}, names of rows, has another SHA-256 than the index says; restore it")
    names = json.loads(data)
    if not isinstance(names, list) or len(names) != info.rows:
        raise DataError(f"{path} does not hold {info.rows} names, as the index says; encode the table again")
    return names


class RowNames:
    """Names by row over all sidecars of a table."""

    def __init__(self, folder: Path, infos: Sequence[NamesInfo]) -> None:
        self._folder = folder
        self._infos = tuple(infos)
        self._starts = np.concatenate([[0], np.cumsum([info.rows for info in infos])]).astype(np.int64)
        self._kept: OrderedDict[int, list[Name]] = OrderedDict()

    def __call__(self, rows: Int64Array) -> list[Name]:
        """The name of each row; rows may repeat. Raises DataError as `read_names`."""
        files = np.searchsorted(self._starts, rows, side="right") - 1
        return [self._of_file(int(n))[int(row - self._starts[n])] for n, row in zip(files, rows, strict=True)]

    def _of_file(self, number: int) -> list[Name]:
        names = self._kept.get(number)
        if names is None:
            names = self._kept[number] = read_names(self._folder, self._infos[number])
            while len(self._kept) > KEPT_FILES:
                self._kept.popitem(last=False)
        return names
