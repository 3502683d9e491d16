"""An environment of its own for a peer whose pins do not fit ours, below build/; and a program in it, line by line."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / "build" / "peers"
DONE = "pins.txt"  # written last: an environment without it was never finished
INSTALL_S = 1_200  # a slow network; the wheels of torch are large


class UnavailableError(Exception):
    """Why a peer cannot be measured here, in one sentence."""


def environment(name: str, pins: Sequence[str], folder: Path = PEERS) -> Path:
    """The Python of an environment that has exactly these pins; made once. Raises UnavailableError, and says so.

    One that was left half made, or made for other pins, is made anew.
    """
    place = folder / name
    python = place / "bin" / "python"
    wanted = "\n".join(pins) + "\n"
    if python.exists() and (place / DONE).is_file() and (place / DONE).read_text() == wanted:
        return python
    print(
        f"making an environment for {name} in {place}: {', '.join(pins)} (once; minutes)", file=sys.stderr, flush=True
    )
    shutil.rmtree(place, ignore_errors=True)
    _call(name, [sys.executable, "-m", "venv", str(place)])
    _call(name, [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pins])
    (place / DONE).write_text(wanted)
    return python


def _call(name: str, command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"{name}: no environment of its own could be made ({error})") from error
    if done.returncode:
        raise UnavailableError(f"{name}: no environment of its own could be made ({_last_line(done.stderr)})")


class Conversation:
    """A program that answers each line with a line. Close it when done."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        """Start it and wait for its `ready`; what it prints besides goes to `log`. Raises UnavailableError."""
        self.name, self._log = name, log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1
            )
        try:
            first = self._line()
            if not first.startswith("ready"):
                raise UnavailableError(f"{name} did not begin: it said {first!r}")
        except UnavailableError:
            self.close()
            raise

    def ask(self, line: str) -> str:
        """Its answer to a line. Raises UnavailableError when it has ended."""
        assert self._process.stdin is not None
        try:
            print(line, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            pass  # the end of its output says the same
        return self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            told = _last_line(self._log.read_text(errors="replace"))
            raise UnavailableError(f"{self.name} ended with {self._process.returncode} ({told})")
        return line.strip()

    def close(self) -> None:
        """End it: its input ends, and after a while so does it; safe to call twice."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
