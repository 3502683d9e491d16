"""The stage `centroids`: k-means over the features of a table, as units; facts in specs/digit.md section 3.

Units draw a sample of the table's vectors block by block (256 per centroid, as faiss would: more are not used), so
memory never holds more than the sample, where the reference concatenates all features; the last unit fits. Fitting
commits its state after each iteration, so a stop costs one iteration. What comes out is the reference's file, float32
[codes, width] as `km_8k.npy`, with the facts of the fit beside it.

    extra_stages:
      centroids:
        worker: "shard_tools.centroids:worker"
        after: [encode]
        options: {table: tables/features, codes: 8192}
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, ValidationError
from torch import Tensor

from hpc_gen.config.base import NonEmpty, PositiveInt, Section
from hpc_gen.data.table import Table
from hpc_gen.runtime import commit, tensor_files
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.runtime.randomness import permutation
from hpc_gen.stages.forecast import Need
from hpc_gen.stages.units import StageContext, Unit
from hpc_gen.tokenizers.kmeans import (
    ITERATIONS,
    POINTS_PER_CENTROID,
    SEED,
    Backend,
    Centroids,
    chosen_backend,
    lloyd,
)

FIT = "fit"
ROWS_AT_ONCE = 64  # read between two looks for a stop
FLOAT_BYTES = 4

Float32Array = npt.NDArray[np.float32]


class CentroidsOptions(Section):
    """Options of the stage."""

    table: NonEmpty
    """Folder of the table with the features, relative to the workspace."""
    column: NonEmpty = "features"
    """Its column: float [tokens, width], or [width]."""
    codes: Annotated[int, Field(ge=2)]
    """Centroids: 8192 for DINOv2 B, 16384 for L, as published."""
    output: NonEmpty | None = None
    """File to write, relative to the workspace; null = centroids/km_8k.npy, 8 being codes // 1000."""
    iterations: PositiveInt = ITERATIONS
    """Iterations of Lloyd's algorithm."""
    points_per_centroid: PositiveInt = POINTS_PER_CENTROID
    """Vectors of the sample per centroid."""
    seed: Annotated[int, Field(ge=0)] = SEED
    """Seed of the sample and of the start."""
    block_rows: PositiveInt = 4096
    """Rows of the table that one unit draws from."""
    backend: Backend = "auto"
    """faiss, torch, or auto = faiss where it is installed."""
    threads: PositiveInt = 1
    """CPU threads of the fit; belongs to the identity."""


def worker(context: StageContext) -> CentroidsWorker:
    """Factory of the stage. Raises UserError for options that it does not have."""
    options = context.experiment.extra_stages[context.stage].options
    try:
        typed = CentroidsOptions.model_validate(options)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["extra_stages", context.stage, "options", *map(str, first["loc"])])
        known = ", ".join(CentroidsOptions.model_fields)
        raise UserError(f"'{where}' is refused: {first['msg']}; the stage has: {known}") from error
    return CentroidsWorker(typed, context.workspace)


