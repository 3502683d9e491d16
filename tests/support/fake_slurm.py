"""Programs that stand for Slurm's, and a stage of small units: for tests of the launcher without a cluster.

Importable as `fake_slurm`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError
from hpc_gen.stages.units import StageContext, Unit

SINFO = "low*|up|1-00:00:00|4|16|64000|gpu:a100:4|(null)\nhigh|up|1:00:00|2|8|32000|(null)|(null)\n"

# one table-less experiment: a stage of eight units, one that follows unit by unit, training in between
EXPERIMENT = """
name: tiny
method:
  {name: energy, input: pixels, image_size: 8, channels: 1, patch_size: 4, hidden: 16, depth: 1, heads: 2,
   diffusion_timesteps: 50}
data: {table: tables/toy}
train:
  {total_images: 64, global_batch: 16, ranks: 4, optimizer: {lr: 1.0e-3}, log_every: 16, save_every: 16}
extra_stages:
  count: {worker: "fake_slurm:worker", options: {units: 8}, tasks: 4}
  again: {worker: "fake_slurm:worker", options: {units: 8}, tasks: 4, after: [count], unit_by_unit: true}
stages: [count, again, train, report]
"""


class FakeSlurm:
    """A folder of programs. Answers lie in files; what was asked is appended to `asked`."""

    def __init__(self, root: Path) -> None:
        """`root`: an empty folder; put `path` first on PATH."""
        self.root, self.path = root, root / "bin"
        self.path.mkdir(parents=True)
        self.answer("sinfo", SINFO)
        for name in ("squeue", "sacct", "scancel", "scontrol"):
            self.answer(name, "")
        self._write(
            "sbatch",
            'if [ "$1" = --test-only ]; then echo "sbatch: Job 1 to start at 2026-11-27T07:23:29" >&2; exit; fi\n'
            'if [ -e "$root/refuse" ] && grep -q "$(cat "$root/refuse")" "$1"; then\n'
            '  echo "sbatch: error: Batch job submission failed: Invalid account" >&2; exit 1; fi\n'
            'number=$(( $(cat "$root/number" 2> /dev/null || echo 100) + 1 )); echo $number > "$root/number"\n'
            'echo "Submitted batch job $number"',
        )

    def _write(self, name: str, body: str) -> None:
        path = self.path / name
        head = f'#!/bin/bash\nroot="{self.root}"\necho "{name} $*" >> "$root/asked"\n'
        path.write_text(f"{head}{body}\n")
        path.chmod(0o755)

    def answer(self, name: str, text: str, code: int = 0) -> None:
        """What a program prints (on stderr when it fails) and returns from now on."""
        (self.root / f"{name}.txt").write_text(text)
        version = (
            'if [ "$1" = --version ]; then echo "slurm 23.11.4"; exit; fi\n' if name == "sinfo" and not code else ""
        )
        self._write(name, f'{version}cat "$root/{name}.txt" {">&2" if code else ""}\nexit {code}')

    def refuse(self, text: str) -> None:
        """sbatch refuses scripts that hold a text."""
        (self.root / "refuse").write_text(text)

    def asked(self, program: str) -> list[str]:
        """The words given to a program, call by call."""
        log = self.root / "asked"
        lines = log.read_text().splitlines() if log.exists() else []
        return [line.removeprefix(f"{program} ") for line in lines if line.startswith(f"{program} ")]


@dataclass
class CountWorker:
    """Units that write their own number."""

    context: StageContext

    @property
    def folder(self) -> Path:
        """Where the numbers lie."""
        return self.context.run.path / "counted" / self.context.stage

    def _size(self) -> int:
        if (self.context.workspace / "no-input").exists():
            raise DataError("the input is not there")
        return int(self.context.experiment.extra_stages[self.context.stage].options["units"])

    def units(self) -> list[Unit]:
        """u-0, u-1, ..."""
        return [Unit(f"u-{number}", number) for number in range(self._size())]

    def fingerprint(self) -> str:
        """Of the stage's name alone."""
        return hashlib.sha256(self.context.stage.encode()).hexdigest()

    def do(self, unit: Unit, staging: Path, poll: Callable[[], None]) -> dict[str, Path]:
        """One small file."""
        poll()
        commit.write_text(staging / unit.name, str(unit.index))
        return {str(self.folder / unit.name): staging / unit.name}

    def finish(self) -> None:
        """The sum of all numbers."""
        total = sum(int((self.folder / unit.name).read_text()) for unit in self.units())
        commit.write_text(self.folder / "sum", str(total))


def worker(context: StageContext) -> CountWorker:
    """The factory that the experiment names."""
    return CountWorker(context)
