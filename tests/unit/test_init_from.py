"""`train.init_from`: weights of a file or a run to begin from, pinned by their hash, refused or listed where unfit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from experiments import LINEAR, TINY, Workspace, make_workspace, resolved, scratch_folder
from torch import Tensor, nn

from hpc_gen.config import loader
from hpc_gen.config.errors import ConfigError
from hpc_gen.methods.materialise import materialise
from hpc_gen.methods.protocol import Method, ParameterGroup
from hpc_gen.runtime.commit import sha256_file
from hpc_gen.runtime.errors import CheckpointError, DataError, ExitCode, UserError
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.runtime.tensor_files import write_tensors
from hpc_gen.stages import initial, origin, run_setup
from hpc_gen.stages.build import meta_method, open_table, table_facts
from hpc_gen.stages.parent import origins
from hpc_gen.training.checkpoint import manifest, read, storage


def silent(line: str) -> None:
    """Nobody listens."""


@pytest.fixture(scope="module")
def base() -> Iterator[Workspace]:
    """A workspace with a finished run `source` of the energy method and one of another method, `other`."""
    with scratch_folder() as folder:
        workspace = make_workspace(folder)
        for name, text in (("source", TINY), ("other", LINEAR)):
            run = workspace.run(name, f"name={name}", "train.total_images=32", "train.keep_last=9", text=text)
            assert workspace.train(run) is ExitCode.DONE
        yield workspace


@pytest.fixture(autouse=True)
def no_copy_of_the_code(base: Workspace, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The copy is a hundred fsyncs; runs made by a test are removed after it."""
    monkeypatch.setattr(run_setup, "PACKAGES", ("slurm",))
    yield
    for path in (base.path / "runs").iterdir():
        if path.name not in ("source", "other"):
            shutil.rmtree(path)


def source(base: Workspace) -> RunFolder:
    return RunFolder(base.path / "runs" / "source")


def prepared(base: Workspace, *overrides: str, text: str = TINY) -> RunFolder:
    return run_setup.prepare_run(loader.loads(text, ["name=tuned", *overrides]), base.path)


def export(base: Workspace, path: str = "weights.safetensors", **changes: Tensor | None) -> Path:
    """The newest average of the source as a file; `changes` replace (None: remove) tensors, `__` standing for a dot."""
    state = read.load_role(read.newest(source(base)).path, "denoiser", "main")
    for name, value in changes.items():
        key = name.replace("__", ".")
        state.pop(key, None)
        if value is not None:
            state[key] = value
    write_tensors(base.path / path, state, {"format": "pt"})
    return base.path / path


def first_weights(run: RunFolder, base: Workspace) -> dict[str, Tensor]:
    """Weights with which the run began: those of a checkpoint after no step, and the average of the same moment."""
    checkpoint = read.newest(run)
    assert checkpoint.images_seen == 8
    return storage.load(checkpoint.path)


ONE_STEP = ("train.total_images=8", "train.save_every=8", "train.log_every=8", "train.schedule.warmup_images=8")
# in a warm-up the first step has the rate 0, so the weights after it are those before it (weight decay included)


@pytest.mark.parametrize("ema", [None, "main"])
def test_weights_of_a_run(base: Workspace, ema: str | None) -> None:
    run = prepared(base, "train.init_from.run=source", f"train.init_from.ema={ema or 'null'}", *ONE_STEP)
    assert base.train(run) is ExitCode.DONE
    state = first_weights(run, base)
    wanted = read.load_role(read.newest(source(base)).path, "denoiser", ema)
    for name, value in wanted.items():
        assert torch.equal(state[f"model/denoiser/{name}"], value), name
    for name, _ in named_parameters(base):
        average = state[f"ema/denoiser/main/{name}"]  # begins there, too; 0.9 x + 0.1 x rounds
        assert torch.allclose(average, wanted[name], rtol=1e-6, atol=0), name
        if f"optim/denoiser/{name}/step" in state:
            assert state[f"optim/denoiser/{name}/step"].item() == 1  # a fresh optimizer
    facts = manifest.read(read.newest(run).path).facts["initial"]
    assert facts["source"] == "source" and facts["images_seen"] == 32 and facts["ema"] == ema
    assert facts["sha256"] == read.manifest_sha256(read.newest(source(base)).path)
    assert facts["differences"] == {"denoiser": 0} and facts["taken"] == {"denoiser": len(wanted)}
    assert str(base.path) not in json.dumps(facts)
    assert origins(run)[0][0] == "begun from" and "source at 32 images" in origins(run)[0][1]


