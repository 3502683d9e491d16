"""What wandb is shown: the journal's rows, pace and memory of their interval, previews at their place, each once."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from wandb_server import WandbServer

from hpc_gen.runtime.journal import Journal, Reader, history
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.runtime.tracking import WandbMirror
from hpc_gen.runtime.tracking_rows import Companions, Picture, lacks_term, rows_of, with_term
from hpc_gen.sampling.images import write_png

needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
FAST = {"x_file_stream_transmit_interval": 1, "init_timeout": 30, "finish_timeout": 30}


@dataclass(frozen=True)
class Settings:
    wandb: str
    loss_term: str | None
    project: str | None = "digits"
    entity: str | None = None


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with WandbServer() as server:
        for name, value in server.environment(tmp_path).items():
            monkeypatch.setenv(name, value)
        yield server


def run_id(run: RunFolder) -> str:
    return str(json.loads((run.path / "wandb" / "mirror.json").read_text())["run_id"])


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "my run")


def write(run: RunFolder, attempt: int, resumed_from: int | None, last: int, brightness: int = 0) -> None:
    """An attempt that logs every 32 images and makes a preview at every 48."""
    journal = Journal(run, attempt, "train")
    journal.event("attempt_start", resumed_from=resumed_from, world_size=1)
    for place in range((resumed_from or 0) + 16, last + 1, 16):
        if place % 48 == 0:
            files = []
            for label in (3, 7):
                path = run.previews / f"{place:012d}" / f"class_{label}.png"
                write_png(path, torch.full((3, 8, 8), brightness + place % 199 + label, dtype=torch.uint8))
                files.append(path.relative_to(run.path).as_posix())
            captions = ["class 3: cat", "class 7"]
            journal.event("preview", images_seen=place, file="x.png", files=files, captions=captions)
        if place % 32 == 0:
            timing = {"productive_s": 3.0, "data_wait_s": 1.0, "save_stall_s": 0.0, "other_s": 9.0}
            journal.event("interval", images_seen=place, images=32, peak_bytes=2**20 * attempt, **timing)
            journal.row(place, {"loss": 1.0, "mse": 0.25, "validation/loss": 2.0, "validation/mse": 0.5})
    journal.event("interval", images_seen=last, images=0, productive_s=0.1)  # the tail of the attempt
    journal.close()


def test_rows_stand_where_previews_are_made_and_are_undone_with_them(run: RunFolder) -> None:
    write(run, 1, None, 144)
    events = Reader(run).events()
    assert [row.images_seen for row in rows_of(events, 1000)] == [32, 48, 64, 96, 128, 144]
    assert [row.images_seen for row in rows_of(events, 96)] == [32, 48, 64, 96]  # not above the committed checkpoint
    assert [row.images_seen for row in history(run)] == [32, 64, 96, 128]
    data = {row.images_seen: row.data for row in rows_of(events, 1000)}
    assert data[48] == {} and data[96] == data[32]
    write(run, 2, 64, 96, brightness=1)
    events = Reader(run).events()
    rows = rows_of(events, 1000)
    assert [(row.images_seen, row.attempt) for row in rows] == [(32, 1), (48, 1), (64, 1), (96, 2)]
    companions = Companions(events)
    files = [[picture.file for picture in companions.pictures(row)] for row in rows]
    assert [len(each) for each in files] == [0, 2, 0, 2]
    assert companions.pictures(rows[1])[0] == Picture("previews/000000000048/class_3.png", "class 3: cat")
    peaks = [companions.pace(row).get("memory/peak_bytes") for row in rows]
    assert peaks == [2**20, None, 2**20, 2**21]


def test_pace_leaves_out_validation_and_previews(run: RunFolder) -> None:
    write(run, 1, None, 32)
    events = Reader(run).events()
    (row,) = rows_of(events, 32)
    assert Companions(events).pace(row) == {
        "time/images_per_s": 8.0,
        "time/data_wait": 0.25,
        "memory/peak_bytes": float(2**20),
    }


def test_odd_lines_are_no_trouble(run: RunFolder) -> None:
    journal = Journal(run, 1, "train")
    journal.event("preview", images_seen=16, file="x.png")  # of a version without pictures
    journal.event("preview", images_seen=16, files=["a"], captions=["a", "b"])
    journal.event("preview")
    journal.event("interval", images_seen=16, images=16, productive_s=math.nan, peak_bytes=None)
    journal.row(16, {"loss": 1.0})
    journal.close()
    events = Reader(run).events()
    (row,) = rows_of(events, 16)
    assert Companions(events).pictures(row) == [] and Companions(events).pace(row) == {}


def test_a_term_in_the_place_of_the_totals() -> None:
    data = {"loss": 1.0, "mse": 0.25, "validation/loss": 2.0, "validation/mse": 0.5, "x": 3.0}
    assert with_term(data, None) == data
    assert with_term(data, "mse") == {**data, "loss": 0.25, "validation/loss": 0.5}
    assert with_term(data, "mes") == data and lacks_term(data, "mes")
    assert (
        not lacks_term(data, "mse") and not lacks_term({"validation/loss": 1.0}, "mse") and not lacks_term(data, None)
    )


def publish(run: RunFolder, upto: int, mode: str = "online", term: str | None = None) -> None:
    mirror = WandbMirror(run, Settings(mode, term), client_settings=FAST)
    mirror.publish(upto, final=True)
    assert mirror.problem is None


@needs_wandb
def test_everything_arrives_once(run: RunFolder, server: WandbServer, capfd: pytest.CaptureFixture[str]) -> None:
    write(run, 1, None, 144)
    (run.previews / f"{96:012d}" / "class_7.png").unlink()  # somebody tidied up
    publish(run, 96, term="mse")
    rows = server.history("digits", run_id(run))
    assert [row["images_seen"] for row in rows] == [32, 48, 64, 96]
    assert [(row.get("loss"), row.get("validation/loss")) for row in rows] == [
        (0.25, 0.5),
        (None, None),
        *[(0.25, 0.5)] * 2,
    ]
    assert [row.get("time/images_per_s") for row in rows] == [8.0, None, 8.0, 8.0]
    assert rows[0]["memory/peak_bytes"] == 2**20
    assert rows[1]["preview"]["captions"] == ["class 3: cat", "class 7"] and rows[1]["preview"]["count"] == 2
    assert rows[3]["preview"]["captions"] == ["class 3: cat"]
    assert "class_7.png is not published" in capfd.readouterr().err
    pictures = [name for name in server.uploads if name.endswith(".png")]
    assert len(pictures) == len(set(pictures)) == 3
    # again, further: what was sent stays, the pictures of the next checkpoint come
    publish(run, 96, term="mse")
    assert [name for name in server.uploads if name.endswith(".png")] == pictures
    publish(run, 144, term="mes")
    again = server.history("digits", run_id(run))
    assert again[:4] == rows and [row["images_seen"] for row in again[4:]] == [128, 144]
    assert again[4]["loss"] == 1.0
    said = capfd.readouterr().err
    assert said.count("tracking.loss_term 'mes' is no key of the rows (did you mean 'mse'?)") == 1
    assert len([name for name in server.uploads if name.endswith(".png")]) == 5


@needs_wandb
def test_offline_takes_the_pictures_along(run: RunFolder, server: WandbServer) -> None:
    write(run, 1, None, 96)
    publish(run, 96, "offline")
    (folder,) = (run.path / "wandb").glob("offline-run-*")
    assert len(list((folder / "files" / "media" / "images").glob("*.png"))) == 4
    assert json.loads((run.path / "wandb" / "mirror.json").read_text())["rows"] == 4
    assert server.operations == []
