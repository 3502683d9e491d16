"""Definitions of images: sound as they stand, and each mistake in one is found; the script of the GPU images' %post."""

from __future__ import annotations

import os
import platform
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_gen.runtime.errors import UserError
from slurm import containers, debian_tree

GPU_IMAGES = {"a100": ("x86_64", "8.0"), "gh200": ("aarch64", "9.0")}


@pytest.mark.parametrize("name", containers.names())
def test_definitions_are_sound(name: str) -> None:
    assert containers.problems(containers.read(name)) == []


def test_the_three_are_there_and_say_where_they_are_built() -> None:
    assert containers.names() == ["a100", "cpu", "gh200"]
    for name, (machine, arch) in GPU_IMAGES.items():
        definition = containers.read(name)
        assert definition.machine == machine and definition.header["bootstrap"] == "docker"
        assert f"install_gpu.sh {machine} {arch} " in definition.sections["post"]
        assert "NOT BUILT HERE" in definition.path.read_text()
    assert containers.read("cpu").machine is None


def test_gpu_images_hold_every_package_of_the_project() -> None:
    """All but torch's own, the versions of pyproject.toml; the packages that need the CUDA compiler come last."""
    text = (containers.FOLDER / "gpu.txt").read_text()
    assert containers.pin_problems(text, containers.pins_of("gh200")) == []
    lines = [line for line in text.splitlines() if "==" in line]
    assert [line.partition("==")[0] for line in lines[-2:]] == ["causal-conv1d", "mamba-ssm"]
    release = containers.pins(())["torch"].rpartition(".")[0]
    for name in GPU_IMAGES:
        assert f"torch={release}\n" in containers.read(name).sections["arguments"]


def test_what_is_written_at_run_time_stays_on_the_node() -> None:
    """The same variables in all images but those of CUDA, and they do what they say."""
    for name in containers.names():
        script = containers.read(name).sections["environment"]
        done = subprocess.run(
            ["bash", "-c", f"set -eu\n{script}\nenv"],
            env={"PATH": os.environ["PATH"], "TMPDIR": "/node", "PYTHONPYCACHEPREFIX": "/elsewhere", "HOME": "/shared"},
            capture_output=True,
            text=True,
            check=True,
        )
        found = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
        cache = f"/node/hpc-gen-{os.getuid()}"
        assert found["HPC_GEN_CACHE"] == cache and found["PYTHONDONTWRITEBYTECODE"] == "1"
        assert "PYTHONPYCACHEPREFIX" not in found, "it would hide the bytecode that the image brings"
        places = [
            value for key, value in found.items() if key.endswith(("DIR", "_HOME", "CACHE_PATH")) and key != "TMPDIR"
        ]
        assert len(places) >= 4 and all(place.startswith(cache) for place in places)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("Bootstrap: localimage\n", "", "cpu.def: the header has no 'bootstrap'"),
        ("%test\n", "%tests\n", "cpu.def: section %test is missing"),
        ("    set -eu\n", "    if true; then\n", "cpu.def: %post: bash: line "),
    ],
)
def test_mistakes_in_a_definition_are_found(tmp_path: Path, old: str, new: str, told: str) -> None:
    text = containers.read("cpu").path.read_text()
    assert old in text
    path = tmp_path / "cpu.def"
    path.write_text(text.replace(old, new, 1))
    found = containers.problems(containers.parse(path))
    assert found and any(line.startswith(told) for line in found), found
    path.write_text(text + "\n%post\n    true\n")
    with pytest.raises(UserError, match="section %post comes twice"):
        containers.parse(path)


def test_pins_that_differ_are_named() -> None:
    wanted = {"numpy": "2.4.6", "rich": "15.0.0"}
    assert containers.pin_problems("# a comment\nnumpy==2.4.6\nrich==15.0.0\n", wanted) == []
    assert containers.pin_problems("numpy==2.4.5\npandas==3.0\n", wanted) == [
        "rich is missing; pyproject.toml has rich==15.0.0",
        "pandas is not among what this image is to hold",
        "numpy==2.4.5, pyproject.toml has 2.4.6",
    ]


def test_the_label_changes_with_pins_and_files(monkeypatch: pytest.MonkeyPatch) -> None:
    before = containers.pins_hash("gh200")
    assert before == containers.pins_hash("gh200") != containers.pins_hash("a100")
    real = containers.pins_of
    monkeypatch.setattr(containers, "pins_of", lambda name: {**real(name), "numpy": "9"})
    assert containers.pins_hash("gh200") != before


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"no image 'gh20' \(did you mean 'gh200'\?\); there are a100, cpu, gh200"):
        containers.read("gh20")
    other = next(name for name, (machine, _) in GPU_IMAGES.items() if machine != platform.machine())
    with pytest.raises(UserError, match=f"and this machine is {platform.machine()}"):
        containers.build(other, tmp_path / "image.sif", print)
    with pytest.raises(UserError, match="there is no image .*; build it with: hpc-gen containers build cpu"):
        containers.image_problems(tmp_path / "none.sif", "cpu")
    monkeypatch.setattr(debian_tree.os, "geteuid", lambda: 1000)
    assert "only root can make" in str(debian_tree.why_not())


