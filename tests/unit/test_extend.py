"""A longer training in place: allowed where no number computed so far depends on its length, else the fork is named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from experiments import LINEAR, Workspace, make_workspace, rows

from hpc_gen.config import loader
from hpc_gen.runtime.errors import CheckpointError, ExitCode, UserError
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import run_setup
from hpc_gen.training.checkpoint import manifest, read

SHORT = LINEAR.replace("total_images: 96", "total_images: 48")
COSINE = SHORT + "  schedule: {kind: cosine}\n"


@pytest.fixture(autouse=True)
def no_copy_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy is a hundred fsyncs."""
    monkeypatch.setattr(run_setup, "PACKAGES", ("slurm",))


def finished(workspace: Workspace, text: str = SHORT) -> RunFolder:
    run = run_setup.prepare_run(loader.loads(text), workspace.path)
    assert workspace.train(run) is ExitCode.DONE and read.newest(run).images_seen == 48
    return run


def extended(run: RunFolder) -> list[dict[str, object]]:
    """Events `extended` in the journal."""
    lines = [json.loads(line) for path in sorted(run.journal.glob("*.jsonl")) for line in path.open()]
    return [line for line in lines if line["kind"] == "extended"]


@pytest.mark.parametrize("by", ["run", "resume"])
def test_a_constant_rate_is_extended_in_place_with_the_numbers_of_a_long_run(tmp_path: Path, by: str) -> None:
    workspace = make_workspace(tmp_path)
    run = finished(workspace)
    before = run_setup.load_run(run)
    if by == "run":
        assert run_setup.prepare_run(loader.loads(SHORT, ["train.total_images=96"]), tmp_path).path == run.path
    else:
        run_setup.change_run(run, ["train.total_images=96"])
    assert run_setup.load_run(run).identity != before.identity
    assert workspace.train(run) is ExitCode.DONE
    [event] = extended(run)
    assert event["changed"] == [["train.total_images", 48, 96]] and event["images_seen"] == 48
    long = run_setup.prepare_run(loader.loads(LINEAR, ["name=long"]), tmp_path)
    assert workspace.train(long) is ExitCode.DONE
    mine, its = manifest.read(read.newest(run).path), manifest.read(read.newest(long).path)
    assert (mine.files, dict(mine.facts)) == (its.files, dict(its.facts))
    assert rows(run) == rows(long)
    assert workspace.train(run) is ExitCode.DONE
    assert len(extended(run)) == 1  # its checkpoints say so themselves now


def test_twice_and_with_a_kill_before_the_first_new_checkpoint(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path)
    run = finished(workspace)
    run_setup.change_run(run, ["train.total_images=64"])
    run_setup.change_run(run, ["train.total_images=96"])  # the newest checkpoint is still of the first length
    assert workspace.train(run) is ExitCode.DONE and read.newest(run).images_seen == 96
    assert extended(run)[0]["changed"] == [["train.total_images", 48, 64]]


def test_a_cosine_is_refused_naming_the_fork(tmp_path: Path) -> None:
    run = finished(make_workspace(tmp_path), COSINE)
    content = run.config_path.read_bytes(), run.hashes_path.read_bytes()
    expected = (
        "run 'tiny' cannot be extended in place: its learning rate follows a cosine that ends at train.total_images = "
        "48, so a run of 96 has other numbers from the start; `hpc-gen fork tiny --at latest --name NEW "
        "train.total_images=96` goes on from its weights"
    )
    for attempt in (
        lambda: run_setup.change_run(run, ["train.total_images=96"]),
        lambda: run_setup.prepare_run(loader.loads(COSINE, ["train.total_images=96"]), tmp_path),
        lambda: run_setup.changed(run, ["train.total_images=96"]),
    ):
        with pytest.raises(UserError, match=re.escape(expected)):
            attempt()
    assert (run.config_path.read_bytes(), run.hashes_path.read_bytes()) == content


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["train.total_images=32"],
            r"cannot be shortened from train.total_images = 48 to 32; train.stop_at_images=32 ends",
        ),
        (
            ["train.total_images=96", "seed=3"],
            r"was made with other settings: seed \(7 -> 3\); train.total_images \(48 -> 96\)",
        ),
        (
            ["train.optimizer.lr=1"],
            r"other settings: train.optimizer.lr .* go on from its weights with `hpc-gen fork tiny`",
        ),
        (["name=other"], "a run keeps its name; `hpc-gen fork tiny --at latest --name NEW` begins another"),
    ],
)
def test_other_changes_are_refused(tmp_path: Path, changes: list[str], message: str) -> None:
    run = run_setup.prepare_run(loader.loads(SHORT), tmp_path)
    (run.checkpoints / "16").mkdir(parents=True)
    before = run.hashes_path.read_bytes()
    with pytest.raises(UserError, match=message):
        run_setup.change_run(run, changes)
    assert run.hashes_path.read_bytes() == before


def test_operation_keys_are_replaced_at_resume(tmp_path: Path) -> None:
    run = run_setup.prepare_run(loader.loads(SHORT), tmp_path)
    run_setup.change_run(run, ["train.save_every=48", "train.keep_last=1"])
    train = run_setup.load_run(run).experiment.train
    assert train is not None and (train.save_every, train.keep_last) == (48, 1)
    run_setup.change_run(run, [])
    assert "extended" not in json.loads(run.hashes_path.read_text())


def test_a_checkpoint_of_another_run_is_still_refused(tmp_path: Path) -> None:
    """The allowance is a list of identities that this run had, no open door."""
    workspace = make_workspace(tmp_path)
    run = finished(workspace)
    other = run_setup.prepare_run(loader.loads(SHORT, ["name=other", "seed=8"]), tmp_path)
    assert workspace.train(other) is ExitCode.DONE
    run_setup.change_run(run, ["train.total_images=96"])
    newest = read.newest(run).path
    newest.rename(tmp_path / "away")
    read.newest(other).path.rename(newest)
    with pytest.raises(CheckpointError, match="was written with another seed, method, data or train section"):
        workspace.train(run)
