"""`status` and `preempt`, on run folders written by the real journal, fence and ledger."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from hpc_gen import cli, cli_errors
from hpc_gen.runtime import clock, commit
from hpc_gen.runtime.errors import UserError
from hpc_gen.runtime.fence import Fence, attempt_path, claim_attempt
from hpc_gen.runtime.journal import Journal
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import control, status_view
from hpc_gen.stages.status import StatusReader, all_runs, disk_use, status
from hpc_gen.stages.status_view import lines, list_sheet, sheet, tell

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = """\
name: toy
method: {name: energy}
data: {table: tables/toy}
train: {total_images: 640, global_batch: 64, log_every: 64, save_every: 64, optimizer: {lr: 1e-3}}
sample: {num_images: 100, block_images: 64}
"""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "runs" / "toy")
    folder.logs.mkdir(parents=True)
    folder.config_path.write_text(CONFIG)
    return folder


def train(run: RunFolder, resumed_from: int | None, upto: int, exit_code: int | None, cause: str) -> int:
    """One attempt of the train stage in the journal, with a row and a checkpoint at its end."""
    number = claim_attempt(run, "train")
    journal = Journal(run, number, "train")
    now = time.time()
    journal.event("attempt_start", world_size=2, rank=0, host="node7", process_start=now, resumed_from=resumed_from)
    journal.row(upto, {"loss": 0.25, "lr": 1e-3})
    if exit_code is not None:
        journal.event("attempt_end", exit_code=exit_code, cause=cause, images_seen=upto)
    journal.close()
    folder = run.checkpoints / f"{upto:012d}"
    folder.mkdir(parents=True)
    files = {"a": {"bytes": 1500, "sha256": "0"}}
    manifest = {"format": 1, "images_seen": upto, "world_size": 2, "files": files, "facts": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return number


def units(run: RunFolder, stage: str, count: int) -> None:
    number = claim_attempt(run, stage)
    journal = Journal(run, number, stage)
    journal.event("attempt_start", world_size=1, rank=0, process_start=time.time())
    for index in range(count):
        commit.make_folder(run.ledger(stage))
        commit.write_json(run.ledger(stage) / f"{index}.json", {"unit": str(index), "files": {}, "fingerprint": ""})
    journal.event("attempt_end", exit_code=0, cause="done")
    journal.close()


def text(run: RunFolder) -> str:
    return "\n".join(lines(status(run)))


def table(run: RunFolder) -> dict[str, tuple[str, ...]]:
    """Rows of the table of stages by name."""
    return {row[0]: row[1:] for row in sheet(status(run)).rows}


def test_run_that_has_not_begun(run: RunFolder) -> None:
    found = text(run)
    assert found.startswith("toy: not begun\n")
    assert table(run) == {
        "train": ("waiting", "0 of 640 images", "", "", ""),
        "sample": ("waiting", "0 of 2 units", "", "", ""),
        "report": ("waiting", "0 of 1 units", "", "", ""),
    }
    assert "at work      nobody" in found


def test_preempted_run(run: RunFolder) -> None:
    train(run, None, 128, 85, "SIGTERM")
    found = text(run)
    assert found.startswith("toy: train preempted, state saved (SIGTERM); `hpc-gen resume` goes on\n")
    assert table(run)["train"] == ("requeued", "128 of 640 images (20%)", "", "1", "preempted, state saved (SIGTERM)")
    assert "newest row   at 128 images: loss 0.25, lr 0.001" in found
    assert "checkpoints  128 (1.5 kB)" in found
    assert re.search(r"attempt 1    train, 2 ranks, [\d.]+s: preempted, state saved \(SIGTERM\)", found)


def test_killed_run(run: RunFolder) -> None:
    number = train(run, None, 128, None, "")
    claim = attempt_path(run, number)  # the claimer of this test is alive: make it a process that is not
    claim.write_text(json.dumps({**json.loads(claim.read_text()), "pid_start": 1}))
    assert text(run).startswith(
        "toy: train killed without a word (its last sign of life is the end); `hpc-gen resume` goes on"
    )
    assert table(run)["train"][0] == "killed"


NO_ROOM = "ended for want of room on the disk"
FULL = "cannot write 9 bytes to /x: the disk is full (0 bytes free); free some space or use another workspace"
TIGHT = "stage 'train' needs about 2 B in /x, but only 1 B are free; free space (see `hpc-gen gc`), or lower keep_last"


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (FULL, NO_ROOM),
        (FULL.replace("the disk is full", "the disk quota is used up"), NO_ROOM),
        (TIGHT, NO_ROOM),
        ("train.ranks=3 does not fit", "ended by a mistake in the command or config"),
    ],
)
def test_a_full_disk_is_told_from_a_mistake(run: RunFolder, cause: str, words: str) -> None:
    train(run, None, 128, 2, cause)
    assert text(run).startswith(f"toy: train {words} ({cause})\n")


@pytest.mark.parametrize("origin, words", [("forked_from", "forked from"), ("imported", "imported from"), ("", "")])
def test_a_fork_or_import_has_its_table(run: RunFolder, origin: str, words: str) -> None:
    run.config_path.write_text(
        CONFIG.replace("table: tables/toy", "table: tables/toy, validation_table: tables/val")
        + "encode: {source: mnist, image_size: 8}\n"
    )
    if origin == "forked_from":
        fork = {"run": "parent", "images_seen": 64, "identity": "a", "manifest_sha256": "b", "changed": []}
        run.hashes_path.write_text(json.dumps({origin: fork}))
    train(run, None, 128, None, "")
    if origin == "imported":
        path = run.checkpoints / f"{128:012d}" / "manifest.json"
        content = {**json.loads(path.read_text()), "facts": {"imported": {"file": "a.pth", "sha256": "c"}}}
        path.write_text(json.dumps(content))
    there = ("done", "", "", "", f"{words} where the table was there")
    assert table(run)["encode"] == (there if origin else ("waiting", "0 units", "", "", ""))


def test_a_lock_without_a_journal_is_of_training(run: RunFolder) -> None:
    Fence.take(run, claim_attempt(run, "train"))
    attempt_path(run, 1).unlink()
    assert "running here: attempt 1 (train), process" in text(run)


def test_failed_run_is_not_told_to_resume(run: RunFolder) -> None:
    train(run, None, 128, 75, "loss stayed NaN")
    assert text(run).startswith("toy: train diverged (loss stayed NaN)\n")
    assert table(run)["train"][::4] == ("failed", "diverged (loss stayed NaN)")
    assert status(run).over


def test_finished_run(run: RunFolder) -> None:
    train(run, None, 128, 85, "SIGTERM")
    train(run, 128, 640, 0, "done")
    assert text(run).startswith("toy: some stages are left; `hpc-gen resume` goes on\n")
    for stage, count in (("sample", 2), ("report", 1)):
        units(run, stage, count)
    assert text(run).startswith("toy: done\n")
    assert table(run)["train"] == ("done", "640 of 640 images", "", "2", "")
    assert table(run)["sample"] == ("done", "2 of 2 units", "", "1", "")
    assert status(run).over
    assert "attempt 2    train from 128 images, 2 ranks, " in text(run)


def test_torn_checkpoint_is_named(run: RunFolder) -> None:
    train(run, None, 128, 85, "SIGTERM")
    (run.checkpoints / "000000000128" / "manifest.json").write_text("{")
    assert "checkpoint   " in text(run) and "manifest.json cannot be read" in text(run)


def test_json_is_json_even_with_nan(run: RunFolder) -> None:
    journal = Journal(run, claim_attempt(run, "train"), "train")
    journal.event("attempt_start", world_size=1, rank=0, process_start=time.time(), resumed_from=None)
    journal.row(64, {"loss": float("nan")})
    journal.close()
    found = json.loads(json.dumps(status(run).to_json(), allow_nan=False))
    assert found["last_row"]["data"]["loss"] == "nan"
    assert [stage["name"] for stage in found["stages"]] == ["train", "sample", "report"]


def test_run_is_found_by_path_and_name(run: RunFolder, tmp_path: Path) -> None:
    assert control.find_run("toy", tmp_path).path == run.path
    assert control.find_run(str(run.path), tmp_path / "elsewhere").path == run.path
    with pytest.raises(
        UserError, match=r"no run 'tyo' \(did you mean 'toy'\?\) as a folder or below .*; runs there: toy$"
    ):
        control.find_run("tyo", tmp_path)


def test_goodput_and_disk_in_words(run: RunFolder) -> None:
    with clock.use(clock.FakeClock()) as fake:
        journal = Journal(run, claim_attempt(run, "train"), "train")
        journal.event("attempt_start", world_size=1, rank=0, process_start=fake.now() - 5, resumed_from=None)
        fake.sleep(15)
        journal.event("interval", images_seen=64, images=64, productive_s=15.0)
        journal.event("attempt_end", exit_code=85, cause="SIGTERM")
        journal.close()
    found = text(run)
    assert "goodput      75% of 20s held (ranks x time) was productive; the rest: start up 25%; 0.0s between" in found
    used = status(run).disk
    assert used is not None and used.whole and "disk used    " in found
    (run.logs / "long.log").write_bytes(b"x" * 50_000)
    more = status(run).disk
    assert more is not None and more.bytes >= used.bytes + 50_000
    assert not disk_use(run.path, limit_s=-1.0).whole


def test_only_the_last_attempts_are_told(run: RunFolder) -> None:
    for upto in range(64, 64 * 12, 64):
        train(run, upto - 64 or None, upto, 85, "SIGTERM")
    found = text(run)
    assert "3 earlier attempts; --json has all of them" in found
    assert "attempt 3 " not in found and "attempt 4 " in found and "attempt 11 " in found
    assert len(status(run).attempts) == 11


def test_holder_of_the_lock_that_is_gone_is_told(run: RunFolder) -> None:
    train(run, None, 128, None, "")
    Fence.take(run, 1)
    lock = {**json.loads(run.lock.read_text()), "pid": 4_000_000}
    commit.write_json(run.lock, lock)
    claim = attempt_path(run, 1)
    claim.write_text(json.dumps({**json.loads(claim.read_text()), "pid": 4_000_000}))
    told = "process 4000000 of attempt 1, which holds the lock, is gone; the next attempt takes over"
    assert f"at work      {told}" in text(run)
    commit.write_json(run.lock, {**lock, "host": "node7"})  # nobody can ask another host
    found = status(run)
    assert found.lost_holder is None and found.running is not None and not found.running.here
    assert "process 4000000 of attempt 1, on node7, which cannot be asked from here; its last line" in text(run)


def test_time_left_goes_by_the_last_ten_minutes(run: RunFolder) -> None:
    with clock.use(clock.FakeClock()) as fake:
        journal = Journal(run, claim_attempt(run, "train"), "train")
        journal.event("attempt_start", world_size=1, rank=0, process_start=fake.now(), resumed_from=None)
        for seen, seconds in ((64, 5000), (128, 5000), (192, 300), (256, 300)):  # slow at first
            fake.sleep(seconds)
            journal.row(seen, {"loss": 0.5})
        (stage, *_), row = status(run).stages, sheet(status(run), fake.now() + 7).rows[0]
        assert stage.rate == pytest.approx(128 / 600) and stage.eta_s == pytest.approx((640 - 256) / (128 / 600))
        assert row == ("train", "running", "256 of 640 images (40%)", "30m 00s", "1", "")
        told = "\n".join(lines(status(run), fake.now() + 7))
        assert "newest row   at 256 images, 7.0s ago: loss 0.5" in told and "speed        0.21 images/s of late" in told
        journal.event("attempt_end", exit_code=85, cause="SIGTERM")
        journal.close()
        assert status(run).stages[0].eta_s is None


def test_units_at_work_have_a_rate_too(run: RunFolder) -> None:
    with clock.use(clock.FakeClock()) as fake:
        journal = Journal(run, claim_attempt(run, "sample"), "sample")
        journal.event("attempt_start", world_size=1, rank=0, process_start=fake.now())
        commit.make_folder(run.ledger("sample"))
        commit.write_json(run.ledger("sample") / "0.json", {})
        for unit in ("a", "b"):
            fake.sleep(20)
            journal.event("unit_committed", unit=unit, seconds=20.0)
        journal.close()
    stage = status(run).stages[1]
    assert (stage.state, stage.rate, stage.eta_s) == ("running", pytest.approx(0.05), pytest.approx(20.0))


# ---------------------------------------------------------------- all runs, watching


def test_all_runs_a_line_each(run: RunFolder, tmp_path: Path) -> None:
    train(run, None, 128, 85, "SIGTERM")
    other, broken = RunFolder(tmp_path / "runs" / "new"), RunFolder(tmp_path / "runs" / "torn")
    for folder, config in ((other, CONFIG), (broken, "name: [")):
        folder.path.mkdir()
        folder.config_path.write_text(config)
    (tmp_path / "runs" / "no run").mkdir()
    found, problems = all_runs(tmp_path)
    shown = list(list_sheet(found, problems, tmp_path / "runs", time.time() + 90).lines())
    assert shown[0] == f"2 runs in {tmp_path / 'runs'}"
    assert "new  waiting   train  0 of 640 images" in shown[2]
    assert "toy  requeued  train  128 of 640 images (20%)" in shown[3] and "0.25  128" in shown[3]
    assert shown[3].endswith("1m 30s ago")
    assert len(problems) == 1 and shown[4].startswith("  torn: ") and "not valid YAML" in shown[4]
    assert found[1].goodput == {} and found[1].disk is None
    empty = list_sheet([], [], tmp_path / "runs").lines()
    assert next(iter(empty)) == f"no runs in {tmp_path / 'runs'} yet; `hpc-gen run CONFIG` makes one"


def test_json_of_one_and_of_all(run: RunFolder, tmp_path: Path) -> None:
    train(run, None, 128, 85, "SIGTERM")
    said = io.StringIO()
    tell(run, tmp_path, as_json=True, stream=said)
    one = json.loads(said.getvalue())
    assert {"name", "path", "state", "identity", "running", "stages", "attempts", "last_row", "goodput"} <= one.keys()
    assert {"held_rank_seconds", "waiting_s", "checkpoints", "unreadable", "torn_lines"} <= one.keys()
    assert {"name", "state", "done", "total", "unit", "attempts"} <= one["stages"][0].keys()
    said = io.StringIO()
    tell(None, tmp_path, as_json=True, stream=said)
    assert [each["name"] for each in json.loads(said.getvalue())["runs"]] == ["toy"]
    with pytest.raises(UserError, match="give one of them"):
        tell(run, tmp_path, as_json=True, watch=True, stream=said)
    with pytest.raises(UserError, match="--every 0 is not a time to wait"):
        tell(run, tmp_path, watch=True, every_s=0, stream=said)


class _Story(clock.FakeClock):
    """A clock that does one more thing to the run whenever the watch sleeps."""

    def __init__(self, *deeds: Callable[[], object]) -> None:
        super().__init__()
        self._deeds = list(deeds)
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        super().sleep(seconds)
        self._deeds.pop(0)()


def test_watch_tells_what_changes_until_the_run_is_over(run: RunFolder, tmp_path: Path) -> None:
    story = _Story(
        lambda: train(run, None, 128, 85, "SIGTERM"),
        lambda: None,
        lambda: None,
        lambda: train(run, 128, 640, 0, "done"),
        lambda: (units(run, "sample", 2), units(run, "report", 1)),
    )
    said = io.StringIO()
    with clock.use(story):
        tell(run, tmp_path, watch=True, every_s=3.0, stream=said)
    heads = [line for line in said.getvalue().splitlines() if line.startswith("toy: ")]
    assert heads == [
        "toy: not begun",
        "toy: train preempted, state saved (SIGTERM); `hpc-gen resume` goes on",
        "toy: some stages are left; `hpc-gen resume` goes on",
        "toy: done",
    ]
    assert story.slept == [3.0] * 5


def test_watch_ends_with_control_c(run: RunFolder, tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    said = io.StringIO()
    with clock.use(_Story(interrupt)):
        tell(run, tmp_path, watch=True, stream=said)
    assert said.getvalue().startswith("toy: not begun\n")


@pytest.mark.parametrize("watch", [False, True])
def test_a_terminal_gets_a_table_in_place(run: RunFolder, tmp_path: Path, watch: bool) -> None:
    train(run, None, 128, 75, "loss stayed NaN")
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        tell(run, tmp_path, watch=watch, stream=terminal)
        terminal.flush()
        parts: list[bytes] = []
        while select.select([ours], [], [], 1)[0]:  # a terminal hands on what is there, piece by piece
            parts.append(os.read(ours, 100_000))
    os.close(ours)
    shown = b"".join(parts).decode()
    assert "─" in shown and "\x1b[" in shown and "128 of 640" in shown
    assert "[NaN]" not in shown and "failed" in shown


def test_a_reader_sees_what_is_new(run: RunFolder) -> None:
    reader = StatusReader(run)
    assert reader.read().state == "not begun"
    train(run, None, 128, 85, "SIGTERM")
    found = reader.read()
    # how full the disk is changes between two looks
    assert found == replace(status(run), disk=found.disk, forecast=found.forecast)


def test_the_commands_of_the_page_run(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every shell line of docs/status.md, on a finished run of that name."""
    page = (REPOSITORY / "docs" / "status.md").read_text()
    commands = [line for block in re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL) for line in block.splitlines()]
    assert len(commands) == 5 and all(command.startswith("hpc-gen ") for command in commands)
    train(run, None, 640, 0, "done")
    units(run, "sample", 2)
    units(run, "report", 1)
    run.path.rename(tmp_path / "runs" / "demo-mnist16")
    monkeypatch.setenv("HPC_GEN_WORKSPACE", str(tmp_path))
    for command in commands:
        arguments = command.split()[1:]
        code = cli_errors.exit_code_of(partial(cli.app, arguments, standalone_mode=False), arguments)
        shown = capsys.readouterr()
        assert code == 0 and "demo-mnist16" in shown.out and not shown.err, command
    words = {"waiting", *(word for word in status_view._STYLES)}
    assert all(f"\n| {word} |" in page for word in words)


