"""Pictures of killed publishers: wandb sends rows and files apart, so a kill can leave a row whose picture never went.

The row is on the server and is not sent again, and its files are known by name only in the folder that the killed
client left. So before such a folder is removed its media are kept in `wandb/unsent`, and whoever publishes next sends
them again under the same names; a file that had arrived is replaced by itself. A publisher that finished in peace
leaves nothing to send.
"""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

from hpc_gen.runtime import commit

UNSENT = "unsent"


def keep(folder: Path, client: Path) -> None:
    """Move the media of the client's folder `client` to those unsent; `folder`: that of the mirror."""
    files = client / "files"
    for path in sorted((files / "media").rglob("*")) if (files / "media").is_dir() else []:
        target = folder / UNSENT / path.relative_to(files)
        if path.is_symlink():
            continue  # one that was sent again by that client: it is among those unsent
        if path.is_file():
            commit.commit_file(path, target)


def send(folder: Path, handle: Any) -> None:
    """Send all that may not have arrived; `handle`: the wandb run whose rows name them."""
    root = folder / UNSENT
    for path in sorted(root.rglob("*")) if root.is_dir() else []:
        if path.is_file():
            handle.save(glob.escape(str(path)), base_path=str(root), policy="now")


def settled(folder: Path) -> None:
    """Everything has arrived: what was kept, and what the client that ended in peace has copied into its folder."""
    for path in (folder / UNSENT, *sorted(folder.glob("run-*/files/media"))):
        if path.is_dir():
            commit.remove_tree(path)
