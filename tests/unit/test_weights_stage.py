"""Weights in and out of a run: exact round trips, ordinary runs from imports, and every difference told."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_method
import torch
from experiments import LINEAR, TINY, Workspace, leftovers, make_workspace, resolved
from torch import Tensor

from hpc_gen.cli_weights import weights_export
from hpc_gen.methods import registry
from hpc_gen.methods.materialise import materialise
from hpc_gen.runtime import commit, journal
from hpc_gen.runtime.errors import CheckpointError, DataError, ExitCode, HpcGenError, UserError
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.runtime.tensor_files import metadata_of, read_tensors, write_tensors
from hpc_gen.stages import run_setup, weights_transfer
from hpc_gen.stages.build import build_method, meta_method, open_table, table_facts
from hpc_gen.stages.status import status
from hpc_gen.stages.status_view import lines
from hpc_gen.stages.weights import differences, list_weights, verify_weights
from hpc_gen.stages.weights_transfer import export_weights, import_weights
from hpc_gen.training.checkpoint import manifest, read, storage

ENERGY = TINY.replace("diffusion_timesteps: 50", "diffusion_timesteps: 50, variant: energy").replace(
    "name: tiny", "name: nrg"
)
ROLE = "denoiser"


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """The toy tables; the copy of the code is a hundred fsyncs."""
    monkeypatch.setattr(run_setup, "PACKAGES", ("slurm",))
    return make_workspace(tmp_path)


def state_of(workspace: Workspace, text: str = TINY, seed: int = 99, *overrides: str) -> dict[str, Tensor]:
    """Weights of the experiment's network that no run would begin with."""
    experiment = resolved(*overrides, text=text).experiment
    method = meta_method(experiment, table_facts(open_table(workspace.path, experiment.data.table)))
    state = materialise(method, seed)[ROLE].state_dict()
    return {k: v if k.endswith(("alpha", "pos_embed")) else v + 0.25 for k, v in state.items()}


def official(path: Path, state: dict[str, Tensor], averages: dict[str, Tensor] | None = None) -> Path:
    """A checkpoint as mar_ebwm writes it."""
    content: dict[str, Any] = {"model": state, "epoch": 4, "args": argparse.Namespace(use_energy=True), "scaler": {}}
    if averages is not None:
        content["model_ema"] = averages
    content["optimizer"] = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    torch.save(content, path)
    return path


def imported(
    workspace: Workspace, file: Path, *overrides: str, text: str = TINY, **options: Any
) -> tuple[RunFolder, str]:
    """The run of an import and what was said."""
    said: list[str] = []
    run = import_weights(resolved(*overrides, text=text), file, workspace.path, said.append, **options)
    return run, "\n".join(said)


def refuses(kind: type[HpcGenError], action: Callable[[], Any], *parts: str) -> None:
    with pytest.raises(kind) as info:
        action()
    assert type(info.value) is kind and "\n" not in str(info.value)
    for part in parts:
        assert part in str(info.value), str(info.value)


# --- importing


def test_an_import_is_an_ordinary_checkpoint_at_zero_images(workspace: Workspace) -> None:
    state = state_of(workspace)
    averages = {name: value + 1 if name.startswith("dit.") else value for name, value in state.items()}
    file = official(workspace.path / "checkpoint-last.pth", state, averages)
    run, said = imported(workspace, file)
    assert run.path == workspace.path / "runs" / "tiny"
    (info,) = read.list_checkpoints(run)
    assert info.images_seen == 0 and read.verify(info.path) == []
    raw, average = read.load_role(info.path, ROLE), read.load_role(info.path, ROLE, "main")
    assert all(torch.equal(raw[name], value) for name, value in state.items()) and raw.keys() == state.keys()
    assert all(torch.equal(average[name], value) for name, value in averages.items() if name != "alpha")
    assert not [name for name in storage.keys(info.path) if name.startswith("optim/")]
    facts = manifest.read(info.path).facts["imported"]
    assert facts == {"file": file.name, "sha256": commit.sha256_file(file), "key": "model", "ema_key": "model_ema"}
    assert "averages are from 'model_ema' of the file" in said and not leftovers(run)
    (event,) = [event for event in journal.read(run) if event.kind == "import"]
    assert event.fields["sha256"] == facts["sha256"] and event.fields["role"] == ROLE
    shown = list(lines(status(run)))
    assert any("attempt 1    import" in line and "done" in line for line in shown)
    assert any(line.startswith(f"  imported from {file.name}, SHA-256 ") for line in shown)


