"""Cluster profiles: the shipped ones, their variables, and what is refused with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_gen.config.errors import ConfigError
from hpc_gen.runtime.errors import UserError
from slurm import profiles

VARIABLES = {"HPC_GEN_ACCOUNT": "p42", "HPC_GEN_IMAGE": "/images/gh200.sif", "SCRATCH": "/scratch/me"}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        profiles.loads(text, overrides, "mine.yaml")
    return str(caught.value)


@pytest.mark.parametrize("name", ["a100", "generic", "gh200", "lab"])
def test_shipped_profiles_load(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in VARIABLES.items():
        monkeypatch.setenv(variable, value)
    profile = profiles.load(name, tmp_path)
    assert profile.description and name in profiles.names(tmp_path)
    assert profile.account == (None if name == "lab" else "p42")


def test_gh200_is_what_its_site_wants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in VARIABLES.items():
        monkeypatch.setenv(variable, value)
    profile = profiles.load("gh200", tmp_path)
    assert (profile.partition, profile.tasks_per_node, profile.cpus_per_task) == ("ghx4", 4, 72)
    assert profile.runtime.binds == ["/scratch/me"]
    report = profile.for_stage("report")
    assert (report.gpus, report.cpus_per_task, report.time_limit_min) == (False, 8, 30)
    assert profile.for_stage("encode").gpus is True and profile.for_stage("encode").units_per_task == 8


def test_a_variable_that_is_not_set_names_itself_and_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        profiles.load("generic", tmp_path)
    assert str(caught.value) == (
        f"{profiles.CLUSTERS}/generic.yaml:4: 'account' needs the environment variable HPC_GEN_ACCOUNT, which is not "
        "set; export it, or give --set account=..."
    )
    assert profiles.load("generic", tmp_path, ["account=mine"]).account == "mine"


def test_own_profiles_go_before_shipped_ones(tmp_path: Path) -> None:
    folder = tmp_path / "clusters"
    folder.mkdir()
    (folder / "lab.yaml").write_text("partition: night\n")
    (folder / "home.yaml").write_text("tasks_per_node: 8\n")
    assert profiles.load("lab", tmp_path).partition == "night"
    assert profiles.load("home", tmp_path).tasks_per_node == 8
    assert profiles.load(str(folder / "home.yaml"), tmp_path).tasks_per_node == 8


def test_unknown_cluster(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        profiles.load("gh20", tmp_path)
    assert str(caught.value) == (
        "no cluster 'gh20' (did you mean 'gh200'?); there are a100, generic, gh200, lab, or give the path of a YAML "
        f"file, or put one into {tmp_path / 'clusters'}"
    )
    with pytest.raises(ConfigError, match=r"cluster profile 'no/such.yaml' cannot be read"):
        profiles.load("no/such.yaml", tmp_path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("partitoin: low\n", "mine.yaml:1: unknown key 'partitoin'; did you mean 'partition'?"),
        ("partition: low\ngrace_s: ten\n", "mine.yaml:2: 'grace_s' must be a number of at least 0, not 'ten' (text)"),
        ("tasks_per_node: 0\n", "mine.yaml:1: 'tasks_per_node' must be an integer of at least 1, not 0 (an integer)"),
        (
            "gpus: {style: gpus}\n",
            "mine.yaml:1: 'gpus.style' must be one of 'gpus-per-node', 'gres', 'gpus-per-task', 'none', not 'gpus' (text)",
        ),
        ("runtime: {kind: apptainer}\n", "mine.yaml:1: 'runtime.kind' = 'apptainer' needs 'runtime.image', the image to run in"),
        (
            "runtime: {kind: apptainer, image: a.sif, options: [--nv, --cleanenv]}\n",
            "mine.yaml:1: 'runtime.options' holds --cleanenv, which drops the SLURM_ variables that tell a task its rank; leave it out (--no-home and --contain keep them)",
        ),
        (
            "environment:\n  WANDB_API_KEY: abc\n",
            "mine.yaml:2: 'environment.WANDB_API_KEY' looks like a secret, and what stands here ends up in scripts that others can read; export it where you submit: jobs inherit the whole environment",
        ),
        (
            "modules: ['export X=${WANDB_API_KEY}']\n",
            "mine.yaml:1: ${WANDB_API_KEY} looks like a secret, and a profile ends up in scripts that others can read; leave it out: jobs inherit the whole environment of whoever submits",
        ),
        ("time_limit_min: 5\n", "mine.yaml:1: 'time_limit_min' = 5 minutes leaves too little time before the notice that comes 'notice_s' = 300 s before its end; lower 'notice_s' to 150 at most"),
        ("- a\n", "mine.yaml:1: an experiment is a mapping of sections such as 'train:', this file holds something else"),
    ],
)  # fmt: skip
def test_refused_with_its_place(text: str, sentence: str) -> None:
    assert refusal(text) == sentence


def test_set_replaces_keys_of_any_depth() -> None:
    profile = profiles.loads("partition: low\n", ["stages.encode.units_per_task=4", "gpus.style=gres", "qos=low"])
    assert profile.for_stage("encode").units_per_task == 4
    assert (profile.gpus.style, profile.qos) == ("gres", "low")
    assert refusal("partition: low\n", "qoss=x") == "command line: unknown key 'qoss'; did you mean 'qos'?"


def test_variables_of_the_node_are_left_to_it() -> None:
    assert profiles.loads("stage_to: ${TMPDIR}/data\n", [], "mine.yaml").stage_to == "${TMPDIR}/data"
