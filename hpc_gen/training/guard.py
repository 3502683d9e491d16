"""The non-finite guard: skip, count, roll back when it persists, and give up as diverged when that does not help."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from hpc_gen.config.experiment import NonFiniteConfig
from hpc_gen.runtime.errors import DivergedError
from hpc_gen.training.state import TrainState


class Verdict(Enum):
    """What the loop does after an iteration."""

    GO_ON = "go on"
    SKIPPED = "skipped"
    ROLL_BACK = "roll back"


@dataclass(frozen=True)
class NonFiniteGuard:
    """Invariant 8 of DESIGN section 7. The counters live in the TrainState, so a restart does not reset them."""

    config: NonFiniteConfig

    def judge(self, state: TrainState, finite: bool) -> Verdict:
        """Count one iteration. Raises DivergedError when the allowed roll-backs are used up."""
        if finite:
            state.non_finite_run = 0
            return Verdict.GO_ON
        state.non_finite_total += 1
        state.non_finite_run += 1
        if state.non_finite_run < self.config.max_consecutive:
            return Verdict.SKIPPED
        if state.draw_counter >= self.config.max_rollbacks:
            raise DivergedError(
                f"{state.non_finite_run} steps in a row were not finite before {state.images_seen} images, after "
                f"{state.draw_counter} roll-backs; lower train.optimizer.lr, or look for bad rows in the table"
            )
        return Verdict.ROLL_BACK