def test_training_goes_on_from_an_import_and_keeps_saying_so(workspace: Workspace) -> None:
    state = state_of(workspace)
    run, said = imported(workspace, official(workspace.path / "a.pth", state))
    assert "the weights themselves, for the file has none" in said
    assert workspace.train(run, "train.stop_at_images=16") is ExitCode.DONE
    assert workspace.train(run) is ExitCode.DONE
    newest = read.newest(run)
    assert newest.images_seen == 96
    assert manifest.read(newest.path).facts["imported"]["file"] == "a.pth"
    changed = read.load_role(newest.path, ROLE)["dit.x_embedder.proj.weight"] - state["dit.x_embedder.proj.weight"]
    assert 0 < changed.abs().max() < 0.1  # from there, not from the initial values
    scratch = workspace.run("scratch")
    workspace.train(scratch, "train.stop_at_images=16")
    assert "imported" not in manifest.read(read.newest(scratch).path).facts


def test_the_same_import_again_does_nothing_and_another_is_refused(workspace: Workspace) -> None:
    file = official(workspace.path / "a.pth", state_of(workspace))
    run, _ = imported(workspace, file)
    before = commit.sha256_file(read.newest(run).path / "manifest.json")
    copy = workspace.path / "b.pth"
    copy.write_bytes(file.read_bytes())
    for same in (file, copy):
        assert "holds these weights already" in imported(workspace, same)[1]
    assert len(list(run.journal.glob("*.attempt"))) == 1
    other = official(workspace.path / "c.pth", state_of(workspace, TINY, 5))
    refuses(UserError, lambda: imported(workspace, other), "was begun from other weights", "name=...")
    workspace.train(run, "train.stop_at_images=16")
    refuses(UserError, lambda: imported(workspace, file), "is at 16 images")
    assert commit.sha256_file(run.checkpoints / f"{0:012d}" / "manifest.json") == before
    assert imported(workspace, other, "name=another")[0].name == "another"


def test_a_run_that_encodes_only_takes_an_import(workspace: Workspace) -> None:
    run_setup.prepare_run(resolved(), workspace.path)
    run, _ = imported(workspace, official(workspace.path / "a.pth", state_of(workspace)))
    assert read.newest(run).images_seen == 0


def test_a_dry_run_changes_nothing(workspace: Workspace) -> None:
    _, said = imported(workspace, official(workspace.path / "a.pth", state_of(workspace)), dry_run=True)
    assert "would write a checkpoint at 0 images" in said and "(new)" in said
    assert not (workspace.path / "runs").exists()


def test_half_precision_is_widened_exactly(workspace: Workspace) -> None:
    state = {name: value.half() for name, value in state_of(workspace).items()}
    run, _ = imported(workspace, official(workspace.path / "a.pth", state))
    found = read.load_role(read.newest(run).path, ROLE)
    assert all(found[name].dtype == torch.float32 and torch.equal(found[name].half(), state[name]) for name in state)


def test_the_key_may_be_named(workspace: Workspace) -> None:
    state = state_of(workspace)
    averages = {name: value * 2 for name, value in state.items()}
    file = official(workspace.path / "a.pth", state, averages)
    run, _ = imported(workspace, file, key="model_ema")
    assert torch.equal(
        read.load_role(read.newest(run).path, ROLE)["dit.x_embedder.proj.bias"], averages["dit.x_embedder.proj.bias"]
    )
    refuses(UserError, lambda: imported(workspace, file, key="module"), "has no entry 'module'", "did you mean 'model'")
    torch.save({"first": state, "second": state}, file)
    refuses(UserError, lambda: imported(workspace, file, "name=x"), "several state dicts: first, second", "--key")


