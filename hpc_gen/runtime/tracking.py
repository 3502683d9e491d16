"""wandb as a mirror of the journal: one history, each row exactly once, whatever is killed.

The recipe is that of specs/wandb_resume.md, section 7.

The journal is the truth. A row is released only when a checkpoint at or above its images_seen is committed,
so wandb never holds a row that a resume would undo, and any process may publish at any time: it asks the
server how many rows it has and sends the rest. The wandb step is the number of the row (steps without holes
are what wandb can resume); images_seen is a column and the x axis. Keys are those of the journal's rows;
pace, memory and the pictures of previews come with the rows of their place (tracking_rows.py).

online    a child process publishes what the checkpoints release while training goes on.
offline   nothing while training; at the end one offline folder from the whole journal, for one `wandb sync`.
disabled  nothing at all.

wandb lives in a process of its own (`serve`), because in the trainer's it could do harm that no try/except
catches: it may hang, it replaces sys.exit and sys.excepthook, at exit it waits for the network while the
requeue code is due. Here the trainer writes a line into a pipe, and at the end waits a bounded time. A
publisher that fails ends; the next one (ten minutes later, in the next attempt, or started by hand) sends
what is missing.

`wandb/mirror.json` in the run folder remembers the id and a hash of all rows released so far, written before
they are sent. Should those rows no longer be the beginning of the history (training fell back below a
released checkpoint), what was released cannot be taken back: the whole history then goes to a new id, and we
say so.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, Protocol

from hpc_gen.runtime import clock, commit, env, tracking_media
from hpc_gen.runtime.errors import nearest
from hpc_gen.runtime.journal import Reader, Row
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.runtime.tracking_rows import PREVIEW_KEY, Companions, lacks_term, rows_of, with_term

_RETRY_S = 600.0  # a server that was away is asked again after this time
_INIT_TIMEOUT_S = 20.0
_FINISH_TIMEOUT_S = 60.0
NO_NETWORK = "HPC_GEN_NO_NETWORK"  # set by the batch script where the cluster's profile says so
_PREEMPTED_WAIT_S = 2.0  # the preempting job waits for our end; what is not sent then, the next attempt sends
_CLIENT_FOLDER = re.compile(r"(offline-)?run-\d{8}_\d{6}-.+")


class TrackingSettings(Protocol):
    """What is needed of the experiment's `tracking` section; project and entity None = wandb's defaults."""

    @property
    def wandb(self) -> str:
        """disabled, offline or online."""

    @property
    def project(self) -> str | None:
        """Project of the wandb run."""

    @property
    def entity(self) -> str | None:
        """User or team of the wandb run."""

    @property
    def loss_term(self) -> str | None:
        """Loss term that is published in the place of the totals."""


class MirrorError(RuntimeError):
    """The mirror must stop: going on would spoil a history on the server. Training is not concerned."""


# ---------------------------------------------------------------- the trainer's side


class WandbMirror:
    """Publishes the train history of one run. Only rank 0 makes one.

    No method raises or waits for the network, but `publish(..., final=True)` waits a bounded time.
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
        """`config`: shown by wandb beside the run (JSON types); `client_settings`: more of wandb.Settings."""
        self._mode = settings.wandb
        self._job = {
            "run": str(run.path),
            "stage": stage,
            "mode": settings.wandb,
            "project": settings.project,
            "entity": settings.entity,
            "loss_term": settings.loss_term,
            "config": dict(config or {}),
            "client_settings": dict(client_settings or {}),
        }
        self._child: subprocess.Popen[bytes] | None = None
        self._started_at = float("-inf")
        self.problem: str | None = None  # what the last publisher that ended had to say
        if self._mode == "online" and env.get(NO_NETWORK):
            self._mode = "disabled"
            self._report(f"there is no network here; `hpc-gen track sync {run.name}` publishes from where there is one")

    def publish(
        self, upto_images: int, final: bool = False, *, preempted: bool = False, wait_s: float | None = None
    ) -> None:
        """Release the rows up to images_seen `upto_images`, that of the newest committed checkpoint.

        `final`: the attempt ends; wait at most `wait_s` seconds for the rows to go out (None: about a minute,
        2 s when preempted). `preempted`: the attempt will be resumed and time is short: no new connection is
        begun, and offline leaves its work to the last attempt. A repeated call, or one by another process
        later, releases nothing twice.
        """
        if self._mode == "disabled" or (self._mode == "offline" and (not final or preempted)):
            return
        self._reap()
        if self._child is None:
            resting = clock.monotonic() - self._started_at < _RETRY_S
            if preempted or (resting and not final):
                return
            self._start()
        self._tell({"upto": upto_images, "final": final, "preempted": preempted})
        if final:
            if wait_s is None:
                wait_s = _PREEMPTED_WAIT_S if preempted else _INIT_TIMEOUT_S + _FINISH_TIMEOUT_S
            self._finish(wait_s)

    def _start(self) -> None:
        self._started_at = clock.monotonic()
        root = str(Path(__file__).resolve().parents[2])  # this very code, wherever it was imported from
        python_path = os.pathsep.join(part for part in (root, env.get("PYTHONPATH")) if part)
        command = [sys.executable, "-c", "from hpc_gen.runtime import tracking; tracking.serve()"]
        try:
            self._child = subprocess.Popen(
                command,
                env=env.child_environment(PYTHONPATH=python_path, WANDB_SILENT="true"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # signals of a terminal are not for it
            )
        except OSError as error:
            self._report(f"cannot start the publisher: {error}")
            return
        assert self._child.stdin is not None
        os.set_blocking(self._child.stdin.fileno(), False)  # one that hangs must not make the trainer hang
        self._tell(self._job)

    def _tell(self, message: Mapping[str, Any]) -> None:
        if self._child is None or self._child.stdin is None:
            return
        try:
            self._child.stdin.write(json.dumps(message, default=str).encode() + b"\n")
            self._child.stdin.flush()
        except OSError:
            pass  # it has ended, or hangs; _reap and _finish report it

    def _finish(self, wait_s: float) -> None:
        """Wait at most `wait_s` seconds for the publisher, then end it: the rest is sent another day."""
        if self._child is None:
            return
        try:
            self._child.wait(wait_s)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
            self._report(f"rows did not go out in {wait_s:.0f} s; publishing again later sends what is missing")
        self._reap()

    def _reap(self) -> None:
        """Let go of a publisher that has ended."""
        if self._child is None or self._child.poll() is None:
            return
        child, self._child = self._child, None
        assert child.stdin is not None and child.stdout is not None
        os.set_blocking(child.stdout.fileno(), False)  # wandb's own process may hold the other end open
        said = (child.stdout.read() or b"").decode(errors="replace").splitlines()
        if said:
            self.problem = said[-1]
        elif child.returncode != 0:
            self._report(f"the publisher ended with code {child.returncode}; training goes on")
        if child.returncode == _GIVEN_UP:
            self._mode = "disabled"
        for pipe in (child.stdin, child.stdout):
            try:
                pipe.close()
            except OSError:
                pass  # unsent lines in the buffer: for a process that is gone

    def _report(self, text: str) -> None:
        self.problem = text
        print(f"wandb: {text}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- the publisher's side

_GIVEN_UP = 3  # exit code: asking again is of no use


def serve(source: IO[bytes] | None = None) -> None:
    """Main program of the publisher process; on stdin a job, then requests, one JSON object per line."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # Slurm signals all processes; the trainer says when to end
    lines = sys.stdin.buffer if source is None else source
    code = 0
    try:
        publisher = _Publisher(json.loads(lines.readline()), parent=os.getppid())
        for line in lines:
            if publisher.serve(**json.loads(line)):
                break
    except ImportError as error:
        code = _GIVEN_UP
        _complain(f"wandb is not installed ({error}); install it or set tracking.wandb=disabled")
    except MirrorError as error:
        code = _GIVEN_UP
        _complain(str(error))
    except Exception as error:  # a foreign library over a network: nothing is impossible
        code = 1
        _complain(f"{type(error).__name__}: {error}; training goes on, the rows are kept in the journal")
    os._exit(code)  # without wandb's wait for the network at exit: a finished run has had its own


def _complain(text: str) -> None:
    """Say it to people (stderr) and to the trainer (stdout), where they are still there."""
    text = " ".join(text.split())
    for line, stream in ((f"wandb: {text}", sys.stderr), (text, sys.stdout)):
        try:
            print(line, file=stream, flush=True)
        except OSError:
            pass  # the trainer was killed: nobody reads the pipe


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


class _Publisher:
    """One connection to wandb. Raises whatever goes wrong; `serve` ends the process then."""

    def __init__(self, job: Mapping[str, Any], parent: int) -> None:
        """`job`: as made by WandbMirror; `parent`: process id of the trainer."""
        self._run, self._job, self._parent = RunFolder(job["run"]), job, parent
        self._folder = self._run.path / "wandb"
        self._reader = Reader(self._run, stage=job["stage"], task=0)
        self._handle: Any = None
        self._marker: _Marker | None = None
        self._sent = 0
        self._companions = Companions([])
        self._said: set[str] = set()

    def serve(self, upto: int, final: bool, preempted: bool) -> bool:
        """Do one request; return whether it was the last."""
        events = self._reader.events()
        rows, self._companions = rows_of(events, upto), Companions(events)
        if self._job["mode"] == "offline":
            self._write_offline(rows)
        else:
            self._release(rows)
            if final and self._handle is not None:
                if preempted:
                    self._handle.mark_preempting()
                self._handle.finish(exit_code=1 if preempted else 0)
                tracking_media.settled(self._folder)
        return final

    # ---- online

    def _release(self, rows: Sequence[Row]) -> None:
        if not rows:
            return
        if self._handle is None:
            self._open(rows)
        if os.getppid() != self._parent:
            raise MirrorError("the trainer is gone; its next attempt publishes")
        assert self._marker is not None
        if len(rows) > self._marker.rows:
            self._remember(replace(self._marker, rows=len(rows), digest=_digest(rows)))
        self._log(rows, range(self._sent, len(rows)))
        self._sent = max(self._sent, len(rows))

    def _open(self, rows: Sequence[Row]) -> None:
        """Connect, and learn from the server which row is the next."""
        marker = self._read_marker()
        if marker is not None and not _continues(rows, marker):
            print(
                f"wandb: rows sent to {marker.run_id} were undone by a fall-back to an older checkpoint; "
                "the history goes to a new wandb run",
                file=sys.stderr,
            )
            marker = None
        if marker is None:
            marker = _Marker(self._new_id(), "online", 0, _digest([]))
        # Before anything is sent: a kill from here on must find the id and what may have gone out.
        self._remember(replace(marker, mode="online", rows=len(rows), digest=_digest(rows)))
        self._clear(keep="", media_of=marker.run_id)
        handle = self._init(marker.run_id)
        tracking_media.send(self._folder, handle)
        start = int(handle.starting_step)
        if start > marker.rows:
            raise MirrorError(
                f"the server has {start} rows of {marker.run_id}, but only {marker.rows} were released from "
                f"{self._run.path}: another writer uses this id; remove {self._marker_path} to go on anew"
            )
        self._handle, self._sent = handle, start

    # ---- offline

    def _write_offline(self, rows: Sequence[Row]) -> None:
        """Write one offline folder that, synced, completes the history; nothing when that is done already."""
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
            print(
                f"wandb: what was released as {marker.run_id} cannot be continued; the history goes to a new wandb run",
                file=sys.stderr,
            )
        self._handle = self._init(run_id)
        self._log(rows, range(first, len(rows)))
        folder = Path(self._handle.settings.sync_dir).name
        self._handle.finish()
        self._remember(_Marker(run_id, "offline", len(rows), _digest(rows), first, folder))
        self._clear(keep=folder)
        count, command = len(rows) - first, f"wandb sync {self._folder / folder}"
        print(f"wandb: {count} rows written; where there is a network: {command}", file=sys.stderr)

    # ---- the client

    def _init(self, run_id: str) -> Any:
        """Start a wandb run that is a mirror and nothing else: no console, statistics, code or git state.

        With WANDB_SILENT set (see _start) it never asks for a key on the terminal either.
        """
        import wandb

        settings: dict[str, Any] = {
            "console": "off",
            "silent": True,
            "disable_git": True,
            "save_code": False,
            "x_disable_stats": True,
            "x_disable_meta": True,
            "x_disable_machine_info": True,
            "x_save_requirements": False,
            "init_timeout": _INIT_TIMEOUT_S,
            "finish_timeout": _FINISH_TIMEOUT_S,
            "finish_timeout_raises": True,
            **self._job["client_settings"],
        }
        self._folder.mkdir(parents=True, exist_ok=True)
        handle = wandb.init(
            id=run_id,
            name=self._run.name,
            project=self._job["project"],
            entity=self._job["entity"],
            dir=self._run.path,
            config=self._job["config"],
            mode=self._job["mode"],
            resume="allow",  # never "must": a first attempt killed early may have left no run
            settings=wandb.Settings(**settings),
        )
        handle.define_metric("*", step_metric="images_seen")
        return handle

    def _log(self, rows: Sequence[Row], numbers: range) -> None:
        term = self._job["loss_term"]
        for number in numbers:
            row = rows[number]
            if lacks_term(row.data, term):
                hint = nearest(term, row.data)
                self._say_once(f"tracking.loss_term '{term}' is no key of the rows{hint}; the total loss is published")
            data: dict[str, Any] = {**with_term(row.data, term), **self._companions.pace(row), **self._images(row)}
            self._handle.log({**data, "images_seen": row.images_seen, "_timestamp": row.t}, step=number, commit=True)

    def _images(self, row: Row) -> dict[str, Any]:
        """The pictures of a preview as wandb's images; one that cannot be read is left out, and said."""
        import wandb

        images = []
        for picture in self._companions.pictures(row):
            path = self._run.path / picture.file
            try:
                images.append(wandb.Image(str(path), caption=picture.caption or None))
            except Exception as error:  # a foreign library reading a picture that somebody may have removed
                self._say_once(f"{path} is not published: {error}")
        return {PREVIEW_KEY: images} if images else {}

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            print(f"wandb: {' '.join(text.split())}", file=sys.stderr)

    # ---- what is remembered

    @property
    def _marker_path(self) -> Path:
        return self._folder / "mirror.json"

    def _read_marker(self) -> _Marker | None:
        if not self._marker_path.is_file():
            return None
        try:
            return _Marker(**json.loads(self._marker_path.read_bytes()))
        except (ValueError, TypeError) as error:
            message = f"{self._marker_path} cannot be read ({error}); remove it to go on under a new id"
            raise MirrorError(message) from error

    def _remember(self, marker: _Marker) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        commit.write_json(self._marker_path, asdict(marker))
        self._marker = marker

    def _new_id(self) -> str:
        """An id that says which run it is; its random end keeps repeated runs of one name apart."""
        return f"{re.sub(r'[^A-Za-z0-9_-]', '-', self._run.name)[:40]}-{secrets.token_hex(4)}"

    def _exists(self, folder: str) -> bool:
        return bool(folder) and (self._folder / folder).is_dir()

    def _is_synced(self, folder: str) -> bool:
        return any((self._folder / folder).glob("*.wandb.synced"))

    def _clear(self, keep: str, media_of: str = "") -> None:
        """Remove the client's folders of killed or earlier attempts: syncing one would double rows.

        `media_of`: the run that goes on; pictures of its killed publishers are kept, to be sent again.
        """
        for path in sorted(self._folder.glob("*run-*")):
            if path.is_symlink() or not path.is_dir() or _CLIENT_FOLDER.fullmatch(path.name) is None:
                continue
            if path.name != keep and not self._is_synced(path.name):
                if media_of and path.name.endswith(f"-{media_of}"):
                    tracking_media.keep(self._folder, path)
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
