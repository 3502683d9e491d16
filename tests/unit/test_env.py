"""The one reader of the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_gen.runtime import env


def test_empty_counts_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPC_GEN_X", "")
    assert env.get("HPC_GEN_X") is None and env.get("HPC_GEN_X", "d") == "d"
    monkeypatch.setenv("HPC_GEN_X", "v")
    assert env.get("HPC_GEN_X", "d") == "v"


def test_workspace_is_the_variable_or_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HPC_GEN_WORKSPACE", raising=False)
    assert env.workspace() == tmp_path
    monkeypatch.setenv("HPC_GEN_WORKSPACE", "sub/../other")
    assert env.workspace() == tmp_path / "other"


def test_copies_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPC_GEN_X", "v")
    env.snapshot()["HPC_GEN_X"] = "changed"
    child = env.child_environment(RANK=1, HPC_GEN_X=None)
    assert child["RANK"] == "1" and "HPC_GEN_X" not in child
    assert env.get("HPC_GEN_X") == "v" and env.get("RANK") is None


def test_a_default_does_not_replace_the_users_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPC_GEN_X", "v")
    env.set_default("HPC_GEN_X", "d")
    assert env.get("HPC_GEN_X") == "v"
