"""Forks: bit-equal to their parent when nothing changed, and refused where the checkpoint cannot carry a change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from experiments import LINEAR, TINY, Workspace, contents, leftovers, make_workspace, rows, scratch_folder

from hpc_gen.data.write import write_table
from hpc_gen.runtime import commit, fence
from hpc_gen.runtime.errors import CheckpointError, DataError, ExitCode, UserError
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import forecast, run_setup
from hpc_gen.stages.fork import fork
from hpc_gen.stages.parent import FORKED, fork_line, forked_from, origins
from hpc_gen.training.checkpoint import manifest, read, storage

AT = 32


def silent(line: str) -> None:
    """Nobody listens."""


@pytest.fixture(scope="module")
def base() -> Iterator[Workspace]:
    """A workspace with a finished run `parent` (96 images, checkpoints at every 16) and one of the energy method."""
    with scratch_folder() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_setup, "PACKAGES", ("slurm",))
        workspace = make_workspace(folder)
        for name, text in (("parent", LINEAR), ("energy", TINY)):
            run = workspace.run(name, f"name={name}", "train.keep_last=9", text=text)
            assert workspace.train(run) is ExitCode.DONE
        yield workspace


@pytest.fixture
def parent(base: Workspace) -> Iterator[RunFolder]:
    """The run to fork; forks are removed afterwards."""
    yield RunFolder(base.path / "runs" / "parent")
    for path in (base.path / "runs").iterdir():
        if path.name not in ("parent", "energy"):
            shutil.rmtree(path)


@pytest.fixture(autouse=True)
def no_copy_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy is a hundred fsyncs."""
    monkeypatch.setattr(run_setup, "PACKAGES", ("slurm",))


def facts_of(path: Path) -> dict[str, object]:
    return dict(manifest.read(path).facts)


# --- what a fork is


@pytest.mark.parametrize("name", ["parent", "energy"])
def test_an_unchanged_fork_trains_bit_for_bit_as_its_parent(base: Workspace, parent: RunFolder, name: str) -> None:
    before = RunFolder(base.path / "runs" / name)
    held = contents(before.path)
    child = fork(before, "child", [], silent, at=AT)
    assert contents(before.path) == held  # nothing of the parent is touched
    shutil.move(before.path, base.path / "away")  # and the child needs nothing of it
    try:
        assert base.train(child) is ExitCode.DONE
    finally:
        shutil.move(base.path / "away", before.path)
    for info in read.list_checkpoints(before):
        if info.images_seen < AT:
            continue
        mine, its = manifest.read(child.checkpoints / info.path.name), manifest.read(info.path)
        assert mine.files == its.files, info.images_seen  # SHA-256 of every file but the manifest itself
        facts = dict(mine.facts)
        assert facts.pop("forked")["run"] == name  # type: ignore[index]
        assert facts == dict(its.facts)
    assert rows(child) == [row for row in rows(before) if row[0] > AT]
    assert leftovers(child) == []


def test_what_changes_numbers_and_what_only_operation_is_said(parent: RunFolder) -> None:
    said: list[str] = []
    changes = ["train.optimizer.lr=0.1", "train.save_every=32", "seed=9"]
    child = fork(parent, "child", changes, said.append, at=AT)
    text = "\n".join(said)
    assert "changed     train.optimizer.lr = 0.1 (was 0.001): changes numbers" in text
    assert "changed     train.save_every = 32 (was 16): operation only" in text
    assert "changed     seed = 9 (was 7): changes numbers" in text
    assert f"training    from {AT} to 96 images" in text
    found = run_setup.load_run(child)
    assert found.experiment.seed == 9 and found.experiment.name == "child"
    changed = json.loads(child.hashes_path.read_text())[FORKED]["changed"]
    assert changed == ["seed", "train.optimizer.lr", "train.save_every"]


def test_provenance_survives_and_is_told(base: Workspace, parent: RunFolder) -> None:
    child = fork(parent, "child", ["train.optimizer.lr=0.1"], silent, at=AT)
    expected = {
        "run": "parent",
        "identity": run_setup.load_run(parent).identity,
        "manifest_sha256": read.manifest_sha256(parent.checkpoints / f"{AT:012d}"),
        "images_seen": AT,
        "changed": ["train.optimizer.lr"],
    }
    assert forked_from(child) == expected
    assert base.train(child) is ExitCode.DONE
    assert facts_of(read.newest(child).path)["forked"] == {**expected, "cut_short": 0}
    run_setup.change_run(child, ["train.keep_last=1"])  # rewrites hashes.json
    assert forked_from(child) == expected
    assert origins(child) == [("forked from", fork_line(expected))] and "parent at 32 images" in fork_line(expected)
    assert origins(parent) == []


