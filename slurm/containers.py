"""Container images: the definitions in `containers/`, what can be checked of them anywhere, and building them.

A definition that cannot be built on this machine can still be read: its sections, the syntax of its scripts, its pins
against pyproject.toml. An image carries the hash of its pins as a label, so one that has grown old is recognised.
"""

from __future__ import annotations

import hashlib
import platform
import re
import shutil
import subprocess
import tempfile
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

from hpc_gen.runtime.errors import UserError, nearest
from slurm import debian_tree

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "containers"
CPU = "cpu"
VENDORS_OWN = ("torch", "torchvision")  # a GPU image keeps the builds of its base
CPU_EXTRAS = ("demo",)
GPU_EXTRAS = ("demo", "tracking", "webdataset", "dali", "mamba", "faiss", "deepspeed")
WANTED_SECTIONS = ("labels", "post", "environment", "runscript", "test")
SCRIPTS = ("post", "environment", "runscript", "test", "setup", "pre", "startscript")
_SECTION = re.compile(r"^%([a-z]+)\b(.*)$")

Printer = Callable[[str], None]


@dataclass(frozen=True)
class Definition:
    """One Apptainer definition: header keys (lower case), sections by name (text without the `%name` line)."""

    name: str
    path: Path
    header: Mapping[str, str]
    sections: Mapping[str, str]

    @property
    def machine(self) -> str | None:
        """The machine it is for, as `uname -m` says it; None: whichever builds it."""
        found = re.search(r"^\s*hpc-gen\.machine\s+(\S+)", self.sections.get("labels", ""), re.MULTILINE)
        return found[1] if found is not None and "{{" not in found[1] else None


def names() -> list[str]:
    """Names of all definitions."""
    return sorted(path.stem for path in FOLDER.glob("*.def"))


def read(name: str) -> Definition:
    """A definition by name. Raises UserError for an unknown one."""
    known = names()
    if name not in known:
        raise UserError(f"no image '{name}'{nearest(name, known)}; there are {', '.join(known) or 'none'} in {FOLDER}")
    return parse(FOLDER / f"{name}.def")


def parse(path: Path) -> Definition:
    """A definition file. Raises UserError for a section that comes twice."""
    header: dict[str, str] = {}
    sections: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in path.read_text(encoding="utf-8").splitlines():
        opened = _SECTION.match(line)
        if opened is not None:
            if opened[1] in sections:
                raise UserError(f"{path}: section %{opened[1]} comes twice; write one of it")
            current = sections.setdefault(opened[1], [])
        elif current is not None:
            current.append(line)
        elif ":" in line and not line.lstrip().startswith("#"):
            key, _, value = line.partition(":")
            header[key.strip().lower()] = value.strip()
    return Definition(path.stem, path, header, {name: "\n".join(lines) + "\n" for name, lines in sections.items()})


# ---------------------------------------------------------------- pins


def pins(extras: Sequence[str]) -> dict[str, str]:
    """Package -> version of pyproject.toml: the dependencies and those of the extras, by normalised name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return dict(_pin(line) for line in lines if not line.startswith("hpc-gen["))


def pins_of(name: str) -> dict[str, str]:
    """What the image of a definition is to hold beside its base: for a GPU image without the vendor's own builds."""
    if name == CPU:
        return pins(CPU_EXTRAS)
    return {package: version for package, version in pins(GPU_EXTRAS).items() if package not in VENDORS_OWN}


def pins_hash(name: str) -> str:
    """Hash of a definition's pins and files; the label `hpc-gen.pins` of its images."""
    text = [f"{package}=={version}" for package, version in sorted(pins_of(name).items())]
    text += [(FOLDER / file).read_text() for file in (f"{name}.def", *_files_of(read(name)))]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


def _pin(line: str) -> tuple[str, str]:
    requirement = Requirement(line)
    (version,) = requirement.specifier
    return requirement.name.lower().replace("_", "-"), version.version


def _files_of(definition: Definition) -> list[str]:
    """What its %files section copies from the folder of the definitions."""
    return [line.split()[0] for line in definition.sections.get("files", "").splitlines() if line.split()]


# ---------------------------------------------------------------- check


def problems(definition: Definition) -> list[str]:
    """What is wrong with a definition, a sentence each: sections, the syntax of its scripts, pins, copied files."""
    where = definition.path.name
    found = [f"{where}: the header has no '{key}'" for key in ("bootstrap", "from") if not definition.header.get(key)]
    found += [f"{where}: section %{name} is missing" for name in WANTED_SECTIONS if name not in definition.sections]
    for name in SCRIPTS:
        if name in definition.sections:
            found += [f"{where}: %{name}: {line}" for line in _script_problems(definition.sections[name])]
    for file in _files_of(definition):
        if not (FOLDER / file).is_file():
            found.append(f"{where}: %files copies {file}, which is not in {FOLDER}")
        elif file.endswith(".sh"):
            found += [f"{file}: {line}" for line in _script_problems((FOLDER / file).read_text())]
        elif file.endswith(".txt"):
            found += [f"{file}: {line}" for line in pin_problems((FOLDER / file).read_text(), pins_of(definition.name))]
    return found


