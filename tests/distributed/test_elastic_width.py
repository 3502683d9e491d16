"""A run that starts again with whatever is there trains what it would have trained: same rows, draws, schedule, batch.

The ranks are real (gloo, one process each), forked from a warm process (tests/support/warm_ranks.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import experiments
import pytest
from experiments import Workspace
from warm_ranks import WarmRanks, output

from hpc_gen.runtime.errors import ExitCode
from hpc_gen.runtime.journal import read
from hpc_gen.training.checkpoint import manifest
from hpc_gen.training.checkpoint import read as reading

TEXT = experiments.TINY.replace("global_batch: 8", "global_batch: 16\n  micro_batch: 4\n  width: [4, 2, 1]")
SCHEDULE = ("train.schedule.kind=cosine", "train.schedule.warmup_images=32", "train.keep_last=9")
WIDTHS = (4, 1, 2, 4, 1, 2)  # one attempt each, 16 images long: a save and a row


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmRanks]:
    with WarmRanks() as ranks:
        yield ranks


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return experiments.make_workspace(tmp_path_factory.mktemp("width"))


@pytest.mark.timeout(300)
def test_every_attempt_may_have_another_width(warm: WarmRanks, space: Workspace) -> None:
    undisturbed, elastic = (space.run(name, *SCHEDULE, text=TEXT) for name in ("undisturbed", "elastic"))
    assert warm.train(undisturbed, 1) == [0]
    for number, ranks in enumerate(WIDTHS, 1):
        assert warm.train(elastic, ranks, [f"train.stop_at_images={16 * number}"]) == [0] * ranks, output(elastic)
    expected = {info.images_seen: info for info in reading.list_checkpoints(undisturbed)}
    found = reading.list_checkpoints(elastic)
    assert [info.world_size for info in found] == list(WIDTHS) and len(expected) == len(WIDTHS)
    for info in found:
        facts = [manifest.read(each.path).facts for each in (info, expected[info.images_seen])]
        assert facts[0]["digest"] == facts[1]["digest"] and facts[0]["identity"] == facts[1]["identity"]
    ours, theirs = experiments.rows(elastic), experiments.rows(undisturbed)
    assert [row[0] for row in ours] == [row[0] for row in theirs]
    for (_, row), (_, peer) in zip(ours, theirs, strict=True):
        assert row == pytest.approx(peer, rel=1e-5)
        assert row["learning_rate"] == peer["learning_rate"]


def test_a_width_that_is_not_allowed_leaves_no_trace(warm: WarmRanks, space: Workspace) -> None:
    run = space.run("refused", text=TEXT.replace("width: [4, 2, 1]", "width: [2, 1]"))
    assert warm.train(run, 4) == [ExitCode.USER] * 4
    assert "this attempt has 4 ranks, and 'train.width' allows [2, 1]; start 2 of them" in output(run)
    assert list(read(run)) == [] and not run.checkpoints.exists()
