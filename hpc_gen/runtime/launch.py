"""Start the processes of a stage on this machine and be their parent: watch, pass signals on, end together.

`run_ranks` starts the ranks of one training job (what torchrun does on a laptop), `run_tasks` independent
tasks that share the units of a stage. The parent survives SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 and sends each
to every child; the children decide (runtime/stop.py) and their exit codes decide what the parent returns.

How a child is tied to its parent. A child must not outlive a parent that was killed with SIGKILL: nobody
would stop it and it would go on writing. Linux offers prctl(PR_SET_PDEATHSIG), which the child itself must
call. subprocess' preexec_fn would run Python between fork and exec, where another thread of the parent (torch
has many) may hold a lock that nobody will ever release, so it is not used: each child starts as a ten-line
program (`_STUB`) that makes the call, makes sure that the parent has not died before it, and then becomes the
wanted program by exec, which keeps the setting. The signal is tied to the *thread* that started the child:
call run_ranks in a thread that lives as long as the job (it waits, so it does).

Signals of a terminal reach a whole process group at once; each child leads a session of its own, so that
Ctrl-C comes to the parent only and each child receives it once. A child begins with these signals held back
(`hold_signals`): the stop token lets them through once its handlers stand, so a preemption in the seconds of
importing torch ends in a clean "requeue" and not in a dead process. Programs that never install a stop token
need hold_signals=False.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from hpc_gen.runtime import clock
from hpc_gen.runtime import env as environment
from hpc_gen.runtime.errors import ExitCode, UserError

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_TICK_S = 0.02  # how often the parent looks at its children: also the resolution of "who failed first"

# Exits that all ranks agree on: when one shows, the others are on their way, no need to push.
_COLLECTIVE = frozenset({ExitCode.REQUEUE, ExitCode.REQUEUE_ELSEWHERE, ExitCode.STOPPED})
_TERMINATED = 128 + signal.SIGTERM
_KILLED = 128 + signal.SIGKILL

# What other launchers told the parent about itself must not reach children that are told otherwise.
_FOREIGN_PREFIXES = ("TORCHELASTIC_", "PMI_", "PMIX_", "OMPI_", "SLURM_STEP")
_FOREIGN_NAMES = (
    "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK ROLE_WORLD_SIZE "
    "ROLE_NAME MASTER_ADDR MASTER_PORT SLURM_PROCID SLURM_LOCALID SLURM_NODEID SLURM_NTASKS SLURM_NPROCS "
    "HPC_GEN_TASK HPC_GEN_NUM_TASKS"
)

_STUB = """
import ctypes, os, sys
parent, argv = int(sys.argv[1]), sys.argv[2:]
if ctypes.CDLL(None, use_errno=True).prctl(1, 9, 0, 0, 0):  # PR_SET_PDEATHSIG, SIGKILL
    sys.exit("launch: prctl(PR_SET_PDEATHSIG) failed: " + os.strerror(ctypes.get_errno()))
if os.getppid() != parent:
    os._exit(137)  # the parent died before the call above
try:
    os.execvp(argv[0], argv)
except OSError as error:
    print(f"launch: cannot start {argv[0]}: {error.strerror}", file=sys.stderr)
    os._exit(127)
