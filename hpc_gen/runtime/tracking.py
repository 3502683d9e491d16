"""wandb as a mirror of the journal: one history, each row exactly once, whatever is killed (specs/wandb_resume.md, 7).

The journal is the truth. A row is released only when a checkpoint at or above its images_seen is committed, so wandb
never holds a row that a resume would undo, and any process may publish at any time: it asks the server how many rows
it has and sends the rest. The wandb step is the number of the row (steps without holes are what wandb can resume);
images_seen is a column and the x axis.

online    a thread publishes, so a slow or absent server costs training nothing; after any exception the handle is
          dropped, and opened again ten minutes later, by the next attempt, or by whoever publishes next.
offline   nothing while training; at the end one offline run folder from the whole journal, for one `wandb sync`.
disabled  nothing at all; wandb is not even imported.

`wandb/mirror.json` in the run folder remembers the id and a hash of all rows released so far, written before they are
sent. Should those rows no longer be the beginning of the history (training fell back below a released checkpoint),
what was released cannot be taken back: the whole history then goes to a new id, and we say so.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from hpc_gen.runtime import clock, commit, env
from hpc_gen.runtime.journal import Reader, Row, history_of
from hpc_gen.runtime.run_folder import RunFolder

_RETRY_S = 600.0  # a server that was away is asked again after this time
_INIT_TIMEOUT_S = 20.0
_FINISH_TIMEOUT_S = 30.0
_PREEMPTED_WAIT_S = 8.0  # the grace time before SIGKILL belongs to the checkpoint
_CLIENT_FOLDER = re.compile(r"(offline-)?run-\d{8}_\d{6}-.+")


class TrackingSettings(Protocol):
    """What is needed of the experiment's `tracking` section; project and entity None = wandb's defaults."""

    @property
    def wandb(self) -> str: ...
    @property
    def project(self) -> str | None: ...
    @property
    def entity(self) -> str | None: ...


class MirrorError(RuntimeError):
    """The mirror must stop: going on would spoil a history on the server. Training is not concerned."""


@dataclass(frozen=True)
class _Marker:
    """What was released: the first `rows` rows of the history, with their hash, as run `run_id`.

    Offline: `folder` holds rows `first` to `rows`; the rows before were synced from an earlier folder.
    """

    run_id: str
    mode: str
    rows: int
    digest: str
    first: int = 0
    folder: str = ""


class WandbMirror:
    """Publishes the train history of one run. Only rank 0 makes one. No method raises or waits for the network.

    The exception: `publish(..., final=True)` waits a bounded time for the last rows to go out.
    """

    def __init__(
        self,
        run: RunFolder,
        settings: TrackingSettings,
        *,
        config: Mapping[str, Any] | None = None,
        stage: str = "train",
        client_settings: Mapping[str, Any] | None = None,
    ) -> None:
        """`config`: shown by wandb beside the run; `client_settings`: more of wandb.Settings (tests: short times)."""
        self._run, self._settings, self._config = run, settings, dict(config or {})
        self._mode = settings.wandb
        self._folder = run.path / "wandb"
        self._client_settings = dict(client_settings or {})
        self._reader = Reader(run, stage=stage, task=0)
        self._said: set[str] = set()
        self.problem: str | None = None
        # Of the publishing thread alone:
        self._handle: Any = None
        self._marker: _Marker | None = None
        self._sent = 0
        self._retry_at = float("-inf")
        # Shared with it, under this condition:
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._asked: int | None = None
        self._ending = False
        self._preempted = False

    def publish(self, upto_images: int, final: bool = False, *, preempted: bool = False) -> None:
        """Release the rows up to images_seen `upto_images`, that of the newest committed checkpoint.

        `final`: the attempt ends; `preempted`: it ends early, will be resumed, and time is short (offline then leaves
        its work to the last attempt). A repeated call, or one by another process later, releases nothing twice.
        """
        if self._mode == "offline":
            if final and not preempted:
                self._guarded(self._write_offline, upto_images)
        elif self._mode == "online":
            with self._changed:
                self._asked = upto_images
                self._ending, self._preempted = final, preempted
                self._changed.notify()
                if self._thread is None or not self._thread.is_alive():
                    self._thread = threading.Thread(target=self._work, name="wandb mirror", daemon=True)
                    self._thread.start()
            if final:
                self._thread.join(_PREEMPTED_WAIT_S if preempted else _INIT_TIMEOUT_S + _FINISH_TIMEOUT_S)
                if self._thread.is_alive():
                    self._say("the last rows are still on their way; publishing again later sends what is missing")

    # ---------------------------------------------------------------- online

    def _work(self) -> None:
        """Life of the publishing thread: release what is asked, until the last request is served."""
        while True:
            with self._changed:
                while self._asked is None:
                    self._changed.wait()
                asked, ending, preempted = self._asked, self._ending, self._preempted
                self._asked = None
            self._guarded(self._release, asked, ending, preempted)
            if ending:
                return

    def _release(self, upto_images: int, ending: bool, preempted: bool) -> None:
        rows = history_of(self._reader.events(), upto_images)
        if self._handle is None:
            # At a preemption there is no time for a new connection; the next attempt sends these rows.
            if not rows or preempted or (clock.monotonic() < self._retry_at and not ending):
                return
            self._open(rows)
        assert self._marker is not None
        if len(rows) > self._marker.rows:
            self._remember(replace(self._marker, rows=len(rows), digest=_digest(rows)))
        self._log(rows, range(self._sent, len(rows)))
        self._sent = max(self._sent, len(rows))
        if ending:
            handle, self._handle = self._handle, None
            if preempted:
                handle.mark_preempting()
            handle.finish(exit_code=1 if preempted else 0)

    def _open(self, rows: Sequence[Row]) -> None:
        """Connect, and learn from the server which row is the next."""
        marker = self._read_marker()
        if marker is not None and not _continues(rows, marker):
            self._say(
                f"rows sent to {marker.run_id} were undone by a fall-back to an older checkpoint; "
                "the history goes to a new wandb run"
            )
            marker = None
        if marker is None:
            marker = _Marker(self._new_id(), "online", 0, _digest([]))
        released = marker.rows
        # Before anything is sent: a kill from here on must find the id and what may have gone out.
        self._remember(replace(marker, mode="online", rows=max(len(rows), released), digest=_digest(rows)))
        self._clear(keep="")
        handle = self._init("online", marker.run_id)
        start = int(handle.starting_step)
        if start > released:
            handle.finish(exit_code=1)
            self._mode = "disabled"
            raise MirrorError(
                f"the server has {start} rows of {marker.run_id}, but only {released} were ever released from "
                f"{self._run.path}: another writer uses this id; remove {self._marker_path} to go on under a new one"
            )
        self._handle, self._sent = handle, start

    # ---------------------------------------------------------------- offline

    def _write_offline(self, upto_images: int) -> None:
        """Write one offline folder that, synced, completes the history; nothing when that is done already."""
        rows = history_of(self._reader.events(), upto_images)
        marker = self._read_marker()
        self._clear(keep=marker.folder if marker is not None else "")
        if not rows:
            return
        first = 0
        if marker is None:
            run_id = self._new_id()
        elif marker.mode == "offline" and _continues(rows, marker) and self._exists(marker.folder):
            if len(rows) == marker.rows:
                return
            run_id = marker.run_id
            first = marker.rows if self._is_synced(marker.folder) else marker.first
        else:
            # Rows may have reached the server that we cannot see or take back: only a new id is exact.
            run_id = self._new_id()
            self._say(f"what was released as {marker.run_id} cannot be continued; the history goes to a new wandb run")
        self._handle = self._init("offline", run_id)
        self._log(rows, range(first, len(rows)))
        handle, self._handle = self._handle, None
        folder = Path(handle.settings.sync_dir).name
        handle.finish()
        self._remember(_Marker(run_id, "offline", len(rows), _digest(rows), first, folder))
        self._clear(keep=folder)
        self._say(f"history of {len(rows)} rows written; on a machine with network: wandb sync {self._folder / folder}")

    # ---------------------------------------------------------------- the client

    def _init(self, mode: str, run_id: str) -> Any:
        """Start a wandb run that is a mirror and nothing else: no console, machine statistics, code or git state."""
        env.set_default("WANDB_SILENT", "true")  # also: never ask for a key on the terminal
        import wandb

        settings: dict[str, Any] = {
            "console": "off",
            "silent": True,
            "disable_git": True,
            "save_code": False,
            "x_disable_stats": True,
            "x_disable_meta": True,
            "x_disable_machine_info": True,
            "init_timeout": _INIT_TIMEOUT_S,
            "finish_timeout": _FINISH_TIMEOUT_S,
            **self._client_settings,
        }
        self._folder.mkdir(parents=True, exist_ok=True)
        handle = wandb.init(
            id=run_id,
            name=self._run.name,
            project=self._settings.project,
            entity=self._settings.entity,
            dir=self._run.path,
            config=self._config,
            mode="offline" if mode == "offline" else "online",
            resume="allow",  # never "must": a first attempt killed early may have left no run
            settings=wandb.Settings(**settings),
        )
        handle.define_metric("*", step_metric="images_seen")
        return handle

    def _log(self, rows: Sequence[Row], numbers: range) -> None:
        for number in numbers:
            row = rows[number]
            data = {**row.data, "images_seen": row.images_seen, "_timestamp": row.t}
            self._handle.log(data, step=number, commit=True)

    def _guarded(self, work: Any, *arguments: Any) -> None:
        """Do some work with wandb; whatever goes wrong with it, the training goes on."""
        try:
            work(*arguments)
        except ImportError as error:
            self._mode = "disabled"
            self._say(f"not installed ({error}); install the package wandb or set tracking.wandb=disabled")
        except Exception as error:  # a foreign library over a network: nothing is impossible
            self._handle = None
            self._retry_at = clock.monotonic() + _RETRY_S
            self._say(f"{type(error).__name__}: {error}; training goes on, the rows are kept in the journal")
            self._tear_down()

    def _tear_down(self) -> None:
        """End wandb's own process: it would refuse the id to a second start and might still be sending."""
        if "wandb" in sys.modules:
            try:
                sys.modules["wandb"].teardown(exit_code=1)
            except Exception as error:
                self._say(f"its process did not end cleanly: {error}")

    def _say(self, text: str) -> None:
        self.problem = text
        if text not in self._said:
            self._said.add(text)
            print(f"wandb: {text}", file=sys.stderr, flush=True)

    # ---------------------------------------------------------------- what is remembered

    @property
    def _marker_path(self) -> Path:
        return self._folder / "mirror.json"

    def _read_marker(self) -> _Marker | None:
        if not self._marker_path.is_file():
            return None
        try:
            return _Marker(**json.loads(self._marker_path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise MirrorError(f"{self._marker_path} cannot be read ({error}); remove it to go on under a new id") from error

    def _remember(self, marker: _Marker) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        commit.write_json(self._marker_path, asdict(marker))
        self._marker = marker

    def _new_id(self) -> str:
        """An id that says which run it is; the random end keeps a deleted and repeated run of the name apart."""
        return f"{re.sub(r'[^A-Za-z0-9_-]', '-', self._run.name)[:40]}-{secrets.token_hex(4)}"

    def _exists(self, folder: str) -> bool:
        return bool(folder) and (self._folder / folder).is_dir()

    def _is_synced(self, folder: str) -> bool:
        return any((self._folder / folder).glob("*.wandb.synced"))

    def _clear(self, keep: str) -> None:
        """Remove the client's folders of killed or earlier attempts: syncing one of them would double rows."""
        for path in sorted(self._folder.glob("*run-*")):
            if path.is_symlink() or not path.is_dir() or _CLIENT_FOLDER.fullmatch(path.name) is None:
                continue
            if path.name != keep and not self._is_synced(path.name):
                commit.remove_tree(path)


def _digest(rows: Sequence[Row]) -> str:
    """Hash of rows: where, when and what."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.images_seen, row.t, row.data], sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _continues(rows: Sequence[Row], marker: _Marker) -> bool:
    """Whether the rows released so far are the beginning of `rows`."""
    return len(rows) >= marker.rows and _digest(rows[: marker.rows]) == marker.digest
