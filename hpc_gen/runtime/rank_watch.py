"""When ranks wait in vain: who is it that does not come, on which host, and what was it doing?

Every rank tells the store of the meeting once a second, by a thread and a connection of its own, where it is: the
innermost span, for how long, at how many images (spans.py). A collective that fails, by its timeout or because the
other end is gone, says only that it failed. The rank that sees it reads what the others told, and names

  a rank that said why it failed (its words and its exit code become those of all),
  else the ranks that are gone (no process on this host any more) or give no sign of life,
  else those that are behind: they have begun fewer spans than anybody else, and what they are in is told.

The store lives in rank 0; when it does not answer, rank 0 is named. On CPUs gloo raises where it waits. On GPUs NCCL
would abort the whole process without a word from us: there the thread looks at its own rank, and ends it with the same
sentence when it has been in a span that ranks share for longer than the limit while another rank is behind.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpc_gen.runtime import clock, spans
from hpc_gen.runtime.errors import CollectiveError, ExitCode, HpcGenError
from hpc_gen.runtime.ranks import Ranks

BEAT_S = 1.0
LOOK_S = 3.5  # how long beats may stand still; longer than one of them may take on a busy machine
_LINGER_S = 5.0  # rank 0, which holds the store, stays this long for the others to read
_SIGNS = ("gloo", "NCCL", "ProcessGroup", "process group", "TCPStore", "c10d")


@dataclass(frozen=True)
class Beat:
    """What a rank last told of itself. `words`: why it ended; `code`: with which exit code; `own`: by its own fault."""

    rank: int
    host: str
    pid: int
    number: int
    span: str
    for_s: float
    begun: int
    images_seen: int
    words: str = ""
    code: int = 0
    own: bool = False


class RankWatch:
    """One per process with several ranks; `start` returns one that does nothing where there is only one rank."""

    def __init__(self, ranks: Ranks, store: Any, limit_s: float | None = None) -> None:
        """`store`: a connection that nobody else uses, None for one rank; `limit_s`: see the module, None: never."""
        self._ranks, self._store, self._limit_s = ranks, store, limit_s
        self._lock = threading.Lock()  # the store's connection answers one question at a time
        self._ending = threading.Event()
        self._number = 0
        self._recorder = spans.active()
        self._thread: threading.Thread | None = None
        self.on_stuck: Callable[[CollectiveError], None] = lambda error: None

    @classmethod
    def start(cls, ranks: Ranks, limit_s: float | None = None) -> RankWatch:
        """Begin to tell where this rank is; the process's recorder of spans has begun."""
        watch = cls(ranks, ranks.open_store() if ranks.world_size > 1 else None, limit_s)
        if watch._store is not None:
            watch._thread = threading.Thread(target=watch._beat, name="rank-watch", daemon=True)
            watch._thread.start()
        return watch

    def close(self) -> None:
        """Tell nothing more; may be called twice."""
        self._ending.set()
        if self._thread is not None:
            self._thread.join(2 * BEAT_S)
            self._thread = None

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Inside, a collective that fails becomes a CollectiveError that names the rank; other failures are told to
        the other ranks before they are raised."""
        try:
            yield
        except CollectiveError:
            raise
        except HpcGenError as error:
            self._say(str(error), int(error.exit_code), own=True)
            raise
        except Exception as error:
            if not is_collective(error):
                self._say(f"{type(error).__name__}: {error}", int(ExitCode.BUG), own=True)
                raise
            found = self.explain(str(error).splitlines()[0])
            self._say(str(found), int(found.exit_code), own=False)
            if self._ranks.is_main and self._store is not None:
                self._linger(found)
            raise found from error

    def explain(self, what: str) -> CollectiveError:
        """Who it is; takes up to `LOOK_S` seconds, less when a rank has said why or is gone."""
        before = self._read()
        first = before
        until = clock.monotonic() + LOOK_S
        while before is not None and not _settled(before) and clock.monotonic() < until:
            clock.sleep(0.1)
            before = self._read()
        return verdict(self._ranks.rank, self._mine(), first, before, self._ranks.world_size, what)

    # ---- telling

    def _mine(self, words: str = "", code: int = 0, own: bool = False) -> Beat:
        if self._recorder is not None:
            at = self._recorder.position()
        else:
            at = spans.Position(spans.OUTSIDE, 0.0, 0, 0)
        text = " ".join(words.split())[:600]
        place = (at.span, round(at.for_s, 1), at.begun, at.images_seen)
        return Beat(self._ranks.rank, platform.node(), os.getpid(), self._number, *place, text, code, own)

    def _say(self, words: str, code: int, own: bool) -> None:
        """Last words: no beat comes after them."""
        self._ending.set()
        if self._store is not None:
            self._put(self._mine(words, code, own))

    def _put(self, beat: Beat) -> bool:
        try:
            with self._lock:
                self._store.set(_key(beat.rank), json.dumps(asdict(beat)))
        except RuntimeError:  # the store is gone, and rank 0 with it; whoever waits for it will see
            return False
        return True

    def _beat(self) -> None:
        while not self._ending.is_set():
            self._number += 1
            if not self._put(self._mine()):
                return
            if self._limit_s is not None and self._recorder is not None:
                self._look_at_myself(self._recorder, self._limit_s)
            self._ending.wait(BEAT_S)

    def _look_at_myself(self, recorder: spans.Recorder, limit_s: float) -> None:
        at = recorder.position()
        if not at.together or at.for_s < limit_s:
            return
        error = self.explain(f"nothing has moved on the device for {at.for_s:.0f} s")
        if not error.blamed:
            return  # all are at the same place, compiling perhaps
        self._say(str(error), int(error.exit_code), own=False)
        print(f"rank {self._ranks.rank}: {error}", file=sys.stderr, flush=True)
        self.on_stuck(error)
        if self._ranks.is_main:
            self._linger(error)
        os._exit(int(error.exit_code))  # the main thread waits in the driver and cannot be woken

    # ---- reading

    def _read(self) -> list[Beat] | None:
        """What each rank last told; None when the store does not answer."""
        found = []
        try:
            with self._lock:
                for rank in range(self._ranks.world_size):
                    if self._store is not None and self._store.check([_key(rank)]):
                        found.append(Beat(**json.loads(self._store.get(_key(rank)))))
        except RuntimeError:
            return None
        return found

    def _linger(self, error: CollectiveError) -> None:
        """The others read the store as well; whoever did not come is not waited for again."""
        blamed_ranks = {rank for rank, _ in error.blamed}
        until = clock.monotonic() + _LINGER_S
        while clock.monotonic() < until:
            beats = self._read() or []
            if all(beat.rank in blamed_ranks or beat.words or is_gone(beat) for beat in beats):
                return
            clock.sleep(0.1)


def is_collective(error: BaseException) -> bool:
    """Whether an error comes from the talk between ranks."""
    import torch.distributed as dist

    if dist.is_available() and isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def is_gone(beat: Beat) -> bool:
    """Whether a rank of this host has no process any more; False for other hosts, of which nobody here can tell."""
    if beat.host != platform.node():
        return False
    try:
        status = Path(f"/proc/{beat.pid}/stat").read_text()
    except FileNotFoundError:
        return Path("/proc/self/stat").exists()  # where there is no /proc nobody can tell either
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] in "ZX"


def _settled(beats: Sequence[Beat]) -> bool:
    return any((beat.words and beat.own) or (not beat.words and is_gone(beat)) for beat in beats)


def _key(rank: int) -> str:
    return f"hpc_gen/watch/{rank}"


# ---------------------------------------------------------------- the verdict


def verdict(
    me: int, mine: Beat, before: Sequence[Beat] | None, after: Sequence[Beat] | None, world_size: int, what: str
) -> CollectiveError:
    """The error that names the rank, from two looks at what all ranks told; None: the store did not answer."""
    if before is None or after is None:
        at = f"this rank was in {_place(mine)}"
        return CollectiveError(
            f"rank {me} of {world_size} waited in vain ({what}) and rank 0, which holds the store, does not answer: "
            f"its process or its node is gone; {at}; look at the log of rank 0",
            [(0, "")],
        )
    now = {beat.rank: beat for beat in after}
    for beat in after:
        if beat.words and beat.own:
            error = CollectiveError(
                f"rank {beat.rank} of {world_size} on {beat.host} failed: {beat.words}", [(beat.rank, beat.host)]
            )
            error.exit_code = ExitCode(beat.code)
            return error
    missing = [rank for rank in range(world_size) if rank not in now]
    numbers = {beat.rank: beat.number for beat in before}
    others = [beat for beat in after if beat.rank != me and not beat.words]
    gone = [beat for beat in others if is_gone(beat)]
    silent = [beat for beat in others if beat not in gone and numbers.get(beat.rank) == beat.number]
    if missing:
        names = ", ".join(map(str, missing))
        told = f"rank {names} of {world_size} has not told anything yet: it never began, or its node is gone"
        return CollectiveError(f"{told} ({what}); look at its log", [(rank, "") for rank in missing])
    if gone or silent:
        how = "its process is gone" if gone else "it gives no sign of life"
        return _blaming(gone or silent, mine, world_size, what, how)
    lowest = min(beat.begun for beat in [*others, mine])
    behind = [beat for beat in others if beat.begun == lowest and beat.begun < mine.begun]
    if behind:
        return _blaming(behind, mine, world_size, what, "it is alive, and behind the others")
    told_already = next((beat.words for beat in after if beat.words), "")
    if told_already:
        return CollectiveError(f"the other ranks have given up: {told_already}")
    return CollectiveError(
        f"ranks waited in vain ({what}), and all {world_size} are in {_place(mine)}: the network between the nodes?"
    )


def _blaming(beats: Sequence[Beat], mine: Beat, world_size: int, what: str, how: str) -> CollectiveError:
    worst = beats[0]
    more = f" (and {len(beats) - 1} more: {', '.join(str(b.rank) for b in beats[1:9])})" if len(beats) > 1 else ""
    text = (
        f"rank {worst.rank} of {world_size} on {worst.host}{more} did not come: {how}; its last span: {_place(worst)}; "
        f"rank {mine.rank} waited for it in {_place(mine)} ({what}); look at the log of rank {worst.rank}"
    )
    return CollectiveError(text, [(beat.rank, beat.host) for beat in beats])


def _place(beat: Beat) -> str:
    return f"'{beat.span}' for {beat.for_s:.1f} s at {beat.images_seen} images"


def blamed(error: BaseException | None) -> list[Mapping[str, Any]]:
    """Ranks and hosts that an error names, for the cause file."""
    found = error.blamed if isinstance(error, CollectiveError) else ()
    return [{"rank": rank, "host": host} for rank, host in found]
