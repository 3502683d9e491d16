"""The one door to tensor files: weights of others are read without running anything of them, ours are written.

Read: files of torch.save (.pt, .pth, .ckpt, .bin; both formats) by a restricted reader, and safetensors. Only tensors,
plain containers, text and numbers become real; classes and functions that a file names (argparse.Namespace of MAR and
energy checkpoints, objects of pytorch_lightning, numpy scalars) become `Inert`s, of which nothing is imported or run.
Written: safetensors, the same bytes for the same content; tensors too large for the memory in pieces, also as files of
torch.save (tensor_pieces.py).
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hpc_gen.runtime import commit, torch_files
from hpc_gen.runtime.errors import DataError, UserError, nearest
from hpc_gen.runtime.pickle_values import Inert
from hpc_gen.runtime.tensor_pieces import Pieces, pieces_of, write_torch

__all__ = [
    "Inert",
    "Pieces",
    "is_program",
    "metadata_of",
    "read_nested",
    "read_program_tensors",
    "read_tensors",
    "select",
    "state_dicts",
    "write_tensors",
    "write_torch",
]

# names of the format's specification; torch.float32 -> "F32"
_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_SHA256 = re.compile(r"[0-9a-fA-F]{64}\Z")
_SHOWN = 8  # names listed in a sentence


def read_nested(path: str | Path, sha256: str | None = None) -> Any:
    """The whole content of a tensor file: a safetensors file as a flat dict, a torch file as it was saved.

    Tensors lie on the CPU, need no gradient, and are views of a private map of the file where possible: do not change
    the file while they are in use. `sha256` (hex) is compared before anything is parsed. Raises UserError where there
    is no such file, DataError where it is damaged, holds something else, or asks for what weights do not need.
    """
    file = Path(path)
    kind = _kind(file, sha256)
    with _one_sentence(file):
        if kind == "safetensors":
            with safe_open(file, framework="pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  it is no dict
        return torch_files.read_zip(file) if kind == "zip" else torch_files.read_legacy(file)


def read_tensors(path: str | Path, *, sha256: str | None = None, key: str | None = None) -> dict[str, Tensor]:
    """A state dict: parameter name -> CPU tensor. As read_nested, below `key` ("model_ema", "a.b" for nested ones).

    `key` None: the file itself when it is one, else the only one of its entries that is; UserError names the entries
    when there are several or none.
    """
    return select(path, read_nested(path, sha256), key)


def read_program_tensors(path: str | Path, *, sha256: str | None = None) -> dict[str, Tensor]:
    """Parameters and buffers of a TorchScript archive by their dotted names, without running or compiling it.

    OpenAI publishes CLIP in this form. Raises as read_nested, and DataError for another kind of file.
    """
    file = Path(path)
    if _kind(file, sha256) != "zip":
        raise DataError(f"{file} is no TorchScript archive; give the file as it was published")
    with _one_sentence(file):
        found = dict(_tensors_below(torch_files.read_zip(file, program=True), ""))
    if not found:
        raise DataError(f"{file} is a TorchScript archive without any tensor; give a file of weights")
    return found


def _tensors_below(part: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a module of a program and of its parts; attributes that are neither are left out."""
    if not isinstance(part, Inert) or not isinstance(part.state, Mapping):
        return
    for name, value in part.state.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        else:
            yield from _tensors_below(value, f"{prefix}{name}.")


