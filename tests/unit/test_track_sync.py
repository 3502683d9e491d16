"""`hpc-gen track sync`: from the journal alone, repeatable, killed midway, never beside a publisher of the run."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from experiments import TINY, Workspace
from typer.testing import CliRunner
from wandb_server import WandbServer

from hpc_gen.cli import app
from hpc_gen.runtime.errors import UserError
from hpc_gen.runtime.fence import Fence, claim_attempt
from hpc_gen.runtime.journal import Journal, history
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import track
from hpc_gen.stages.run_setup import load_run

needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
FAST: dict[str, Any] = {"x_file_stream_transmit_interval": 1, "init_timeout": 30, "finish_timeout": 30}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with WandbServer() as server:
        for name, value in server.environment(tmp_path).items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def run(workspace: Workspace) -> RunFolder:
    """A run that trained to its end without wandb, and then wrote a row that no checkpoint holds."""
    run = workspace.run("offline", text=TINY)
    assert workspace.train(run) == 0
    book = Journal(run, 1, "train", 0)
    book.row(112, {"loss": 0.5})
    book.close()
    return run


def said(run: RunFolder, **options: Any) -> list[str]:
    lines: list[str] = []
    track.sync(run, load_run(run), lines.append, **options)
    return lines


def remote(server: WandbServer, run: RunFolder) -> list[int]:
    run_id = json.loads((run.path / "wandb" / "mirror.json").read_text())["run_id"]
    return [row["images_seen"] for row in server.history("hpc-gen", run_id)]


@needs_wandb
def test_published_once_however_often(run: RunFolder, server: WandbServer) -> None:
    assert said(run, dry_run=True) == ["6 rows up to 96 images, project hpc-gen, as a new wandb run"]
    assert not (run.path / "wandb").exists() and server.operations == []
    server.available = False
    with pytest.raises(track.TrackError, match="the command may be repeated"):
        said(run, client_settings={**FAST, "init_timeout": 2})
    server.available = True
    lines = said(run, client_settings=FAST)
    run_id = json.loads((run.path / "wandb" / "mirror.json").read_text())["run_id"]
    assert lines[-1] == f"published: 6 rows of offline are on the server as {run_id}"
    expected = [row.images_seen for row in history(run, 96)]
    assert remote(server, run) == expected == [16, 32, 48, 64, 80, 96]
    again = said(run, client_settings=FAST)
    assert again[0].endswith(f"as {run_id}, 6 rows released before") and remote(server, run) == expected
    assert len(server.runs) == 1


def test_nothing_to_publish_and_a_run_that_publishes_by_itself(workspace: Workspace) -> None:
    run = workspace.run("young", "tracking.wandb=online", text=TINY)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        said(run, dry_run=True)
    assert workspace.train(run, "tracking.wandb=disabled") == 0
    number = claim_attempt(run, "train")
    Fence.take(run, number)
    with pytest.raises(UserError, match=f"attempt {number} of young is at work on .* and publishes by itself"):
        said(run)
    assert said(run, dry_run=True)


def test_as_typed(run: RunFolder) -> None:
    ran = CliRunner().invoke(app, ["track", "sync", str(run.path), "--dry-run"])
    assert ran.exit_code == 0 and ran.output == "6 rows up to 96 images, project hpc-gen, as a new wandb run\n"
