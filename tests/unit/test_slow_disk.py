"""A disk that is slower than training: training waits, says so, and commits what it would have committed."""

from __future__ import annotations

from pathlib import Path

import experiments
import pytest

from hpc_gen.runtime import commit, journal
from hpc_gen.stages.prove_kills import manifests
from hpc_gen.training import loop

SLOW_S = 0.02  # for each of some thirty operations of a save; the two steps between take a few milliseconds


def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files below checkpoints/ take their time."""
    from hpc_gen.runtime import clock

    def slow(name: str, path: Path) -> None:
        if "checkpoints" in path.parts:
            clock.sleep(SLOW_S)

    monkeypatch.setattr(commit.ops, "observer", slow)


def test_a_disk_slower_than_training_costs_time_only(
    workspace: experiments.Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fast, slow = (workspace.run(name, "train.keep_last=9", text=experiments.LINEAR) for name in ("fast", "slow"))
    assert workspace.train(fast) == 0
    monkeypatch.setattr(loop, "WORTH_SAYING_S", 0.0)
    slow_disk(monkeypatch)
    assert workspace.train(slow) == 0
    assert manifests(slow) == manifests(fast) and len(manifests(slow)) == 6
    assert experiments.rows(slow) == experiments.rows(fast)
    waited = [event.fields for event in journal.read(slow) if event.kind == "save_waited"]
    assert len(waited) >= 3 and {fields["images_seen"] for fields in waited} <= {32, 48, 64, 80, 96}  # 16: the first
    assert sum(fields["waited_s"] for fields in waited) > SLOW_S
    said = capsys.readouterr().out
    assert "images training waited " in said and "a larger train.save_every, or a faster disk" in said


def test_a_stop_waits_for_the_slow_disk_too(workspace: experiments.Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    run = workspace.run("slow", "train.keep_last=9", text=experiments.LINEAR)
    slow_disk(monkeypatch)
    assert workspace.train(run, "train.stop_at_images=24") == 0
    assert sorted(manifests(run)) == [16, 24]
    assert workspace.train(run) == 0 and len(manifests(run)) == 7
