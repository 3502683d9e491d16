"""Units of work and the ledger that remembers which are committed (DESIGN section 4, "Units and a ledger")."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError
from hpc_gen.runtime.run_folder import RunFolder

if TYPE_CHECKING:
    from hpc_gen.config.experiment import Experiment
    from hpc_gen.config.loader import Resolved
    from hpc_gen.runtime.journal import Journal


IN_WORKSPACE = "workspace:"  # before the name of a recorded file that lies beside the runs, as a table's shard
FINISHED = "finished"  # file of a ledger: the fingerprint of the units that the stage was finished with


@dataclass(frozen=True)
class Unit:
    """A named, idempotent piece of work of a stage; `index` is its place in the stage's order."""

    name: str
    index: int


@dataclass(frozen=True)
class StageContext:
    """All that a worker may know: the run, its resolved experiment, and which share of the units is its own."""

    run: RunFolder
    resolved: Resolved
    stage: str
    workspace: Path
    task: int = 0
    num_tasks: int = 1
    journal: Journal | None = None

    @property
    def experiment(self) -> Experiment:
        """The typed experiment of the run."""
        return self.resolved.experiment


class UnitWorker(Protocol):
    """What a stage of units must offer. Workers are named by an entry string `module:factory(context)`."""

    def units(self) -> list[Unit]:
        """All units of the stage in order; a pure function of config and inputs."""
        ...

    def fingerprint(self) -> str:
        """Hash of everything that determines what the units hold; a changed one makes committed units missing."""
        ...

    def do(self, unit: Unit, staging: Path, poll: Callable[[], None]) -> dict[str, Path]:
        """Do one unit: write files below `staging` through runtime.commit, return {final path: staged path}.

        `poll()` is called at least once a second of work and raises StopRequested; nothing is committed then.
        """
        ...

    def finish(self) -> None:
        """Write what needs all units (an index, metrics). Idempotent; two tasks doing it at once are harmless."""
        ...


class Ledger:
    """Which units of a stage are committed: one JSON file per unit, written after the unit's files."""

    def __init__(self, folder: Path, root: Path) -> None:
        """`folder` holds the records of the run in `root`.

        Paths in them are relative to `root` or to the run's workspace where possible: either may be moved, or lie
        elsewhere on another node.
        """
        self.folder = folder
        self.root = root

    def record_of(self, unit_name: str) -> dict[str, Any] | None:
        """The record of a committed unit, or None. Raises DataError when the file is not a record."""
        path = self.folder / f"{unit_name}.json"
        try:
            record = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise DataError(f"{path} is not a ledger record ({error}); delete it to redo the unit") from error
        if not isinstance(record, dict) or "files" not in record:
            raise DataError(f"{path} is not a ledger record; delete it to redo the unit")
        return record

    def is_committed(self, unit_name: str, fingerprint: str) -> bool:
        """Whether the unit is recorded with this fingerprint and its files still have the recorded sizes."""
        record = self.record_of(unit_name)
        if record is None or record.get("fingerprint") != fingerprint:
            return False
        for name, facts in record["files"].items():
            path = self._absolute(name)
            if not path.is_file() or path.stat().st_size != facts["bytes"]:
                return False
        return True

    def missing(self, units: Iterable[Unit], fingerprint: str) -> list[Unit]:
        """Units that still have to be done, in order."""
        return [unit for unit in units if not self.is_committed(unit.name, fingerprint)]

    def is_finished(self, fingerprint: str) -> bool:
        """Whether what needs all units was written after these very units."""
        try:
            return (self.folder / FINISHED).read_text() == fingerprint
        except OSError:
            return False

    def finish(self, fingerprint: str) -> None:
        """Remember that the stage is finished, so that nobody need look again."""
        if not self.is_finished(fingerprint):
            commit.write_text(self.folder / FINISHED, fingerprint)

    def commit(self, unit: Unit, files: dict[str, Path], fingerprint: str) -> int:
        """Move the staged files of a unit into place, then record it; returns the bytes committed."""
        facts: dict[str, dict[str, Any]] = {}
        for final_name, staged in files.items():
            final = Path(final_name)
            size, digest = staged.stat().st_size, commit.sha256_file(staged)
            commit.commit_file(staged, final)
            facts[self._relative(final)] = {"bytes": size, "sha256": digest}
        record = {"unit": unit.name, "fingerprint": fingerprint, "files": facts}
        commit.write_json(self.folder / f"{unit.name}.json", record)
        return sum(int(fact["bytes"]) for fact in facts.values())

    def _relative(self, path: Path) -> str:
        if path.is_relative_to(self.root):
            return path.relative_to(self.root).as_posix()
        workspace = RunFolder(self.root).workspace
        if path.is_relative_to(workspace):
            return IN_WORKSPACE + path.relative_to(workspace).as_posix()
        return path.as_posix()

    def _absolute(self, name: str) -> Path:
        if name.startswith(IN_WORKSPACE):
            return RunFolder(self.root).workspace / name.removeprefix(IN_WORKSPACE)
        return self.root / name  # an absolute name replaces the root
