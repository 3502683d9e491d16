"""Checkpoints handled from outside: many parts merged into one, everything as safetensors, export, and pruning."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import experiments
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from hpc_gen import cli
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import CheckpointError, DataError, UserError
from hpc_gen.runtime.fence import Fence, claim_attempt
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import checkpoint_tools as tools
from hpc_gen.stages import weights_transfer
from hpc_gen.training.checkpoint import manifest, read, storage
from hpc_gen.training.checkpoint.pieces import Pieces, of_flat_slice

END = 96
NUMBERS = itertools.count()  # of runs, for their names


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> experiments.Workspace:
    return experiments.make_workspace(tmp_path_factory.mktemp("tools"))


@pytest.fixture(scope="module")
def trained(space: experiments.Workspace) -> RunFolder:
    """Checkpoints at 16, 32, ... 96 images, written by one ddp rank."""
    run = space.run("whole", "train.keep_last=9")
    assert space.train(run) == 0
    return run


def in_parts(tensor: Tensor) -> Tensor | Pieces:
    """As flat partitions cut it, in three."""
    if tensor.numel() < 3:
        return tensor
    flat, shape = tensor.reshape(-1), tuple(tensor.shape)
    ends = [0, tensor.numel() // 3, tensor.numel() - 1, tensor.numel()]
    parts = [of_flat_slice(shape, a, flat[a:b]) for a, b in zip(ends, ends[1:], strict=False)]
    return Pieces(shape, tensor.dtype, tuple(box for part in parts for box in part.boxes))


@pytest.fixture
def sharded(space: experiments.Workspace, trained: RunFolder) -> RunFolder:
    """A run with the same state at the end, in parts."""
    run = space.run(f"parts-{next(NUMBERS)}")
    source = read.newest(trained).path
    folder = run.checkpoints / source.name
    folder.mkdir(parents=True)
    files = storage.save({name: in_parts(tensor) for name, tensor in storage.load(source).items()}, folder, None)
    facts = manifest.read(source).facts
    commit.write_json(folder / manifest.NAME, manifest.Manifest(END, 3, files, facts).to_json())
    assert read.verify(folder) == []
    assert (folder / "__0_0.distcp").read_bytes() != (source / "__0_0.distcp").read_bytes()
    return run


def test_a_merged_checkpoint_is_the_one_that_one_rank_writes(trained: RunFolder, sharded: RunFolder) -> None:
    said: list[str] = []
    path = tools.convert(sharded, said.append)
    assert path == sharded.exports / f"{END:012d}" and read.verify(path) == []
    for name in ("__0_0.distcp", ".metadata"):
        assert (path / name).read_bytes() == (read.newest(trained).path / name).read_bytes(), name
    content, origin = manifest.read(path), read.newest(sharded).path
    assert content.world_size == 1
    assert content.facts["converted"] == {"manifest": read.manifest_sha256(origin), "world_size": 3}
    assert content.facts["digest"] == manifest.read(origin).facts["digest"]
    assert said == [f"{path}: {len(storage.keys(path))} tensors, {said[0].rpartition(', ')[2]}"]


def test_one_tensor_at_a_time_is_in_memory(sharded: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    read_names: list[str] = []
    box = storage.StoredTensors.box

    def noted(self: storage.StoredTensors, name: str, *rest: Any) -> Tensor:
        read_names.append(name)
        return box(self, name, *rest)

    monkeypatch.setattr(storage.StoredTensors, "box", noted)
    for form in tools.FORMS:
        read_names.clear()
        tools.convert(sharded, lambda line: None, to=form)
        assert sorted(read_names) == sorted(storage.keys(read.newest(sharded).path)), form


def test_everything_as_safetensors(trained: RunFolder, sharded: RunFolder) -> None:
    path = tools.convert(sharded, lambda line: None, to="safetensors")
    expected = storage.load(read.newest(trained).path)
    found = load_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_weights_are_exported_from_a_sharded_checkpoint(trained: RunFolder, sharded: RunFolder, tmp_path: Path) -> None:
    """Engines that cut tensors leave checkpoints that sampling, evaluation and export read like any other."""
    files = []
    for run in (trained, sharded):
        target = tmp_path / f"{run.name}.safetensors"
        weights_transfer.export_weights(run, lambda line: None, target=target)
        files.append(load_file(target))
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], tensor) for name, tensor in files[1].items())


def test_refusals_of_convert(trained: RunFolder, sharded: RunFolder, tmp_path: Path) -> None:
    said: list[str] = []
    path = tools.convert(sharded, said.append, at=END, dry_run=True)
    assert not path.exists() and said[0].startswith(f"would write {read.newest(sharded).path} (3 ranks, ")
    with pytest.raises(CheckpointError, match="has no checkpoint at 17 images; it has: 96"):
        tools.convert(sharded, said.append, at=17)
    with pytest.raises(UserError, match=r"exists already; remove it, or choose another place with --output"):
        tools.convert(sharded, said.append, target=tmp_path)
    data = read.newest(sharded).path / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"is not whole: .*; choose another with --at"):
        tools.convert(sharded, said.append)
    assert not sharded.exports.exists()


def test_a_disk_that_fills_up_leaves_nothing(sharded: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: memoryview, path: Path) -> None:
        raise UserError(f"cannot write {path}: the disk is full")

    monkeypatch.setattr(commit.ops, "write", full)
    for form in tools.FORMS:
        with pytest.raises(UserError, match="the disk is full"):
            tools.convert(sharded, lambda line: None, to=form)
    assert list(sharded.exports.iterdir()) == []


def positions(run: RunFolder) -> list[int]:
    return [info.images_seen for info in read.list_checkpoints(run)]


@pytest.fixture
def several(space: experiments.Workspace) -> RunFolder:
    run = space.run(f"several-{next(NUMBERS)}", "train.keep_last=9")
    assert space.train(run) == 0
    return run


@pytest.mark.parametrize(
    ("choice", "kept"),
    [
        ({"last": 1}, [96]),
        ({"last": 2, "every": 48}, [48, 80, 96]),
        ({"last": 1, "keep": [16, 64]}, [16, 64, 96]),
        ({}, [16, 32, 48, 64, 80, 96]),  # train.keep_last
    ],
    ids=str,
)
def test_prune_keeps_what_it_is_told(several: RunFolder, choice: dict[str, Any], kept: list[int]) -> None:
    said: list[str] = []
    size = tools.prune(several, said.append, **choice, dry_run=True)
    assert positions(several) == [16, 32, 48, 64, 80, 96]
    assert tools.prune(several, lambda line: None, **choice) == size
    assert positions(several) == kept and (size > 0) == (len(kept) < 6)
    assert read.verify(read.newest(several).path) == []


def test_prune_never_takes_the_newest_whole_one(several: RunFolder) -> None:
    (read.newest(several).path / "__0_0.distcp").write_bytes(b"")
    tools.prune(several, lambda line: None, last=1)
    assert positions(several) == [80, 96]  # the last, and the last that can be loaded
    for info in read.list_checkpoints(several):
        (info.path / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(CheckpointError, match="has no whole checkpoint; nothing is removed"):
        tools.prune(several, lambda line: None, last=1)


def test_prune_keeps_the_best(space: experiments.Workspace) -> None:
    validate = "train.validate={every_images: 16, num_images: 16}"
    run = space.run("best", "train.keep_last=9", validate, "train.optimizer.lr=10.0")  # it only gets worse
    assert space.train(run) == 0
    best = int(storage.load(read.newest(run).path, tools.BEST)[tools.BEST])
    assert best < 96
    tools.prune(run, lambda line: None, last=1)
    assert positions(run) == [best, 96]


def test_refusals_of_prune(several: RunFolder) -> None:
    with pytest.raises(UserError, match=r"has no checkpoint at 17 images to keep; it has: 16, 32, 48, 64, 80, 96"):
        tools.prune(several, lambda line: None, last=1, keep=[17])
    fence = Fence.take(several, claim_attempt(several, "train"))
    with pytest.raises(UserError, match="nothing is removed from .* is at work in process"):
        tools.prune(several, lambda line: None, last=1)
    fence.release("done")
    assert positions(several) == [16, 32, 48, 64, 80, 96]


def test_the_commands(trained: RunFolder, sharded: RunFolder) -> None:
    def call(*words: str) -> Any:
        return CliRunner().invoke(cli.app, ["checkpoints", *words], catch_exceptions=True)

    listed = call("list", str(sharded.path))
    assert listed.exit_code == 0 and "96 images" in listed.stdout and "3 ranks  ddp" in listed.stdout
    assert json.loads(call("list", str(trained.path), "--json").stdout)[0]["engine"] == "ddp"
    assert call("verify", str(sharded.path)).exit_code == 0
    done = call("convert", str(sharded.path), "--to", "merged")
    assert done.exit_code == 0 and str(sharded.exports) in done.stdout
    wrong = call("convert", str(sharded.path), "--to", "merge")
    assert isinstance(wrong.exception, UserError)
    assert str(wrong.exception) == "--to is 'merge' (did you mean 'merged'?); it is one of: merged, safetensors"
    wrong = call("convert", str(sharded.path), "--at", "the last")
    assert str(wrong.exception) == "--at is 'the last'; give images seen as a whole number, or latest"
    pruned = call("prune", str(trained.path), "--last", "1", "--keep", "16", "--dry-run")
    assert pruned.exit_code == 0 and "would remove checkpoints beyond the retention: 4" in pruned.stdout
    data = read.newest(sharded).path / "__0_0.distcp"
    data.unlink()
    assert call("verify", str(sharded.path)).exit_code == DataError.exit_code
