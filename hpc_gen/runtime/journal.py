"""The journal: what happened in a run, told by each process in a file of its own and merged when read.

One file per process, `journal/ATTEMPT_STAGE_TASK.jsonl`, one JSON object per line: {"t": wall seconds,
"kind": ..., fields}. Files are only ever appended to, one `write` call per line, so a kill at any moment
costs at most the line being written; readers skip such a torn line and count it. Nothing here may stop the
work: a full or vanished disk makes the journal poorer, never the run fail. Status, goodput, the report and
the wandb mirror are computed from it.

Kinds that readers understand (others are kept as they are):
  attempt_start{world_size, rank, host, process_start, resumed_from, identity}   process_start: wall seconds
        when the process began; resumed_from: images_seen of the checkpoint loaded, None for a fresh start
  attempt_end{exit_code, cause, images_seen}
  row{images_seen, data}   for the curves; the row of a checkpoint's images_seen must be written before
        its save_begin, which makes all rows so far durable (so that a resumed history has no holes)
  rollback{images_seen, resumed_from}   training went back inside an attempt, to the checkpoint `resumed_from`
  interval, unit_begin, unit_committed  see goodput.py
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import threading
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hpc_gen.runtime import clock
from hpc_gen.runtime.run_folder import RunFolder

_FILE_NAME = re.compile(r"(\d{4,})_(.+)_(\d+)\.jsonl\Z")
_CLAIM_NAME = re.compile(r"(\d{4,})\.attempt\Z")
# After these a loss of power must not lose the lines before them: a checkpoint or an end refers to those
# lines.
_DURABLE_KINDS = frozenset({"save_begin", "attempt_end"})
# Enough for the begin of an attempt and for its end with the newest rows; see `ends`.
_HEAD_BYTES, _TAIL_BYTES = 4096, 16384


def journal_path(run: RunFolder, attempt: int, stage: str, task: int) -> Path:
    """File of one process: attempt and task are numbers from 1 and 0."""
    return run.journal / f"{attempt:04d}_{stage}_{task}.jsonl"


# ---------------------------------------------------------------- writing


class Journal:
    """Appends lines to the file of one process; may be used from several threads (the save thread's, too)."""

    def __init__(self, run: RunFolder, attempt: int, stage: str, task: int = 0, *, below: str = "") -> None:
        """`attempt` as claimed in fence.py; `task`: rank in training, number of the task in unit stages.

        `below`: a folder in the journal's for lines that `read` does not take in (spans).
        """
        self.path = journal_path(run, attempt, stage, task)
        if below:
            self.path = self.path.parent / below / self.path.name
        self.failed_writes = 0
        self.last_error = ""
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._line_open = False  # the file ends in the middle of a line: end it before writing the next one

    def event(self, kind: str, /, **fields: Any) -> None:
        """Write one line. Numbers that JSON does not know (nan, inf) become strings, objects their repr."""
        assert "t" not in fields and "kind" not in fields, "the journal writes t and kind itself"
        content = {"t": clock.now(), "kind": kind, **_plain(fields)}
        line = json.dumps(content, allow_nan=False).encode() + b"\n"
        with self._lock:
            try:
                self._append(line)
                if kind in _DURABLE_KINDS and self._descriptor is not None:
                    os.fsync(self._descriptor)
            except OSError as error:
                self._count(error)

    def row(self, images_seen: int, data: dict[str, float]) -> None:
        """Write the numbers measured at `images_seen`; a second row at a place adds its keys."""
        numbers = {key: float(value) for key, value in data.items()}
        self.event("row", images_seen=int(images_seen), data=numbers)

    def sync(self) -> None:
        """Make all lines so far survive a loss of power (done already by save_begin and attempt_end)."""
        with self._lock:
            try:
                if self._descriptor is not None:
                    os.fsync(self._descriptor)
            except OSError as error:
                self._count(error)

    def close(self) -> None:
        """Close the file; tell on stderr how many lines were lost, if any. A later event opens it again."""
        with self._lock:
            try:
                if self._descriptor is not None:
                    os.close(self._descriptor)
            except OSError as error:
                self._count(error)
            self._descriptor = None
            if self.failed_writes:
                print(
                    f"journal: {self.failed_writes} writes to {self.path} failed ({self.last_error}); status "
                    "and report of this attempt are incomplete, the work itself is not touched",
                    file=sys.stderr,
                )
                self.failed_writes = 0

    def _count(self, error: OSError) -> None:
        self.failed_writes += 1
        self.last_error = str(error)

    def _append(self, line: bytes) -> None:
        if self._descriptor is None:
            self._descriptor = self._open()
        if self._line_open:
            line = b"\n" + line
        self._line_open = True  # until the whole line is out
        while line:
            line = line[os.write(self._descriptor, line) :]
        self._line_open = False

    def _open(self) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        size = os.fstat(descriptor).st_size
        self._line_open = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)  # without this the name of the file may be lost with its fsynced content
        finally:
            os.close(folder)
        return descriptor


