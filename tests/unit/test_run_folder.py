"""The layout of a run folder (DESIGN section 5)."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_gen.runtime.errors import UserError
from hpc_gen.runtime.run_folder import RunFolder


def test_everything_lies_where_the_design_says() -> None:
    run = RunFolder("/space/runs/mnist")
    root = Path("/space/runs/mnist")
    assert run.name == "mnist" and run.path == root
    assert {
        name: getattr(run, name).relative_to(root).as_posix()
        for name in dir(RunFolder)
        if isinstance(getattr(RunFolder, name), property) and name not in ("name", "workspace")
    } == {
        "config_path": "config.yaml",
        "hashes_path": "hashes.json",
        "code": "code",
        "lock": "attempt.lock",
        "journal": "journal",
        "logs": "logs",
        "checkpoints": "checkpoints",
        "exports": "exports",
        "previews": "previews",
        "tables": "tables",
        "stop_file": "STOP",
        "preempt_file": "PREEMPT",
        "report": "report/index.html",
    }
    assert run.samples("main") == root / "samples/main"
    assert run.features("main") == root / "features/main"
    assert run.metrics("cfg=1.5") == root / "metrics/cfg=1.5.json"
    assert run.ledger("encode") == root / "ledger/encode"


@pytest.mark.parametrize("tag", ["", "a/b", "..", ".hidden", "a b", "a\n"])
def test_tags_that_would_leave_the_folder_are_refused(tag: str) -> None:
    run = RunFolder("/space/runs/mnist")
    for place in (run.samples, run.features, run.metrics, run.ledger):
        with pytest.raises(UserError, match="cannot name a part of the run folder"):
            place(tag)


def test_a_relative_path_becomes_absolute_and_runs_compare_by_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert RunFolder("a/../b") == RunFolder(tmp_path / "b") != RunFolder("c")
    run = RunFolder("b")
    assert not run.exists()
    run.path.mkdir()
    run.config_path.write_text("name: b\n")
    assert run.exists()


def test_the_workspace_is_where_the_run_lies_unless_it_was_moved_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPC_GEN_WORKSPACE", "/elsewhere")
    assert RunFolder("/space/runs/mnist").workspace == Path("/space")
    assert RunFolder("/archive/mnist").workspace == Path("/elsewhere")
