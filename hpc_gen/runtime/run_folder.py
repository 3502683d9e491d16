"""The layout of a run folder (DESIGN section 5): one place that knows where each thing of a run lies.

Path arithmetic: nothing here creates, reads or writes a file, apart from `exists`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from hpc_gen.runtime import env
from hpc_gen.runtime.errors import UserError

# Tags and stage names become names of folders and files. A leading dot is reserved for staging (commit.py).
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*\Z")


def check_name(name: str, what: str) -> str:
    """Return `name` if it may be part of a file name, else raise UserError; `what` names it there."""
    if not _NAME.match(name):
        raise UserError(
            f"{what} {name!r} cannot name a part of the run folder; use letters, digits and . _ + = - "
            "(no slash, no leading dot)"
        )
    return name


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run. `path` is made absolute without following links."""

    path: Path

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """`path`: the run folder, existing or not."""
        object.__setattr__(self, "path", Path(os.path.abspath(path)))

    @property
    def name(self) -> str:
        """Name of the run: the last part of its path."""
        return self.path.name

    def exists(self) -> bool:
        """Whether a run was begun here (its config is written)."""
        return self.config_path.is_file()

    @property
    def workspace(self) -> Path:
        """Folder of the tables and downloads that the run names: the one whose `runs/` it lies in, wherever the command
        was typed; $HPC_GEN_WORKSPACE or the current folder for a run that was moved out."""
        return self.path.parent.parent if self.path.parent.name == "runs" else env.workspace()

    @property
    def config_path(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def hashes_path(self) -> Path:
        """Identity and operation hashes of the config."""
        return self.path / "hashes.json"

    @property
    def code(self) -> Path:
        """Copy of the code that attempts import."""
        return self.path / "code"

    @property
    def lock(self) -> Path:
        """The fence: which attempt may commit (fence.py)."""
        return self.path / "attempt.lock"

    @property
    def stop_file(self) -> Path:
        """Its presence asks every process of the run to save and stop for good."""
        return self.path / "STOP"

    @property
    def preempt_file(self) -> Path:
        """Its presence asks every process of the run to save and ask for a requeue."""
        return self.path / "PREEMPT"

    @property
    def journal(self) -> Path:
        """Folder of journal files and attempt claims."""
        return self.path / "journal"

    @property
    def logs(self) -> Path:
        """Folder of the processes' output."""
        return self.path / "logs"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints, one folder per images_seen."""
        return self.path / "checkpoints"

    @property
    def exports(self) -> Path:
        """Folder of exported weights."""
        return self.path / "exports"

    @property
    def previews(self) -> Path:
        """Folder of preview grids."""
        return self.path / "previews"

    @property
    def tables(self) -> Path:
        """Folder of tables that belong to this run alone."""
        return self.path / "tables"

    @property
    def report(self) -> Path:
        """The report page (a file)."""
        return self.path / "report" / "index.html"

    def samples(self, tag: str) -> Path:
        """Folder of the images of one sampling plan."""
        return self.path / "samples" / check_name(tag, "tag")

    def features(self, tag: str) -> Path:
        """Folder of extracted features of one sampling plan."""
        return self.path / "features" / check_name(tag, "tag")

    def metrics(self, tag: str) -> Path:
        """Metrics file of one sampling plan (JSON)."""
        return self.path / "metrics" / f"{check_name(tag, 'tag')}.json"

    def claims(self, stage: str) -> Path:
        """Folder that says which task works on which unit of a stage just now."""
        return self.path / "claims" / check_name(stage, "stage")

    def ledger(self, stage: str) -> Path:
        """Folder of the records of committed units of a stage."""
        return self.path / "ledger" / check_name(stage, "stage")