class CentroidsWorker:
    """A UnitWorker; units are the blocks of the table, then the fit."""

    def __init__(self, options: CentroidsOptions, workspace: Path) -> None:
        self.options = options
        self.workspace = workspace
        self.backend = chosen_backend(options.backend)
        name = options.output or f"centroids/km_{options.codes // 1000}k.npy"
        if not name.endswith(".npy"):
            raise UserError(f"the output '{name}' of the centroids is no .npy file; name one")
        self.path = workspace / name

    @cached_property
    def table(self) -> Table:
        """The table of features. Raises DataError when it is not whole, UserError when the column cannot be used."""
        table = Table.open(self.workspace / self.options.table)
        column = table.index.columns.get(self.options.column)
        if column is None or not column.dtype.startswith(("float", "bfloat")) or len(column.shape) not in (1, 2):
            said = "no such column" if column is None else f"{column.dtype} {list(column.shape)}"
            raise UserError(
                f"table {table.folder}, column '{self.options.column}': {said}, but k-means needs floats [tokens, "
                f"width] or [width]; it has: {', '.join(sorted(table.index.columns))}"
            )
        return table

    @property
    def width(self) -> int:
        """Numbers of one vector."""
        return int(self.table.index.columns[self.options.column].shape[-1])

    @property
    def tokens(self) -> int:
        """Vectors of one row."""
        shape = self.table.index.columns[self.options.column].shape
        return int(shape[0]) if len(shape) == 2 else 1

    @cached_property
    def num_points(self) -> int:
        """Vectors of the sample. Raises UserError when the table has fewer vectors than there are codes."""
        there = self.table.rows * self.tokens
        if there < self.options.codes:
            raise UserError(
                f"table {self.table.folder} has {there} vectors for {self.options.codes} codes; encode more rows, or "
                "lower 'codes'"
            )
        return min(there, self.options.codes * self.options.points_per_centroid)

    @property
    def num_blocks(self) -> int:
        """Blocks of the table."""
        return -(-self.table.rows // self.options.block_rows)

    def units(self) -> list[Unit]:
        """`sample-00000`, ..., then `fit`; the fit alone once it is done, for the sample is swept then."""
        names = [f"sample-{block:05d}" for block in range(self.num_blocks)]
        if self._facts().get("fingerprint") == self.fingerprint():
            names = []
        return [Unit(name, index) for index, name in enumerate([*names, FIT])]

    def fingerprint(self) -> str:
        """Hash of the options that change numbers, of the table and of the output's name."""
        options = self.options.model_dump(mode="json", exclude={"table", "backend", "output"})
        facts = {"options": options, "backend": self.backend, "table": self.table.identity, "output": self.path.name}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def do(self, unit: Unit, staging: Path, poll: Callable[[], None]) -> dict[str, Path]:
        """One block of the sample, or the fit."""
        if unit.name == FIT:
            return self._fit(staging, poll)
        block = int(unit.name.rpartition("-")[2])
        final = self._block_path(block)
        commit.write_bytes(staging / final.name, _npy(self._draw(block, poll)))
        return {str(final): staging / final.name}

    def forecast(self) -> Need:
        """The sample, and the centroids."""
        vectors = self.num_points + self.options.codes
        return Need(vectors * self.width * FLOAT_BYTES, self.num_blocks + 2)

    def finish(self) -> None:
        """Sweep the sample and the state of the fit: both can be made again, and the sample is large."""
        if self._facts().get("fingerprint") == self.fingerprint():
            commit.remove_tree(self._folder)

    @property
    def _folder(self) -> Path:
        """What the stage needs while it is not done."""
        return self.path.with_suffix(".work")

    def _block_path(self, block: int) -> Path:
        return self._folder / f"{self.fingerprint()[:12]}-{block:05d}.npy"

    def _facts(self) -> dict[str, Any]:
        """The facts beside a whole output, {} when there is none or when it is not the one that they tell of."""
        try:
            facts: dict[str, Any] = json.loads(self.path.with_suffix(".json").read_text())
            return facts if commit.sha256_file(self.path) == facts.get("sha256") else {}
        except (OSError, ValueError, AttributeError):
            return {}

    def _share(self, block: int) -> int:
        """Vectors that the sample takes from a block: its part of all, so that the parts add up exactly."""
        ends = [min(edge * self.options.block_rows, self.table.rows) for edge in (block, block + 1)]
        begin, end = (self.num_points * edge // self.table.rows for edge in ends)
        return end - begin

    def _draw(self, block: int, poll: Callable[[], None]) -> Float32Array:
        """The sample's vectors of one block, float32 [n, width]: a function of the seed, the block and the table."""
        first = block * self.options.block_rows
        rows = min(self.options.block_rows, self.table.rows - first)
        order = permutation(self.options.seed, "kmeans/sample", block, rows * self.tokens)
        chosen = np.sort(order[: self._share(block)])
        found: list[Tensor] = []
        for begin in range(0, rows, ROWS_AT_ONCE):
            poll()
            end = min(begin + ROWS_AT_ONCE, rows)
            inside = chosen[(chosen >= begin * self.tokens) & (chosen < end * self.tokens)]
            if not len(inside):
                continue
            needed, place = np.unique(inside // self.tokens, return_inverse=True)
            column = self.table.read(first + needed, (self.options.column,))[self.options.column]
            vectors = column.view(len(needed), self.tokens, self.width)
            found.append(vectors[torch.from_numpy(place), torch.from_numpy(inside % self.tokens)].float())
        points = torch.cat(found).numpy() if found else np.empty((0, self.width), np.float32)
        if not np.isfinite(points).all():
            raise DataError(f"table {self.table.folder}: '{self.options.column}' holds values that are not finite")
        return points

    def _fit(self, staging: Path, poll: Callable[[], None]) -> dict[str, Path]:
        """Iterate from the last committed state; blocks that no task has drawn yet are drawn here."""
        points = np.empty((self.num_points, self.width), np.float32)
        filled = 0
        for block in range(self.num_blocks):
            part = self._read_block(block, poll)
            points[filled : filled + len(part)] = part
            filled += len(part)
        assert filled == len(points)
        begun, centroids, history = self._read_state()
        options = self.options
        steps = lloyd(points, centroids, options.codes, options.iterations, begun, self.backend, options.threads, poll)
        for step in steps:
            centroids = step.centroids
            history.append({"objective": step.objective, "empty": step.empty})
            self._write_state(step.iteration + 1, centroids, history)
            print(
                f"iteration {step.iteration + 1} of {options.iterations}: mean squared distance "
                f"{step.objective / len(points):.6g}, {step.empty} empty clusters split",
                flush=True,
            )
        assert centroids is not None  # at least one iteration
        sha256 = Centroids(torch.from_numpy(centroids)).write(staging / self.path.name)
        facts = {
            "sha256": sha256,
            "codes": options.codes,
            "width": self.width,
            "vectors": len(points),
            "iterations": history,
            "seed": options.seed,
            "backend": self.backend,
            "threads": options.threads,
            "table": {"identity": self.table.identity, "tokenizer": dict(self.table.index.tokenizer)},
            "fingerprint": self.fingerprint(),
        }
        note = self.path.with_suffix(".json")
        commit.write_json(staging / note.name, facts)
        return {str(self.path): staging / self.path.name, str(note): staging / note.name}

    def _read_block(self, block: int, poll: Callable[[], None]) -> Float32Array:
        path, shape = self._block_path(block), (self._share(block), self.width)
        try:
            points: Float32Array = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return self._draw(block, poll)
        return points if points.shape == shape and points.dtype == np.float32 else self._draw(block, poll)

    @property
    def _state_path(self) -> Path:
        return self._folder / f"{self.fingerprint()[:12]}-state.safetensors"

    def _read_state(self) -> tuple[int, Float32Array | None, list[dict[str, Any]]]:
        """Iterations done, the centroids after them, and what was said of each."""
        if not self._state_path.is_file():
            return 0, None, []
        centroids = tensor_files.read_tensors(self._state_path)["centroids"].numpy()
        history: list[dict[str, Any]] = json.loads(tensor_files.metadata_of(self._state_path)["history"])
        return len(history), centroids, history

    def _write_state(self, done: int, centroids: Float32Array, history: list[dict[str, Any]]) -> None:
        assert done == len(history)
        tensors = {"centroids": torch.from_numpy(centroids)}
        tensor_files.write_tensors(self._state_path, tensors, {"history": json.dumps(history)})


def _npy(array: Float32Array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