# ---------------------------------------------------------------- preempt

WORKER = """
import signal, sys, time
from hpc_gen.runtime.fence import Fence, claim_attempt
from hpc_gen.runtime.journal import Journal
from hpc_gen.runtime.run_folder import RunFolder
run, stage = RunFolder(sys.argv[1]), sys.argv[2]
number = claim_attempt(run, stage)
fence = Fence.take(run, number) if stage == "train" else None
journal = Journal(run, number, stage)
def leave(*_):
    time.sleep(0.2)
    journal.event("attempt_end", exit_code=85, cause="SIGTERM")
    if fence is not None:
        fence.release("SIGTERM")
    sys.exit(85)
signal.signal(signal.SIGTERM, leave)
journal.event("attempt_start", world_size=1, rank=0, process_start=time.time(), resumed_from=None)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def worker(run: RunFolder, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """A process at work on the run, as attempt 1 of the stage that the test names."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    arguments = [sys.executable, "-c", WORKER, str(run.path), request.param]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("worker", ["train", "encode"], indirect=True)
def test_preempt_here(run: RunFolder, worker: subprocess.Popen[str]) -> None:
    told: list[str] = []
    assert f"running here: attempt 1 ({'train' if run.lock.exists() else 'encode'}), process {worker.pid}" in text(run)
    assert control.preempt(run, told.append, dry_run=True)
    assert told[0].startswith(f"would send SIGTERM to process {worker.pid}, attempt 1 (")
    assert worker.poll() is None
    assert control.preempt(run, told.append, wait_s=20)
    assert told[1].startswith(f"sending SIGTERM to process {worker.pid}")
    assert "attempt 1 ended with code 85 (SIGTERM) after " in told[2]
    assert worker.wait(5) == 85
    assert not run.preempt_file.exists()
    with pytest.raises(UserError, match=r"nothing is running in .*toy, so there is nothing to preempt"):
        control.preempt(run, told.append)