def named_parameters(base: Workspace) -> list[tuple[str, nn.Parameter]]:
    experiment = resolved(text=TINY).experiment
    method = meta_method(experiment, table_facts(open_table(base.path, experiment.data.table)))
    return list(method.roles()["denoiser"].named_parameters())


def test_weights_of_a_file_and_a_resumed_run_ignores_it(base: Workspace) -> None:
    path = export(base)
    run = prepared(base, "train.init_from.weights=weights.safetensors", *ONE_STEP)
    assert base.train(run) is ExitCode.DONE
    wanted = read.load_role(read.newest(source(base)).path, "denoiser", "main")
    state = first_weights(run, base)
    assert all(torch.equal(state[f"model/denoiser/{name}"], value) for name, value in wanted.items())
    path.unlink()
    run_setup.change_run(run, ["train.total_images=24"])
    assert base.train(run) is ExitCode.DONE
    facts = manifest.read(read.newest(run).path).facts
    assert read.newest(run).images_seen == 24 and facts["initial"]["source"] == "weights.safetensors"
    assert [line for line in journal_lines(run) if line["kind"] == "initial_weights"][0]["left"] == {"denoiser": []}


def journal_lines(run: RunFolder) -> list[dict[str, object]]:
    return [json.loads(line) for path in sorted(run.journal.glob("*_train_0.jsonl")) for line in path.open()]


# --- the identity covers the content


def test_the_identity_covers_the_content_and_latest_becomes_a_number(base: Workspace) -> None:
    export(base)
    plain = prepared(base, "name=plain")
    filed = prepared(base, "name=filed", "train.init_from.weights=weights.safetensors")
    held = run_setup.load_run(filed).experiment.train
    assert held is not None and held.init_from is not None
    assert held.init_from.sha256 == sha256_file(base.path / "weights.safetensors")
    export(base, "renamed.safetensors")  # the same bytes elsewhere are the same experiment
    renamed = prepared(base, "name=renamed", "train.init_from.weights=renamed.safetensors")
    export(base, alpha_like=torch.zeros(1))
    changed = prepared(base, "name=changed", "train.init_from.weights=weights.safetensors")
    identities = [run_setup.load_run(each).identity for each in (plain, filed, renamed, changed)]
    assert identities[1] == identities[2] and len(set(identities)) == 3

    run = prepared(base, "name=latest", "train.init_from.run=source")
    held = run_setup.load_run(run).experiment.train
    assert held is not None and held.init_from is not None and held.init_from.checkpoint == 32
    named = prepared(base, "name=named", "train.init_from.run=source", "train.init_from.checkpoint=16")
    assert run_setup.load_run(named).identity != run_setup.load_run(run).identity


def test_the_same_command_again_goes_on_whatever_became_of_the_source(base: Workspace) -> None:
    path = export(base)
    run = prepared(base, "train.init_from.weights=weights.safetensors", *ONE_STEP)
    before = run_setup.load_run(run).identity
    path.write_bytes(b"other")
    assert (
        run_setup.load_run(prepared(base, "train.init_from.weights=weights.safetensors", *ONE_STEP)).identity == before
    )
    with pytest.raises(
        DataError, match=r"has the SHA-256 .*, 'train.init_from.sha256' is .*: it is not what was asked"
    ):
        base.train(run)  # but what it would load now is not what it says it loads
    path.unlink()
    with pytest.raises(
        UserError, match=r"'train.init_from.weights' cannot be read: .*paths are relative to the workspace"
    ):
        base.train(run)
    (run.checkpoints / "8").mkdir(parents=True)
    with pytest.raises(UserError, match=r"was made with other settings: train.init_from"):
        prepared(base, "train.init_from.run=source", *ONE_STEP)


