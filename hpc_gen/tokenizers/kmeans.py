"""k-means as DiGIT uses it: centroids as a .npy file, assignment to the nearest, and fitting by faiss or by torch.

Facts: specs/digit.md section 3. Distances are Euclidean, in float32, without any normalisation. Fitting is Lloyd's
algorithm, one iteration after the other, so that a stage can be stopped and goes on where it was: twenty slices of one
iteration are the same computation as one run of twenty (tested against faiss to the bit).
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.runtime.randomness import permutation

ITERATIONS = 20
SEED = 1234  # faiss's own; of the start and of the split of empty clusters
POINTS_PER_CENTROID = 256  # more are not used (faiss's limit)
ASSIGN_ROWS = 4096  # vectors compared with all centroids at once: 4096 x 8192 distances are 128 MiB
CPU = torch.device("cpu")

Backend = Literal["auto", "faiss", "torch"]
Float32Array = npt.NDArray[np.float32]


class Centroids:
    """K vectors and the assignment to the nearest of them."""

    def __init__(self, vectors: Tensor) -> None:
        """`vectors`: float32 [K, D], on the device where features will be assigned."""
        self.vectors = vectors
        self._squared_norms = vectors.square().sum(dim=1)

    def __len__(self) -> int:
        """Number of codes."""
        return len(self.vectors)

    @property
    def content(self) -> str:
        """SHA-256 of the values, whatever file holds them."""
        array = np.ascontiguousarray(self.vectors.cpu().numpy())
        return hashlib.sha256(f"{array.shape}\n".encode() + array.tobytes()).hexdigest()

    @classmethod
    def read(
        cls, path: Path, width: int | None = None, sha256: str | None = None, device: torch.device = CPU
    ) -> Centroids:
        """Read a .npy file, float32 [K, D], as the reference's `km_8k.npy`. Nothing in it is unpickled.

        Raises UserError where there is none, DataError when its hash, type or shape is another, or a value is not
        finite.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"there are no centroids {path} ({error.strerror}); fit them first (docs/tokenizers.md), or correct "
                "tokenizer.dinov2.centroids"
            ) from error
        found = hashlib.sha256(data).hexdigest()
        if sha256 is not None and found != sha256:
            raise DataError(f"{path} has the SHA-256 {found}, not {sha256}; name the right centroids")
        try:
            array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise DataError(f"{path} is not a .npy file of numbers ({error}); fit the centroids again") from error
        if array.dtype != np.float32 or array.ndim != 2 or not array.size:
            raise DataError(
                f"{path} holds {array.dtype} {list(array.shape)}, centroids are float32 [codes, width]; inside a "
                "DiGIT checkpoint they lie transposed"
            )
        if width is not None and array.shape[1] != width:
            raise DataError(
                f"{path} holds centroids of {array.shape[1]} numbers, the features have {width}; they belong to "
                "another network"
            )
        if not np.isfinite(array).all():
            raise DataError(f"{path} holds values that are not finite; fit the centroids again")
        return cls(torch.from_numpy(np.ascontiguousarray(array)).to(device))

    def write(self, path: Path) -> str:
        """Write the .npy file whole or not at all; returns its SHA-256."""
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(self.vectors.cpu().numpy()), allow_pickle=False)
        commit.write_bytes(path, buffer.getvalue())
        return hashlib.sha256(buffer.getvalue()).hexdigest()

    @torch.no_grad()
    def assign(self, features: Tensor) -> Tensor:
        """Number of the nearest centroid, int64 [...], of float features [..., D] on the centroids' device.

        argmin of |x|^2 - 2 x.c + |c|^2 in float32; of equally near ones the lowest. The reference does this in half
        precision where it trains so, which moves codes near a border (specs/digit.md section 3).
        """
        return self.nearest(features)[0]

    @torch.no_grad()
    def nearest(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """As `assign`, and the squared distance float32 [...]."""
        flat = features.to(torch.float32).reshape(-1, self.vectors.shape[1])
        codes = torch.empty(len(flat), dtype=torch.int64, device=flat.device)
        distances = torch.empty(len(flat), dtype=torch.float32, device=flat.device)
        for begin in range(0, len(flat), ASSIGN_ROWS):
            part = flat[begin : begin + ASSIGN_ROWS]
            squared = part.square().sum(1, keepdim=True) - 2 * part @ self.vectors.T + self._squared_norms
            codes[begin : begin + len(part)] = squared.argmin(1)
            distances[begin : begin + len(part)] = squared.amin(1)
        return codes.view(features.shape[:-1]), distances.view(features.shape[:-1])


@dataclass(frozen=True)
class Step:
    """The state after one iteration of Lloyd's algorithm.

    `objective`: sum of the squared distances before the update, float64, as faiss reports it; `empty`: clusters that
    got no point and were split off a large one.
    """

    iteration: int
    centroids: Float32Array
    objective: float
    empty: int


def lloyd(
    points: Float32Array,
    start: Float32Array | None,
    codes: int,
    iterations: int = ITERATIONS,
    first: int = 0,
    backend: Backend = "auto",
    threads: int = 1,
    poll: Callable[[], None] = lambda: None,
) -> Iterator[Step]:
    """Iterations `first` .. `iterations` - 1 from the centroids `start` [K, D] (None: K points drawn by `initial`).

    `poll` is called between iterations, `threads` are those of a CPU. Raises UserError when there are fewer points than
    codes, DataError for points that are not finite.
    """
    if points.ndim != 2 or len(points) < codes:
        raise UserError(f"k-means of {codes} codes needs at least as many vectors, got {len(points)}; give more rows")
    if not np.isfinite(points).all():
        raise DataError("the features hold values that are not finite; encode them again in float32")
    step = _stepper(np.ascontiguousarray(points, dtype=np.float32), chosen_backend(backend), threads)
    centroids = initial(points, codes) if start is None else np.ascontiguousarray(start, dtype=np.float32)
    for iteration in range(first, iterations):
        poll()
        centroids, objective, empty = step(centroids)
        yield Step(iteration, centroids, objective, empty)


def initial(points: Float32Array, codes: int, seed: int = SEED) -> Float32Array:
    """The start: `codes` points drawn without repetition, a function of the seed alone."""
    chosen = permutation(seed, "kmeans/start", 0, len(points))[:codes]
    return np.ascontiguousarray(points[chosen], dtype=np.float32)


def chosen_backend(backend: Backend) -> Literal["faiss", "torch"]:
    """`auto` = faiss where it is installed. Raises UserError where faiss is asked for and is not."""
    if backend == "torch":
        return "torch"
    try:
        import faiss  # noqa: F401
    except ImportError as error:
        if backend == "faiss":
            raise UserError("faiss is not installed; install hpc-gen[faiss], or set backend: torch") from error
        return "torch"
    return "faiss"


Stepper = Callable[[Float32Array], tuple[Float32Array, float, int]]


def _stepper(points: Float32Array, backend: str, threads: int) -> Stepper:
    torch.set_num_threads(threads)
    return _faiss_stepper(points, threads) if backend == "faiss" else _torch_stepper(points)


def _faiss_stepper(points: Float32Array, threads: int) -> Stepper:
    """One iteration by faiss, on a GPU where its build and the machine have one."""
    import faiss

    faiss.omp_set_num_threads(threads)
    gpu = bool(getattr(faiss, "get_num_gpus", lambda: 0)())

    def step(centroids: Float32Array) -> tuple[Float32Array, float, int]:
        fit: Any = faiss.Kmeans(
            points.shape[1],
            len(centroids),
            niter=1,
            seed=SEED,
            gpu=gpu,
            max_points_per_centroid=len(points),  # the sample was drawn before
            min_points_per_centroid=1,  # its warning would come once per iteration
        )
        objective = float(fit.train(points, init_centroids=centroids))
        empty = int(fit.iteration_stats[-1]["nsplit"])
        return np.array(fit.centroids, dtype=np.float32), objective, empty

    return step


def _torch_stepper(points: Float32Array) -> Stepper:
    """One iteration in torch, for machines without faiss: the same arithmetic, sums in float64.

    An empty cluster takes the place of a copy of the largest one, both moved a little apart, as faiss does it (there a
    large cluster is drawn at random).
    """
    on_torch = torch.from_numpy(points)

    def step(centroids: Float32Array) -> tuple[Float32Array, float, int]:
        codes, distances = Centroids(torch.from_numpy(centroids)).nearest(on_torch)
        counts = torch.bincount(codes, minlength=len(centroids))
        sums = torch.zeros(centroids.shape, dtype=torch.float64).index_add_(0, codes, on_torch.double())
        means = (sums / counts.clamp(min=1).unsqueeze(1)).float()
        empty = _split_empty(means, counts)
        return means.numpy(), float(distances.double().sum()), empty

    return step


SPLIT = 1 / 1024  # by how much the halves of a split cluster move apart, relative


def _split_empty(means_KD: Tensor, counts_K: Tensor) -> int:
    """Fill empty clusters in place; returns their number."""
    empty = torch.nonzero(counts_K == 0).flatten().tolist()
    signs = torch.ones(means_KD.shape[1])
    signs[1::2] = -1
    for cluster in empty:
        largest = int(counts_K.argmax())
        means_KD[cluster] = means_KD[largest] * (1 + SPLIT * signs)
        means_KD[largest] *= 1 - SPLIT * signs
        counts_K[cluster] = counts_K[largest] // 2
        counts_K[largest] -= counts_K[cluster]
    return len(empty)
