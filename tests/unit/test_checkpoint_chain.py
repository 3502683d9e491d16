"""The checkpoint chain: whole or absent, verified before it is parsed, fenced, with fall-back and retention."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import CheckpointError, FencedError, UserError
from hpc_gen.runtime.fence import Fence, claim_attempt
from hpc_gen.runtime.journal import Journal, read
from hpc_gen.runtime.ranks import RankInfo, Ranks
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.training.checkpoint import manifest, storage
from hpc_gen.training.checkpoint import read as reading
from hpc_gen.training.checkpoint.chain import CheckpointChain, Retention

FACTS = {"identity": "abc", "digest": "0" * 16}


def state(seed: int = 0) -> dict[str, Tensor]:
    """Every dtype and shape that a training saves."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "model/net/weight": torch.randn(4, 3, generator=generator),
        "model/net/count": torch.tensor(seed),
        "model/net/half": torch.randn(5, generator=generator).bfloat16(),
        "ema/net/main/weight": torch.randn(4, 3, generator=generator),
        "optim/net/weight/exp_avg": torch.randn(4, 3, generator=generator),
        "optim/net/weight/step": torch.tensor(float(seed)),
        "train/best_loss": torch.tensor(float("inf"), dtype=torch.float64),
    }


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@dataclass
class Room:
    """A run folder and chains on it."""

    run: RunFolder
    said: list[str] = field(default_factory=list)

    def chain(self, last: int = 9, every: int | None = None, fence: Fence | None = None) -> CheckpointChain:
        ranks = Ranks(RankInfo(0, 1, 0, 1, "python"), "gloo", torch.device("cpu"))
        journal = Journal(self.run, fence.attempt if fence else 1, "train")
        return CheckpointChain(self.run, ranks, fence, journal, Retention(last, every), self.said.append)

    def filled(self, *positions: int) -> CheckpointChain:
        """A chain with checkpoints; each holds `state(position)`."""
        chain = self.chain()
        for position in positions:
            chain.write(position, state(position), FACTS)
        return chain

    def folder(self, position: int) -> Path:
        return self.run.checkpoints / f"{position:012d}"

    def positions(self) -> list[int]:
        return [info.images_seen for info in reading.list_checkpoints(self.run)]

    def names(self) -> list[str]:
        return sorted(path.name for path in self.run.checkpoints.iterdir())

    def faults(self) -> list[dict[str, Any]]:
        return [event.fields for event in read(self.run) if event.kind == "fault"]


@pytest.fixture
def room(tmp_path: Path) -> Room:
    run = RunFolder(tmp_path / "runs" / "a")
    run.journal.mkdir(parents=True)
    return Room(run)


# -- saving ------------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_what_is_loaded(room: Room) -> None:
    chain, expected = room.chain(), state(3)
    chain.save(64, expected, FACTS)
    chain.wait()
    assert (chain.begun_images, chain.committed_images) == (64, 64)
    loaded = room.chain().load_newest()
    assert loaded is not None
    assert (loaded.images_seen, loaded.path, dict(loaded.facts)) == (64, room.folder(64), FACTS)
    assert_equal(loaded.tensors, expected)