def _script_problems(text: str) -> list[str]:
    """What bash, and shellcheck where it is installed, say about a script; template variables are filled in."""
    filled = "#!/bin/bash\n" + re.sub(r"\{\{\s*\w+\s*\}\}", "filled", text)
    commands = [["bash", "-n"]]
    if shutil.which("shellcheck"):
        commands.append(["shellcheck", "-S", "warning", "-f", "gcc", "-"])
    for command in commands:
        done = subprocess.run(command, input=filled, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return [line for line in (done.stderr + done.stdout).splitlines() if line.strip()][:5]
    return []


def pin_problems(text: str, wanted: Mapping[str, str]) -> list[str]:
    """How the `name==version` lines of `text` differ from `wanted`."""
    has = dict(_pin(line) for line in text.splitlines() if line.strip() and not line.startswith("#"))
    found = [f"{name} is missing; pyproject.toml has {name}=={wanted[name]}" for name in sorted(wanted.keys() - has)]
    found += [f"{name} is not among what this image is to hold" for name in sorted(has.keys() - wanted.keys())]
    return found + [
        f"{name}=={has[name]}, pyproject.toml has {wanted[name]}"
        for name in sorted(has.keys() & wanted.keys())
        if has[name] != wanted[name]
    ]


def image_problems(image: Path, name: str) -> list[str]:
    """What is wrong with a built image: its %test, its machine, its age. Raises UserError without apptainer."""
    if not image.exists():
        raise UserError(f"there is no image {image}; build it with: hpc-gen containers build {name} --output {image}")
    labels = image_labels(image)
    found = []
    if labels.get("hpc-gen.pins") != pins_hash(name):
        found.append(f"{image.name} was built from another definition or other versions; build it again")
    if labels.get("hpc-gen.machine") != platform.machine():
        found.append(f"{image.name} is for {labels.get('hpc-gen.machine')}, and this machine is {platform.machine()}")
    done = subprocess.run([_apptainer(), "test", str(image)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        found.append(f"%test of {image.name} ended with {done.returncode}: {said[-1].strip() if said else 'no output'}")
    return found


def image_labels(image: Path) -> dict[str, str]:
    """The labels of an image. Raises UserError when it is none."""
    argv = [_apptainer(), "inspect", "--labels", str(image)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"{image} is not an image: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    return dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)


def _apptainer() -> str:
    found = shutil.which("apptainer")
    if found is None:
        script = ROOT / "slurm" / "lab" / "install_apptainer.sh"
        raise UserError(f"apptainer is not installed; on Debian, as root: bash {script}")
    return found


# ---------------------------------------------------------------- build


def why_not(definition: Definition) -> str | None:
    """Why this machine cannot build a definition, in one sentence; None when nothing speaks against it."""
    if definition.machine not in (None, platform.machine()):
        return (
            f"image '{definition.name}' is for {definition.machine}, and this machine is {platform.machine()}; "
            f"build it on a node of that kind"
        )
    if shutil.which("apptainer") is None or shutil.which("mksquashfs") is None:
        return f"apptainer or mksquashfs is missing; on Debian, as root: bash {ROOT}/slurm/lab/install_apptainer.sh"
    return debian_tree.why_not() if definition.name == CPU else None


def command(definition: Definition, image: Path, arguments: Mapping[str, str]) -> list[str]:
    """The words of `apptainer build`, to be run in the folder of the definitions."""
    given = {"pins": pins_hash(definition.name), **arguments}
    used = {name: value for name, value in given.items() if f"{{{{ {name} }}}}" in definition.path.read_text()}
    words = ["apptainer", "build", "--fakeroot", "--force"]
    words += [word for name, value in used.items() for word in ("--build-arg", f"{name}={value}")]
    # quick to make and to unpack: an image is made rarely and read at each start
    return [*words, "--mksquashfs-args", "-comp zstd -Xcompression-level 3", str(image), definition.path.name]


def build(name: str, image: Path, say: Printer, arguments: Mapping[str, str] | None = None) -> None:
    """Build an image. Raises UserError when this machine cannot, or with the last words of apptainer."""
    definition = read(name)
    reason, wrong = why_not(definition), problems(definition)
    if reason or wrong:
        raise UserError(reason or wrong[0])
    given = dict(arguments or {})
    image.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".hpc-gen-build-", dir=image.parent) as scratch:
        if name == CPU:
            tree = Path(scratch) / "tree"
            debian_tree.make(tree, pins_of(CPU), say)
            given = {"tree": str(tree), "machine": platform.machine(), **given}
        part = Path(scratch) / image.name
        words = command(definition, part, given)
        say(f"apptainer builds {image} (a minute or more)")
        done = subprocess.run(words, cwd=FOLDER, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            for line in said[-20:]:
                say(line)
            raise UserError(f"apptainer build of '{name}' ended with {done.returncode}; its last lines are above")
        part.replace(image)
    say(f"built {image}: {image.stat().st_size / 1e6:.0f} MB")
