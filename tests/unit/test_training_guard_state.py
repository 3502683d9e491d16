"""What the loop remembers beside weights, and the guard against steps that are not finite."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from hpc_gen.config.train import NonFiniteConfig
from hpc_gen.runtime.errors import CheckpointError, DivergedError, ExitCode
from hpc_gen.training.guard import NonFiniteGuard, Verdict
from hpc_gen.training.state import TrainState

TOP = 2**64 - 1


def test_the_digest_is_the_same_on_any_number_of_ranks() -> None:
    parts = [TOP, 5, 2**63, 17, TOP - 3, 1, 0, 2**62]
    alone = TrainState()
    for part in parts:
        alone.add_digest(part)
    alone.merge_digests([alone.digest_here])
    four = [TrainState() for _ in range(4)]
    for number, part in enumerate(parts):
        four[number % 4].add_digest(part)
    gathered = [state.digest_here for state in four]
    for state in four:
        state.merge_digests(gathered)
    assert {state.digest for state in four} == {alone.digest} == {sum(parts) % 2**64}
    assert alone.digest_here == 0


def test_merging_twice_counts_nothing_twice() -> None:
    state = TrainState(digest=10)
    state.add_digest(5)
    state.merge_digests([5, 7])
    state.merge_digests([0, 0])
    assert (state.digest, state.digest_here) == (22, 0)
    state.add_digest(1)
    state.merge_digests([1, 1])
    assert state.digest == 24


def test_the_window_gives_means_and_starts_afresh() -> None:
    state = TrainState()
    state.add_losses({"loss": 1.0, "grad_norm": 4.0})
    state.add_losses({"loss": 2.0, "grad_norm": 8.0})
    assert state.close_window() == {"loss": 1.5, "grad_norm": 6.0}
    assert state.close_window() == {}
    state.add_losses({"loss": 7.0})
    assert state.close_window() == {"loss": 7.0}


FULL = TrainState(
    images_seen=1_281_167 * 800,
    digest=TOP - 1,
    draw_counter=2,
    non_finite_total=9,
    non_finite_run=3,
    best_loss=0.1,  # not a float32
    best_images=640,
    window={"loss": 1 / 3, "d/grad_norm": 1e-300},
    window_steps=2,
)


@pytest.mark.parametrize(
    "state",
    [TrainState(), FULL, replace(FULL, digest=2**63), replace(FULL, digest=2**63 - 1)],
    ids=["new", "full", "smallest-negative", "largest-positive"],
)
def test_tensors_go_round_exactly(state: TrainState) -> None:
    tensors = state.tensors()
    assert all(name.startswith("train/") and value.ndim == 0 for name, value in tensors.items())
    assert {value.dtype for value in tensors.values()} <= {torch.int64, torch.float64}
    assert TrainState.from_tensors({**tensors, "model/net/weight": torch.zeros(2)}) == state


def test_the_part_of_this_rank_is_not_saved() -> None:
    """A save merges first; a part that was saved as well would be counted twice after a resume."""
    state = replace(FULL, digest_here=77)
    assert TrainState.from_tensors(state.tensors()).digest_here == 0


@pytest.mark.parametrize("key", sorted(TrainState().tensors()))
def test_a_missing_entry_is_named(key: str) -> None:
    tensors = FULL.tensors()
    del tensors[key]
    with pytest.raises(CheckpointError, match=f"no entry '{key}'; it was written by another version"):
        TrainState.from_tensors(tensors)


def verdicts(guard: NonFiniteGuard, state: TrainState, steps: str) -> list[Verdict]:
    """Judge a string of steps: '.' finite, 'x' not."""
    return [guard.judge(state, step == ".") for step in steps]


def test_the_guard_skips_counts_and_rolls_back_when_it_persists() -> None:
    guard, state = NonFiniteGuard(NonFiniteConfig(max_consecutive=3, max_rollbacks=2)), TrainState()
    go, skip, back = Verdict.GO_ON, Verdict.SKIPPED, Verdict.ROLL_BACK
    assert verdicts(guard, state, ".xx.xxx") == [go, skip, skip, go, skip, skip, back]
    assert (state.non_finite_total, state.non_finite_run) == (5, 3)


def test_the_guard_goes_on_counting_after_a_restart() -> None:
    guard, state = NonFiniteGuard(NonFiniteConfig(max_consecutive=3, max_rollbacks=1)), TrainState()
    verdicts(guard, state, "xx")
    resumed = TrainState.from_tensors(state.tensors())
    assert guard.judge(resumed, False) is Verdict.ROLL_BACK


def test_the_guard_gives_up_when_roll_backs_are_used_up() -> None:
    guard = NonFiniteGuard(NonFiniteConfig(max_consecutive=2, max_rollbacks=2))
    state = TrainState(images_seen=640, draw_counter=1)
    assert verdicts(guard, state, "xx")[-1] is Verdict.ROLL_BACK
    state.draw_counter, state.non_finite_run = 2, 0  # what the loop does at the second roll-back
    assert guard.judge(state, False) is Verdict.SKIPPED
    with pytest.raises(
        DivergedError, match="2 steps in a row were not finite before 640 images, after 2 roll-backs"
    ) as info:
        guard.judge(state, False)
    assert info.value.exit_code == ExitCode.DIVERGED == 75


def test_no_roll_backs_allowed() -> None:
    guard = NonFiniteGuard(NonFiniteConfig(max_consecutive=1, max_rollbacks=0))
    with pytest.raises(DivergedError, match="train.optimizer.lr"):
        guard.judge(TrainState(), False)


def test_no_validation_is_worse_than_any() -> None:
    assert TrainState().best_loss == math.inf
    assert TrainState().best_images == -1