def test_tensors_may_change_while_they_are_written(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy is made before save() returns; and host buffers of one save are not those of the next."""
    chain, live = room.chain(), state(1)
    expected = {name: tensor.clone() for name, tensor in live.items()}
    before = storage.save

    def slow(share: Mapping[str, Tensor], folder: Path, group: Any) -> dict[str, dict[str, Any]]:
        for tensor in live.values():
            tensor.zero_()
        return before(share, folder, group)

    monkeypatch.setattr(storage, "save", slow)
    chain.save(8, live, FACTS)
    chain.wait()
    assert_equal(storage.load(room.folder(8)), expected)


def test_equal_states_have_equal_bytes_in_any_order_and_place(tmp_path: Path) -> None:
    folders = []
    for name, reverse in (("a", False), ("b", True)):
        run = RunFolder(tmp_path / name)
        run.journal.mkdir(parents=True)
        room = Room(run)
        items = sorted(state(5).items(), reverse=reverse)
        chain = room.chain()
        chain.save(5, dict(items), dict(sorted(FACTS.items(), reverse=reverse)))
        chain.wait()
        folders.append({path.name: path.read_bytes() for path in room.folder(5).iterdir()})
    assert folders[0] == folders[1]
    assert set(folders[0]) == {"__0_0.distcp", ".metadata", "manifest.json"}


def test_keys_that_come_and_go_are_followed(room: Room) -> None:
    chain = room.chain()
    for position, extra in ((8, "a"), (16, "b")):
        chain.save(position, {**state(), f"train/window/{extra}": torch.tensor(1.0)}, FACTS)
    chain.wait()
    assert "train/window/a" not in storage.keys(room.folder(16))
    assert "train/window/b" in storage.keys(room.folder(16))


@pytest.mark.parametrize(
    ("last", "every", "best", "kept"),
    [
        (2, None, None, [40, 48]),
        (1, None, None, [48]),
        (2, 24, None, [24, 40, 48]),
        (1, None, 16, [16, 48]),
        (3, 16, 8, [8, 16, 32, 40, 48]),
    ],
)
def test_retention(room: Room, last: int, every: int | None, best: int | None, kept: list[int]) -> None:
    chain = room.chain(last, every)
    chain.best_images = best
    for position in range(8, 49, 8):
        chain.write(position, state(position), FACTS)
    assert room.positions() == kept
    assert room.names() == [f"{position:012d}" for position in kept]


def test_a_failed_save_is_raised_later_and_cleaned_up(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = room.filled(8)
    write = commit.ops.write

    def full(descriptor: int, data: memoryview, path: Path) -> None:
        raise UserError(f"cannot write {path}: the disk is full")

    monkeypatch.setattr(commit.ops, "write", full)
    chain.save(16, state(16), FACTS)
    chain.settle()  # raises nothing
    with pytest.raises(UserError, match="the disk is full"):
        chain.wait()
    assert (chain.begun_images, chain.committed_images) == (16, None)
    assert room.names() == [f"{8:012d}"], "what was staged keeps the disk full"
    monkeypatch.setattr(commit.ops, "write", write)
    chain.save(24, state(24), FACTS)
    chain.wait()
    assert room.positions() == [8, 24]
    kinds = [(event.kind, event.fields["images_seen"]) for event in read(room.run) if event.kind.startswith("save")]
    assert kinds == [("save_begin", 16), ("save_failed", 16), ("save_begin", 24), ("save_committed", 24)]


def test_a_bug_while_writing_is_told_as_it_is(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*unused: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(commit.ops, "fsync", broken)
    with pytest.raises(CheckpointError, match="rank 0 could not write its part of .*Input/output error"):
        room.chain().write(8, state(), FACTS)
    assert room.names() == []


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: os.truncate(path, 10)], ids=["vanished", "shrunk"])
def test_a_staged_file_that_is_lost_is_not_committed(
    room: Room, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], object]
) -> None:
    before = storage.save

    def save(share: Mapping[str, Tensor], folder: Path, group: Any) -> dict[str, dict[str, Any]]:
        written = before(share, folder, group)
        spoil(folder / "__0_0.distcp")
        return written

    monkeypatch.setattr(storage, "save", save)
    with pytest.raises(CheckpointError, match="vanished or shrank"):
        room.chain().write(8, state(), FACTS)
    assert room.names() == []


def test_sweep_removes_what_killed_saves_left_and_nothing_else(room: Room) -> None:
    chain = room.filled(8)
    for name in (".tmp-000000000016-0001", ".trash-000000000004-12-ab"):
        (room.run.checkpoints / name).mkdir()
        (room.run.checkpoints / name / "__0_0.distcp").write_bytes(b"x")
    (room.run.checkpoints / "broken-000000000004").mkdir()
    chain.sweep()
    assert room.names() == [f"{8:012d}", "broken-000000000004"]


# -- the fence ---------------------------------------------------------------------------------------------------------


def take(room: Room) -> Fence:
    return Fence.take(room.run, claim_attempt(room.run, "train"))


def test_a_zombie_commits_nothing_and_removes_nothing(room: Room) -> None:
    zombie = room.chain(last=1, fence=take(room))
    zombie.write(8, state(8), FACTS)
    successor = room.chain(last=1, fence=take(room))
    with pytest.raises(FencedError, match="attempt 2 holds it"):
        zombie.write(16, state(16), FACTS)
    with pytest.raises(FencedError):
        zombie.sweep()
    assert room.positions() == [8]
    successor.sweep()
    assert room.names() == [f"{8:012d}"]
    successor.write(16, state(16), FACTS)
    assert room.positions() == [16]


def test_a_zombie_does_not_touch_what_its_successor_stages(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node that was lost comes back in the middle of its successor's save of the same position."""
    zombie, successor = room.chain(fence=take(room)), room.chain(fence=take(room))
    before, woken = storage.save, []

    def save(share: Mapping[str, Tensor], folder: Path, group: Any) -> dict[str, dict[str, Any]]:
        written = before(share, folder, group)
        if not woken:
            woken.append(True)
            with pytest.raises(FencedError):
                zombie.write(8, state(1), FACTS)
        return written

    monkeypatch.setattr(storage, "save", save)
    successor.write(8, state(8), FACTS)
    assert woken
    assert reading.verify(room.folder(8)) == []
    assert_equal(storage.load(room.folder(8)), state(8))


# -- loading -----------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object], fit: bool = True) -> None:
    """Change the manifest; `fit`: its own hash as well, as somebody with bad intentions would."""
    path = folder / manifest.NAME
    content = json.loads(path.read_text())
    change(content)
    if fit:
        del content["sha256"]
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        content["sha256"] = hashlib.sha256(canonical.encode()).hexdigest()
    path.write_text(json.dumps(content))


class Evil:
    """Unpickled, it makes a file in the current folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pwned",)


def make_evil(folder: Path, consistent: bool) -> None:
    data = pickle.dumps(Evil())
    (folder / storage.METADATA).write_bytes(data)
    if consistent:  # whoever could write the metadata could write the manifest, too
        facts = {"bytes": len(data), "sha256": commit.sha256_file(folder / storage.METADATA)}
        edit_manifest(folder, lambda content: content["files"].update({storage.METADATA: facts}))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "data truncated": (lambda f: os.truncate(f / "__0_0.distcp", 100), "has 100 bytes"),
    "data emptied": (lambda f: os.truncate(f / "__0_0.distcp", 0), "has 0 bytes"),
    "data flipped": (lambda f: flip(f / "__0_0.distcp"), "SHA-256"),
    "data missing": (lambda f: (f / "__0_0.distcp").unlink(), "is missing"),
    "metadata flipped": (lambda f: flip(f / storage.METADATA), "SHA-256"),
    "metadata missing": (lambda f: (f / storage.METADATA).unlink(), "is missing"),
    "a file too many": (lambda f: (f / "__7_0.distcp").write_bytes(b""), "not in the manifest"),
    "manifest missing": (lambda f: (f / manifest.NAME).unlink(), "never committed"),
    "manifest emptied": (lambda f: os.truncate(f / manifest.NAME, 0), "cannot be read"),
    "manifest torn": (lambda f: os.truncate(f / manifest.NAME, 150), "cannot be read"),
    "manifest not text": (lambda f: (f / manifest.NAME).write_bytes(b"\xff\xfe"), "cannot be read"),
    "manifest of another kind": (lambda f: (f / manifest.NAME).write_text("[1]"), "not a checkpoint manifest"),
    "manifest of the future": (lambda f: edit_manifest(f, lambda c: c.update(format=9)), "format 9"),
    "manifest forgets a file": (lambda f: edit_manifest(f, lambda c: c["files"].pop("__0_0.distcp")), "not in the man"),
    "manifest edited": (
        lambda f: edit_manifest(f, lambda c: c["facts"].update(digest="1"), fit=False),
        "it was written with",
    ),
    "manifest lies": (lambda f: edit_manifest(f, lambda c: c["files"][".metadata"].update(sha256="0" * 64)), "SHA-256"),
    "manifest at another place": (lambda f: edit_manifest(f, lambda c: c.update(images_seen=8)), "is named for"),
    "manifest points outside": (
        lambda f: edit_manifest(f, lambda c: c["files"].update({"../x": {"bytes": 1, "sha256": ""}})),
        "outside the checkpoint",
    ),
    "evil metadata": (lambda f: make_evil(f, consistent=False), "the manifest says"),
    "evil metadata and manifest": (lambda f: make_evil(f, consistent=True), "mkdir, which is not allowed"),
    "a file in its place": (lambda f: (shutil.rmtree(f), f.write_bytes(b"")), "cannot be read"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_loudly(
    room: Room, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # where evil would show
    damage, sentence = DAMAGES[name]
    room.filled(8, 16, 24)
    damage(room.folder(24))
    chain = room.chain(last=2)
    loaded = chain.load_newest()
    assert loaded is not None and loaded.images_seen == 16
    assert_equal(loaded.tensors, state(16))
    (told,) = room.said
    assert "not whole" in told and sentence in told and "falling back" in told
    assert sentence in room.faults()[0]["detail"]
    assert not (tmp_path / "pwned").exists()
    # it is kept aside, out of the chain; the run passes the place again, and retention does not count it
    assert room.names() == [f"{8:012d}", f"{16:012d}", f"broken-{24:012d}"]
    chain.write(24, state(24), FACTS)
    assert room.positions() == [16, 24]
    assert reading.verify(room.folder(24)) == []


def test_every_flipped_byte_of_every_file_is_found(room: Room) -> None:
    room.filled(8)
    folder = room.folder(8)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for position in range(0, len(whole), max(1, len(whole) // 40)):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
            assert reading.verify(folder), f"byte {position} of {path.name}"
        path.write_bytes(whole)
    assert reading.verify(folder) == []


def test_two_damaged_ones_in_a_row(room: Room) -> None:
    room.filled(8, 16, 24)
    flip(room.folder(24) / "__0_0.distcp")
    (room.folder(16) / manifest.NAME).unlink()
    loaded = room.chain().load_newest()
    assert loaded is not None and loaded.images_seen == 8
    assert len(room.said) == 2
    assert room.names() == [f"{8:012d}", f"broken-{16:012d}", f"broken-{24:012d}"]


def test_a_second_damage_at_the_same_place_replaces_the_first(room: Room) -> None:
    for _ in range(2):
        room.filled(8, 16)
        flip(room.folder(16) / "__0_0.distcp")
        assert room.chain().load_newest() is not None
    assert room.names() == [f"{8:012d}", f"broken-{16:012d}"]


@pytest.mark.parametrize("damage", ["data flipped", "manifest missing"])
def test_none_whole_is_an_error_however_often_it_is_tried(room: Room, damage: str) -> None:
    """Setting the damaged ones aside would make the second try begin anew, in silence."""
    room.filled(8, 16)
    for position in (8, 16):
        DAMAGES[damage][0](room.folder(position))
    for _ in range(2):
        with pytest.raises(CheckpointError, match="no checkpoint of .* is whole: .*begin anew"):
            room.chain().load_newest()
    assert room.names() == [f"{8:012d}", f"{16:012d}"]


def test_an_empty_chain_is_a_fresh_start(room: Room) -> None:
    assert room.chain().load_newest() is None
    room.run.checkpoints.mkdir()
    (room.run.checkpoints / ".tmp-000000000008-0001").mkdir()
    assert room.chain().load_newest() is None
    assert room.said == []


# -- reading without an engine -----------------------------------------------------------------------------------------


def test_listing_and_choosing(room: Room) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoint; run its train stage first"):
        reading.newest(room.run)
    room.filled(8, 16)
    found = reading.list_checkpoints(room.run)
    assert [(info.images_seen, info.world_size) for info in found] == [(8, 1), (16, 1)]
    on_disk = sum(path.stat().st_size for path in room.folder(8).iterdir() if path.name != manifest.NAME)
    assert found[0].bytes == on_disk
    assert reading.newest(room.run).images_seen == 16
    assert reading.at(room.run, 8).path == room.folder(8)
    with pytest.raises(CheckpointError, match="no checkpoint at 9 images; it has: 8, 16"):
        reading.at(room.run, 9)


def test_weights_of_a_role(room: Room) -> None:
    room.filled(8)
    path, expected = room.folder(8), state(8)
    raw = reading.load_role(path, "net")
    assert set(raw) == {"weight", "count", "half"}
    average = reading.load_role(path, "net", "main")
    assert torch.equal(average["weight"], expected["ema/net/main/weight"])
    assert torch.equal(average["count"], raw["count"])
    with pytest.raises(CheckpointError, match="no role 'critic'; it has: net"):
        reading.load_role(path, "critic")
    with pytest.raises(CheckpointError, match="no average 'fast' of 'net'"):
        reading.load_role(path, "net", "fast")
    flip(path / "__0_0.distcp")
    with pytest.raises(CheckpointError, match="is not whole: .*SHA-256"):
        reading.load_role(path, "net")


def test_the_manifest_names_content_and_nothing_else(room: Room) -> None:
    room.filled(8)
    content = json.loads((room.folder(8) / manifest.NAME).read_text())
    assert set(content) == {"format", "images_seen", "world_size", "files", "facts", "sha256"}
    assert content["facts"] == FACTS
    assert reading.manifest_sha256(room.folder(8)) == commit.sha256_file(room.folder(8) / manifest.NAME)
