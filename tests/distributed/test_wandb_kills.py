"""The real wandb client against the loopback server: trainer and service killed at random, every row and picture once."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from wandb_server import HISTORY, WandbServer

from hpc_gen.runtime import commit
from hpc_gen.runtime.journal import Journal, Reader
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.runtime.tracking import WandbMirror
from hpc_gen.runtime.tracking_rows import rows_of

needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
KILLS = 20
LAST = 1000
EVERY = 5
PICTURE_EVERY = 25

# rows, checkpoints and pictures as training writes them, at a pace at which a kill hits anything
TRAINER = f"""
import sys, time
from pathlib import Path
from types import SimpleNamespace
from hpc_gen.runtime import commit
from hpc_gen.runtime.journal import Journal
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.runtime.tracking import WandbMirror

folder, attempt, last, pause = RunFolder(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
checkpoint = folder.path / "checkpoint"
resumed = int(checkpoint.read_text()) if checkpoint.exists() else None
journal = Journal(folder, attempt, "train")
journal.event("attempt_start", resumed_from=resumed, world_size=1)
settings = SimpleNamespace(wandb="online", project="digits", entity=None, loss_term=None)
fast = {{"x_file_stream_transmit_interval": 1, "init_timeout": 60, "finish_timeout": 60}}
mirror = WandbMirror(folder, settings, client_settings=fast)
print("begun", flush=True)
committed = resumed
for step in range((resumed or 0) + 1, last + 1):
    if step % {PICTURE_EVERY} == 0:
        name = f"previews/{{step:012d}}.png"
        commit.write_bytes(folder.path / name, Path(sys.argv[5]).read_bytes() + bytes([step % 256, step // 256, attempt]))
        journal.event("preview", images_seen=step, files=[name], captions=[f"at {{step}}"])
    journal.row(step, {{"loss": 1 / step, "attempt": attempt}})
    if step % {EVERY} == 0:
        journal.event("save_begin", images_seen=step)
        commit.write_text(checkpoint, str(step))
        committed = step
        mirror.publish(step)
    time.sleep(pause)
mirror.publish(committed, final=True, wait_s=120)
print("problem", mirror.problem, flush=True)
"""


@dataclass(frozen=True)
class Settings:
    wandb: str = "online"
    project: str | None = "digits"
    entity: str | None = None
    loss_term: str | None = None


FAST = {"x_file_stream_transmit_interval": 1, "init_timeout": 60, "finish_timeout": 60}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with WandbServer() as server:
        for name, value in server.environment(tmp_path).items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    from PIL import Image

    Image.new("RGB", (8, 8), (9, 99, 199)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def run_id(run: RunFolder) -> str:
    return str(json.loads((run.path / "wandb" / "mirror.json").read_text())["run_id"])


def descendants(pid: int) -> list[int]:
    """Processes below `pid`, children before their children: the publisher, then wandb's service."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:
            continue
        parents.setdefault(int(text.rpartition(")")[2].split()[1]), []).append(int(path.parent.name))
    found, waiting = [], [pid]
    while waiting:
        children = parents.get(waiting.pop(0), [])
        found += children
        waiting += children
    return found


def kill(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


VICTIMS = ("trainer", "service", "publisher", "all", "service by SIGTERM")


def attempt(run: RunFolder, number: int, picture: Path, moment_s: float, victim: str, service_s: float) -> None:
    """One attempt that ends with SIGKILL `moment_s` after it began; its service may go first."""
    command = [sys.executable, "-c", TRAINER, str(run.path), str(number), str(LAST), "0.02", str(picture)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        process.stdout.readline()
        below: list[int] = []
        if victim != "trainer":
            time.sleep(service_s)
            below = descendants(process.pid)
            chosen = below[:1] if victim == "publisher" else below[1:] if "service" in victim else below
            kill(chosen, signal.SIGTERM if "SIGTERM" in victim else signal.SIGKILL)
        time.sleep(0.0 if victim == "all" else moment_s)
        left = sorted({*below, *descendants(process.pid)})
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    if number % 2:  # a node that is lost takes everything; else the publisher ends by itself, beside the next attempt
        kill(left, signal.SIGKILL)


@needs_wandb
@pytest.mark.timeout(600)
def test_twenty_kills_of_trainer_and_service(server: WandbServer, tmp_path: Path, picture: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    dice = random.Random(20)
    seen: list[int] = []
    for number in range(1, KILLS + 1):
        attempt(run, number, picture, dice.uniform(0.1, 2.0), dice.choice(VICTIMS), dice.uniform(0.0, 1.5))
        checkpoint = run.path / "checkpoint"
        seen.append(int(checkpoint.read_text()) if checkpoint.exists() else 0)
    left = LAST if seen[-1] < LAST else seen[-1] + 50
    command = [sys.executable, "-c", TRAINER, str(run.path), str(KILLS + 1), str(left), "0", str(picture)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "problem None" in said.stdout, said.stdout + said.stderr
    rows, remote = rows_of(Reader(run, stage="train", task=0).events(), left), server.history("digits", run_id(run))
    assert len({name for _, name in server.runs}) == 1, "a second wandb run was begun"
    assert [row["_step"] for row in remote] == list(range(left))
    assert [row["images_seen"] for row in remote] == list(range(1, left + 1))
    assert [row["attempt"] for row in remote] == [row.data["attempt"] for row in rows]
    assert sum("preview" in row for row in remote) == left // PICTURE_EVERY
    assert server.lost_pictures("digits", run_id(run)) == []
    assert server.runs["digits", run_id(run)].complete
    survivors = {row.attempt for row in rows}
    print(f"{KILLS} kills at {seen}; rows of {len(survivors)} attempts, {len(remote)} rows once each")
    assert len(survivors) > 3, "the kills came too early to mean anything"


@needs_wandb
def test_a_picture_whose_row_arrived_alone_is_sent_again(server: WandbServer, tmp_path: Path, picture: Path) -> None:
    run = RunFolder(tmp_path / "run")
    journal = Journal(run, 1, "train")
    journal.event("attempt_start", resumed_from=None, world_size=1)
    commit.write_bytes(run.path / "previews" / "a.png", picture.read_bytes())
    journal.event("preview", images_seen=1, files=["previews/a.png"], captions=["a"])
    journal.row(1, {"loss": 1.0})
    server.takes_files = False
    mirror = WandbMirror(run, Settings(), client_settings=FAST)
    mirror.publish(1)
    assert mirror._child is not None
    limit = time.monotonic() + 60
    while not ((run.path / "wandb" / "mirror.json").exists() and server.history("digits", run_id(run))):
        assert time.monotonic() < limit
        time.sleep(0.05)
    kill([mirror._child.pid, *descendants(mirror._child.pid)], signal.SIGKILL)
    mirror._child.wait()
    assert len(server.lost_pictures("digits", run_id(run))) == 1
    server.takes_files = True
    again: Any = WandbMirror(run, Settings(), client_settings=FAST)
    again.publish(1, final=True)
    assert again.problem is None and server.lost_pictures("digits", run_id(run)) == []
    assert server.runs["digits", run_id(run)].count(HISTORY) == 1
    assert not (run.path / "wandb" / "unsent").exists()