def test_an_experiment_without_it_keeps_its_identity() -> None:
    assert "init_from" not in str(loader.split(resolved(text=TINY).experiment)[0])
    with_it = resolved("train.init_from.run=source", text=TINY)
    assert with_it.identity != resolved(text=TINY).identity


# --- what does not fit


def test_unfit_keys_are_refused_by_name(base: Workspace) -> None:
    first, second = [name for name, _ in named_parameters(base)][:2]
    for changes, message in (
        ({first: None}, f"role 'denoiser' lacks '{first}'"),
        ({"extra": torch.zeros(2)}, r"role 'denoiser' has unknown 'extra' \[2\]"),
        ({first: torch.zeros(1, 2, 3)}, rf"role 'denoiser' has '{first}' as \[1, 2, 3\], the model needs"),
        ({first: None, "extra": torch.zeros(2)}, "and 1 more differences"),
    ):
        export(base, **{name.replace(".", "__"): value for name, value in changes.items()})
        run = prepared(base, "train.init_from.weights=weights.safetensors")
        with pytest.raises(DataError, match=message) as info:
            base.train(run)
        assert "train.init_from.strict=false" in str(info.value)
        shutil.rmtree(run.path)
    assert second


def test_without_strict_what_was_not_taken_is_counted_printed_and_journaled(
    base: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    (first, wanted), (second, _) = named_parameters(base)[:2]
    export(
        base,
        **{first.replace(".", "__"): torch.zeros(1, 2, 3), second.replace(".", "__"): None, "extra": torch.ones(2)},
    )
    run = prepared(base, "train.init_from={weights: weights.safetensors, strict: false}", *ONE_STEP)
    assert base.train(run) is ExitCode.DONE
    said = capsys.readouterr().out
    total = len(read.load_role(read.newest(source(base)).path, "denoiser"))
    assert f"initial weights of role 'denoiser': {total - 2} of {total} tensors taken; 3 differences" in said
    for phrase in (
        f"the source lacks '{second}'",
        "the source has unknown 'extra'",
        f"the source has '{first}' as [1, 2, 3]",
    ):
        assert phrase in said
    told = next(line for line in journal_lines(run) if line["kind"] == "initial_weights")
    assert len(told["left"]["denoiser"]) == 3 and told["differences"] == {"denoiser": 3}  # type: ignore[index]
    state = first_weights(run, base)
    experiment = resolved(text=TINY).experiment
    method = meta_method(experiment, table_facts(open_table(base.path, experiment.data.table)))
    untouched = materialise(method, experiment.seed)["denoiser"].state_dict()
    assert torch.equal(state[f"model/denoiser/{first}"], untouched[first])
    assert state[f"model/denoiser/{first}"].shape == wanted.shape


def test_nothing_that_fits_is_refused_even_then(base: Workspace) -> None:
    write_tensors(base.path / "alien.safetensors", {"a": torch.zeros(1)}, {})
    run = prepared(base, "train.init_from={weights: alien.safetensors, strict: false}")
    with pytest.raises(DataError, match="not one tensor fits role 'denoiser'"):
        base.train(run)


@pytest.mark.parametrize(
    ("section", "kind", "message"),
    [
        ("{run: nowhere}", UserError, "no run 'nowhere'"),
        ("{run: source, checkpoint: 24}", CheckpointError, "has no checkpoint at 24 images; it has: 16, 32"),
        ("{weights: none.safetensors}", UserError, "'train.init_from.weights' cannot be read"),
        ("{run: source, weights: x}", ConfigError, "exactly one of .* must be given, but both are"),
        ("{strict: false}", ConfigError, "exactly one of .* must be given, but neither is"),
        ("{weights: x, ema: main}", ConfigError, "'train.init_from.ema' does not go with 'train.init_from.weights'"),
        ("{run: source, key: model}", ConfigError, "'train.init_from.key' does not go with 'train.init_from.run'"),
        (f"{{run: source, sha256: {'ab' * 32}}}", DataError, "it is not what was asked for"),
    ],
)
def test_sources_that_are_not_there(base: Workspace, section: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        prepared(base, f"train.init_from={section}")
    assert not (base.path / "runs" / "tuned").exists()


def test_another_method_and_another_average(base: Workspace) -> None:
    run = prepared(base, "train.init_from.run=other")
    with pytest.raises(CheckpointError, match=r"has no role 'denoiser' \(it has: net\); name one with"):
        base.train(run)
    run = prepared(base, "name=average", "train.init_from={run: source, ema: slow}")
    with pytest.raises(CheckpointError, match="has no average 'slow' of 'denoiser'"):
        base.train(run)


# --- several roles


class TwoRoles:
    """A method with a trained generator and discriminator and a frozen judge; only what initial.py asks for."""

    def roles(self) -> dict[str, nn.Module]:
        return {"generator": nn.Linear(2, 2), "discriminator": nn.Linear(2, 1), "judge": nn.Linear(1, 1)}

    def parameter_groups(self, role: str) -> list[ParameterGroup]:
        return [] if role == "judge" else [ParameterGroup(("weight", "bias"))]


def test_every_role_of_a_run_frozen_ones_included(monkeypatch: pytest.MonkeyPatch, base: Workspace) -> None:
    method: Method = TwoRoles()  # type: ignore[assignment]
    given = {
        role: {k: torch.full_like(v, 3.0) for k, v in m.state_dict().items()} for role, m in method.roles().items()
    }
    asked: list[tuple[str, str | None]] = []

    def load_role(path: Path, role: str, ema: str | None = None) -> dict[str, Tensor]:
        asked.append((role, ema))
        return given[role]

    monkeypatch.setattr(initial.read, "roles", lambda path: sorted(given))
    monkeypatch.setattr(initial.read, "load_role", load_role)
    experiment = resolved("train.init_from={run: source, ema: main}", text=TINY).experiment
    modules = method.roles()
    taken = initial.take_initial_weights(experiment, base.path, method, modules, silent)
    assert taken is not None and taken.facts["taken"] == {"discriminator": 2, "generator": 2, "judge": 2}
    assert asked == [("generator", "main"), ("discriminator", "main"), ("judge", None)]
    assert all(bool((p == 3).all()) for module in modules.values() for p in module.parameters())

    said: list[str] = []
    modules = method.roles()
    kept = {role: {k: v.clone() for k, v in m.state_dict().items()} for role, m in modules.items()}
    one = resolved("train.init_from={run: source, role: generator}", text=TINY).experiment
    initial.take_initial_weights(one, base.path, method, modules, said.append)
    assert bool((modules["generator"].weight == 3).all())
    assert torch.equal(modules["discriminator"].weight, kept["discriminator"]["weight"])
    assert "initial weights of role 'discriminator': those of the method, the source was not asked for it" in said

    del given["discriminator"]
    with pytest.raises(CheckpointError, match="has no role 'discriminator'"):
        initial.take_initial_weights(experiment, base.path, method, method.roles(), silent)
    lenient = resolved("train.init_from={run: source, strict: false}", text=TINY).experiment
    assert initial.take_initial_weights(lenient, base.path, method, method.roles(), silent) is not None


def test_unpinned_experiments_are_pinned_once(base: Workspace) -> None:
    asked = resolved("train.init_from.run=source", text=TINY)
    pinned = origin.pinned(asked, base.path)
    assert origin.pinned(pinned, base.path).identity == pinned.identity != asked.identity
    assert origin.pinned(resolved(text=TINY), base.path).identity == resolved(text=TINY).identity