def is_program(path: str | Path) -> bool:
    """Whether a file is a TorchScript archive; False also where there is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.partition("/")[2] == "constants.pkl" for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def select(path: str | Path, nested: Any, key: str | None = None) -> dict[str, Tensor]:
    """The state dict below `key` ("": the whole) of what read_nested gave for `path`; raises as read_tensors."""
    if not isinstance(nested, Mapping):
        raise DataError(f"{path} holds a {type(nested).__name__}, not tensors by name; give a state dict")
    if key is None:
        key = _only_state_dict(Path(path), nested)
    found = nested if key == "" else _below(Path(path), nested, key)
    where = f"{path}: '{key}'" if key else str(path)
    if not isinstance(found, Mapping) or not found:
        raise DataError(f"{where} is no state dict but {_kind_of(found)}; {_entries(nested)}")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise DataError(f"{where} is no state dict: its entry '{name}' is {_kind_of(value)}; {_entries(nested)}")
    return dict(found)


def state_dicts(nested: Any) -> list[str]:
    """Keys of the state dicts in what read_nested gave: [""] when it is one itself, else those of its entries."""
    if _is_state_dict(nested):
        return [""]
    if not isinstance(nested, Mapping):
        return []
    return [name for name, value in nested.items() if isinstance(name, str) and _is_state_dict(value)]


def metadata_of(path: str | Path) -> dict[str, str]:
    """The text metadata of a safetensors file; {} for a torch file, which has none. Raises as read_nested."""
    file = Path(path)
    if _kind(file, None) != "safetensors":
        return {}
    with _one_sentence(file), safe_open(file, framework="pt") as opened:
        return dict(opened.metadata() or {})


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor] | Mapping[str, Tensor | Pieces],
    metadata: Mapping[str, str],
    fence: commit.FenceLike | None = None,
    described: Mapping[str, Tensor] | None = None,
) -> str:
    """Write a safetensors file whole or not at all; returns its SHA-256. Equal content gives equal bytes.

    (The library's own writer puts metadata in a random order.) Tensors of any device and stride, or in pieces; shared
    ones are written once each. `described`: tensors without memory of the same names, types and shapes, so that each of
    `tensors` is asked for once, when it is written. Raises UserError (disk full), DataError for a type that the format
    does not have.
    """
    # large types first, so that each tensor begins at a multiple of its item size, as the library's reader wants
    known = tensors if described is None else described
    names = sorted(known, key=lambda name: (-known[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in names:
        tensor = known[name]
        if tensor.dtype not in _NAMES or name == "__metadata__":
            raise DataError(f"cannot write tensor '{name}' of {tensor.dtype} to {path}; convert or rename it")
        end = offset + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    final = Path(path)
    commit.make_folder(final.parent)
    staged = commit.staging_path(final)
    try:
        with commit.CommitStream(staged) as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                for part in pieces_of(tensors[name]):
                    stream.write(part)
        commit.commit_file(staged, final, fence)
    except Exception:  # not BaseException: a simulated kill must leave what a kill leaves
        commit.remove_tree(staged)
        raise
    return stream.sha256


def _kind(path: Path, sha256: str | None) -> str:
    """`zip`, `legacy` or `safetensors`, by content; the hash is compared first."""
    if sha256 is not None and not _SHA256.match(sha256):
        raise UserError(f"'{sha256}' is not a SHA-256, which has 64 hexadecimal digits; give the one of {path.name}")
    try:
        with path.open("rb") as stream:
            head = stream.read(64)
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); check the path") from error
    if sha256 is not None:
        found = commit.sha256_file(path)
        if found != sha256.lower():
            raise DataError(f"{path} has the SHA-256 {found}, not {sha256.lower()}; download it again")
    if head.startswith(torch_files.ZIP_BEGINS):
        return "zip"
    if torch_files.begins_legacy(head):
        return "legacy"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return "safetensors"
    raise DataError(
        f"{path} ({size} bytes) is neither a file of torch.save nor a whole safetensors file; download it again, or "
        "convert it"
    )


@contextmanager
def _one_sentence(path: Path) -> Iterator[None]:
    """Whatever a damaged file leads a parser to, told as one DataError that names the file."""
    try:
        yield
    except DataError as error:
        if str(path) in str(error):
            raise
        raise DataError(f"{path} is refused: {error}") from error
    except SafetensorError as error:
        raise DataError(f"{path} is no whole safetensors file ({error}); download it again") from error
    except MemoryError as error:
        raise DataError(f"{path} asks for more memory than there is; it is damaged, or too large for here") from error
    except Exception as error:  # a damaged pickle or zip may raise anything
        cause = " ".join(str(error).split())[:200]
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {cause}); download it again") from error


def _is_state_dict(value: Any) -> bool:
    if not isinstance(value, Mapping) or not value:
        return False
    return all(isinstance(name, str) and isinstance(entry, Tensor) for name, entry in value.items())


def _only_state_dict(path: Path, nested: Mapping[str, Any]) -> str:
    found = state_dicts(nested)
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{path} holds several state dicts: {', '.join(found)}; say which with --key")
    raise DataError(f"{path} holds no state dict; {_entries(nested)}")


def _below(path: Path, nested: Mapping[str, Any], key: str) -> Any:
    if key in nested:
        return nested[key]
    found: Any = nested
    for part in key.split("."):
        if not isinstance(found, Mapping) or part not in found:
            names = [str(name) for name in nested]
            raise UserError(f"{path} has no entry '{key}'{nearest(key, names)}; {_entries(nested)}")
        found = found[part]
    return found


def _entries(nested: Mapping[str, Any]) -> str:
    names = [f"{name} ({_kind_of(value)})" for name, value in nested.items()]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"the file has: {', '.join(names[:_SHOWN])}{more}" if names else "the file is empty"


def _kind_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return "a tensor"
    if isinstance(value, Inert):
        return f"a {value.name}"
    return f"a {type(value).__name__}"
