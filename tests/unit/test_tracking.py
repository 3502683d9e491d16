"""The wandb mirror against a stand-in server: every row once, over kills, absences, repeats and fall-backs.

No test leaves this machine. Tests with the real client are skipped, loudly, where wandb is not installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from wandb_server import HISTORY, WandbServer

from hpc_gen.runtime import env
from hpc_gen.runtime.journal import Journal, history
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.runtime.tracking import WandbMirror

needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
FAST = {"x_file_stream_transmit_interval": 1, "init_timeout": 30, "finish_timeout": 30}


@dataclass(frozen=True)
class Settings:
    wandb: str = "online"
    project: str | None = "digits"
    entity: str | None = None
    loss_term: str | None = None


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "my run")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with WandbServer() as server:
        for name, value in server.environment(tmp_path).items():
            monkeypatch.setenv(name, value)
        yield server


def write_rows(run: RunFolder, attempt: int, resumed_from: int | None, *images_seen: int) -> None:
    """An attempt of a trainer, as far as the mirror can see it."""
    journal = Journal(run, attempt, "train")
    journal.event("attempt_start", resumed_from=resumed_from, world_size=1)
    for number in images_seen:
        journal.row(number, {"loss": 1 / number, "attempt": attempt, "odd": float("nan")})
    journal.close()


def publish(run: RunFolder, upto: int, mode: str = "online", **options: Any) -> WandbMirror:
    """One publisher from start to end."""
    mirror = WandbMirror(run, Settings(mode), config={"seed": 1}, client_settings=FAST)
    mirror.publish(upto, final=True, **options)
    return mirror


def run_id(run: RunFolder) -> str:
    return str(json.loads((run.path / "wandb" / "mirror.json").read_text())["run_id"])


def check_mirror(server: WandbServer, run: RunFolder, upto: int | None = None) -> int:
    """The server holds exactly the history: no holes, values of the surviving attempts. Returns its length."""
    rows, remote = history(run, upto), server.history("digits", run_id(run))
    assert [row["_step"] for row in remote] == list(range(len(rows)))
    assert [row["images_seen"] for row in remote] == [row.images_seen for row in rows]
    for row, sent in zip(rows, remote):
        assert {"loss": sent["loss"], "attempt": sent["attempt"]} == pytest.approx(
            {"loss": row.data["loss"], "attempt": row.data["attempt"]}, rel=1e-15
        )
        assert sent["_timestamp"] == pytest.approx(row.t, abs=1e-5)
    return len(rows)


# ---------------------------------------------------------------- without the client


def fake_client(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Put a module wandb of ours before the real one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "wandb.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_disabled_does_nothing(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_client(tmp_path / "fake", monkeypatch, f"open({str(tmp_path / 'imported')!r}, 'w')")
    write_rows(run, 1, None, 64)
    mirror = publish(run, 64, "disabled")
    assert mirror.problem is None and not (run.path / "wandb").exists() and not (tmp_path / "imported").exists()


def test_without_a_network_no_connection_is_tried(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where the cluster's profile says that compute nodes have none; offline needs none."""
    fake_client(tmp_path / "fake", monkeypatch, f"open({str(tmp_path / 'imported')!r}, 'w')")
    monkeypatch.setenv("HPC_GEN_NO_NETWORK", "1")
    write_rows(run, 1, None, 64)
    publish(run, 64, "online")
    assert not (tmp_path / "imported").exists()
    said = capfd.readouterr().err
    assert (
        said == f"wandb: there is no network here; `hpc-gen track sync {run.name}` publishes from where there is one\n"
    )
    publish(run, 64, "offline")
    assert (tmp_path / "imported").exists()


