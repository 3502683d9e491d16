"""Losses that are not what they were: NaN in a batch, a spike, and spikes that persist (docs/bad_input.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import experiments
import pytest
import torch
from experiments import LINEAR, Workspace
from tiny_method import TinyMethod

from hpc_gen.config.errors import ConfigError
from hpc_gen.config.train import NonFiniteConfig
from hpc_gen.methods.protocol import Losses, Term
from hpc_gen.runtime.errors import DivergedError, ExitCode
from hpc_gen.runtime.journal import Event, read
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.training import loop
from hpc_gen.training.checkpoint import storage
from hpc_gen.training.guard import FEWEST_STEPS, RECENT_STEPS, NonFiniteGuard
from hpc_gen.training.state import TrainState

LONG = ("train.total_images=320", "train.save_every=8", "train.keep_last=99")
GUARDED = (*LONG, "train.non_finite={spike_factor: 5.0, max_consecutive: 3, max_rollbacks: 2}")


def events(run: RunFolder, kind: str) -> list[Event]:
    return [event for event in read(run) if event.kind == kind]


def weights(run: RunFolder, position: int) -> dict[str, torch.Tensor]:
    tensors = storage.load(run.checkpoints / f"{position:012d}")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("train/")}


def spike(monkeypatch: pytest.MonkeyPatch, when: Callable[[int, int], bool]) -> None:
    """Losses 100 times as high in steps where `when(images_seen before it, draw counter)`."""
    place = [0, 0]
    step, objective = loop._step_all_turns, TinyMethod.objective

    def stepped(job: loop.TrainJob, micro_batches: Any) -> Any:
        place[:] = job.state.images_seen, job.state.draw_counter
        return step(job, micro_batches)

    def spiked(self: TinyMethod, *args: Any) -> Losses:
        losses = objective(self, *args)
        if not when(*place):
            return losses
        return Losses({name: Term(term.sum * 100, term.count, term.weight) for name, term in losses.terms.items()})

    monkeypatch.setattr(loop, "_step_all_turns", stepped)
    monkeypatch.setattr(TinyMethod, "objective", spiked)


def test_a_spike_moves_no_weight(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spike(monkeypatch, lambda images_seen, counter: images_seen == 240)
    run = workspace.run("guarded", *GUARDED, text=LINEAR)
    assert workspace.train(run) == ExitCode.DONE
    before, after = weights(run, 240), weights(run, 248)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    (told,) = events(run, "non_finite")
    assert told.fields["images_seen"] == 248 and told.fields["loss"] > 0
    assert "step before 248 images was a spike of the loss (" in capsys.readouterr().out
    assert not events(run, "rollback")

    plain = workspace.run("plain", *LONG, text=LINEAR)  # without the key it is taken as it comes
    assert workspace.train(plain) == ExitCode.DONE
    assert not events(plain, "non_finite") and not torch.equal(
        weights(plain, 240)["model/net/weight"], weights(plain, 248)["model/net/weight"]
    )

    cut = workspace.run("cut", *GUARDED, text=LINEAR)  # the usual loss is not forgotten between attempts
    for end in (160, 240, 248, 320):
        assert workspace.train(cut, f"train.stop_at_images={end}") == ExitCode.DONE
    assert experiments.contents(cut.checkpoints / f"{320:012d}") == experiments.contents(
        run.checkpoints / f"{320:012d}"
    )
    assert experiments.rows(cut) == experiments.rows(run)


def test_spikes_that_persist_are_left_by_a_roll_back(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    spike(monkeypatch, lambda images_seen, counter: images_seen >= 240 and counter == 0)
    run = workspace.run("rolled", *GUARDED, "train.save_every=80", text=LINEAR)
    assert workspace.train(run) == ExitCode.DONE
    (told,) = events(run, "rollback")
    assert (told.fields["images_seen"], told.fields["resumed_from"], told.fields["draw_counter"]) == (264, 240, 1)
    assert int(storage.load(run.checkpoints / f"{320:012d}", "train/")["train/non_finite_total"]) == 3


def test_spikes_for_ever_end_as_diverged(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    spike(monkeypatch, lambda images_seen, counter: images_seen >= 240)
    run = workspace.run("diverged", *GUARDED, "train.save_every=80", text=LINEAR)
    sentence = (
        r"3 steps in a row were not finite or spikes before 264 images, after 2 roll-backs; lower train\.optimizer\.lr, "
        "or look for bad rows in the table"
    )
    with pytest.raises(DivergedError, match=f"^{sentence}$") as caught:
        workspace.train(run)
    assert caught.value.exit_code == ExitCode.DIVERGED
    assert len(events(run, "rollback")) == 2


def test_nan_in_a_batch_and_in_every_batch(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    """Once: skipped and said; for ever: rolled back, then one sentence. The weights never hold one."""
    run = workspace.run("once", "method.bad_at=[40]", text=LINEAR)
    assert workspace.train(run) == ExitCode.DONE
    assert "step before 48 images was not finite and was skipped" in capsys.readouterr().out
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(run, 96).values())
    run = workspace.run("ever", "method.bad_from=40", "train.non_finite={max_consecutive: 2}", text=LINEAR)
    sentence = (
        r"2 steps in a row were not finite before 64 images, after 2 roll-backs; lower train\.optimizer\.lr, or look "
        "for bad rows in the table"
    )
    with pytest.raises(DivergedError, match=f"^{sentence}$"):
        workspace.train(run)


def filled(losses: list[float], factor: float | None = 3.0) -> tuple[NonFiniteGuard, TrainState]:
    guard, state = NonFiniteGuard(NonFiniteConfig(spike_factor=factor)), TrainState()
    for loss in losses:
        guard.remember(state, {"train": loss})
    return guard, state


def test_the_limit_follows_the_median_of_late() -> None:
    guard, state = filled([2.0] * (FEWEST_STEPS - 1))
    assert guard.highest_loss(state, "train") is None  # too few to know what is usual
    guard.remember(state, {"train": 1e6})
    assert guard.highest_loss(state, "train") == 6.0 and guard.highest_loss(state, "other") is None
    guard, state = filled([9.0] * RECENT_STEPS + [1.0] * RECENT_STEPS)
    assert guard.highest_loss(state, "train") == 3.0 and len(state.recent["train"]) == RECENT_STEPS
    resumed = TrainState.from_tensors(state.tensors())
    assert resumed == state and guard.highest_loss(resumed, "train") == 3.0


@pytest.mark.parametrize("usual", [0.0, -2.0])
def test_no_limit_where_a_factor_says_nothing(usual: float) -> None:
    guard, state = filled([usual] * 50)
    assert guard.highest_loss(state, "train") is None


def test_without_the_key_nothing_is_remembered() -> None:
    guard, state = filled([2.0] * 50, factor=None)
    assert state == TrainState() and guard.highest_loss(state, "train") is None


def test_a_factor_that_would_skip_half_the_steps_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'train\.non_finite\.spike_factor' must be a number of more than 1 or null"):
        experiments.resolved("train.non_finite.spike_factor=0.9", text=LINEAR)
