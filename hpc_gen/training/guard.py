"""The non-finite guard: skip, count, roll back when it persists, and give up as diverged when that does not help.

With `train.non_finite.spike_factor` a loss far above those of late is treated in the same way, before it moves a
weight.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from hpc_gen.config.experiment import NonFiniteConfig
from hpc_gen.runtime.errors import DivergedError
from hpc_gen.training.state import TrainState

RECENT_STEPS = 100  # losses of one turn whose median is the usual
FEWEST_STEPS = 20  # before that there is no usual


class Verdict(Enum):
    """What the loop does after an iteration."""

    GO_ON = "go on"
    SKIPPED = "skipped"
    ROLL_BACK = "roll back"


@dataclass(frozen=True)
class NonFiniteGuard:
    """Invariant 8 of DESIGN section 7. The counters live in the TrainState, so a restart does not reset them."""

    config: NonFiniteConfig

    def highest_loss(self, state: TrainState, purpose: str) -> float | None:
        """Above this the next loss of a turn is a spike; None: no limit yet, or at all.

        There is none where the usual loss is not positive (an adversarial one): a factor says nothing there.
        """
        recent = state.recent.get(purpose, [])
        if self.config.spike_factor is None or len(recent) < FEWEST_STEPS:
            return None
        usual = statistics.median(recent)
        return self.config.spike_factor * usual if usual > 0 else None

    def remember(self, state: TrainState, losses: Mapping[str, float]) -> None:
        """Note the losses of a step that was taken, by turn."""
        if self.config.spike_factor is not None:
            for purpose, loss in losses.items():
                state.recent[purpose] = [*state.recent.get(purpose, []), loss][-RECENT_STEPS:]

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
            what = "not finite" if self.config.spike_factor is None else "not finite or spikes"
            raise DivergedError(
                f"{state.non_finite_run} steps in a row were {what} before {state.images_seen} images, after "
                f"{state.draw_counter} roll-backs; lower train.optimizer.lr, or look for bad rows in the table"
            )
        return Verdict.ROLL_BACK