def _plain(value: Any) -> Any:
    """Make `value` fit for strict JSON, without ever failing."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)  # an IntEnum, too
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:  # scalars of numpy and torch
        return _plain(value.item())
    return repr(value)


# ---------------------------------------------------------------- reading


@dataclass(slots=True)  # not frozen: there may be hundreds of thousands, and a frozen one takes three times as long
class Event:
    """One line of the journal; `t` in wall seconds of the host that wrote it."""

    attempt: int
    stage: str
    task: int
    t: float
    kind: str
    fields: dict[str, Any]


class Events(list[Event]):
    """Events in order; `torn` counts the lines that could not be read."""

    torn: int = 0


@dataclass
class _File:
    """What was read of one file so far; `keys` sorts its events without breaking their order in the file."""

    attempt: int
    stage: str
    task: int
    offset: int = 0
    torn: int = 0
    events: list[Event] = field(default_factory=list)
    keys: list[float] = field(default_factory=list)

    def add(self, data: bytes) -> None:
        """Add the events of whole lines."""
        latest = self.keys[-1] if self.keys else -math.inf
        for content in _parse([line for line in data.splitlines() if line.strip()]):
            try:
                t, kind = float(content.pop("t")), str(content.pop("kind"))
            except (ValueError, TypeError, KeyError, AttributeError):
                self.torn += 1
                continue
            self.events.append(Event(self.attempt, self.stage, self.task, t, kind, content))
            # A wall clock that is set back must not make an end come before its beginning.
            latest = max(t, latest)
            self.keys.append(latest)


def _parse(lines: list[bytes]) -> list[Any]:
    """The content of each line, None for a torn one.

    All lines go to the parser at once, which takes a third of the time of one by one. Should that fail, halves are
    tried, down to the torn line. Pieces of torn lines might fit together, but then there are fewer objects than lines.
    """
    try:
        found = json.loads(f"[{b','.join(lines).decode()}]")
        if len(found) == len(lines):
            return list(found)
    except (ValueError, RecursionError):
        pass
    if len(lines) <= 1:
        return [None] * len(lines)
    middle = len(lines) // 2
    return _parse(lines[:middle]) + _parse(lines[middle:])


class Reader:
    """Reads a journal again and again at the cost of what is new; `stage`, `task`: only files of these."""

    def __init__(self, run: RunFolder, stage: str | None = None, task: int | None = None, *, below: str = "") -> None:
        """Nothing is read yet. `below`: a folder in the journal's, as in Journal."""
        self._folder, self._stage, self._task = run.journal / below, stage, task
        self._files: dict[str, _File] = {}

    def events(self) -> Events:
        """All events, by attempt, then time; the order inside one file is kept. No journal: no events."""
        names = sorted(os.listdir(self._folder)) if self._folder.is_dir() else []
        torn = sum(self._update(name) for name in names)
        return _merged(self._files.values(), torn)

    def _update(self, name: str) -> int:
        """Read what is new in one file; return its number of torn lines, the unfinished last one included."""
        match = _FILE_NAME.match(name)
        if match is None:
            return 0
        attempt, stage, task = int(match[1]), match[2], int(match[3])
        if (self._stage not in (None, stage)) or (self._task not in (None, task)):
            return 0
        file = self._files.setdefault(name, _File(attempt, stage, task))
        with open(self._folder / name, "rb") as stream:
            stream.seek(file.offset)
            data = stream.read()
        end = data.rfind(b"\n") + 1
        file.add(data[:end])
        file.offset += end
        return file.torn + (1 if data[end:].strip() else 0)


