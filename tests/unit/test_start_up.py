"""The start-up budget: parts in order, the launch known or not, and that a training tells it."""

from __future__ import annotations

import pytest
from experiments import Workspace

from hpc_gen.runtime import clock, journal
from hpc_gen.runtime.start_up import LAUNCHED, PARTS, StartUp


@pytest.mark.parametrize("launched", [True, False])
def test_parts_and_their_sum(monkeypatch: pytest.MonkeyPatch, launched: bool) -> None:
    fake = clock.FakeClock()
    with clock.use(fake):
        monkeypatch.setattr(clock, "process_start", lambda: fake.now() - 4.0)
        monkeypatch.setenv(LAUNCHED, f"{fake.now() - 5.5:.3f}" if launched else "")
        start = StartUp.begin()
        for part, seconds in (("rendezvous", 1.0), ("load", 2.0), ("first_step", 0.5)):
            fake.advance(seconds)
            start.mark(part)
    expected = {"container": 1.5, "import": 4.0, "rendezvous": 1.0, "load": 2.0, "first_step": 0.5}
    if not launched:
        del expected["container"]
    assert start.seconds == pytest.approx(expected, abs=1e-3)
    assert list(start.seconds) == [part for part in PARTS if part in expected]
    assert start.fields["total_s"] == pytest.approx(sum(expected.values()), abs=1e-3)
    told = "container 1.5, " if launched else ""
    assert start.sentence() == (
        f"start-up {9.0 if launched else 7.5} s: {told}import 4.0, rendezvous 1.0, load 2.0, first step 0.5"
    )


@pytest.mark.parametrize("value", ["soon", "0", "9e99"])
def test_a_launch_that_cannot_be_is_left_out(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(LAUNCHED, value)
    assert "container" not in StartUp.begin().seconds


def test_a_training_tells_it(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    run = workspace.run("told", "train.total_images=16")
    assert workspace.train(run) == 0
    (event,) = [event for event in journal.read(run) if event.kind == "start_up"]
    parts = [event.fields[f"{part}_s"] for part in PARTS[1:]]
    assert all(value >= 0.0 for value in parts) and event.fields["total_s"] == pytest.approx(sum(parts))
    assert "start-up " in capsys.readouterr().out
    assert workspace.train(run) == 0  # nothing is left to do: no first step, so no budget
    assert len([event for event in journal.read(run) if event.kind == "start_up"]) == 1
