"""The tree of the CPU image: Debian's Python from the machine's own archive, and the packages of this environment.

Nothing is downloaded but a few Debian packages: the Python packages are those that the tests of this machine run with,
file by file as their records list them, and only when their versions are the pinned ones.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from packaging.requirements import Requirement

from hpc_gen.runtime.errors import UserError

PACKAGES = (
    *("python3", "python3-minimal", "libstdc++6", "libgomp1", "libc-bin", "bash", "coreutils", "base-files"),
    *("util-linux", "grep", "sed", "procps", "hostname", "tzdata", "ca-certificates"),
)
_UNREADABLE = ("var/cache/apt", "var/lib/apt")  # another user's: a build without root's powers cannot read them


def why_not() -> str | None:
    """Why no tree can be made on this machine, in one sentence; None when it can."""
    if os.geteuid() != 0:
        return "the CPU image is made from a Debian tree, which only root can make"
    if shutil.which("mmdebstrap") is None:
        return "mmdebstrap is missing; on Debian, as root: bash slurm/lab/install_apptainer.sh"
    return None


def make(tree: Path, pins: Mapping[str, str], say: Callable[[str], None]) -> None:
    """Make the tree in a folder that does not exist yet. Raises UserError.

    The interpreter of this process and Debian's must have the same minor version: packages are compiled for one.
    """
    found = closure(pins)
    say(f"extracting {len(PACKAGES)} Debian packages with what they need")
    suite, mirror = _archive()
    argv = ["mmdebstrap", "--quiet", "--variant=extract", f"--include={','.join(PACKAGES)}", suite, str(tree), mirror]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"no Debian tree was made: mmdebstrap ended with {done.returncode}: {last}")
    _finish(tree)
    python = next((tree / "usr/bin").glob("python3.[0-9]*")).name
    ours = f"python{sys.version_info.major}.{sys.version_info.minor}"
    if python != ours:
        raise UserError(f"Debian's interpreter is {python} and this one is {ours}; run this command with {python}")
    target = tree / "usr/local/lib" / python / "dist-packages"
    say(f"adding {len(found)} Python packages of this environment")
    for distribution in found.values():
        copy_distribution(distribution, target)


def _archive() -> tuple[str, str]:
    """The suite of this machine and the mirror it is configured with, as a line for mmdebstrap."""
    for line in Path("/etc/os-release").read_text().splitlines():
        if line.startswith("VERSION_CODENAME="):
            suite = line.partition("=")[2].strip("\"'")
            break
    else:
        raise UserError("/etc/os-release has no VERSION_CODENAME; is this Debian?")
    argv = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]
    sites = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()
    site = next((site for site in sites if site.rstrip("/").endswith("/debian")), None)
    if site is None:
        raise UserError("the apt configuration of this machine names no Debian archive")
    return suite, f"deb {site} {suite} main"


def _finish(tree: Path) -> None:
    """What the packages' own scripts would have made, as far as programs need it; and nothing that cannot be read."""
    for name in _UNREADABLE:
        shutil.rmtree(tree / name, ignore_errors=True)
    shutil.rmtree(tree / "dev")
    (tree / "dev").mkdir()
    if not (tree / "bin/sh").exists():
        (tree / "bin/sh").symlink_to("bash")
    for name, line in (("passwd", "root:x:0:0:root:/root:/bin/bash"), ("group", "root:x:0:")):
        if not (tree / "etc" / name).exists():
            (tree / "etc" / name).write_text(line + "\n")


def closure(pins: Mapping[str, str]) -> dict[str, importlib.metadata.Distribution]:
    """The pinned packages and all that they need, as installed here. Raises UserError for another version."""
    found: dict[str, importlib.metadata.Distribution] = {}
    open_names = [Requirement(name) for name in pins]
    while open_names:
        wanted = open_names.pop()
        name = wanted.name.lower().replace("_", "-")
        if name in found:
            continue
        try:
            distribution = importlib.metadata.distribution(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(f"{name} is not installed here; pip install -e '.[demo]' first") from None
        version = distribution.version.partition("+")[0]  # torch says 2.13.0+cpu
        if version != pins.get(name, version):
            raise UserError(f"{name} {version} is installed here, and pyproject.toml has {pins[name]}; install that")
        found[name] = distribution
        open_names += _needs(distribution.requires or [], wanted.extras)
    return found


def _needs(lines: Iterable[str], extras: Iterable[str]) -> list[Requirement]:
    """The requirements among `lines` that hold on this machine with these extras."""
    requirements = [Requirement(line) for line in lines]
    return [
        each
        for each in requirements
        if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in ("", *extras))
    ]


def copy_distribution(distribution: importlib.metadata.Distribution, target: Path) -> None:
    """Copy the files of a package, its bytecode too; linked where the file system allows, for they are gigabytes."""
    for file in distribution.files or []:
        source = Path(str(distribution.locate_file(file)))
        if file.parts[0] == ".." or not source.is_file():
            continue  # programs of the environment: their first line names its interpreter
        place = target / file
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, place)
        except OSError:
            shutil.copy2(source, place)  # with its time, by which Python knows that the bytecode fits
