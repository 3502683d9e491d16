"""Changing a run in place: replaced while it has no checkpoint, and the tag of samples of a longer training."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from experiments import LINEAR, TINY, make_workspace

from hpc_gen.config import loader
from hpc_gen.config.loader import loads
from hpc_gen.runtime.errors import ExitCode, UserError
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import run_setup, runner

SAMPLED = LINEAR + "sample: {num_images: 8, block_images: 4, batch: 4}\n"
SCORED = SAMPLED + "evaluate: {metrics: [fid], extractor: {name: random-conv}, reference: {table: tables/toyval}}\n"


@pytest.fixture(autouse=True)
def no_copy_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy is a hundred fsyncs."""
    monkeypatch.setattr(run_setup, "PACKAGES", ("slurm",))


def test_a_run_that_has_computed_nothing_takes_another_experiment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = make_workspace(tmp_path)
    run = run_setup.prepare_run(loads(LINEAR, ["train.optimizer.lr=0.5"]), tmp_path)
    (run.path / "ledger/encode").mkdir(parents=True)  # tables are recognised by recipes of their own
    (run.path / "ledger/encode/train-00000.json").write_text("{}")
    wanted = run_setup.typed(loads(LINEAR, ["train.optimizer.lr=0.25"]))
    changes = (
        "run 'tiny' has no checkpoint yet, so its experiment is replaced in place: train.optimizer.lr (0.5 -> 0.25)"
    )
    assert f"changes     {changes}" in runner.plan(run, run_setup.accepted(run, wanted, tmp_path))
    assert capsys.readouterr().out == ""
    assert run_setup.prepare_run(wanted, tmp_path).path == run.path
    assert capsys.readouterr().out == f"{changes}\n"
    assert run_setup.load_run(run).identity == wanted.identity
    assert run_setup.EXTENDED not in json.loads(run.hashes_path.read_text())
    assert workspace.train(run) is ExitCode.DONE


@pytest.mark.parametrize("made", ["checkpoints/16", "samples/main", "metrics/main.json", "exports/main.safetensors"])
def test_what_was_computed_keeps_its_experiment(tmp_path: Path, made: str) -> None:
    run = run_setup.prepare_run(loads(TINY), tmp_path)
    (run.path / made).mkdir(parents=True)
    with pytest.raises(UserError, match=r"made with other settings: seed \(7 -> 8\); choose another name") as info:
        run_setup.prepare_run(loads(TINY, ["seed=8"]), tmp_path)
    assert ("hpc-gen fork" in str(info.value)) == made.startswith(
        "checkpoints"
    )  # else there are no weights to go on from


def test_a_run_at_work_keeps_its_experiment(tmp_path: Path) -> None:
    run = run_setup.prepare_run(loads(TINY), tmp_path)
    run.lock.write_text(json.dumps({"attempt": 1, "host": "elsewhere", "pid": 1}))
    with pytest.raises(UserError, match="made with other settings"):
        run_setup.prepare_run(loads(TINY, ["seed=8"]), tmp_path)


def sampled(workspace: Path, text: str = SCORED) -> RunFolder:
    """A run whose samples are those of its end at 48 images, as far as names tell."""
    run = run_setup.prepare_run(loads(text, ["train.total_images=48"]), workspace)
    for folder in (run.checkpoints / "48", run.samples("main")):
        folder.mkdir(parents=True)
        (folder / "plan.json").write_text("{}")
    return run


@pytest.mark.parametrize("by", ["run", "resume"])
def test_a_longer_training_gets_samples_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str], by: str) -> None:
    run = sampled(tmp_path)

    def extend(images: int) -> tuple[str, str]:
        if by == "run":
            run_setup.prepare_run(loads(SCORED, [f"train.total_images={images}"]), tmp_path)
        else:
            run_setup.change_run(run, [f"train.total_images={images}"])
        found = run_setup.load_run(run).experiment
        assert found.sample is not None and found.evaluate is not None
        return found.sample.tag, found.evaluate.tag

    assert extend(96) == ("main-96", "main-96")
    told = capsys.readouterr().out
    assert (
        told == "samples/main is of another checkpoint and stays; the new samples and metrics get the tag 'main-96'\n"
    )
    assert extend(96) == ("main-96", "main-96") and capsys.readouterr().out == ""
    run.samples("main-96").mkdir()
    (run.samples("main-96") / "plan.json").write_text("{}")
    assert extend(192) == ("main-192", "main-192")
    run_setup.change_run(run, ["train.keep_last=1"])
    assert run_setup.load_run(run).experiment.sample.tag == "main-192"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "overrides",
    [["sample.tag=mine", "evaluate.tag=mine"], ["sample.checkpoint=48"], ["train.total_images=48"]],
)
def test_other_changes_leave_the_tag_alone(tmp_path: Path, overrides: list[str]) -> None:
    run = sampled(tmp_path)
    run_setup.change_run(run, ["train.total_images=96", *overrides])
    found = run_setup.load_run(run).experiment.sample
    assert found is not None and found.tag == ("mine" if "sample.tag=mine" in overrides else "main")


def test_without_samples_the_tag_stays(tmp_path: Path) -> None:
    run = run_setup.prepare_run(loads(SAMPLED, ["train.total_images=48"]), tmp_path)
    run_setup.change_run(run, ["train.total_images=96"])
    found = run_setup.load_run(run).experiment.sample
    assert found is not None and found.tag == "main"


@pytest.mark.parametrize(
    ("asked", "order"),
    [
        (["train", "encode"], ["encode", "train"]),
        (["evaluate", "sample", "train", "sample"], ["train", "sample", "evaluate"]),
        (None, ["encode", "train", "sample", "evaluate", "report"]),
    ],
)
def test_stages_are_run_in_the_order_of_the_experiment(asked: list[str] | None, order: list[str]) -> None:
    found = run_setup.typed(loads(SCORED + "encode: {source: mnist, image_size: 8}\n"))
    assert runner.in_order(found, asked) == order


def test_stages_in_an_order_of_the_users_own_keep_it(tmp_path: Path) -> None:
    found = run_setup.typed(loader.loads(SCORED, ["stages=[report, train]"]))
    assert runner.in_order(found, ["train", "report"]) == ["report", "train"]
    lines = runner.plan(RunFolder(tmp_path / "runs/x"), found, ["train", "sample"])
    assert [re.sub(":.*", "", line) for line in lines[2:]] == ["stage       train", "stage       sample"]
