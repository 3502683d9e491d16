"""A sweep's grid file: which checkpoints and sampler settings are sampled and scored. It is a desired state.

Every combination of the axes and every explicit point is one set of samples; what is not in the file any more is not
wanted any more.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hpc_gen.config.base import FolderName, KeyName, NonEmpty, PositiveInt, Section
from hpc_gen.config.errors import KeyProblem

OF_THE_SAMPLE = ("checkpoint", "ema", "seed")
"""Keys of a point that are keys of the section 'sample'; all others are sampler settings of the method."""
MAX_POINTS = 2000
SIGNIFICANT = 6  # digits of a value that a search proposes

Point = dict[str, Any]
ScoredMetric = Literal[
    "fid", "kid", "sfid", "isc", "precision", "recall", "density", "coverage", "clip_fid", "fd_dinov2"
]


class SearchConfig(Section):
    """The best value of one setting, by finer and finer steps around the best one so far."""

    key: KeyName
    """Setting to be searched, as in guidance."""
    low: float
    """Smallest value."""
    high: float
    """Largest value."""
    values: Annotated[int, Field(ge=3, le=50)] = 5
    """Values of the first round, evenly from low to high."""
    rounds: Annotated[int, Field(ge=1, le=12)] = 3
    """Rounds; each after the first halves the steps beside the best value."""
    at: dict[str, Any] = Field(default_factory=dict)
    """The other keys of these points."""

    @model_validator(mode="after")
    def _has_a_range(self) -> SearchConfig:
        if self.high <= self.low:
            raise KeyProblem("search.high", f"'search.high' = {self.high:g} is not above 'search.low' = {self.low:g}")
        if self.key in self.at:
            raise KeyProblem("search.at", f"'search.at' fixes '{self.key}', which is searched; remove it there")
        return self

    def first(self) -> list[Point]:
        """Points of the first round."""
        step = (self.high - self.low) / (self.values - 1)
        return [self.point(self.low + i * step) for i in range(self.values)]

    def point(self, value: float) -> Point:
        """The point at a value."""
        return {**self.at, self.key: rounded(value)}


class SweepConfig(Section):
    """One grid file."""

    name: FolderName
    """Name of the sweep: it is kept as a run of its own, runs/NAME."""
    run: NonEmpty
    """Run whose checkpoints are sampled: a name below runs/, or a path."""
    axes: dict[KeyName, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    """Key -> values; all combinations are wanted. checkpoint, ema, seed, and every sampler setting of the method."""
    points: list[dict[KeyName, Any]] = Field(default_factory=list)
    """More points, a line each."""
    search: SearchConfig | None = None
    """Search for the best value of one setting."""
    sample: dict[str, Any] = Field(default_factory=dict)
    """Keys of the section 'sample' of every point; absent ones are those of the run."""
    evaluate: dict[str, Any] = Field(default_factory=dict)
    """Keys of the section 'evaluate' of every point; absent ones are those of the run."""
    metric: ScoredMetric = "fid"
    """What the best point and the Pareto table go by."""
    tasks: PositiveInt = 1
    """Processes that share the work of each stage."""

    @model_validator(mode="after")
    def _wants_something(self) -> SweepConfig:
        if not self.axes and not self.points and self.search is None:
            raise KeyProblem("axes", "the sweep wants nothing: give 'axes', 'points' or 'search'")
        count = 1
        for values in self.axes.values():
            count *= len(values)
        if count + len(self.points) > MAX_POINTS:
            raise KeyProblem("axes", f"'axes' make {count} combinations, more than {MAX_POINTS}; use fewer values")
        for key in ("num_images", "block_images", "batch"):
            if key in self.axes:
                raise KeyProblem(f"axes.{key}", f"'{key}' is no axis; points of other sizes are not comparable")
        return self

    def wanted(self) -> list[Point]:
        """Points of axes and lines in order, each once; those of the search are not among them."""
        names = list(self.axes)
        found: list[Point] = []
        if names:
            found = [dict(zip(names, values, strict=True)) for values in itertools.product(*self.axes.values())]
        return each_once([*found, *self.points])


def each_once(points: list[Point]) -> list[Point]:
    """Without repetitions, in order."""
    seen: dict[str, Point] = {}
    for point in points:
        seen.setdefault(_canonical(point), point)
    return list(seen.values())


def point_name(point: Mapping[str, Any], sample: Mapping[str, Any]) -> str:
    """The tag of a point: from its keys and what all points share."""
    return f"p{hashlib.sha256(_canonical([dict(point), dict(sample)]).encode()).hexdigest()[:10]}"


def rounded(value: float) -> float:
    """A value as it is written and compared."""
    return float(f"{value:.{SIGNIFICANT}g}")


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