def spoiled(state: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    name = "dit.x_embedder.proj.weight"
    if how == "missing":
        return {key: value for key, value in state.items() if key != name}
    replaced = {
        "unknown": ("dit.extra", torch.ones(2)),
        "shape": (name, torch.ones(3, 3)),
        "nan": (name, torch.full_like(state[name], float("nan"))),
        "kind": (name, torch.ones(state[name].shape, dtype=torch.int64)),
    }
    return {**state, replaced[how][0]: replaced[how][1]}


@pytest.mark.parametrize(
    ("how", "phrase"),
    [
        ("missing", "lacks 'dit.x_embedder.proj.weight' [16, 1, 4, 4]"),
        ("unknown", "has unknown 'dit.extra' [2]"),
        ("shape", "has 'dit.x_embedder.proj.weight' as [3, 3], the model needs [16, 1, 4, 4]"),
        ("nan", "has 256 values that are not finite in 'dit.x_embedder.proj.weight'"),
        ("kind", "has 'dit.x_embedder.proj.weight' as torch.int64, the model needs torch.float32"),
    ],
)
@pytest.mark.parametrize("part", ["model", "model_ema"])
def test_weights_that_do_not_fit_are_refused_whole(workspace: Workspace, how: str, phrase: str, part: str) -> None:
    state = state_of(workspace)
    bad = spoiled(state, how)
    file = official(workspace.path / "a.pth", *((bad, state) if part == "model" else (state, bad)))
    refuses(DataError, lambda: imported(workspace, file), f"a.pth: '{part}' {phrase}", "hpc-gen weights verify")
    assert not (workspace.path / "runs").exists()


def test_what_an_import_needs_is_said(workspace: Workspace) -> None:
    file = official(workspace.path / "a.pth", state_of(workspace))
    refuses(
        UserError,
        lambda: imported(workspace, file, "data.table=tables/none"),
        "tables/none is not there",
        "--stages encode",
    )
    refuses(
        UserError, lambda: imported(workspace, file, role="denoise"), "no role 'denoise' (did you mean 'denoiser'?)"
    )
    refuses(DataError, lambda: imported(workspace, file, sha256="0" * 64), "has the SHA-256")
    found = resolved()
    without = replace(found, experiment=found.experiment.model_copy(update={"train": None}))
    refuses(UserError, lambda: import_weights(without, file, workspace.path, print), "no 'train' section")
    assert not (workspace.path / "runs").exists()


def test_a_failed_import_leaves_a_run_that_can_be_imported_again(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = official(workspace.path / "a.pth", state_of(workspace))
    with monkeypatch.context() as patch:
        patch.setattr(storage, "save", lambda *_: (_ for _ in ()).throw(UserError("the disk is full")))
        refuses(UserError, lambda: imported(workspace, file), "the disk is full")
    run, _ = imported(workspace, file)
    assert read.newest(run).images_seen == 0 and not leftovers(run)
    assert [attempt.exit_code for attempt in journal.attempts(run)] == [ExitCode.USER, ExitCode.DONE]


# --- the energy method's silent surprises


def test_another_step_size_is_told_and_taken(workspace: Workspace) -> None:
    state = {**state_of(workspace, ENERGY), "alpha": torch.tensor(0.5)}
    run, said = imported(workspace, official(workspace.path / "a.pth", state), text=ENERGY)
    assert "the step size in the weights, alpha = 0.5, replaces method.energy.step_size = 0.01" in said
    assert float(read.load_role(read.newest(run).path, ROLE)["alpha"]) == 0.5
    same = official(workspace.path / "b.pth", state_of(workspace, ENERGY))
    assert "step size" not in imported(workspace, same, "name=b", text=ENERGY)[1]


@pytest.mark.parametrize("learnable", [False, True])
def test_a_fixed_step_size_becomes_learnable_and_back(workspace: Workspace, learnable: bool) -> None:
    """The reference's lists of parameters differ then, and its optimizer state no longer fits."""
    key = "method.energy.learnable_step_size"
    state = state_of(workspace, ENERGY, 99, f"{key}={str(not learnable).lower()}")
    file = official(workspace.path / "a.pth", state, {**state, "alpha": torch.tensor(0.25)})
    run, _ = imported(workspace, file, f"{key}={str(learnable).lower()}", text=ENERGY)
    assert workspace.train(run, "train.stop_at_images=16") is ExitCode.DONE
    names = storage.keys(read.newest(run).path)
    assert (f"ema/{ROLE}/main/alpha" in names) is learnable
    first = storage.load(run.checkpoints / f"{0:012d}")
    assert not learnable or float(first[f"ema/{ROLE}/main/alpha"]) == 0.25


def test_other_fixed_positions_are_told(workspace: Workspace) -> None:
    state = state_of(workspace)
    state["dit.pos_embed"] = state["dit.pos_embed"] + 0.5
    _, said = imported(workspace, official(workspace.path / "a.pth", state))
    assert "the fixed positions in the weights differ from sines and cosines by up to 0.5" in said


# --- exporting


def test_a_round_trip_is_bit_exact(workspace: Workspace) -> None:
    run = workspace.run("made")
    workspace.train(run)
    said: list[str] = []
    path = export_weights(run, said.append)
    assert path == run.exports / f"{ROLE}-main-000000000096.safetensors"
    again, _ = imported(workspace, path, "name=again")
    expected, found = read.load_role(read.newest(run).path, ROLE, "main"), read.load_role(read.newest(again).path, ROLE)
    assert expected.keys() == found.keys() and all(torch.equal(found[name], value) for name, value in expected.items())
    second = export_weights(again, said.append, raw=True)
    assert read_tensors(second).keys() == read_tensors(path).keys()
    assert all(torch.equal(value, read_tensors(path)[name]) for name, value in read_tensors(second).items())
    assert commit.sha256_file(path) in said[0]


def test_an_export_says_what_it_is(workspace: Workspace) -> None:
    run = workspace.run("made", "train.ema={main: {decay: 0.9}, slow: {decay: 0.99}}", "train.keep_last=9")
    workspace.train(run)
    path = export_weights(run, print, checkpoint=32, ema="slow", target=workspace.path / "out" / "a.safetensors")
    said = metadata_of(path)
    checkpoint = read.at(run, 32)
    assert said["hpc_gen.method"] == "energy" and said["hpc_gen.role"] == ROLE and said["format"] == "pt"
    assert (said["hpc_gen.images_seen"], said["hpc_gen.ema"]) == ("32", "slow")
    assert said["hpc_gen.checkpoint"] == read.manifest_sha256(checkpoint.path)
    assert said["hpc_gen.identity"] == run_setup.load_run(run).identity
    entry = registry.entry("energy")
    assert entry.config.model_validate(json.loads(said["hpc_gen.config"])).hidden == 16
    weights = read.load_role(checkpoint.path, ROLE, "slow")
    assert all(torch.equal(weights[name], value) for name, value in read_tensors(path).items())
    first = path.read_bytes()
    export_weights(run, print, checkpoint=32, ema="slow", target=path)
    assert path.read_bytes() == first


def test_what_a_run_does_not_have_is_named(workspace: Workspace) -> None:
    run = workspace.run("made")
    refuses(CheckpointError, lambda: export_weights(run, print), "has no checkpoint; run its train stage first")
    workspace.train(run, "train.stop_at_images=16")
    refuses(CheckpointError, lambda: export_weights(run, print, checkpoint=8), "no checkpoint at 8 images; it has: 16")
    refuses(
        UserError, lambda: export_weights(run, print, ema="mian"), "no average 'mian' (did you mean 'main'?)", "--raw"
    )
    refuses(UserError, lambda: export_weights(run, print, ema="main", raw=True), "exclude one another")
    refuses(UserError, lambda: export_weights(run, print, role="x"), f"no role 'x'; it has: {ROLE}")
    refuses(UserError, lambda: weights_export("made", checkpoint="newest"), "--checkpoint is 'newest'", "or latest")
    said: list[str] = []
    assert not export_weights(run, said.append, dry_run=True).exists()
    assert "would write role 'denoiser' (main)" in said[0] and not run.exports.exists()
    (next(iter(read.newest(run).path.glob("*.distcp")))).write_bytes(b"x")
    refuses(CheckpointError, lambda: export_weights(run, print), "is not whole")


def test_the_hooks_of_a_method_are_asked(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method whose files have other keys: export writes them, import reads them."""
    seen: list[Any] = []

    def export(role: str, state: Any, config: Any, table: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        seen.append((role, type(config).__name__, table.rows))
        return {f"theirs.{name}": value for name, value in state.items()}, {"hpc_gen.scale": "2.0"}

    def theirs(role: str, flat: Any, config: Any, own: Any) -> tuple[dict[str, Tensor], list[str]]:
        return {name.removeprefix("theirs."): value for name, value in flat.items()}, [f"{len(own)} keys were renamed"]

    entry = replace(tiny_method.ENTRY, export=export, official=theirs)
    monkeypatch.setattr(tiny_method, "ENTRY", entry)
    run = workspace.run("made", text=LINEAR)
    workspace.train(run, "train.stop_at_images=16")
    path = export_weights(run, print)
    assert seen == [("net", "Config", 192)] and list(read_tensors(path)) == ["theirs.weight"]
    assert metadata_of(path)["hpc_gen.scale"] == "2.0" and metadata_of(path)["hpc_gen.role"] == "net"
    again, said = imported(workspace, path, text=LINEAR)
    assert "1 keys were renamed" in said
    assert torch.equal(read.load_role(read.newest(again).path, "net")["weight"], read_tensors(path)["theirs.weight"])


# --- listing and verifying


def test_the_list_has_every_key_and_the_counts(workspace: Workspace) -> None:
    shown = list(list_weights(resolved(text=ENERGY), workspace.path))
    state = state_of(workspace, ENERGY)
    assert len(shown) == len(state) + 1
    assert f"{ROLE}  alpha  []  buffer" in shown and f"{ROLE}  dit.pos_embed  [1, 4, 16]  frozen" in shown
    assert f"{ROLE}  dit.x_embedder.proj.weight  [16, 1, 4, 4]  parameter" in shown
    total = sum(value.numel() for name, value in state.items() if name != "alpha")
    assert f"{total:,} parameters, {total - 64:,} of them trained" in shown[-1]
    learnable = list(list_weights(resolved("method.energy.learnable_step_size=true", text=ENERGY), workspace.path))
    assert f"{ROLE}  alpha  []  parameter" in learnable


def test_no_table_is_needed_to_list_and_verify(tmp_path: Path, workspace: Workspace) -> None:
    elsewhere = tmp_path / "empty"
    said: list[str] = []
    file = official(tmp_path / "a.pth", state_of(workspace))
    assert list_weights(resolved("method.num_classes=4"), elsewhere)
    assert verify_weights(file, resolved("method.num_classes=4"), elsewhere, said.append) == 0
    refuses(UserError, lambda: list(list_weights(resolved(), elsewhere)), "set method.num_classes")


def test_verify_lists_every_difference_and_bounds_the_list(workspace: Workspace) -> None:
    state = state_of(workspace)
    file = official(workspace.path / "a.pth", state, spoiled(spoiled(state, "unknown"), "missing"))
    said: list[str] = []
    assert verify_weights(file, resolved(), workspace.path, said.append) == 2
    text = "\n".join(said)
    assert commit.sha256_file(file) in text and re.search(
        r"'model': \d+ tensors, [\d,]+ values of parameters, 0 diff", text
    )
    assert "'model_ema':" in text and "2 differences" in text
    assert "  lacks 'dit.x_embedder.proj.weight'" in text and "  has unknown 'dit.extra' [2]" in text
    said.clear()
    assert verify_weights(file, resolved(), workspace.path, said.append, key="model") == 0
    write_tensors(file, {f"x{n:02}": torch.ones(1) for n in range(40)}, {})
    said.clear()
    found = verify_weights(file, resolved(), workspace.path, said.append)
    assert found == 40 + len(state)
    assert said[-1] == f"  and {found - 20} more" and len(said) == 3 + 20 + 1
    assert (workspace.path / "runs").exists() is False


def test_differences_of_equal_states_are_none() -> None:
    state = {"a": torch.ones(2), "n": torch.tensor(3)}
    assert differences(state, dict(state)) == []
    assert differences({k: v.to("meta") for k, v in state.items()}, state) == []
    eighth = {"a": torch.ones(2).to(torch.float8_e4m3fn), "n": torch.tensor(3)}
    assert differences(state, eighth) == []


def test_imported_weights_are_what_sampling_builds(workspace: Workspace) -> None:
    state = state_of(workspace)
    run, _ = imported(workspace, official(workspace.path / "a.pth", state))
    experiment = run_setup.load_run(run).experiment
    facts = table_facts(open_table(workspace.path, experiment.data.table))
    method = build_method(experiment, facts, lambda role: read.load_role(read.newest(run).path, role, "main"))
    built = method.roles()[ROLE].state_dict()
    assert all(torch.equal(built[name], value) for name, value in state.items())
    assert weights_transfer.known_table(experiment, workspace.path / "nowhere") is None


def test_an_export_writes_over_no_other_file(workspace: Workspace) -> None:
    run = workspace.run("made")
    workspace.train(run)
    target = workspace.path / "thesis.txt"
    target.write_text("three years of work")
    for dry_run in (True, False):
        with pytest.raises(UserError, match=r"thesis\.txt exists and is no earlier export"):
            export_weights(run, print, target=target, dry_run=dry_run)
    assert target.read_text() == "three years of work"
    again = workspace.path / "a.safetensors"
    assert export_weights(run, print, target=again) == export_weights(run, print, target=again)
