"""What the loop knows of an engine: it wraps the objective, and alone owns backward, reduction, clipping and step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from hpc_gen.methods.protocol import Turn
from hpc_gen.training.checkpoint.pieces import Pieces
from hpc_gen.training.engines.layout import Layout

MicroBatch = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]  # (shard columns, draws of the turn)
Parts = Mapping[str, Mapping[str, Tensor]]  # role -> parameter -> this rank's part


@dataclass(frozen=True)
class StepResult:
    """One turn over the global batch: `losses` per term and `total` (global means), gradient norm before clipping.

    `finite` False: some loss or gradient was NaN or infinite, and no weight has changed.
    """

    losses: dict[str, float]
    total: float
    grad_norm: float
    finite: bool


class Holder(Protocol):
    """Who holds the parameters of the trained roles, and how they are cut over ranks."""

    def parts(self, role: str) -> dict[str, Tensor]:
        """This rank's fp32 part of every parameter of a role, trained or frozen: live, the optimizer writes here."""
        ...

    def layouts(self, role: str) -> dict[str, Layout]:
        """Where these parts lie in their parameters."""
        ...

    def whole(self, parts: Parts | None = None) -> AbstractContextManager[None]:
        """Inside, the modules are plain ones with all their parameters, for use outside of a step (collective).

        `parts` None: the current weights; else others of the same layout, an average for instance. No weight may be
        changed inside, and no collective is needed for a forward pass.
        """
        ...


class Engine(Holder, Protocol):
    """How parameters, gradients and optimizer state lie over ranks.

    The batch of a step is cut over `data_ranks` ways, of which this rank has number `data_rank`; ranks of one number
    get the same rows, and only one of them `leads_data`.
    """

    name: str
    data_rank: int
    data_ranks: int
    leads_data: bool

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

        Inside `whole()` only. Micro-batches are taken one by one, and no collective happens before the last one is.
        """
        ...

    def state(self) -> dict[str, Tensor | Pieces]:
        """`model/ROLE/...` and `optim/ROLE/...`: live tensors, the same keys on every rank and for every engine.

        A tensor is the same on all ranks; Pieces are this rank's share.
        """
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over whole tensors of the names that `state()` gives, read one at a time.

        Raises CheckpointError where keys or shapes do not fit.
        """
        ...
