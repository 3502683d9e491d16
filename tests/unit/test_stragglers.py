"""`hpc-gen spans`: who works longest, who waits; attempts, lost lines, and runs without spans."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from experiments import TINY, Workspace
from typer.testing import CliRunner

from hpc_gen.cli import app
from hpc_gen.runtime.errors import UserError
from hpc_gen.runtime.journal import Journal
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import stragglers


def write(run: RunFolder, attempt: int, rank: int, forward_s: float, waits_s: float, data_s: float = 0.1) -> None:
    """Spans of one rank over 10 steps in two intervals; a step is as long on every rank."""
    book = Journal(run, attempt, "train", rank, below="spans")
    book.event("begin", rank=rank, host=f"node{rank // 2}", world_size=4, pid=1, detail="interval")
    for place in (1, 2):
        names = {
            "step": [5, forward_s + waits_s, 0.0, 1.0],
            "forward_backward": [5, forward_s, forward_s, forward_s / 4],
            "collective": [5, waits_s, waits_s, waits_s / 4],
            "data_wait": [5, data_s, data_s, data_s / 5],
        }
        book.event("spans", images_seen=40 * place, steps=5, elapsed_s=3.0, names=names)
    book.close()


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "runs" / "wide")
    for rank in range(4):
        slow = rank == 2
        write(run, 1, rank, 1.0, 1.0)
        write(run, 2, rank, 1.8 if slow else 1.0, 0.1 if slow else 0.9)
    return run


def test_the_slow_one_is_marked(run: RunFolder) -> None:
    attempt, ranks = stragglers.times(run)
    assert attempt == 2 and [each.rank for each in ranks] == [0, 1, 2, 3]
    slow = ranks[2]
    assert slow.host == "node1" and slow.steps == 10 and slow.images_seen == 80
    assert (slow.own_s, slow.data_s, slow.waits_s) == pytest.approx((3.6, 0.2, 0.2))
    assert slow.slow == pytest.approx(3.8 / 2.2) and slow.longest == ("forward_backward", pytest.approx(0.45))
    assert [each.is_straggler for each in ranks] == [False, False, True, False]
    lines = stragglers.lines(run)
    assert lines[0] == "wide: attempt 2, 4 ranks, 10 steps until 80 images"
    assert lines[2].split()[:2] == ["2", "node1"] and lines[2].endswith("<- straggler")
    assert sum("straggler" in line for line in lines) == 1
    spans = {line.split()[0]: line.split()[1:] for line in lines[7:]}
    assert spans["forward_backward"] == ["2.40", "2.00", "3.60", "2"]


def test_an_attempt_of_ones_choice(run: RunFolder) -> None:
    assert not any(each.is_straggler for each in stragglers.times(run, 1)[1])
    with pytest.raises(UserError, match="attempt 3 of wide has no spans; there are: 1, 2"):
        stragglers.times(run, 3)


def test_without_spans_and_with_lost_ones(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train.spans=off"):
        stragglers.times(RunFolder(tmp_path / "none"))
    book = Journal(run, 2, "train", 1, below="spans")
    book.event("lost", lines=7)
    book.event("spans", images_seen=1, steps="odd", names=[1])  # of another version
    book.close()
    path = run.journal / "spans" / "0002_train_1.jsonl"
    text = path.read_text().replace('"odd"', "0")
    path.write_text(text + '{"t": 1, "ki')  # torn by a kill
    assert any("7 lines of spans were lost" in line for line in stragglers.lines(run))


def test_of_a_real_training_as_typed(workspace: Workspace) -> None:
    run = workspace.run("real", text=TINY)
    assert workspace.train(run) == 0
    ran = CliRunner().invoke(app, ["spans", "real", "-w", str(workspace.path), "--json"])
    assert ran.exit_code == 0, ran.output
    (rank,) = json.loads(ran.output)["ranks"]
    assert rank["steps"] == 12 and rank["images_seen"] == 96 and not rank["straggler"]
    assert {"forward_backward", "optimizer", "ema", "data_wait", "save"} <= set(rank["names"])
    assert rank["own_s"] > 0
