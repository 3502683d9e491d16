"""Run folders that are held, full, read-only or damaged, and clocks that go back (docs/bad_input.md)."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import experiments
import mounts
import pytest
from experiments import LINEAR, Workspace
from PIL import Image

from hpc_gen.config.errors import ConfigError
from hpc_gen.config.experiment import EncodeConfig
from hpc_gen.data.table import Table
from hpc_gen.runtime import clock, commit, fence
from hpc_gen.runtime.errors import DataError, ExitCode, UserError
from hpc_gen.runtime.journal import attempts, read
from hpc_gen.runtime.ranks import Ranks
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.runtime.stop import Cause, Stop, StopToken
from hpc_gen.stages.run_setup import load_run
from hpc_gen.stages.units import Ledger
from shard_tools.encode import EncodeWorker

ROOT = Path(__file__).resolve().parents[2]


def end(run: RunFolder) -> dict[str, str]:
    return experiments.contents(run.checkpoints / f"{96:012d}")


@pytest.fixture
def undisturbed(workspace: Workspace) -> RunFolder:
    run = workspace.run("undisturbed", text=LINEAR)
    assert workspace.train(run) == ExitCode.DONE
    return run


class AtStep(StopToken):
    """Something happens before step `step` (from 1) of the attempt."""

    def __init__(self, run: RunFolder, step: int, action: object) -> None:
        super().__init__(run)
        self._left, self._action = step, action

    def agree(self, ranks: Ranks) -> Stop | None:
        self._left -= 1
        if self._left == 0:
            self._action()
        return super().agree(ranks)


# -- who holds it ------------------------------------------------------------------------------------------------------


@contextmanager
def living_holder(run: RunFolder) -> Iterator[int]:
    """Another process that has taken the run folder and lives."""
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from hpc_gen.runtime.fence import Fence, claim_attempt\n"
        "from hpc_gen.runtime.run_folder import RunFolder\n"
        "run = RunFolder(Path(sys.argv[1]))\n"
        "Fence.take(run, claim_attempt(run, 'train'))\n"
        "print('taken', flush=True)\n"
        "time.sleep(600)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(run.path)], stdout=subprocess.PIPE, cwd=ROOT, text=True)
    try:
        assert child.stdout is not None and child.stdout.readline() == "taken\n"
        yield child.pid
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()


def test_a_second_process_on_a_run_folder(
    workspace: Workspace, undisturbed: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The living one is left alone; once it is dead, the next attempt takes over without a word from anybody."""
    monkeypatch.setattr(fence, "_HOLDER_WAIT_S", 0.3)
    run = workspace.run("held", text=LINEAR)
    with living_holder(run) as pid:
        lock = run.lock.read_bytes()
        with pytest.raises(UserError) as caught:
            workspace.train(run)
        assert str(caught.value) == (
            f"run {run.path} is held by process {pid} of attempt 1 on this host, which is alive; wait for it or stop it "
            f"with 'hpc-gen preempt {run.path}'"
        )
        assert run.lock.read_bytes() == lock and not run.checkpoints.exists()
    assert workspace.train(run) == ExitCode.DONE
    assert end(run) == end(undisturbed)


# -- disks -------------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_really_full(
    workspace: Workspace, undisturbed: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Full from step 6 on: the last save fails with its sentence; with room again the run ends as any other."""
    with mounts.small_disk(tmp_path / "small", "4m") as disk:
        there = experiments.make_workspace(disk)
        run = there.run("full", text=LINEAR)
        fillers: list[Path] = []
        token = AtStep(run, 6, lambda: fillers.append(mounts.fill(disk, leave_bytes=0)))
        with pytest.raises(UserError) as caught:
            there.train(run, stop=token)
        assert re.fullmatch(
            rf"cannot write \d+ bytes to {run.checkpoints}/\.tmp-{96:012d}-0001\S*: the disk is full \(\d+ bytes free\); "
            "free some space or use another workspace, then start again: nothing committed was lost",
            str(caught.value),
        )
        assert "the save before this one failed and was given up" in capsys.readouterr().out
        fillers[0].unlink()
        assert there.train(run) == ExitCode.DONE
        assert end(run) == end(undisturbed)
        assert experiments.leftovers(run) == []


def test_a_disk_too_full_to_begin(workspace: Workspace, tmp_path: Path) -> None:
    with mounts.small_disk(tmp_path / "small", "4m") as disk:
        there = experiments.make_workspace(disk)
        run = there.run("full", text=LINEAR)
        mounts.fill(disk, leave_bytes=8192)
        with pytest.raises(UserError, match="^[^\n]*(full|free)[^\n]*$"):
            there.train(run)


def test_encoding_on_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """One sentence, no table and no half of one; with room again it is made as ever."""

    def encode(workspace: Path) -> None:
        keys = {"source": "folder", "source_path": str(tmp_path / "images"), "image_size": 16, "shard_rows": 32}
        worker = EncodeWorker(EncodeConfig.model_validate(keys), workspace, {"train": "tables/t"})
        book = Ledger(workspace / "ledger", workspace)
        for unit in book.missing(worker.units(), worker.fingerprint()):
            staging = commit.make_folder(commit.staging_path(workspace / "staging" / unit.name))
            try:
                book.commit(unit, worker.do(unit, staging, lambda: None), worker.fingerprint())
            finally:
                commit.remove_tree(staging)
        worker.finish()

    for label, shade in (("dark", 20), ("light", 220)):
        (tmp_path / "images" / "train" / label).mkdir(parents=True)
        for number in range(40):
            picture = Image.new("RGB", (16, 16), (shade, shade + number % 30, shade))
            picture.save(tmp_path / "images" / "train" / label / f"{number:02d}.png")
    with mounts.small_disk(tmp_path / "small", "2m") as disk:
        filler = mounts.fill(disk, leave_bytes=24 * 1024)  # a shard has 25 KiB
        with pytest.raises(UserError) as caught:
            encode(disk)
        assert re.fullmatch(
            rf"cannot write \d* ?(bytes to )?{disk}/\S+: the disk is full \(\d+ bytes free\); free some space or use another "
            "workspace, then start again: nothing committed was lost",
            str(caught.value),
        ), str(caught.value)
        assert not list(disk.rglob("*.pt")) and not list(disk.rglob("index.json"))
        filler.unlink()
        encode(disk)
        assert Table.open(disk / "tables" / "t", verify=True).rows == 80


READ_ONLY = r"cannot write \S+: Read-only file system; use a folder you may write"


def test_a_read_only_run_folder(workspace: Workspace, undisturbed: RunFolder) -> None:
    """Also for root, whom permissions do not stop."""
    run = workspace.run("locked", text=LINEAR)
    assert workspace.train(run, "train.stop_at_images=48") == ExitCode.DONE
    before = experiments.contents(run.path)
    with mounts.read_only(run.path):
        with pytest.raises(UserError) as caught:
            workspace.train(run)
        assert re.fullmatch(READ_ONLY, str(caught.value)), str(caught.value)
        assert experiments.contents(run.path) == before
    assert workspace.train(run) == ExitCode.DONE
    assert end(run) == end(undisturbed)


def test_a_file_system_that_turns_read_only(
    workspace: Workspace, undisturbed: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ext4 does after an error: the save says so, and the checkpoints of before are whole."""
    run = workspace.run("turned", text=LINEAR)

    def turn() -> None:
        def refuse(path: Path) -> int:
            with commit.ops._explained(path):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr(commit.ops, "open_write", refuse)
        monkeypatch.setattr(commit.ops, "mkdir", refuse)

    with pytest.raises(UserError) as caught:
        workspace.train(run, stop=AtStep(run, 6, turn))
    assert re.fullmatch(READ_ONLY, str(caught.value)), str(caught.value)
    monkeypatch.undo()
    assert workspace.train(run) == ExitCode.DONE
    assert end(run) == end(undisturbed)