"""


_Handler = Callable[[int, FrameType | None], object] | int | None


@dataclass
class _Child:
    """One started process: its number, its log reader, and the code it ended with (None while it runs)."""

    number: int
    process: subprocess.Popen[bytes]
    reader: threading.Thread | None
    code: int | None = None


def run_ranks(
    argv: Sequence[str],
    world_size: int,
    *,
    env: Mapping[str, str],
    log_dir: Path | None,
    on_line: Callable[[str], None] | None = None,
    threads: int,
    grace_s: float = 30.0,
    hold_signals: bool = True,
    log_name: str = "rank",
) -> int:
    """Run `argv` as `world_size` ranks on this machine and return the exit code of the whole.

    `env` is laid over the parent's environment; RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR,
    MASTER_PORT and the thread counts over that. Output of rank 0 goes to `on_line` (called in a thread,
    without line end; an exception in it is raised here when all is over), else to stdout; with `log_dir`,
    every rank's output, rank 0's too, is appended to log_dir/LOG-NAME_N.log. Without log_dir and on_line rank
    0 simply inherits stdout, so that it can draw on a terminal. Without log_dir the other ranks' stdout is
    dropped; their stderr is ours.

    When a rank fails the others get SIGTERM and, `grace_s` seconds later, SIGKILL. Returned: 0 when all ranks
    returned 0; 85, 86 or 87 when a rank ended with it and the others with that, 0 or SIGTERM; else the code
    of the rank that failed first, 128 + N for one killed by signal N. Raises KeyboardInterrupt when SIGINT came and
    all returned 0 all the same: they were done.
    """
    if world_size < 1:
        raise UserError(f"world_size is {world_size}; at least one rank is needed")
    with _ReservedPort() as port:
        shared = {
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port.getsockname()[1]),
        }
        own = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
        family = _Family(argv, "rank", own, env, log_dir, log_name, on_line, threads, grace_s, hold_signals)
        return family.run()


def run_tasks(
    argv: Sequence[str],
    tasks: int,
    *,
    env: Mapping[str, str],
    log_dir: Path | None,
    on_line: Callable[[str], None] | None = None,
    threads: int,
    grace_s: float = 30.0,
    hold_signals: bool = True,
    log_name: str = "task",
) -> int:
    """As `run_ranks` for tasks that do not talk to each other: they get HPC_GEN_TASK and HPC_GEN_NUM_TASKS.

    A failing task stops the others, too: the stage cannot be completed without it, and what they committed
    stays.
    """
    if tasks < 1:
        raise UserError(f"tasks is {tasks}; at least one task is needed")
    own = [{"HPC_GEN_TASK": str(task), "HPC_GEN_NUM_TASKS": str(tasks)} for task in range(tasks)]
    return _Family(argv, "task", own, env, log_dir, log_name, on_line, threads, grace_s, hold_signals).run()


class _Family:
    """The children of one call and the loop that watches them."""

    def __init__(
        self,
        argv: Sequence[str],
        word: str,
        own: Sequence[Mapping[str, str]],
        env: Mapping[str, str],
        log_dir: Path | None,
        log_name: str,
        on_line: Callable[[str], None] | None,
        threads: int,
        grace_s: float,
        hold_signals: bool,
    ) -> None:
        self._argv = [os.fspath(part) for part in argv]
        self._word, self._own, self._env = word, own, env
        self._log_dir, self._log_name = log_dir, log_name
        self._on_line, self._threads = on_line, threads
        self._grace_s, self._hold_signals = grace_s, hold_signals
        self._children: list[_Child] = []
        self._received: list[signal.Signals] = []
        self._seen: set[signal.Signals] = set()  # all that were ever received
        self._failure: BaseException | None = None  # of on_line, raised at the end

    def run(self) -> int:
        """Start, watch, reap; never leaves a child behind, whatever happens."""
        old = self._install_handlers()
        try:
            for number in range(len(self._own)):
                self._children.append(self._start(number))
            first = self._watch()
        finally:
            for child in self._children:
                if child.code is None:
                    self._kill_hard(child)
                    child.code = _shell_code(child.process.wait())
                if child.reader is not None:
                    child.reader.join(timeout=5.0)  # a grandchild may keep the pipe open for ever
            for number, handler in old.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self._failure is not None:
            raise self._failure
        if first is None and signal.SIGINT in self._seen:
            raise KeyboardInterrupt  # the children were done before it came; what follows them must not begin
        return _verdict([child.code or 0 for child in self._children], first)

    def _install_handlers(self) -> dict[signal.Signals, _Handler]:
        if threading.current_thread() is not threading.main_thread():
            return {}  # Python hands signals to the main thread alone; there the caller must deal with them
        # The handler only takes a note: signals come in the middle of anything, in containers several times.
        old: dict[signal.Signals, _Handler] = {
            number: signal.signal(number, lambda got, frame: self._received.append(signal.Signals(got)))
            for number in _FORWARDED
        }
        # A Slurm stub may have held signals back for us as we do for our children.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
        return old

    def _start(self, number: int) -> _Child:
        foreign = _FOREIGN_NAMES.split()
        variables = {
            name: value
            for name, value in {**environment.child_environment(), **self._env}.items()
            if name not in foreign and not name.startswith(_FOREIGN_PREFIXES)
        }
        variables.update(self._own[number])
        variables.update(OMP_NUM_THREADS=str(self._threads), MKL_NUM_THREADS=str(self._threads))
        listened = number == 0 and self._on_line is not None
        piped = listened or self._log_dir is not None
        output = subprocess.PIPE if piped else None if number == 0 else subprocess.DEVNULL
        # A mask is inherited through fork and exec: there is no moment at which a signal kills the stub.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED if self._hold_signals else ())
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _STUB, str(os.getpid()), *self._argv],
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if piped else None,
                start_new_session=True,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        reader = None
        if piped:
            assert process.stdout is not None
            reader = threading.Thread(target=self._read, args=(number, process.stdout), daemon=True)
            reader.start()
        return _Child(number, process, reader)

    def _read(self, number: int, pipe: IO[bytes]) -> None:
        """Drain the output of a child to its end, whatever goes wrong here: a full pipe stops the child."""
        log: IO[bytes] | None = None
        log_path = self._log_path(number)
        if log_path is not None:
            try:
                log_path.parent.mkdir(parents=True, exist_ok=True)
                log = open(log_path, "ab", buffering=0)  # noqa: SIM115 - closed below, used in between
            except OSError as error:
                print(f"launch: no log of {self._word} {number}: {error}", file=sys.stderr)
        for line in pipe:
            if log is not None:
                try:
                    log.write(line)
                except OSError as error:
                    print(f"launch: log of {self._word} {number} ends here: {error}", file=sys.stderr)
                    log.close()
                    log = None
            if number == 0 and self._failure is None:
                self._show(line)
        pipe.close()
        if log is not None:
            log.close()

    def _show(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip("\r\n")
        try:
            if self._on_line is not None:
                self._on_line(text)
            else:
                print(text, flush=True)
        except BrokenPipeError:
            pass  # nobody reads our output any more (`| head`): the work goes on
        except BaseException as error:  # ours to hand on, in run(): a thread has nobody to raise to
            self._failure = error

    def _watch(self) -> int | None:
        """Wait for all children; return the code of the one that failed first, None when none failed."""
        first: int | None = None
        terminate_at = kill_at = float("inf")
        while any(child.code is None for child in self._children):
            failed: list[tuple[int, _Child]] = []
            for child in self._children:
                if child.code is None and (code := child.process.poll()) is not None:
                    child.code = _shell_code(code)
                    if child.code:
                        failed.append((child.code, child))
            if first is None and failed:
                # Within one tick nobody knows who was first; our codes say more than a broken connection.
                first, child = min(failed, key=lambda item: _telling(item[0]))
                if first in _COLLECTIVE:
                    terminate_at = clock.monotonic() + self._grace_s
                else:
                    terminate_at = clock.monotonic()
                    self._tell(first, child)
            received, self._received = self._received, []
            self._seen.update(received)
            for number in dict.fromkeys(received):
                self._send(number)
            if clock.monotonic() >= terminate_at:
                self._send(signal.SIGTERM)
                terminate_at, kill_at = float("inf"), clock.monotonic() + self._grace_s
            if clock.monotonic() >= kill_at:
                for child in self._children:
                    if child.code is None:
                        self._kill_hard(child)
                kill_at = float("inf")
            clock.sleep(_TICK_S)
        return first

    def _tell(self, code: int, child: _Child) -> None:
        names = {128 + number: number.name for number in signal.Signals}
        how = f"was killed by {names[code]}" if code in names else f"ended with code {code}"
        where = f"; its output: {self._log_path(child.number)}" if self._log_dir is not None else ""
        rest = "; the others are stopped" if any(other.code is None for other in self._children) else ""
        print(f"launch: {self._word} {child.number} {how}{rest}{where}", file=sys.stderr, flush=True)

    def _log_path(self, number: int) -> Path | None:
        return None if self._log_dir is None else self._log_dir / f"{self._log_name}_{number}.log"

    def _send(self, number: signal.Signals) -> None:
        for child in self._children:
            if child.code is None:
                child.process.send_signal(number)

    @staticmethod
    def _kill_hard(child: _Child) -> None:
        """SIGKILL a child and what it started; it leads its own process group and is not reaped yet."""
        try:
            os.killpg(child.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            child.process.kill()  # it has ended, or has not reached setsid yet


def _shell_code(returncode: int) -> int:
    """subprocess says -N for a process killed by signal N, shells and Slurm say 128 + N."""
    return 128 - returncode if returncode < 0 else returncode


def _telling(code: int) -> int:
    """Order of codes seen at the same moment, the one that tells most about the cause first."""
    if code in (ExitCode.USER, ExitCode.DATA, ExitCode.DIVERGED):
        return 0
    if code == _KILLED:
        return 1
    if code in _COLLECTIVE:
        return 2
    return 4 if code == _TERMINATED else 3


def _verdict(codes: Sequence[int], first: int | None) -> int:
    """The code of the whole, by the rule in `run_ranks`."""
    if first is None:
        return int(ExitCode.DONE)
    agreed = [code for code in codes if code in _COLLECTIVE]
    if agreed and all(code in _COLLECTIVE or code in (0, _TERMINATED) for code in codes):
        return max(agreed)  # 87 before 85: who was asked to stop for good must not be started again
    return first


class _ReservedPort:
    """A free TCP port that stays ours: the socket is held bound, not listening, so nobody else is given it.

    Both this socket and torch's store set SO_REUSEADDR, and Linux then allows the second to listen.
    """

    def __enter__(self) -> socket.socket:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        return self._socket

    def __exit__(self, *unused: object) -> None:
        self._socket.close()