def test_a_fork_of_another_seed_trains_otherwise(base: Workspace, parent: RunFolder) -> None:
    child = fork(parent, "child", ["seed=9"], silent, at=AT)
    assert base.train(child) is ExitCode.DONE
    last = f"{96:012d}"
    assert manifest.read(child.checkpoints / last).files != manifest.read(parent.checkpoints / last).files


def test_latest_is_the_newest_and_a_longer_training_goes_on(base: Workspace, parent: RunFolder) -> None:
    said: list[str] = []
    child = fork(parent, "idle", [], said.append)
    assert "training    nothing is left: train.total_images = 96; raise it to train on" in said
    child = fork(parent, "longer", ["train.total_images=128"], silent)
    assert read.newest(child).images_seen == 96
    assert base.train(child) is ExitCode.DONE and read.newest(child).images_seen == 128


def test_what_a_stop_cut_short_is_done_by_the_fork(base: Workspace, parent: RunFolder) -> None:
    """The checkpoint of a preemption inside validation: the fork validates there, as the resumed parent would."""
    validated = LINEAR + "  validate: {every_images: 16, num_images: 16}\n"
    cut = base.run("cut", "name=cut", "train.stop_at_images=16", text=validated)
    assert base.train(cut) is ExitCode.DONE
    with (cut.journal / "0001_train_0.jsonl").open("a") as stream:  # what a stop inside validation leaves
        stream.write('{"t": 1.0, "kind": "cut_short", "what": "validation", "images_seen": 16}\n')
    child = fork(cut, "child", ["train.stop_at_images=null"], silent)
    assert facts_of(read.newest(child).path)["forked"]["cut_short"] == 1  # type: ignore[index]
    assert base.train(child) is ExitCode.DONE
    first, *_ = rows(child)
    assert first[0] == 16 and "validation/loss" in first[1]
    assert base.train(child) is ExitCode.DONE  # and only once
    assert "caught_up" not in (child.journal / "0002_train_0.jsonl").read_text()


# --- dry run, names, kills, disk


def test_dry_run_changes_nothing(base: Workspace, parent: RunFolder) -> None:
    before, said = contents(base.path), []
    fork(parent, "child", ["train.total_images=128"], said.append, dry_run=True)
    assert contents(base.path) == before
    assert f"would copy {read.newest(parent).path}" in said[-1]


def test_names(parent: RunFolder) -> None:
    with pytest.raises(UserError, match=r"run .*/parent exists already; choose another name, or remove it"):
        fork(parent, "parent", [], silent)
    with pytest.raises(UserError, match="'name=x' and --name exclude one another"):
        fork(parent, "child", ["name=x"], silent)
    with pytest.raises(ValueError, match="command line: 'name'"):
        fork(parent, "../child", [], silent)


