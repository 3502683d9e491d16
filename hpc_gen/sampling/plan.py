"""The sampling plan: what defines every image of a set of samples, and nothing else.

An image is a function of its id and the plan; tasks, their number and their order are no part of it. The batch split
and the thread count are, because they change the last bits (DESIGN section 4, "bit for bit").
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from hpc_gen.data.table import Table
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.runtime.randomness import Draw, Integers, Stream
from hpc_gen.sampling.class_file import classes_sha256

FORMAT = "hpc-gen-sample-plan-1"
PLAN_NAME = "plan.json"
CLASSES_NAME = "classes.json"  # of a plan whose classes came from a file: the list itself
LABEL_PURPOSE = "sample/labels"
ROW_PURPOSE = "sample/rows"

ClassPlan = Literal["balanced", "sorted", "uniform", "file"]
RowPlan = Literal["in_order", "uniform"]


_NO_FIELDS = ("table", "listed")  # what the plan is given beside its defining fields


@dataclass(frozen=True)
class Block:
    """A unit of sampling: images `ids` under one name, always computed whole."""

    name: str
    ids: range


@dataclass(frozen=True)
class SamplePlan:
    """Everything that determines the images; `hash` is over all fields but the table object.

    `checkpoint_images_seen` and `checkpoint_manifest_sha256` name the weights, `ema` the average (None = raw weights),
    `method_hash` the method's config, `table_identity` the rows a method may be conditioned on (None = no table).
    `device` is a kind ("cpu", "cuda"): the last bits depend on it, on the number of devices they do not. `listed` is
    the class of each image where these came from a file; its hash `classes_sha256` stands for it in the plan.
    """

    run_identity: str
    checkpoint_images_seen: int
    checkpoint_manifest_sha256: str
    ema: str | None
    method_hash: str
    seed: int
    num_images: int
    block_images: int
    batch: int
    threads: int
    device: str
    classes: ClassPlan
    num_classes: int
    settings: Mapping[str, Any]
    table_identity: str | None = None
    table: Table | None = field(default=None, compare=False, repr=False)
    classes_sha256: str | None = None
    listed: tuple[int, ...] | None = field(default=None, compare=False, repr=False)
    row_plan: RowPlan = "in_order"

    def __post_init__(self) -> None:
        assert (self.classes == "file") == (self.classes_sha256 is not None), "a list of classes has a hash"
        if self.classes in ("uniform", "file") or self.num_classes == 0:
            return
        if self.num_images % self.num_classes:
            below = self.num_images - self.num_images % self.num_classes
            near = f"{below} or {below + self.num_classes}" if below else f"{self.num_classes}"
            raise UserError(
                f"sample.num_images {self.num_images} is not a multiple of the {self.num_classes} classes, so the plan "
                f"'{self.classes}' cannot give each class the same count; use {near}, or sample.classes=uniform"
            )

    def to_json(self) -> dict[str, Any]:
        """All defining fields, JSON-ready."""
        facts = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in _NO_FIELDS}
        if self.classes_sha256 is None:
            del facts["classes_sha256"]  # plans without keep their hash
        if self.row_plan == "in_order":
            del facts["row_plan"]  # as above
        return {"format": FORMAT, **facts, "settings": dict(self.settings)}

    @property
    def class_plan(self) -> str:
        """The class plan in a word or two; lists are told apart by their hash."""
        return self.classes if self.classes_sha256 is None else f"file {self.classes_sha256}"

    @property
    def hash(self) -> str:
        """SHA-256 over the canonical JSON of the plan."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def blocks(self) -> list[Block]:
        """The blocks in order; the last one may be shorter."""
        starts = range(0, self.num_images, self.block_images)
        return [
            Block(f"{i:06d}", range(start, min(start + self.block_images, self.num_images)))
            for i, start in enumerate(starts)
        ]

    def labels(self, ids: Tensor) -> Tensor:
        """Class label int64 [N] of image `ids` int64 [N]; zeros without classes."""
        ids = ids.to(torch.int64)
        if self.num_classes == 0:
            return torch.zeros_like(ids)
        if self.classes == "file":
            assert self.listed is not None, "the list of classes was not read"
            return torch.tensor(self.listed, dtype=torch.int64)[ids % len(self.listed)]
        if self.classes == "balanced":
            return ids % self.num_classes
        if self.classes == "sorted":
            return ids // (self.num_images // self.num_classes)
        draw = Draw((), Integers(0, self.num_classes))
        return Stream(self.seed, LABEL_PURPOSE).batch(draw, ids.tolist()).reshape(ids.shape)

    def rows(self, ids: Tensor, columns: Sequence[str]) -> dict[str, Tensor]:
        """Columns of the conditioning table: each [N, ...]. Raises UserError without a table.

        Image `id` has row `id % rows`, or one drawn uniformly with replacement where the plan says so.
        """
        if self.table is None:
            raise UserError(
                f"the method is conditioned on table columns ({', '.join(columns)}), but the plan has no table; "
                "set data.table to the folder of one"
            )
        if self.row_plan == "uniform":
            chosen = Stream(self.seed, ROW_PURPOSE).batch(Draw((), Integers(0, self.table.rows)), ids.tolist())
            return self.table.read(chosen.numpy().reshape(-1), columns)
        return self.table.read(ids.numpy().astype(np.int64) % self.table.rows, columns)

    def adopted(self, folder: Path) -> Self:
        """This plan, under the run identity of the one in `folder` where that is all in which they differ.

        The identity covers sections that no image depends on; what images depend on has fields of its own.
        """
        try:
            found = read_plan(folder)
        except (DataError, UserError):
            return self  # `write` says what is wrong, if anything is
        same = replace(self, run_identity=found.run_identity)
        return same if same.hash == found.hash else self

    def write(self, folder: Path) -> None:
        """Write `folder/plan.json`, or check that the one there is this plan.

        Raises UserError naming the first differing field: images of two plans never share a folder.
        """
        path = folder / PLAN_NAME
        if path.exists():
            self._check_same(path)
            return
        folder.mkdir(parents=True, exist_ok=True)
        if self.listed is not None:
            commit.write_json(folder / CLASSES_NAME, list(self.listed))
        commit.write_json(path, {**self.to_json(), "hash": self.hash})

    def _check_same(self, path: Path) -> None:
        found = read_plan(path.parent)
        if found.hash == self.hash:
            return
        mine, theirs = self.to_json(), found.to_json()
        different = [name for name in mine if mine[name] != theirs.get(name)]
        name = next((name for name in different if name != "run_identity"), "run_identity")  # a cause before its hash
        raise UserError(
            f"{path} is another plan: {name} is {theirs.get(name)!r} there and {mine[name]!r} now; "
            "use another sample.tag, or remove the folder"
        )

    @classmethod
    def from_json(cls, document: Mapping[str, Any], listed: tuple[int, ...] | None = None) -> Self:
        """The plan of a JSON object and its list of classes. Raises KeyError, TypeError or ValueError when it is not
        one."""
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']!r}, not {FORMAT!r}")
        names = [name for name in cls.__dataclass_fields__ if name not in _NO_FIELDS]
        optional = {"classes_sha256": None, "row_plan": "in_order"}
        given = {name: document[name] for name in names if name not in optional}
        given |= {name: document.get(name, absent) for name, absent in optional.items()}
        plan = cls(**given, listed=listed)
        if listed is not None and classes_sha256(listed) != plan.classes_sha256:
            raise ValueError("its list of classes is another one")
        if document.get("hash", plan.hash) != plan.hash:
            raise ValueError("its hash does not fit its fields")
        return plan


def read_plan(folder: Path) -> SamplePlan:
    """The plan in `folder`. Raises UserError when there is none, DataError when it is damaged."""
    path = folder / PLAN_NAME
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; run the sample stage first") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a sampling plan ({error}); remove the folder and sample again") from error
    try:
        listed = None
        if document.get("classes_sha256") is not None:
            listed = tuple(int(label) for label in json.loads((folder / CLASSES_NAME).read_text()))
        return SamplePlan.from_json(document, listed)
    except (AssertionError, KeyError, OSError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not a sampling plan ({error!r}); remove the folder and sample again") from error


def method_hash(section: Mapping[str, Any]) -> str:
    """SHA-256 of an experiment's `method` section, defaults filled in."""
    text = json.dumps(section, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def describe(plan: SamplePlan) -> dict[str, Any]:
    """The plan without its table, for provenance: field -> value, with its hash."""
    return {**plan.to_json(), "hash": plan.hash}
