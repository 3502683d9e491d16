"""Shards of many rows, whatever their format: opening one as mapped columns, and writing one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from hpc_gen.data import ptshard
from hpc_gen.data.index import ColumnInfo, Layout
from hpc_gen.data.ptshard import ByteSink, check_columns, check_size, num_rows, unreadable
from hpc_gen.data.tar_shard import open_tar_shard, tar_bytes
from hpc_gen.runtime.errors import DataError

SUFFIXES: dict[Layout, str] = {"ptshard": ".pt", "safetensors": ".safetensors", "webdataset": ".tar"}
"""Layouts of many rows per file, and how their files' names end."""

PROBES, PROBE_BYTES = 16, 2**16  # what of a file without checksums its fingerprint looks at


def shard_name(layout: Layout, number: int) -> str:
    """How we name shard `number` of a table."""
    return f"shard_{number:05d}{SUFFIXES[layout]}"


def write_columns(layout: Layout, sink: ByteSink, columns: Mapping[str, Tensor], first_row: int) -> None:
    """Write columns {name: [N, ...]} to a binary stream; the bytes depend on the columns (and `first_row`) alone.

    `first_row`: number of the shard's first row in its table, from which a tar has its keys. Raises DataError when the
    columns disagree about N, UserError for a dtype that the layout lacks.
    """
    rows = num_rows(columns, "a shard to be written")
    if layout == "ptshard":
        ptshard.write_shard(sink, columns)
    elif layout == "webdataset":
        sink.write(tar_bytes(columns, first_row))
    else:
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in columns.items()}
        first = next(iter(plain.values()))
        # what LightningDiT's and GMem's own shards say of themselves
        facts = {"total_size": str(rows), "dtype": str(first.dtype), "device": "cpu"}
        _write_ordered(sink, save(plain, facts))


def _write_ordered(sink: ByteSink, file: bytes) -> None:
    """Write a safetensors file with the keys of its header sorted: the library has those of the metadata at random."""
    length = int.from_bytes(file[:8], "little")
    text = json.dumps(json.loads(file[8 : 8 + length]), separators=(",", ":"), sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    sink.write(len(text).to_bytes(8, "little") + text)
    sink.write(memoryview(file)[8 + length :])


def open_columns(
    layout: Layout,
    path: Path,
    columns: Mapping[str, ColumnInfo] | None = None,
    rows: int | None = None,
    num_bytes: int | None = None,
    says: str = "the index says",
) -> dict[str, Tensor]:
    """Map a shard into memory: {column: Tensor [N, ...]} whose rows are contiguous; checked as `ptshard.open_shard`."""
    path = Path(path)
    if layout == "ptshard":
        return ptshard.open_shard(path, columns, rows, num_bytes, says)
    check_size(path, num_bytes, says)
    try:
        shard = _open_safetensors(path) if layout == "safetensors" else open_tar_shard(path, rows)
    except DataError:
        raise
    except Exception as error:  # safetensors, tarfile, numpy and torch raise a dozen kinds for damaged files
        raise unreadable(path, error) from error
    check_columns(path, shard, columns or {}, says)
    found = num_rows(shard, f"shard {path}")
    if rows is not None and found != rows:
        raise DataError(f"shard {path} has {found} rows, {says} {rows}; restore it or encode the table again")
    return shard


def _open_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, views of one private map of it."""
    opened: Any
    with safe_open(path, framework="pt", device="cpu") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping


def fingerprint(path: Path) -> str:
    """SHA-256 of a file's size and of 16 pieces of 64 KiB from its beginning to its end.

    For formats that carry no checksums, where a whole hash would read the table at each start; the first piece holds
    the header, so a change of shape shows, and so does another table. One flipped bit may not: an index finds it.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size}\n".encode())
    with path.open("rb") as stream:
        for number in range(PROBES):
            stream.seek(max(0, size - PROBE_BYTES) * number // (PROBES - 1))
            digest.update(stream.read(PROBE_BYTES))
    return digest.hexdigest()
