"""Reading golden folders: damaged files become failing tests with a sentence, lists stay strict, names stay unique."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from expected_failures import CASES, OFFICIAL, case_reason, official_reason
from golden_files import (
    PARITY_FOLDER,
    REPOSITORY,
    Case,
    GoldenError,
    OfficialModel,
    cases,
    official_models,
    roots,
)
from golden_handling import (
    ModelFacts,
    UnreadWarning,
    constants,
    known_keys,
    load_handlers,
    official_differences,
)
from safetensors.torch import save_file

FOLDER_TESTS = ("golden", "cache_sample", "edm_zip", "latent_files", "recognise")  # those that read golden folders
GOOD = {"kind": "k", "owner": "energy", "compare": [{"tensors": "out.*", "rule": "exact"}]}


def write(folder: Path, name: str, content: Any) -> Path:
    path = folder / "energy" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_good_case_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, "one", GOOD)
    save_file({"out.a": torch.ones(2)}, path.with_suffix(".safetensors"))
    (case,) = cases([tmp_path])
    assert (case.id, case.kind, case.owner, case.problem) == ("energy-one", "k", "energy", None)
    assert case.tensors()["out.a"].tolist() == [1, 1]
    with pytest.raises(GoldenError, match=r"in\.x"):
        case.tensors()["in.x"]
    with pytest.raises(GoldenError, match="config"):
        case.record["config"]


@pytest.mark.parametrize(
    "content",
    [
        "{ not json",
        "[]",
        "",
        {"compare": []},
        {"kind": "k"},
        {"kind": 3, "compare": []},
        {"kind": "k", "compare": {}},
        {"kind": "k", "compare": [1]},
        {**GOOD, "owner": 4},
    ],
)
def test_damaged_case_names_its_file(tmp_path: Path, content: Any) -> None:
    path = write(tmp_path, "bad", content)
    (case,) = cases([tmp_path])
    assert case.problem is not None and str(path) in case.problem


def test_tensors_without_a_record_are_a_damaged_case(tmp_path: Path) -> None:
    (tmp_path / "energy").mkdir()
    save_file({"out.a": torch.ones(1)}, tmp_path / "energy" / "alone.safetensors")
    (case,) = cases([tmp_path])
    assert case.name == "alone" and case.problem is not None


def test_damaged_tensor_file_says_so(tmp_path: Path) -> None:
    path = write(tmp_path, "one", GOOD)
    path.with_suffix(".safetensors").write_bytes(b"no tensors here")
    with pytest.raises(GoldenError, match=r"one\.safetensors"):
        cases([tmp_path])[0].tensors()


def test_names_with_dots_are_cases_of_their_own(tmp_path: Path) -> None:
    for name in ("a.1", "a.2"):
        save_file({"out.a": torch.ones(1)}, write(tmp_path, name, GOOD).with_name(name + ".safetensors"))
    assert [case.name for case in cases([tmp_path])] == ["a.1", "a.2"]
    assert all(case.problem is None and len(case.tensors()) == 1 for case in cases([tmp_path]))


def test_official_lists_are_read_and_damaged_ones_reported(tmp_path: Path) -> None:
    path = write(tmp_path, "official_shapes", {"fine": {"state_dict": {"a": [1]}}, "odd": {"params": 3}})
    models = {model.name: model for model in official_models([tmp_path])}
    assert models["fine"].problem is None and "odd" in str(models["odd"].problem)
    assert cases([tmp_path]) == []
    path.write_text("{")
    (model,) = official_models([tmp_path])
    assert model.problem is not None and str(path) in model.problem


def test_the_first_folder_wins_and_names_are_unique(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write(tmp_path / folder, "same", {**GOOD, "kind": folder})
        write(tmp_path / folder, "official_shapes", {"m": {"state_dict": {folder: []}}})
    folders = [tmp_path / "a", tmp_path / "b"]
    assert [case.kind for case in cases(folders)] == ["a"]
    assert [list(m.record["state_dict"]) for m in official_models(folders)] == [["a"]]


def test_environment_replaces_all_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPC_GEN_GOLDEN", str(tmp_path))
    assert roots() == [tmp_path]
    monkeypatch.delenv("HPC_GEN_GOLDEN")
    assert roots()[0] == PARITY_FOLDER / "golden"


def test_expected_failures_name_their_reason() -> None:
    anywhere = Path("x.json")

    def reason(name: str, **change: Any) -> str | None:
        return case_reason(Case("energy", name, anywhere, {**GOOD, **change}))

    assert reason("pd_loss_std") is None
    assert reason("pd_loss_std", owner="no_such_method", kind="never_heard_of")
    assert reason("vae", owner="no_such_method", kind="never_heard_of")
    assert reason("a_new_case", kind="a_new_kind") is None
    assert official_reason(OfficialModel("energy", "pure_diffusion_base_std_64", anywhere)) is None
    assert official_reason(OfficialModel("energy", "mar_base", anywhere))
    assert official_reason(OfficialModel("no_such_method", "anything", anywhere))
    assert all(why for _, _, why in CASES + OFFICIAL)


def test_what_has_a_handler_is_checked_before_its_owner_is_there() -> None:
    load_handlers()
    anywhere = Path("x.json")
    tokenizer = {**GOOD, "kind": "vae", "owner": "no_such_method"}
    assert case_reason(Case("dim", "vae_small", anywhere, tokenizer)) is None
    assert case_reason(Case("dim", "vae_small", anywhere, {**tokenizer, "kind": "never_heard_of"}))
    assert official_reason(OfficialModel("dim", "sd_vae_kl_f8", anywhere)) is None


def test_official_comparison_sees_each_difference() -> None:
    record: dict[str, Any] = {
        "params": 3, "trainable": 2, "buffers": ["c"], "frozen": ["b"], "state_dict": {"a": [2], "b": [1], "c": []},
    }  # fmt: skip
    right = {"a": (2,), "b": (1,), "c": ()}
    assert official_differences(ModelFacts(right, ("c",), ("b",), 3, 2), record) == []
    for wrong in (
        ModelFacts({"a": (2,), "b": (1,)}, ("c",), ("b",), 3, 2),
        ModelFacts({**right, "d": ()}, ("c",), ("b",), 3, 2),
        ModelFacts({**right, "a": (1, 2)}, ("c",), ("b",), 3, 2),
        ModelFacts({"b": (1,), "a": (2,), "c": ()}, ("c",), ("b",), 3, 2),
        ModelFacts(right, (), ("b",), 3, 2),
        ModelFacts(right, ("c",), (), 3, 2),
        ModelFacts(right, ("c",), ("b",), 4, 2),
        ModelFacts(right, ("c",), ("b",), 3, 3),
    ):
        assert official_differences(wrong, record), wrong
    other_word = {"trainable_params": 2, "state_dict": record["state_dict"]}  # as METHOD gmem has it
    assert official_differences(ModelFacts(right, (), (), 3, 2), other_word) == []
    assert official_differences(ModelFacts(right, (), (), 3, 3), other_word)


def test_damaged_unknown_and_expected_cases_in_a_whole_run(tmp_path: Path) -> None:
    """A run over one damaged, one unknown and one expected case: collection stands, exactly the first two are red.

    The tests of samples that belong to cases (a zip, shards) ask for none in a folder that has none.
    """
    write(tmp_path, "broken", "{")
    write(tmp_path, "unknown", {**GOOD, "kind": "never_heard_of"})
    write(tmp_path, "expected", {**GOOD, "kind": "never_heard_of", "owner": "no_such_method"})
    shapes = {"m": {"state_dict": {"a": [1]}}}
    (tmp_path / "never_heard_of").mkdir()
    (tmp_path / "never_heard_of" / "official_shapes.json").write_text(json.dumps(shapes))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *(str(PARITY_FOLDER / f"test_{name}.py") for name in FOLDER_TESTS),
    ]
    environment = {**os.environ, "HPC_GEN_GOLDEN": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=REPOSITORY)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "2 failed" in result.stdout and "2 xfailed" in result.stdout, result.stdout
    assert "test_case[energy-broken]" in result.stdout and "test_case[energy-unknown]" in result.stdout


def test_what_a_handler_does_not_read_is_said() -> None:
    """Neither passes in silence: an option that nobody reads, and a constant that is not ours."""
    with pytest.warns(UnreadWarning, match=r"config\.loss has 'huber'"):
        known_keys({"weight": 1, "huber": 2}, ("weight",), "config.loss")
    with pytest.warns(UnreadWarning, match=r"eps = 1e-05, ours is 1e-06"):
        constants({"eps": 1e-5}, {"eps": 1e-6}, "config")