def _merged(files: Iterable[_File], torn: int) -> Events:
    """The events of all files by attempt, then time; the order inside one file is kept."""
    ordered = sorted(files, key=lambda file: (file.attempt, file.stage, file.task))
    entries = [
        (file.attempt, key, number, index) for number, file in enumerate(ordered) for index, key in enumerate(file.keys)
    ]
    entries.sort()
    result = Events([ordered[number].events[index] for _, _, number, index in entries])
    result.torn = torn
    return result


def read(run: RunFolder) -> Events:
    """Merge the journals of all processes of a run; lines torn by a kill are skipped, counted in `.torn`."""
    return Reader(run).events()


# ---------------------------------------------------------------- attempts


@dataclass(frozen=True)
class Attempt:
    """One start of a stage; times in wall seconds. No `end`, `exit_code`, `cause`: nobody lived to tell."""

    number: int
    stage: str
    start: float
    end: float | None
    last_seen: float
    exit_code: int | None
    cause: str | None
    resumed_from: int | None
    world_size: int
    host: str


def attempts(run: RunFolder) -> list[Attempt]:
    """List the attempts of a run in order, those that were killed before they wrote a line included.

    Costs two small reads per file, however long the journal is: how an attempt began and ended stands at the ends.
    """
    return attempts_of(ends(run), claims(run))


def last_attempt(run: RunFolder) -> Attempt | None:
    """The newest of `attempts`, at the cost of its own files alone; None when there was none."""
    names = os.listdir(run.journal) if run.journal.is_dir() else []
    matches = [match for name in names for match in (_FILE_NAME.match(name), _CLAIM_NAME.match(name)) if match]
    number = max((int(match[1]) for match in matches), default=0)
    told = attempts_of(ends(run, number), claims(run, number))
    return told[-1] if told else None


def ends(run: RunFolder, attempt: int | None = None) -> Events:
    """The first and the last lines of each file, or of those of one attempt; a file that is short is read whole.

    They hold `attempt_start`, `attempt_end`, the last sign of life and the newest row; `torn` counts only these lines.
    """
    files, torn = [], 0
    for name in sorted(os.listdir(run.journal)) if run.journal.is_dir() else []:
        match = _FILE_NAME.match(name)
        if match is None or attempt not in (None, int(match[1])):
            continue
        file = _File(int(match[1]), match[2], int(match[3]))
        file.add(_end_lines(run.journal / name))
        files.append(file)
        torn += file.torn
    return _merged(files, torn)


