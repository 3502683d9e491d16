"""Shell and Python blocks of the pages, and a workspace in which they are true.

A block fenced as ```sh, ```bash or ```python is run, in the order of its page, in a workspace with MNIST's files (small
ones, made here), the shipped experiments, and a finished run `demo-mnist16`. What follows the language says why a block
cannot run on a machine of tests: `cluster` (it needs a real Slurm), `long` (minutes), `files` (downloads that are not
here). Such a block is not run, but each of its commands must be one that the command line accepts, option by option.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import typer

from shard_tools.sources import MNIST_FILES

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted([REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md")])
RUN = ("sh", "bash", "python")
PARSED = ("cluster", "long", "files")
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```", re.MULTILINE | re.DOTALL)

# the demo, but for its length and for weights of metrics that would have to be downloaded
SHORT = [
    "train.total_images=1280",
    "train.save_every=640",
    "train.keep_every=640",
    "train.schedule.warmup_images=320",
    "train.validate=null",
    "train.preview=null",
    "sample.num_images=20",
    "sample.block_images=10",
    "sample.batch=10",
    "sample.tasks=1",
    "sample.settings.steps=3",
    "evaluate.extractor.name=random-conv",
    "evaluate.metrics=[fid]",
    "evaluate.reference.rows=32",
    "evaluate.tasks=1",
    "evaluate.block_images=8",
    "evaluate.batch=8",
]

WRAPPERS = {
    "hpc-gen": f'exec {sys.executable} -m hpc_gen.cli "$@"\n',
    "make": f'exec {shutil.which("make") or "make"} --no-print-directory -n -C {REPOSITORY} "$@"\n',  # says, does not
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"\n',
}


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, what follows it, its text and its first line in the page."""

    language: str
    note: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = page.read_text()
    found = []
    for match in FENCE.finditer(text):
        language, _, note = match["info"].strip().partition(" ")
        found.append(Block(language, note.strip(), match["body"], text[: match.start()].count("\n") + 2))
    return found


def commands(block: Block) -> list[list[str]]:
    """The `hpc-gen` commands of a shell block as words: comments, variables and continued lines are resolved."""
    joined = re.sub(r"\\\n\s*", " ", block.text)
    found = []
    for line in joined.splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            del words[0]
        for cut, word in enumerate(words):
            if word in (">", ">>", "|", "||", "&&", ";", "&"):
                words = words[:cut]
                break
        if words and words[0] == "hpc-gen":
            found.append(words[1:])
    return found


def parse(words: list[str]) -> None:
    """Refuse, by the command line's own exception, a command or option that does not exist; nothing is run."""
    from hpc_gen.cli import app

    command = typer.main.get_command(app)
    context = None
    while True:
        context = command.make_context(command.name or "hpc-gen", list(words), parent=context)
        if not hasattr(command, "resolve_command"):
            return
        rest = [*context._protected_args, *context.args]
        if not rest:
            return
        _, command, words = command.resolve_command(context, rest)


def make_workspace(folder: Path) -> None:
    """Downloads, experiments, wrappers of the programs that pages name, and the finished run `demo-mnist16`."""
    generator = np.random.default_rng(0)
    downloads = folder / "downloads" / "mnist"
    downloads.mkdir(parents=True)
    for (images, labels), count in zip(MNIST_FILES.values(), (640, 64), strict=True):
        numbers = np.arange(count, dtype=np.uint8) % 10
        pixels = generator.integers(0, 60, (count, 28, 28), np.uint8) + numbers[:, None, None] * np.uint8(18)
        for name, array in ((images, pixels), (labels, numbers)):
            header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            (downloads / name).write_bytes(header + array.astype(np.uint8).tobytes())
    (folder / "job_configs").symlink_to(REPOSITORY / "job_configs")
    for name, text in {**{f"bin/{name}": text for name, text in WRAPPERS.items()}, ".venv/bin/activate": ""}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}" if text else "")
        path.chmod(0o755)
    run_shell(folder, shlex.join(["hpc-gen", "run", "job_configs/demo/mnist16.yaml", *SHORT]))


def run_shell(folder: Path, text: str) -> str:
    """Run a shell block in the workspace; returns what it printed. Fails with that text where a command failed."""
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("MAKEFLAGS", None)  # of the `make test` around us
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{text}\nended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def run_python(folder: Path, text: str) -> str:
    """Run a Python block, or all those of a page one after the other, in a process in the workspace."""
    (folder / "page.py").write_text(text)
    return run_shell(folder, f"{sys.executable} page.py")