@pytest.mark.parametrize("worker", ["train"], indirect=True)
def test_preempt_that_is_not_heard_says_so(run: RunFolder, worker: subprocess.Popen[str]) -> None:
    worker.send_signal(signal.SIGSTOP)
    told: list[str] = []
    assert control.preempt(run, told.append, wait_s=0.5) is False
    assert told[-1].startswith("attempt 1 has not ended within 0.5 s")


@pytest.mark.parametrize("worker", ["train"], indirect=True)
def test_killed_holder_is_nobody(run: RunFolder, worker: subprocess.Popen[str]) -> None:
    worker.kill()
    worker.wait()
    assert control.holder(run) is None
    with pytest.raises(UserError, match="nothing is running"):
        control.preempt(run, lambda line: None)


def test_preempt_elsewhere_writes_a_file(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    number = claim_attempt(run, "train")
    Fence.take(run, number)
    monkeypatch.setattr(socket, "gethostname", lambda: "login1")
    lock = json.loads(run.lock.read_text())
    told: list[str] = []
    assert control.preempt(run, told.append, dry_run=True) and not run.preempt_file.exists()
    assert control.preempt(run, told.append) and run.preempt_file.exists()
    where = f"attempt {number} (train) runs on {lock['host']}"
    assert told[-1] == f"writing {run.preempt_file}: {where} and looks at it once a second"


def test_reused_pid_gets_no_signal(run: RunFolder) -> None:
    Fence.take(run, claim_attempt(run, "train"))
    lock = {**json.loads(run.lock.read_text()), "pid": os.getppid(), "pid_start": 1}  # a stranger has the number now
    commit.write_json(run.lock, lock)
    assert control.holder(run) is None
