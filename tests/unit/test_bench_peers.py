"""Peers of the benchmarks that live in an environment of their own: how it is made, how they are asked, how they fail."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
# The two classes that the worker uses, over one file: it is the protocol that is tried, not the package.
STREAMING = """
import json
from pathlib import Path
import numpy as np

class MDSWriter:
    def __init__(self, out, columns):
        self.out, self.columns, self.rows = Path(out), columns, []
    def __enter__(self):
        return self
    def __exit__(self, *told):
        self.out.mkdir(parents=True)
        np.savez(self.out / "all.npz", **{name: np.stack([row[name] for row in self.rows]) for name in self.columns})
    def write(self, row):
        assert set(row) == set(self.columns)
        self.rows.append(row)

class StreamingDataset:
    def __init__(self, local, shuffle, shuffle_seed, batch_size):
        assert shuffle
        found = np.load(Path(local) / "all.npz")
        self.rows = {name: found[name] for name in found.files}
    def __iter__(self):
        for number in np.random.permutation(len(self.rows["row"])):
            sample = {name: rows[number] for name, rows in self.rows.items()}
            sample["moments"] = sample["moments"] + np.float16(DAMAGE)
            yield sample
"""


@pytest.fixture(scope="module")
def own() -> Any:
    spec = importlib.util.spec_from_file_location("bench_own_environment", BENCH / "own_environment.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_python(path: Path, log: Path, pip_fails: bool = False) -> Path:
    """A program that makes environments whose Python is itself, and notes what it was asked for."""
    fails = 'echo "ERROR: No matching distribution found for peer==2" >&2; exit 1' if pip_fails else "exit 0"
    path.write_text(
        f'#!/bin/sh\necho "$@" >> {log}\n'
        f'if [ "$2" = venv ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; exit; fi\n{fails}\n'
    )
    path.chmod(0o755)
    return path


def test_an_environment_is_made_once_and_anew_for_other_pins_or_when_it_was_left_half_made(
    own: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    monkeypatch.setattr(own.sys, "executable", str(fake_python(tmp_path / "python", log)))

    def calls() -> list[str]:
        lines = log.read_text().splitlines()
        log.write_text("")
        return lines

    python = own.environment("peer", ["peer==1", "torch==2"], tmp_path / "peers")
    assert python == tmp_path / "peers" / "peer" / "bin" / "python"
    made, installed = calls()
    assert made == f"-m venv {tmp_path / 'peers' / 'peer'}"
    assert installed.startswith("-m pip install") and installed.endswith("peer==1 torch==2")
    assert "making an environment for peer" in capsys.readouterr().err
    assert own.environment("peer", ["peer==1", "torch==2"], tmp_path / "peers") == python and calls() == []
    own.environment("peer", ["peer==2", "torch==2"], tmp_path / "peers")
    assert len(calls()) == 2
    (tmp_path / "peers" / "peer" / own.DONE).unlink()  # as after a kill in the middle
    own.environment("peer", ["peer==2", "torch==2"], tmp_path / "peers")
    assert len(calls()) == 2


def test_an_environment_that_cannot_be_made_says_why_and_is_tried_again_the_next_time(
    own: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    monkeypatch.setattr(own.sys, "executable", str(fake_python(tmp_path / "python", log, pip_fails=True)))
    for attempt in (1, 2):
        with pytest.raises(
            own.UnavailableError, match=r"^peer: no environment .*No matching distribution found for peer==2"
        ):
            own.environment("peer", ["peer==2"], tmp_path / "peers")
        assert log.read_text().count("venv") == attempt
    monkeypatch.setattr(own.sys, "executable", str(tmp_path / "no-such-python"))
    with pytest.raises(own.UnavailableError, match=r"^peer: no environment .*No such file"):
        own.environment("peer", ["peer==2"], tmp_path / "peers")


def conversation(own: Any, tmp_path: Path, program: str) -> Any:
    return own.Conversation("peer", [sys.executable, "-c", program], tmp_path / "log")


def test_a_program_answers_line_by_line_until_it_is_closed(own: Any, tmp_path: Path) -> None:
    program = "import sys\nprint('ready 3', flush=True)\nfor line in sys.stdin: print(2 * int(line), flush=True)"
    talk = conversation(own, tmp_path, program)
    assert [talk.ask("4"), talk.ask("5")] == ["8", "10"]
    talk.close()
    talk.close()
    assert talk._process.returncode == 0


@pytest.mark.parametrize(
    "program, sentence",
    [
        ("raise ImportError('numpy is too new')", r"^peer ended with 1 \(ImportError: numpy is too new\)$"),
        ("print('hello')", "^peer did not begin: it said 'hello'$"),
        ("import sys; sys.exit(3)", r"^peer ended with 3 \(it said nothing\)$"),
    ],
)
def test_a_program_that_does_not_begin_says_why(own: Any, tmp_path: Path, program: str, sentence: str) -> None:
    with pytest.raises(own.UnavailableError, match=sentence):
        conversation(own, tmp_path, program)


def test_a_program_that_dies_later_says_why(own: Any, tmp_path: Path) -> None:
    talk = conversation(own, tmp_path, "print('ready', flush=True); input(); raise OSError('disk is gone')")
    with pytest.raises(own.UnavailableError, match=r"^peer ended with 1 \(OSError: disk is gone\)$"):
        talk.ask("1")
    talk.close()


@pytest.mark.parametrize("damage", [0, 1])
def test_the_worker_writes_the_rows_checks_what_it_reads_and_tells_seconds(
    own: Any, tmp_path: Path, damage: int
) -> None:
    (tmp_path / "streaming.py").write_text(STREAMING.replace("DAMAGE", str(damage)))
    rows = np.random.default_rng(0).standard_normal((20, 2, 2, 3)).astype(np.float16)
    np.save(tmp_path / "rows.npy", rows)
    command = [
        sys.executable,
        str(BENCH / "peer_worker.py"),
        "streaming",
        str(tmp_path / "rows.npy"),
        str(tmp_path / "mds"),
        "8",
    ]
    environment = dict(os.environ, PYTHONPATH=str(tmp_path))
    done = subprocess.run(command, input="1\n3\n", capture_output=True, text=True, timeout=100, env=environment)
    if damage:
        assert done.returncode == 1 and "not those that were written" in done.stderr and done.stdout == ""
        return
    assert done.returncode == 0, done.stderr
    ready, *answers = done.stdout.split("\n")[:-1]
    seconds = [float(each) for answer in answers for each in answer.split()]
    assert ready == "ready 20" and len(answers) == 2 and len(seconds) == 4 and all(0 < each < 60 for each in seconds)
