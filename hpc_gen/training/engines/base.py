"""What the loop knows of an engine: it wraps the objective, and alone owns backward, reduction, clipping and step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from hpc_gen.methods.protocol import Turn
from hpc_gen.training.checkpoint.pieces import Pieces

MicroBatch = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]  # (shard columns, draws of the turn)


@dataclass(frozen=True)
class StepResult:
    """One turn over the global batch: `losses` per term and `total` (global means), gradient norm before clipping.

    `finite` False: some loss or gradient was NaN or infinite, and no weight has changed.
    """

    losses: dict[str, float]
    total: float
    grad_norm: float
    finite: bool


class Engine(Protocol):
    """How parameters, gradients and optimizer state lie over ranks."""

    name: str

    def modules(self) -> dict[str, nn.Module]:
        """The roles, materialised and placed."""
        ...

    def trained_roles(self) -> list[str]:
        """Roles that have an optimizer."""
        ...

    def step(
        self, turn: Turn, micro_batches: Sequence[MicroBatch], lr: float, highest_loss: float | None = None
    ) -> StepResult:
        """Forward and backward over this rank's micro-batches, reduction, clipping and one optimizer step.

        A total above `highest_loss` counts as not finite: no weight changes.
        """
        ...

    def evaluate(self, turn: Turn, micro_batches: Iterable[MicroBatch]) -> dict[str, float]:
        """Global mean of each loss term, and their weighted total `loss`, without gradients; no weight changes.

        Micro-batches are taken one by one, and no collective happens before the last one is.
        """
        ...

    def state(self) -> Mapping[str, Tensor | Pieces]:
        """`model/ROLE/...` and `optim/ROLE/...`: live tensors, the same keys on every rank, whatever the engine.

        A plain tensor is the same on every rank; of a sharded one each rank gives the pieces that it holds.
        """
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over whole tensors by the names that `state()` gave. Raises CheckpointError where they do not fit.

        Each access of the mapping reads from disk: take a tensor once, and let go of it.
        """
        ...
