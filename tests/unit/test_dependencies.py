"""One list of versions (pyproject.toml); whoever repeats one of them repeats it exactly. And the floors of the house."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
ALL = [*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)]
VERSIONS = {Requirement(line).name: str(Requirement(line).specifier) for line in ALL if not line.startswith("hpc-gen[")}


@pytest.mark.parametrize("line", ALL)
def test_every_dependency_is_pinned_exactly_and_has_its_reason(line: str) -> None:
    if not line.startswith("hpc-gen["):
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", line)
        (stands,) = [text for text in (REPOSITORY / "pyproject.toml").read_text().splitlines() if f'"{line}"' in text]
        assert re.search(r"#\s\S+ ?\S+", stands.split(line)[1]), f"{line} has no reason beside it"
    else:
        inner = re.fullmatch(r"hpc-gen\[([a-z,]+)\]", line)
        assert inner is not None and set(inner[1].split(",")) <= set(EXTRAS)


@pytest.mark.parametrize("line", PYPROJECT["tool"]["hpc-gen"]["peers"])
def test_peers_in_an_environment_of_their_own_are_pinned_and_nothing_of_ours(line: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", line)
    assert Requirement(line).name not in VERSIONS
    (stands,) = [text for text in (REPOSITORY / "pyproject.toml").read_text().splitlines() if f'"{line}"' in text]
    assert re.search(r"#\s\S+ ?\S+", stands.split(line)[1]), f"{line} has no reason beside it"


def test_no_package_has_two_versions() -> None:
    names = [Requirement(line).name for line in ALL if not line.startswith("hpc-gen[")]
    assert len(names) == len(set(names))


def test_extras_are_those_that_were_promised() -> None:
    promised = {
        "demo",
        "tracking",
        "webdataset",
        "dali",
        "parquet",
        "mamba",
        "faiss",
        "deepspeed",
        "gpu",
        "dev",
    }
    assert set(EXTRAS) == promised


def test_environment_yaml_agrees() -> None:
    environment = yaml.safe_load((REPOSITORY / "environment.yaml").read_text())
    lines = environment["dependencies"][-1]["pip"]
    pins = [Requirement(line) for line in lines if not line.startswith("-e ")]
    assert "torch" in [pin.name for pin in pins]
    assert {pin.name: str(pin.specifier) for pin in pins}.items() <= VERSIONS.items()
    (editable,) = [line for line in lines if line.startswith("-e ")]
    extras = re.fullmatch(r"-e \.\[([a-z,]+)\]", editable)
    assert extras is not None and set(extras[1].split(",")) <= set(EXTRAS)
    (python,) = [line for line in environment["dependencies"] if isinstance(line, str) and line.startswith("python=")]
    assert PROJECT["requires-python"] == ">=" + python.removeprefix("python=")


def test_makefile_names_torch_with_its_pin_in_the_same_command() -> None:
    done = subprocess.run(
        ["make", "-n", "-W", "pyproject.toml", "setup"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    (install,) = [line for line in done.stdout.splitlines() if "pip install" in line]
    assert f'".[demo]" "torch{VERSIONS["torch"]}"' in install


def test_documents_repeat_versions_exactly() -> None:
    """`name==version` in README, docs and scripts is the version of pyproject.toml."""
    wrong = []
    for path in [REPOSITORY / "README.md", *REPOSITORY.glob("docs/**/*.md"), *REPOSITORY.glob("slurm/**/*.sh")]:
        if not path.is_file():
            continue
        for name, version in re.findall(r"\b([a-z][a-z0-9-]+)==([0-9][\w.]*)", path.read_text()):
            if name in VERSIONS and VERSIONS[name] != f"=={version.rstrip('.')}":
                wrong.append(f"{path.name}: {name}=={version}, pyproject.toml has {VERSIONS[name]}")
    assert wrong == []


def test_packages_of_the_distribution_exist() -> None:
    include = PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    for name in (pattern.rstrip("*") for pattern in include):
        assert (REPOSITORY / name / "__init__.py").is_file(), f"{name} has no __init__.py"
    for folder in (REPOSITORY / "hpc_gen").rglob("*.py"):
        assert (folder.parent / "__init__.py").is_file(), f"{folder.parent} would not be packaged"


def test_every_room_has_its_floor() -> None:
    """A new room of hpc_gen must be placed in the import contract, and a new method among those that are independent."""
    contracts = {contract["name"]: contract for contract in PYPROJECT["tool"]["importlinter"]["contracts"]}
    floors = " ".join(contracts["The floors of the house: imports go down only"]["layers"])
    rooms = {path.parent.name for path in (REPOSITORY / "hpc_gen").glob("*/__init__.py")}
    assert {room for room in rooms if not re.search(rf"\bhpc_gen\.{room}\b", floors)} == set()
    methods = {f"hpc_gen.methods.{path.parent.name}" for path in (REPOSITORY / "hpc_gen/methods").glob("*/__init__.py")}
    assert methods == set(contracts["No method knows another"]["modules"])


def test_no_init_below_tests() -> None:
    """tests/slurm/__init__.py would shadow the package slurm."""
    assert list((REPOSITORY / "tests").rglob("__init__.py")) == []
