"""One real Slurm cluster for the tests of this folder: own directory, ports and node names; purged after.

Where no lab can run (not root, not Debian, programs missing) every test that needs it is skipped, and the
reason is printed in a section of its own at the end of the test run.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slurm import containers
from slurm import lab as slurm_lab

_PREFIX = "hpc-gen-lab-"  # of the directories, followed by the process id of the test run
_skip_reason: str | None = None
_image_reason: str | None = None


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker of these tests known."""
    config.addinivalue_line(
        "markers", "slurm_real: needs a real Slurm on this machine (root on Debian); see slurm/lab.py"
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A skipped cluster must not look like a passed one."""
    for what, reason in (("SLURM", _skip_reason), ("CONTAINER", _image_reason)):
        if reason is not None:
            terminalreporter.section(f"{what} TESTS WERE SKIPPED", sep="!", red=True)
            terminalreporter.write_line(reason)


@pytest.fixture(scope="session")
def lab() -> Iterator[slurm_lab.Lab]:
    """A running lab of four nodes with accounting; GraceTime 30 s, so that a busy machine is in time."""
    global _skip_reason
    _skip_reason = slurm_lab.why_not()
    if _skip_reason is not None:
        pytest.skip(_skip_reason)
    _sweep()
    # not pytest's tmp_path: sockets lie in it, and the kernel allows 107 characters for a socket's path
    parent = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir="/tmp"))
    parent.chmod(0o755)
    base = slurm_lab.free_port_base(4, first=18000 + os.getpid() % 100 * 100)
    try:
        yield slurm_lab.start(parent / "lab", nodes=4, port_base=base, prefix=f"t{base}n", grace_s=30)
    finally:
        slurm_lab.stop(parent / "lab", purge=True)
        shutil.rmtree(parent, ignore_errors=True)


@pytest.fixture(scope="session")
def image() -> Path:
    """The CPU image, built from its definition; kept in build/images until the definition or a version changes."""
    global _image_reason
    definition = containers.read(containers.CPU)
    _image_reason = containers.why_not(definition)
    if _image_reason is not None:
        pytest.skip(_image_reason)
    place = Path(__file__).resolve().parents[2] / "build" / "images" / "cpu.sif"
    if not place.exists() or containers.image_problems(place, containers.CPU):
        containers.build(containers.CPU, place, print)
    assert containers.image_problems(place, containers.CPU) == []
    return place


@pytest.fixture(scope="session")
def until() -> Callable[..., None]:
    """`until(condition, what, limit_s)`: wait for an event of the cluster; fail with its name without it."""

    def wait(condition: Callable[[], bool], what: str, limit_s: float = 30.0) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline, f"waited {limit_s:g} s in vain: {what}"
            time.sleep(0.05)

    return wait


def _sweep() -> None:
    """Take down the labs of test runs that were killed before they could."""
    for parent in Path("/tmp").glob(f"{_PREFIX}[0-9]*"):
        pid = parent.name.removeprefix(_PREFIX).partition("-")[0]
        if parent.stat().st_uid == os.geteuid() and not Path(f"/proc/{pid}").exists():
            slurm_lab.stop(parent / "lab", purge=True)
            shutil.rmtree(parent, ignore_errors=True)
