"""The health probe: each illness of a node is told in one sentence, a hanging file system too, and nothing is left."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from hpc_gen.runtime import commit
from hpc_gen.runtime.run_folder import RunFolder
from slurm import probe

HOST = socket.gethostname()


def test_a_healthy_node_has_nothing_to_tell_and_nothing_is_left(tmp_path: Path) -> None:
    assert probe.probe(RunFolder(tmp_path), gpus=0) == []
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (found,) = probe.probe(RunFolder(tmp_path / "file" / "run"), gpus=0)
    assert found.startswith(f"node {HOST}: {tmp_path}/file/run cannot be written and read (")


def test_what_is_read_back_must_be_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"zeros instead")
    (found,) = probe.check_files(tmp_path)
    assert found == f"what was written to {tmp_path} is not what is read back"


@pytest.mark.parametrize(("shift_s", "told"), [(-3600.0, True), (3600.0, True), (-5.0, False), (5.0, False)])
def test_a_clock_that_differs_from_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift_s: float, told: bool
) -> None:
    real = probe.clock.now
    monkeypatch.setattr(probe.clock, "now", lambda: real() + shift_s)
    found = probe.check_files(tmp_path)
    if told:
        assert found == [f"its clock and that of the file system of {tmp_path} differ by 3600 s"]
    else:
        assert found == []


def test_a_file_system_that_hangs_is_told_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()
    monkeypatch.setattr(commit, "write_bytes", lambda path, content: answer.wait(60))
    try:
        assert probe.probe(RunFolder(tmp_path), gpus=0, limit_s=0.2) == [
            f"node {HOST}: the file system did not answer within 0.2 s"
        ]
    finally:
        answer.set()


def machine(root: Path, available_kb: int, **files: str) -> Path:
    """A tree with /proc/meminfo and other files below `root`."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 64000000 kB\nMemAvailable:  {available_kb} kB\n")
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_memory(tmp_path: Path) -> None:
    assert probe.check_memory(tmp_path) == []  # no /proc: nothing to tell
    assert probe.check_memory(machine(tmp_path / "a", 9_000_000)) == []
    assert probe.check_memory(machine(tmp_path / "b", 200_000)) == ["only 0.20 GB of memory are free"]


@pytest.mark.parametrize(
    ("group", "folder", "limit", "used"),
    [
        ("0::/job", "sys/fs/cgroup/job", "memory.max", "memory.current"),
        ("9:cpu:/x\n5:memory:/job", "sys/fs/cgroup/memory/job", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ],
)
def test_the_memory_limit_of_the_job(tmp_path: Path, group: str, folder: str, limit: str, used: str) -> None:
    def found(name: str, value: str) -> list[str]:
        files = {"proc/self/cgroup": group, f"{folder}/{limit}": value, f"{folder}/{used}": "500000000"}
        return probe.check_memory(machine(tmp_path / name, 9_000_000, **files))

    assert found("wide", "8000000000") == [] and found("none", "max") == []
    assert found("tight", "900000000") == ["the memory limit of the job leaves only 0.40 GB; ask for more memory"]


class FakeCuda(SimpleNamespace):
    """torch.cuda of a node with `count` GPUs, of which `free` of the memory is free."""

    def __init__(self, count: int, free: float = 1.0) -> None:
        self.is_available = lambda: count > 0
        self.device_count = lambda: count
        self.get_device_name = lambda number: "A100"
        self.mem_get_info = lambda number: (int(free * 80e9), int(80e9))


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device: ones(*shape))
    monkeypatch.setattr(torch, "cuda", FakeCuda(4))
    assert probe.check_gpus(4) == []
    monkeypatch.setattr(torch, "cuda", FakeCuda(3))
    assert probe.check_gpus(4) == ["3 of 4 GPUs are visible; the driver or a card has failed"]
    monkeypatch.setattr(torch, "cuda", FakeCuda(1, free=0.5))
    assert probe.check_gpus(1) == ["GPU 0 (A100) is not free: 40.0 of 80.0 GB are held by others"]
    monkeypatch.setattr(torch, "cuda", FakeCuda(1))
    monkeypatch.setattr(torch, "ones", lambda *shape, device: ones(*shape) * 2)
    assert probe.check_gpus(1) == ["GPU 0 (A100) computes wrong numbers"]


def test_no_gpu_where_some_were_asked_for(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    (found,) = probe.probe(RunFolder(tmp_path), gpus=2)
    assert found == f"node {HOST}: 0 of 2 GPUs are visible; the driver or a card has failed"
