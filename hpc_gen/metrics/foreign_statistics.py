"""Files that torch-fidelity caches (`NAME-EXTRACTOR-stat-fid-LAYER.pt`, `...-features-LAYER.pt`), read without pickle.

The first kind holds mu and sigma as numpy arrays inside a pickle, the second a tensor of features [N, D]. The reader of
weights gives inert descriptions of the arrays; from their bytes they are built here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from hpc_gen.metrics.moments import Moments
from hpc_gen.runtime.errors import DataError
from hpc_gen.runtime.tensor_files import Inert, read_nested

Arrays = dict[str, np.ndarray[Any, Any]]
_KINDS = {"f4": np.float32, "f8": np.float64}


def read_cache(path: Path, sha256: str | None) -> tuple[Arrays, int | None]:
    """Arrays mu [D] and sigma [D, D] of a cached file, and the number of images where that is known.

    Raises DataError for a file that is neither kind.
    """
    found = read_nested(path, sha256)
    if isinstance(found, Tensor) and found.dim() == 2 and len(found) > 1:
        moments = Moments.of(found)
        return {"mu": moments.mean.numpy(), "sigma": moments.covariance.numpy()}, len(found)
    if isinstance(found, Mapping) and {"mu", "sigma"} <= set(found):
        return {name: _array(path, found[name]) for name in ("mu", "sigma")}, None
    raise DataError(f"{path} is neither statistics nor features of torch-fidelity; name a file of its cache")


def _array(path: Path, value: Any) -> np.ndarray[Any, Any]:
    """A numpy array from what its pickle says; tensors are taken as they are."""
    if isinstance(value, Tensor):
        return value.numpy()
    try:
        assert isinstance(value, Inert) and value.name.endswith("multiarray._reconstruct")
        _, shape, kind, fortran, content = value.state
        assert isinstance(kind, Inert) and kind.name == "numpy.dtype"
        dtype = _KINDS[str(kind.args[0])]
        raw = content if isinstance(content, bytes) else _latin(content)
        order = "F" if fortran else "C"
        return np.frombuffer(raw, dtype=dtype).reshape(tuple(int(size) for size in shape), order=order).copy()
    except (AssertionError, IndexError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} holds an array that cannot be read ({error!r}); make the cache again") from error


def _latin(content: Any) -> bytes:
    """Bytes that an old pickle protocol spells as text in Latin-1."""
    assert isinstance(content, Inert) and content.name == "_codecs.encode" and content.args[1] == "latin1"
    return str(content.args[0]).encode("latin1")
