"""What training and sampling know of a method, and nothing more (DESIGN section 4).

A method is a small object that owns its networks (its *roles*). The engine materialises, shards and steps them; the
feed draws all randomness; a method only says what to compute. Shapes: B is the size of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from hpc_gen.runtime.randomness import Draw, Draws


@dataclass(frozen=True)
class Turn:
    """One optimizer step of one role.

    `purpose` names the turn in every random stream, so two turns of one iteration never share a draw; `lr_scale`
    multiplies the learning rate of this turn only (GDD's R1 turn steps at a sixteenth of the rate, for instance).
    """

    role: str
    purpose: str
    lr_scale: float = 1.0


@dataclass(frozen=True)
class Term:
    """One term of a loss over a micro-batch: `sum` is differentiable and added up over the global batch.

    The engine divides by the term's global count, so the result does not depend on how the batch was cut. `weight`
    0.0 marks a value that is logged but not trained on.
    """

    sum: Tensor
    count: float
    weight: float = 1.0


@dataclass(frozen=True)
class Losses:
    """All terms of one turn by name; the differentiated total is sum(weight * sum / global count)."""

    terms: Mapping[str, Term]


@dataclass(frozen=True)
class ColumnSpec:
    """What a method needs of a shard column: dtype name (`uint8`, `float16`, `int64`), shape of one row (-1 = any)."""

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]
    max_value: int | None = None  # labels: the largest value allowed, inclusive


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters of one role that share optimizer settings; `weight_decay` None = the experiment's value."""

    names: tuple[str, ...]
    weight_decay: float | None = None
    lr_scale: float = 1.0


@dataclass(frozen=True)
class TensorSplit:
    """How tensor parallelism splits a linear layer: a column split over its outputs, a row split over its inputs.

    `fused`: equal projections that lie one after the other in the outputs, each of which is split by itself (q, k, v).
    """

    kind: Literal["column", "row"]
    fused: int = 1


@dataclass(frozen=True)
class ParallelPlan:
    """Where a method may be cut: module names for FSDP units, compile and activation checkpointing.

    `tensor_splits`: linear layers by name, column splits first and row splits after what is done to each output alone;
    the number of ways divides each of `tensor_divides` (heads, inner widths).
    """

    fsdp_units: tuple[str, ...] = ()
    checkpoint_units: tuple[str, ...] = ()
    differentiates_inside: bool = False  # energy and R1 losses: refused by ZeRO-3, HSDP and compile
    tensor_splits: Mapping[str, TensorSplit] = field(default_factory=dict)
    tensor_divides: tuple[int, ...] = ()


@dataclass(frozen=True)
class TableFacts:
    """What a method may know of the training table when it is built.

    Classes, dtype and shape of each column, and the identity of the tokenizer that made it (nn.posterior.LatentScale
    reads the scale of its latents from there).
    """

    num_classes: int = 0
    columns: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    tokenizer: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Curve:
    """Something a sampler measured along its way: entry i was observed `counts[i]` times and adds up to `sums[i]`.

    Sums and counts of batches, blocks and tasks add up, so a curve does not depend on how the images were cut.
    """

    sums: tuple[float, ...]
    counts: tuple[float, ...]

    def added(self, other: Curve) -> Curve:
        """The curve of both; the shorter one counts as never observed beyond its end."""
        size = max(len(self.sums), len(other.sums))

        def padded(values: tuple[float, ...]) -> tuple[float, ...]:
            return values + (0.0,) * (size - len(values))

        return Curve(
            tuple(a + b for a, b in zip(padded(self.sums), padded(other.sums), strict=True)),
            tuple(a + b for a, b in zip(padded(self.counts), padded(other.counts), strict=True)),
        )

    def means(self) -> list[float | None]:
        """Mean of each entry; None where nothing was observed."""
        return [total / count if count else None for total, count in zip(self.sums, self.counts, strict=True)]


@runtime_checkable
class Measures(Protocol):
    """An optional part of a method: what its sampler measured besides the images (energies, accept rates)."""

    def take_curves(self) -> dict[str, Curve]:
        """Curves by name since the last call, which are forgotten by it."""
        ...


FrozenNetwork = Callable[[Tensor], Mapping[str, Tensor]]
"""A network that the objective asks and nobody trains: inputs [N, ...] -> its outputs by name, each [N, ...]."""


@dataclass(frozen=True)
class FrozenSpec:
    """What a method gives a frozen network, and what it needs of it: one row of each."""

    inputs: ColumnSpec
    outputs: Mapping[str, ColumnSpec]


@runtime_checkable
class AsksFrozen(Protocol):
    """An optional part of a method: frozen networks of other people (encoders, teachers) that its objective asks.

    Which file each is read from says the section `train.frozen` under its name. They are no roles: they lie whole on
    the device of every rank, no engine wraps or steps them, no checkpoint, average or export holds them. Only training
    has them; `conditions` and `generate` do without.
    """

    def frozen(self) -> dict[str, FrozenSpec]:
        """The networks that `objective` asks, by their names in `train.frozen`; {} = none."""
        ...

    def take_frozen(self, networks: Mapping[str, FrozenNetwork]) -> None:
        """Keep these for `objective`; called once, before training, with all of them."""
        ...


class Conditioning(Protocol):
    """What a sampling plan tells a method about image `ids` [N] int64."""

    def labels(self, ids: Tensor) -> Tensor:
        """Class label of each image: int64 [N]."""
        ...

    def rows(self, ids: Tensor, columns: Sequence[str]) -> dict[str, Tensor]:
        """Columns of the conditioning table at row `id % rows`: each [N, ...]."""
        ...


@runtime_checkable
class Method(Protocol):
    """The protocol of a method. Implementations live in `hpc_gen/methods/NAME/objective.py`."""

    def roles(self) -> dict[str, nn.Module]:
        """Networks by role, built on the meta device; the engine materialises them and calls `initialise`."""
        ...

    def initialise(self, role: str, generator: torch.Generator) -> None:
        """Fill every parameter and buffer of a materialised role (they arrive filled with NaN)."""
        ...

    def parameter_groups(self, role: str) -> list[ParameterGroup]:
        """Optimizer groups of one role; every trainable parameter is in exactly one. Empty list: a frozen role."""
        ...

    def turns(self, iteration: int, images_seen: int) -> list[Turn]:
        """Optimizer steps of this iteration, in order; all of them see the same global batch."""
        ...

    def draws(self, turn: Turn) -> dict[str, Draw]:
        """Random inputs of a turn: static shapes per sample; the feed fills them."""
        ...

    def counts(self, turn: Turn, batch: Mapping[str, Tensor], draws: Mapping[str, Tensor]) -> dict[str, float]:
        """Count of each loss term in this micro-batch, known before the networks run (samples, masked tokens ...)."""
        ...

    def objective(self, turn: Turn, batch: Mapping[str, Tensor], draws: Mapping[str, Tensor]) -> Losses:
        """Loss terms of a micro-batch; networks are in train mode; other roles have requires_grad off.

        Validation calls it under no_grad with networks in eval mode: one that differentiates inside enables gradients
        for that by itself (and keeps the graph only where they were enabled outside).
        """
        ...

    def columns(self) -> dict[str, ColumnSpec]:
        """Shard columns that `objective` reads."""
        ...

    def parallel_plan(self, role: str) -> ParallelPlan:
        """Where this role may be cut."""
        ...

    def conditions(self, ids: Tensor, plan: Conditioning) -> dict[str, Tensor]:
        """What image `id` is conditioned on: each tensor [N, ...]."""
        ...

    def generate(
        self, conditions: Mapping[str, Tensor], draws: Draws, settings: Any, poll: Callable[[], None]
    ) -> Tensor:
        """Images uint8 [N, 3, H, W], or latents float [N, C, h, w] for the tokenizer.

        Networks are in eval mode, no gradients. `poll` is called at least once per solver step and may raise
        StopRequested. All randomness comes from `draws`.
        """
        ...
