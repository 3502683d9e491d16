"""Randomness as a function of (run seed, purpose, n, k): n = position or image id, k = draw counter.

Never of rank, worker, batch, device or wall time. The function is numpy's Philox 4x64 (Salmon et al. 2011):
the key is a hash of seed and purpose, n and k are the upper two words of the counter, and the lower two count
blocks within the draw, so no two (n, k) of a stream can meet. torch's CPU generator would not do: it keeps
only 32 bits of a seed, and among 50,000 image ids two would draw the same numbers with probability 1 -
exp(-50000**2 / 2**33) = 25 %.

numpy does not promise the numbers of its distributions for ever, so each process compares a few with pinned
values before the first draw (`check_pinned`) and refuses to work when they changed.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hpc_gen.runtime.errors import UserError

_WORD = (1 << 64) - 1
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Normal:
    """Standard normal, float32."""


@dataclass(frozen=True)
class Uniform:
    """Uniform on [low, high), float32."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not np.float32(self.low) < np.float32(self.high):
            raise UserError(f"Uniform(low={self.low}, high={self.high}) is empty; low must be below high")


@dataclass(frozen=True)
class Integers:
    """Uniform on the integers low, ..., high - 1, int64."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise UserError(f"Integers(low={self.low}, high={self.high}) is empty; low must be below high")


Distribution = Normal | Uniform | Integers


@dataclass(frozen=True)
class Draw:
    """What to draw: shape per sample, distribution, and whether per sample or once per coupling group."""

    shape: tuple[int, ...] = ()
    distribution: Distribution = field(default_factory=Normal)
    per: Literal["sample", "group"] = "sample"

    @property
    def dtype(self) -> torch.dtype:
        """float32, or int64 for Integers."""
        return torch.int64 if isinstance(self.distribution, Integers) else torch.float32


def stream_key(seed: int, purpose: str) -> int:
    """Key of a stream: 128 bits of BLAKE2b over seed and purpose. Any Python integer is a seed."""
    return int.from_bytes(_digest(seed, purpose, 16), "little")


def _digest(seed: int, purpose: str, num_bytes: int) -> bytes:
    # The seed is a decimal string closed by a zero byte, so (1, "2x") and (12, "x") differ.
    return hashlib.blake2b(f"hpc-gen/{int(seed)}\0{purpose}".encode(), digest_size=num_bytes).digest()


class _Engine(threading.local):
    """One Philox per thread, set to (key, n, k) before each draw: faster than building a generator each time."""

    def __init__(self) -> None:
        self.philox = np.random.Philox(key=0)
        self.generator = np.random.Generator(self.philox)
        self.state: Any = self.philox.state  # a copy of the fresh state: nothing buffered from an earlier draw
        self.key = self.state["state"]["key"]
        self.counter = self.state["state"]["counter"]

    def at(self, key: int, n: int, k: int) -> np.random.Generator:
        """The generator at the beginning of draw (n, k) of a stream; valid until the next call in this thread."""
        if not (0 <= n <= _WORD and 0 <= k <= _WORD):
            raise ValueError(f"draw (n={n}, k={k}) is out of range; both lie in [0, 2**64)")
        self.key[:] = (key & _WORD, key >> 64)
        self.counter[:] = (0, 0, n, k)
        self.philox.state = self.state
        return self.generator

    def each(self, key: int, ns: Sequence[int], k: int, rows: Array) -> Iterator[tuple[np.random.Generator, Array]]:
        """The generator at (n, k) and the row to fill, for each n; sets only what differs between them."""
        if len(ns) == 0:
            return
        self.at(key, min(ns), k)
        generator = self.at(key, max(ns), k)
        philox, state, counter = self.philox, self.state, self.counter
        for n, row in zip(ns, rows, strict=True):
            counter[2] = n
            philox.state = state
            yield generator, row


_engine = _Engine()


def _fill(distribution: Distribution, rows: Array, key: int, ns: Sequence[int], k: int) -> None:
    """Fill row i of `rows` [len(ns), numbers] with the draw (ns[i], k)."""
    if isinstance(distribution, Normal):
        for generator, row in _engine.each(key, ns, k, rows):
            generator.standard_normal(out=row, dtype=np.float32)
    elif isinstance(distribution, Uniform):
        for generator, row in _engine.each(key, ns, k, rows):
            generator.random(out=row, dtype=np.float32)
        low, high = np.float32(distribution.low), np.float32(distribution.high)
        if (distribution.low, distribution.high) != (0.0, 1.0):
            rows *= high - low
            rows += low
            np.clip(rows, low, np.nextafter(high, low), out=rows)  # rounding may reach high itself
    else:
        first, end = distribution.low, distribution.high
        for generator, row in _engine.each(key, ns, k, rows):
            if row.size == 1:  # the same number in a fifth of the time
                row[0] = generator.integers(first, end)
            else:
                row[:] = generator.integers(first, end, size=row.size, dtype=np.int64)


class Stream:
    """All draws of one purpose. Holds no state: any order, batch or thread gives the same numbers."""

    def __init__(self, seed: int, purpose: str) -> None:
        check_pinned()
        self.key = stream_key(seed, purpose)

    def draw(self, draw: Draw, n: int, k: int = 0) -> Tensor:
        """Draw (n, k): a CPU tensor of `draw.shape`."""
        return self.batch(draw, [n], k)[0]

    def batch(self, draw: Draw, ns: Sequence[int] | Array | Tensor, k: int = 0) -> Tensor:
        """Draws (n, k) for every n of `ns`: a CPU tensor [len(ns), *draw.shape], equal to stacked single
        draws.
        """
        ids: Sequence[int] = ns.tolist() if isinstance(ns, (np.ndarray, Tensor)) else ns
        dtype = np.int64 if isinstance(draw.distribution, Integers) else np.float32
        rows = np.empty((len(ids), int(np.prod(draw.shape, dtype=np.int64))), dtype=dtype)
        _fill(draw.distribution, rows, self.key, ids, int(k))
        return torch.from_numpy(rows).reshape(len(ids), *draw.shape)


class Draws:
    """Named draws for a fixed list of ids; what `method.generate` gets. Stream of a name: purpose/name."""

    def __init__(self, seed: int, purpose: str, ids: Sequence[int] | Array | Tensor) -> None:
        """`ids` [N]: image ids, or positions."""
        self.seed = seed
        self.purpose = purpose
        self.ids: list[int] = ids.tolist() if isinstance(ids, (np.ndarray, Tensor)) else [int(i) for i in ids]

    def take(self, name: str, draw: Draw, k: int = 0) -> Tensor:
        """A CPU tensor [len(ids), *draw.shape]; `k` counts the draws of one name (steps of a solver)."""
        if draw.per != "sample":
            raise ValueError(f"draw {name!r} is per group, but image ids know no groups; use per='sample'")
        return Stream(self.seed, f"{self.purpose}/{name}").batch(draw, self.ids, k)


def permutation(seed: int, purpose: str, n: int, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Permutation number `n` of 0, ..., count - 1 in the stream of `purpose`: int64 [count]."""
    check_pinned()
    return _engine.at(stream_key(seed, purpose), n, 0).permutation(count).astype(np.int64, copy=False)