# -- files of the run folder -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\x01\x02",
        b"\xff\xfe\x80",
        b"name: [tiny",
        b"name: tiny\n  seed: 7\n",
        b"- 1\n- 2\n",
        b"name: {a: &a [*a]}",
    ],
)
def test_a_corrupted_config_of_a_run(workspace: Workspace, content: bytes) -> None:
    """Whatever is in it, the file is named in a sentence; a shorter file that is YAML still is not taken for the run's."""
    run = workspace.run("a", text=LINEAR)
    run.config_path.write_bytes(content)
    with pytest.raises((ConfigError, UserError), match="config.yaml") as caught:
        load_run(run)
    assert "Traceback" not in str(caught.value)


def test_a_config_cut_at_any_line(workspace: Workspace) -> None:
    run = workspace.run("a", text=LINEAR)
    whole = load_run(run)
    lines = run.config_path.read_bytes().splitlines(keepends=True)
    refused = 0
    for number in range(len(lines)):
        run.config_path.write_bytes(b"".join(lines[:number]))
        try:
            found = load_run(run)  # without its last lines it may say the same, but for keys that change no number
            assert found.identity == whole.identity
        except (ConfigError, UserError, DataError) as error:
            refused += 1
            assert "config.yaml" in str(error) or str(run.path) in str(error)
    assert refused > len(lines) / 2


# -- time --------------------------------------------------------------------------------------------------------------


class Shifted:
    """The real clock, whose wall time is `shift_s` off; monotonic time knows nothing of that."""

    def __init__(self) -> None:
        self.shift_s = 0.0

    def now(self) -> float:
        return time.time() + self.shift_s

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@pytest.mark.parametrize("shift_s", [-7200.0, 7200.0])
def test_a_clock_that_is_set_while_training(workspace: Workspace, undisturbed: RunFolder, shift_s: float) -> None:
    shifted = Shifted()
    run = workspace.run("set", text=LINEAR)
    with clock.use(shifted):
        assert workspace.train(run, "train.stop_at_images=32") == ExitCode.DONE
        token = AtStep(run, 3, lambda: setattr(shifted, "shift_s", shift_s))
        assert workspace.train(run, "train.stop_at_images=64", stop=token) == ExitCode.DONE
        assert workspace.train(run) == ExitCode.DONE
    assert end(run) == end(undisturbed)
    assert experiments.rows(run) == experiments.rows(undisturbed)
    assert [attempt.number for attempt in attempts(run)] == [1, 2, 3]
    booked = [event.fields for event in read(run) if event.kind == "interval"]
    assert all(0 <= fields["productive_s"] < 600 for fields in booked)


def test_a_time_limit_holds_when_the_clock_is_set_back() -> None:
    shifted = Shifted()
    with clock.use(shifted):
        token = StopToken(deadline=clock.now() + 0.05)
        assert token.deadline == pytest.approx(clock.now() + 0.05, abs=0.05)
        shifted.shift_s = -7200.0
        assert token.poll() is None
        time.sleep(0.06)
        found = token.poll()
        assert found is not None and found.cause is Cause.TIME_LIMIT
        early = StopToken(deadline=clock.now() + 600)
        shifted.shift_s = 7200.0
        assert early.poll() is None  # nor does it come early when the clock is set forward
        early.deadline = None
        assert early.deadline is None and early.poll() is None