def _end_lines(path: Path) -> bytes:
    """Whole lines from both ends of a file; all of it when its ends do not hold the begin and a last line."""
    with open(path, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > _HEAD_BYTES + _TAIL_BYTES:
            head = stream.read(_HEAD_BYTES)
            stream.seek(size - _TAIL_BYTES)
            tail = stream.read()
            head, tail = head[: head.rfind(b"\n") + 1], tail[tail.find(b"\n") + 1 : tail.rfind(b"\n") + 1]
            if b'"attempt_start"' in head and tail:
                return head + tail
            stream.seek(0)
        data = stream.read()
    return data[: data.rfind(b"\n") + 1]


def attempts_of(events: Iterable[Event], claims: dict[int, dict[str, Any]] | None = None) -> list[Attempt]:
    """As `attempts`, from events read already; `claims`: contents of the files NNNN.attempt (fence.py)."""
    claims = claims or {}
    by_attempt: dict[tuple[int, str], list[Event]] = defaultdict(list)
    for event in events:
        by_attempt[event.attempt, event.stage].append(event)
    found = {key: _attempt(key, own, claims.get(key[0], {})) for key, own in by_attempt.items()}
    told = {number for number, _ in found}
    for number, claim in claims.items():
        time, stage = _number(claim.get("time")), str(claim.get("stage") or "")
        if number not in told and time is not None:
            size, host = int(claim.get("world_size") or 1), str(claim.get("host") or "")
            found[number, stage] = Attempt(number, stage, time, None, time, None, None, None, size, host)
    return [found[key] for key in sorted(found, key=lambda key: (key[0], found[key].start, key[1]))]


def _attempt(key: tuple[int, str], events: list[Event], claim: dict[str, Any]) -> Attempt:
    """One attempt from its own events, in order."""
    claimed = _number(claim.get("time"))
    start = events[0].t if claimed is None else min(events[0].t, claimed)
    attempt = Attempt(*key, start, None, max(event.t for event in events), None, None, None, 1, "")
    for event in events:
        if event.kind == "attempt_start":
            began = _number(event.fields.get("process_start"))
            attempt = replace(attempt, start=min(attempt.start, event.t if began is None else began))
            if not attempt.host or event.task == 0:
                attempt = replace(
                    attempt,
                    resumed_from=event.fields.get("resumed_from"),
                    world_size=int(event.fields.get("world_size") or 1),
                    host=str(event.fields.get("host") or ""),
                )
        elif event.kind == "attempt_end" and (attempt.end is None or event.task == 0):
            cause, code = event.fields.get("cause"), event.fields.get("exit_code")
            attempt = replace(attempt, end=event.t, exit_code=code, cause=None if cause is None else str(cause))
    return attempt


def claims(run: RunFolder, attempt: int | None = None) -> dict[int, dict[str, Any]]:
    """Contents of the claim files (fence.py), or of one; one that was cut off by a kill tells nothing, is left out."""
    claims: dict[int, dict[str, Any]] = {}
    for name in sorted(os.listdir(run.journal)) if run.journal.is_dir() else []:
        match = _CLAIM_NAME.match(name)
        if match is None or attempt not in (None, int(match[1])):
            continue
        try:
            content = json.loads((run.journal / name).read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(content, dict):
            claims[int(match[1])] = content
    return claims


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


# ---------------------------------------------------------------- history


@dataclass(frozen=True)
class Row:
    """Numbers measured at `images_seen`, `t` (wall seconds) when they were written, by which attempt."""

    images_seen: int
    t: float
    data: dict[str, float]
    attempt: int = 0


def history(run: RunFolder, upto: int | None = None, *, stage: str = "train") -> list[Row]:
    """The rows of task 0 that are part of the run as it stands, ascending in images_seen, each place once.

    Rows above the point from which a later attempt (or a rollback) went on were undone and are left out; a
    fresh start undoes all. `upto`: leave out rows above this images_seen as well.
    """
    return history_of(Reader(run, stage=stage, task=0).events(), upto)


def history_of(events: Iterable[Event], upto: int | None = None) -> list[Row]:
    """As `history`, from the events of task 0 of one stage, in order."""
    rows: list[Row] = []
    for event in events:
        if event.kind in ("attempt_start", "rollback"):
            point = event.fields.get("resumed_from")
            while rows and (point is None or rows[-1].images_seen > point):
                rows.pop()
        elif event.kind == "row":
            images_seen = int(event.fields["images_seen"])
            # float() also turns the texts "nan" and "inf" back into numbers.
            data = {key: float(value) for key, value in event.fields["data"].items()}
            # Should the line that told of a resume be lost, rows that go back tell of it as well.
            while rows and rows[-1].images_seen > images_seen:
                rows.pop()
            row = Row(images_seen, event.t, data, event.attempt)
            if rows and rows[-1].images_seen == images_seen:
                last = rows.pop()
                if last.attempt == row.attempt:
                    row = replace(last, data={**last.data, **data})
            rows.append(row)
    return rows if upto is None else [row for row in rows if row.images_seen <= upto]