def test_a_kill_leaves_no_half_fork(parent: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    operations = 0

    def count(operation: str, path: Path) -> None:
        nonlocal operations
        operations += 1
        if operations == die_at:
            raise Killed

    monkeypatch.setattr(commit.ops, "observer", count)
    outcomes = set()
    for die_at in range(1, 400, 7):  # noqa: B007  read by `count`
        operations = 0
        try:
            child = fork(parent, "child", [], silent, at=AT)
        except Killed:
            child = RunFolder(parent.path.parent / "child")
        outcomes.add(child.path.exists())
        if child.path.exists():
            monkeypatch.setattr(commit.ops, "observer", None)
            assert run_setup.load_run(child) and read.verify(read.newest(child).path) == []
            break
    assert outcomes == {False, True}


def test_a_full_disk_is_seen_before(parent: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def tiny(folder: Path) -> forecast.Room:
        return forecast.Room(10, 1000, 5, 100)

    monkeypatch.setattr(forecast, "room", tiny)
    with pytest.raises(UserError, match=r"stage 'fork' needs about .* but only 10 B are free"):
        fork(parent, "child", [], silent)
    assert not (parent.path.parent / "child").exists()


# --- what cannot be carried


@pytest.mark.parametrize(
    ("run", "change", "message"),
    [
        (
            "energy",
            "method.hidden=32",
            r"cannot carry the change of method.hidden \(16 -> 32\): it has 'model/denoiser/",
        ),
        ("energy", "method.depth=2", r"cannot carry the change of method.depth \(1 -> 2\): it has no 'model/denoiser/"),
        ("energy", "method.variant=energy", r"method.variant \('standard' -> 'energy'\): it has no 'model/denoiser/"),
        ("energy", "train.ema.slow={decay: 0.99}", r"train.ema.slow.decay \(null -> 0.99\): it has no average 'slow'"),
        ("parent", "train.total_images=16", "'train.total_images' = 16 lies before the checkpoint at 32 images; raise"),
        ("parent", "data.table=tables/none", "'data.table' = 'tables/none' is not there yet"),
        ("parent", "train.init_from={run: energy}", "'train.init_from' is for runs without a checkpoint"),
    ],
)
def test_what_the_checkpoint_cannot_carry(
    base: Workspace, parent: RunFolder, run: str, change: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        fork(RunFolder(base.path / "runs" / run), "child", [change], silent, at=AT)
    assert not (base.path / "runs" / "child").exists()


def test_a_batch_that_does_not_divide_the_clock(parent: RunFolder) -> None:
    changes = ["train.global_batch=48", "train.log_every=48", "train.save_every=48"]
    with pytest.raises(UserError, match="'train.global_batch' = 48 does not divide the 32 images of the checkpoint"):
        fork(parent, "child", changes, silent, at=AT)
    fork(parent, "child", changes, silent, at=96)


def test_averages_may_be_left_behind(base: Workspace, parent: RunFolder) -> None:
    child = fork(parent, "child", ["train.ema={}"], silent, at=AT)
    assert base.train(child) is ExitCode.DONE
    assert not any(name.startswith("ema/") for name in storage.keys(read.newest(child).path))


def test_another_table_is_named(base: Workspace, parent: RunFolder) -> None:
    import torch

    other = {"pixels": torch.zeros(64, 1, 8, 8, dtype=torch.uint8), "labels": torch.arange(64) % 4}
    write_table(base.path / "tables" / "other", other, shard_rows=32, num_classes=4)
    said: list[str] = []
    child = fork(parent, "child", ["data.table=tables/other"], said.append, at=AT)
    assert any(line.startswith("changed     content of the table other") for line in said)
    assert base.train(child) is ExitCode.DONE
    wrong = {"pixels": torch.zeros(64, 1, 4, 4, dtype=torch.uint8), "labels": torch.arange(64) % 4}
    write_table(base.path / "tables" / "wrong", wrong, shard_rows=32, num_classes=4)
    with pytest.raises(DataError, match="a row of column 'pixels' has shape"):
        fork(parent, "child2", ["data.table=tables/wrong"], silent, at=AT)


def test_a_damaged_checkpoint_is_refused(base: Workspace, parent: RunFolder) -> None:
    copy = RunFolder(base.path / "runs" / "copy")
    shutil.copytree(parent.path, copy.path)
    with pytest.raises(CheckpointError, match="has no checkpoint at 33 images; it has: 16, 32"):
        fork(copy, "child", [], silent, at=33)
    data = next(path for path in read.newest(copy).path.iterdir() if path.suffix == ".distcp")
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"is not whole: .*; fork from another one with --at"):
        fork(copy, "child", [], silent)
    fork(copy, "child", [], silent, at=AT)


def test_the_fork_of_a_fork_names_its_parent(parent: RunFolder) -> None:
    child = fork(parent, "child", [], silent, at=AT)
    grandchild = fork(child, "grandchild", [], silent)
    assert facts_of(read.newest(grandchild).path)["forked"]["run"] == "child"  # type: ignore[index]


def test_a_fork_begins_free(base: Workspace, parent: RunFolder) -> None:
    """Also when the parent is at work: it is a folder of its own, with no attempt yet."""
    fence.Fence.take(parent, fence.claim_attempt(parent, "train"))
    child = fork(parent, "child", [], silent, at=AT)
    assert not child.lock.exists() and list(child.journal.iterdir()) == []
    assert replace(read.newest(child), path=parent.path) == replace(read.at(parent, AT), path=parent.path)