def test_a_package_of_another_version_is_not_put_into_an_image() -> None:
    found = debian_tree.closure({"torch": torch_version(), "jinja2": jinja()})
    assert {"torch", "sympy", "jinja2", "markupsafe"} <= set(found)
    with pytest.raises(
        UserError, match=f"jinja2 {jinja()} is installed here, and pyproject.toml has 0.1; install that"
    ):
        debian_tree.closure({"jinja2": "0.1"})
    with pytest.raises(UserError, match="no-such-package is not installed here"):
        debian_tree.closure({"no-such-package": "1"})


def torch_version() -> str:
    return debian_tree.importlib.metadata.version("torch").partition("+")[0]


def jinja() -> str:
    return debian_tree.importlib.metadata.version("jinja2")


def test_packages_are_copied_with_their_bytecode_and_without_programs(tmp_path: Path) -> None:
    debian_tree.copy_distribution(debian_tree.importlib.metadata.distribution("jinja2"), tmp_path)
    assert (tmp_path / "jinja2" / "__init__.py").is_file() and list(tmp_path.glob("jinja2-*.dist-info/METADATA"))
    code = "import jinja2; print(jinja2.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.stdout.startswith(str(tmp_path))


# ---------------------------------------------------------------- install_gpu.sh with a make-believe base


class Base:
    """A folder of programs in the place of those of a vendor's image; pip writes its words to a file."""

    def __init__(
        self, folder: Path, torch: str = "2.13.0a0+abc", machine: str = "x86_64", compiler: bool = True
    ) -> None:
        self.folder, self.log, self.torch = folder / "bin", folder / "pip.log", folder / "torch"
        self.folder.mkdir()
        self.torch.write_text(torch)
        self.program("uname", f"echo {machine}")
        if compiler:
            self.program("nvcc", "true")
        self.program(
            "python3",
            f'case "$*" in\n'
            f'  "-m pip "*) echo "$* | $TORCH_CUDA_ARCH_LIST $MAMBA_FORCE_BUILD ${{PIP_CONSTRAINT-free}}" >> {self.log}\n'
            f'    while [ $# != 0 ]; do if [ "$1" = --requirement ]; then cat "$2" >> {self.log}; fi; shift; done\n'
            f"    [ ! -e {folder}/replacing ] || echo 2.13.0 > {self.torch} ;;\n"
            f"  -m*) true ;;\n"
            f"  -) echo torch==$(cat {self.torch}) ;;\n"
            f"  *__version__*) cat {self.torch} ;;\n"
            f"  *) echo {folder} ;;\n"
            f"esac",
        )

    def program(self, name: str, body: str) -> None:
        path = self.folder / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def install(self) -> subprocess.CompletedProcess[str]:
        words = ["bash", str(containers.FOLDER / "install_gpu.sh"), "x86_64", "8.0", "2.13"]
        environment = {"PATH": f"{self.folder}:/usr/bin:/bin", "PIP_CONSTRAINT": "/etc/vendor.txt"}
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)


def test_install_gpu_compiles_for_the_card_and_keeps_the_vendors_torch(tmp_path: Path) -> None:
    base = Base(tmp_path)
    done = base.install()
    assert done.returncode == 0, done.stderr
    lines = base.log.read_text().splitlines()
    calls = [line for line in lines if line.startswith("-m pip install")]
    assert len(calls) == 3 and all("--constraint" in line and line.endswith("free") for line in calls)
    assert "numpy==2.4.6" in lines and not any(line.startswith(("mamba-ssm", "causal-conv1d")) for line in lines)
    assert "--no-build-isolation --no-binary causal-conv1d causal-conv1d==" in calls[1]
    assert "--no-build-isolation --no-binary mamba-ssm mamba-ssm==" in calls[2]
    assert all(" | 8.0 TRUE " in line for line in calls[1:])


@pytest.mark.parametrize(
    ("torch", "machine", "compiler", "replacing", "told"),
    [
        ("2.12.1", "x86_64", True, False, "the base image has torch 2.12.1, and hpc-gen is tested with 2.13"),
        ("2.130.0", "x86_64", True, False, "the base image has torch 2.130.0"),
        ("2.13.0", "aarch64", True, False, "this definition is for x86_64, and this machine is aarch64"),
        ("2.13.0", "x86_64", False, False, "no CUDA compiler (nvcc)"),
        ("2.13.0a0+nv", "x86_64", True, True, "a package has replaced torch 2.13.0a0+nv by 2.13.0"),
    ],
)
def test_install_gpu_refuses(
    tmp_path: Path, torch: str, machine: str, compiler: bool, replacing: bool, told: str
) -> None:
    base = Base(tmp_path, torch, machine, compiler)
    if replacing:
        (tmp_path / "replacing").touch()
    done = base.install()
    assert done.returncode == 1 and told in done.stderr