def test_a_preemption_waits_two_seconds_for_a_client_that_hangs(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The preempting job is to start within five."""
    fake_client(tmp_path / "fake", monkeypatch, "import time; time.sleep(60)")
    write_rows(run, 1, None, 64)
    mirror = WandbMirror(run, Settings("online"))
    mirror.publish(32)
    begun = time.monotonic()
    mirror.publish(64, final=True, preempted=True)
    assert time.monotonic() - begun < 4.0
    assert "rows did not go out in 2 s; publishing again later sends what is missing" in capfd.readouterr().err


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_not_installed_is_said_once(
    run: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    mode: str,
) -> None:
    fake_client(tmp_path / "fake", monkeypatch, "raise ImportError('nothing here')")
    write_rows(run, 1, None, 64)
    mirror = WandbMirror(run, Settings(mode))
    for _ in range(3):
        mirror.publish(64, final=True)
    assert capfd.readouterr().err.count("not installed (nothing here); install it or set tracking.wandb") == 1
    assert mirror.problem is not None and "not installed" in mirror.problem


def test_a_client_that_hangs_does_not_make_the_trainer_wait(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fake_client(tmp_path / "fake", monkeypatch, "import time; Settings = dict\ndef init(**k): time.sleep(600)")
    write_rows(run, 1, None, 64)
    mirror = WandbMirror(run, Settings())
    started = time.monotonic()
    for _ in range(20_000):  # more than a pipe holds
        mirror.publish(64)
    assert time.monotonic() - started < 20.0
    started = time.monotonic()
    mirror.publish(64, final=True, wait_s=0.5)
    assert time.monotonic() - started < 10.0
    assert "publishing again later" in capfd.readouterr().err


def test_a_client_that_fails_is_left_alone_for_a_while(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fake_client(tmp_path / "fake", monkeypatch, "Settings = dict\ndef init(**k): raise OSError('no route')")
    write_rows(run, 1, None, 64)
    mirror = WandbMirror(run, Settings())
    mirror.publish(64)
    limit = time.monotonic() + 60.0
    while mirror.problem is None and time.monotonic() < limit:
        mirror.publish(64)
        time.sleep(0.02)
    assert mirror.problem == "OSError: no route; training goes on, the rows are kept in the journal"
    mirror.publish(64)
    mirror.publish(64, final=True, preempted=True)  # no time for new connections
    assert capfd.readouterr().err.count("no route") == 1
    mirror.publish(64, final=True)  # the end of the run: once more
    assert capfd.readouterr().err.count("no route") == 1


# ---------------------------------------------------------------- online


@needs_wandb
def test_each_row_once_or_a_new_run(run: RunFolder, server: WandbServer, capfd: pytest.CaptureFixture[str]) -> None:
    write_rows(run, 1, None, 64, 128, 192, 256)
    assert publish(run, 192).problem is None
    assert check_mirror(server, run, upto=192) == 3  # 256 is not committed
    first = run_id(run)
    remote = server.runs["digits", first]
    assert remote.complete and remote.exit_code == 0
    assert json.loads(remote.config)["seed"] == {"value": 1}
    secret = (env.get("WANDB_API_KEY") or "?").encode()
    for path in run.path.rglob("*"):
        assert not path.is_file() or secret not in path.read_bytes(), f"{path} holds the key"
    # Again: nothing new.
    before = dict(remote.files[HISTORY])
    assert publish(run, 192).problem is None
    assert remote.files[HISTORY] == before
    # The checkpoints at 192 and 128 were damaged: what is on the server was undone, it cannot be taken back.
    write_rows(run, 2, 64, 128)
    publish(run, 128)
    assert run_id(run) != first and "undone by a fall-back" in capfd.readouterr().err
    assert check_mirror(server, run) == 2
    assert remote.files[HISTORY] == before
    # Somebody else writes to our id: stop.
    remote = server.runs["digits", run_id(run)]
    for step in range(2, 9):
        remote.files[HISTORY][step] = json.dumps({"_step": step})
    write_rows(run, 3, 128, 192)
    mirror = publish(run, 192)
    assert "another writer uses this id" in str(mirror.problem)
    mirror.publish(192, final=True)  # given up: not even tried
    assert remote.count(HISTORY) == 9


TRAINER = """
import os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
from hpc_gen.runtime import commit
from hpc_gen.runtime.journal import Journal
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.runtime.tracking import WandbMirror

folder, attempt, last, ending = RunFolder(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
checkpoint = folder.path / "checkpoint"
resumed = int(checkpoint.read_text()) if checkpoint.exists() else None
journal = Journal(folder, attempt, "train")
journal.event("attempt_start", resumed_from=resumed, world_size=1)
settings = SimpleNamespace(wandb="online", project="digits", entity=None, loss_term=None)
patience_s = 2 if ending == "no server" else 30
fast = {"x_file_stream_transmit_interval": 1, "init_timeout": patience_s, "finish_timeout": 30}
mirror = WandbMirror(folder, settings, client_settings=fast)
committed = resumed
for step in range((resumed or 0) + 1, last + 1):
    journal.row(step, {"loss": 1 / step, "attempt": attempt})
    if step % 5 == 0:
        journal.event("save_begin", images_seen=step)
        commit.write_text(checkpoint, str(step))
        committed = step
        if ending == "killed before release" and step + 5 > last:
            os.kill(os.getpid(), signal.SIGKILL)
        mirror.publish(step)
print("trained", flush=True)
if ending == "killed":
    time.sleep(60)
mirror.publish(committed, final=True, preempted=ending == "preempted", wait_s=60)
"""


@needs_wandb
def test_one_history_over_kills_and_absences(run: RunFolder, server: WandbServer, tmp_path: Path) -> None:
    run.path.mkdir()

    def attempt(number: int, last: int, ending: str, until: Callable[[], bool] | None = None) -> None:
        command = [sys.executable, "-c", TRAINER, str(run.path), str(number), str(last), ending]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        if until is not None:
            limit = time.monotonic() + 60.0
            while not until():
                assert time.monotonic() < limit, "the rows did not arrive in 60 s"
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()

    def sent() -> int:
        return len(server.history("digits", run_id(run))) if (run.path / "wandb" / "mirror.json").exists() else 0

    attempt(1, 23, "killed", until=lambda: sent() > 0)  # rows 21 ... 23 are undone
    assert 0 < sent() <= 20
    attempt(2, 41, "killed before release")  # the checkpoint at 40 is newer than all that was released
    assert sent() <= 40
    server.available = False
    attempt(3, 62, "no server")
    server.available = True
    attempt(4, 78, "preempted")
    remote = server.runs["digits", run_id(run)]
    assert check_mirror(server, run, upto=75) == 75
    assert remote.preempting and remote.complete and remote.exit_code == 1
    attempt(5, 100, "done")
    assert check_mirror(server, run) == 100 and remote.exit_code == 0
    assert {row["attempt"] for row in server.history("digits", run_id(run))} == {1, 2, 3, 4, 5}


# ---------------------------------------------------------------- offline


def sync(folder: Path) -> None:
    """What a user does on a machine with network; beside the folder, as the client leaves logs where it runs."""
    subprocess.run(
        [sys.executable, "-m", "wandb", "sync", str(folder)],
        check=True,
        capture_output=True,
        timeout=120,
        cwd=folder.parent.parent,
        env={**os.environ, "WANDB_SILENT": "true"},
    )


def offline_folders(run: RunFolder) -> list[Path]:
    return sorted((run.path / "wandb").glob("offline-run-*"))


@needs_wandb
def test_offline_folders_complete_one_history(
    run: RunFolder, server: WandbServer, capfd: pytest.CaptureFixture[str]
) -> None:
    write_rows(run, 1, None, 64, 128, 192)
    publish(run, 128, "offline", preempted=True)
    assert not (run.path / "wandb").exists()  # an attempt that will be resumed leaves it to the last one
    write_rows(run, 2, 128, 192, 256)
    publish(run, 256, "offline")
    (folder,) = offline_folders(run)
    assert f"wandb sync {folder}" in capfd.readouterr().err
    half_written = run.path / "wandb" / f"offline-run-20200101_000000-{run_id(run)}"  # by a publisher that was killed
    half_written.mkdir()
    publish(run, 256, "offline")
    assert offline_folders(run) == [folder] and server.operations == []
    # More rows before anybody synced: the folder is replaced by a whole one.
    write_rows(run, 3, 256, 320)
    publish(run, 320, "offline")
    (whole,) = offline_folders(run)
    assert whole != folder
    sync(whole)
    assert check_mirror(server, run) == 5
    # More rows after that: a folder with these rows alone.
    write_rows(run, 4, 320, 384, 448)
    publish(run, 448, "offline")
    (rest,) = (path for path in offline_folders(run) if path != whole)
    sync(rest)
    assert check_mirror(server, run) == 7
    # Then online: nobody may sync the folder that is left, its rows go to the server now.
    write_rows(run, 5, 448, 512)
    publish(run, 512, "offline")
    first = run_id(run)
    publish(run, 512)
    assert run_id(run) == first and check_mirror(server, run) == 8
    assert all(list(path.glob("*.synced")) for path in offline_folders(run))
    # And back: nobody here knows what has reached the server, so the whole history gets a new id.
    publish(run, 512, "offline")
    marker = json.loads((run.path / "wandb" / "mirror.json").read_text())
    assert marker["run_id"] != first and (marker["first"], marker["rows"]) == (0, 8)