def torch_generator(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator of torch for weight initialisation only: it keeps 32 bits of its seed (see top of
    file).
    """
    generator = torch.Generator(device="cpu")
    generator.manual_seed(int.from_bytes(_digest(seed, purpose, 4), "little"))
    return generator


# Numbers of seed 0, purpose "pinned", n = 3, k = 5 (drawn by numpy 2.4.6). The floats are exact float32
# values.
PINNED: dict[str, list[float] | list[int]] = {
    "raw": [17261944191635425249, 15031417864757831241],
    "normal": [-2.062993288040161, 1.968371868133545, 0.559775710105896, 2.0616438388824463],
    "uniform": [2.4226090908050537, 2.7430872917175293, 0.9273619651794434, 2.2594189643859863],
    "integers": [855, 935, 481, 814],
    "permutation": [5, 2, 3, 4, 6, 7, 0, 1],
}


def _pinned_now() -> dict[str, list[float] | list[int]]:
    """What this numpy draws for the pinned case."""
    key = stream_key(0, "pinned")

    def take(distribution: Distribution, dtype: type) -> Array:
        rows: Array = np.empty((1, 4), dtype=dtype)
        _fill(distribution, rows, key, [3], 5)
        return rows.reshape(-1)

    return {
        "raw": [int(word) for word in _engine.at(key, 3, 5).bit_generator.random_raw(2)],
        "normal": take(Normal(), np.float32).tolist(),
        "uniform": take(Uniform(-1.0, 3.0), np.float32).tolist(),
        "integers": take(Integers(0, 1000), np.int64).tolist(),
        "permutation": _engine.at(key, 3, 5).permutation(8).tolist(),
    }


@functools.cache
def check_pinned() -> None:
    """Raise UserError when the installed numpy draws other numbers than the pinned ones. Runs once per
    process.
    """
    found = _pinned_now()
    for name, wanted in PINNED.items():
        if found[name] != wanted:
            raise UserError(
                f"numpy {np.__version__} draws other {name} numbers than hpc-gen is pinned to ({found[name]} "
                f"instead of {wanted}), so runs could not be resumed or compared; install another numpy"
            )
