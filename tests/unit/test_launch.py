"""run_ranks and run_tasks with tiny children: environment, output, signals, codes, death of the parent."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from hpc_gen.runtime.errors import UserError
from hpc_gen.runtime.launch import run_ranks, run_tasks

# A child that says when it is ready, so that no test depends on how long Python takes to start.
PRELUDE = """
import os, signal, sys, time
rank = int(os.environ.get("RANK", os.environ.get("HPC_GEN_TASK", "-1")))
folder = os.environ["TEST_FOLDER"]
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]
def ready(word="ready"):
    open(os.path.join(folder, f"{word}.{rank}"), "w").write(str(os.getpid()))
def unblock():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
def wait_for(word, of):
    while not os.path.exists(os.path.join(folder, f"{word}.{of}")):
        time.sleep(0.01)
"""


def child(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", PRELUDE + textwrap.dedent(code)]


def launch(code: str, ranks: int, folder: Path, **options: object) -> int:
    settings: dict[str, object] = {"log_dir": folder / "logs", "threads": 3, "grace_s": 30.0, **options}
    env = {"TEST_FOLDER": str(folder), **settings.pop("env", {})}  # type: ignore[dict-item]
    return run_ranks(child(code), ranks, env=env, **settings)  # type: ignore[arg-type]


def wait_for_files(folder: Path, *names: str) -> None:
    limit = time.monotonic() + 60.0
    while not all((folder / name).exists() and (folder / name).read_text() for name in names):
        assert time.monotonic() < limit, f"no {names} in 60 s"
        time.sleep(0.01)


def when_ready(folder: Path, ranks: int, action: object, word: str = "ready") -> threading.Thread:
    """Call `action` in a thread as soon as all ranks have said that they are ready."""

    def run() -> None:
        wait_for_files(folder, *(f"{word}.{rank}" for rank in range(ranks)))
        action()  # type: ignore[operator]

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_environment_of_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "SLURM_PROCID": "7",
        "SLURM_STEP_ID": "0",
        "TORCHELASTIC_RUN_ID": "x",
        "RANK": "9",
    }.items():
        monkeypatch.setenv(name, value)
    code = """
    names = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR OMP_NUM_THREADS MKL_NUM_THREADS MINE"
    print(" ".join(os.environ[name] for name in names.split()), int(os.environ["MASTER_PORT"]) > 0)
    foreign = [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_", "HPC_GEN_TASK"))]
    print(foreign, os.getsid(0) == os.getpid())
    """
    assert launch(code, 2, tmp_path, env={"MINE": "yes", "SLURM_LOCALID": "3"}) == 0
    for rank in range(2):
        lines = (tmp_path / "logs" / f"rank_{rank}.log").read_text().splitlines()
        assert lines == [f"{rank} 2 {rank} 2 127.0.0.1 3 3 yes True", "[] True"]


def test_environment_of_tasks(tmp_path: Path) -> None:
    code = 'print(os.environ["HPC_GEN_TASK"], os.environ["HPC_GEN_NUM_TASKS"], "RANK" in os.environ)'
    env = {"TEST_FOLDER": str(tmp_path)}
    assert run_tasks(child(code), 2, env=env, log_dir=tmp_path, threads=1, log_name="encode") == 0
    assert [(tmp_path / f"encode_{i}.log").read_text() for i in range(2)] == ["0 2 False\n", "1 2 False\n"]


def test_output_goes_to_on_line_and_logs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = 'print("out", rank); print("err", rank, file=sys.stderr); sys.stdout.flush()'
    lines: list[str] = []
    assert launch(code, 2, tmp_path, on_line=lines.append) == 0
    assert sorted(lines) == ["err 0", "out 0"]
    assert launch(code, 2, tmp_path) == 0  # no on_line: rank 0 is passed through; logs are appended to
    assert sorted(capfd.readouterr().out.splitlines()) == ["err 0", "out 0"]
    for rank in range(2):
        logged = (tmp_path / "logs" / f"rank_{rank}.log").read_text().splitlines()
        assert sorted(logged) == [f"err {rank}"] * 2 + [f"out {rank}"] * 2


def test_output_without_log_dir_is_inherited(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch('print("out", rank); print("err", rank, file=sys.stderr)', 2, tmp_path, log_dir=None) == 0
    said = capfd.readouterr()
    assert said.out == "out 0\n" and sorted(said.err.splitlines()) == ["err 0", "err 1"]


def test_exception_of_on_line_is_raised_at_the_end(tmp_path: Path) -> None:
    def refuse(line: str) -> None:
        raise RuntimeError(f"bad {line}")

    with pytest.raises(RuntimeError, match="bad 0"):
        launch("for i in range(20000): print(i)\nready()", 1, tmp_path, on_line=refuse)
    assert (tmp_path / "ready.0").exists()  # the pipe was drained all the same


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_signals_reach_all_ranks_as_they_are(tmp_path: Path, number: signal.Signals) -> None:
    code = """
    got = []
    for number in SIGNALS:
        signal.signal(number, lambda n, f: got.append(n))
    unblock()
    ready()
    while not got: time.sleep(0.01)
    time.sleep(0.1)  # containers multiply signals: the parent may be given it twice, too
    print(sorted(set(got)))
    sys.exit(85)
    """
    before = signal.getsignal(number)

    def twice() -> None:
        os.kill(os.getpid(), number)
        time.sleep(0.03)
        os.kill(os.getpid(), number)

    thread = when_ready(tmp_path, 2, twice)
    assert launch(code, 2, tmp_path) == 85
    thread.join()
    assert signal.getsignal(number) is before
    for rank in range(2):
        assert (tmp_path / "logs" / f"rank_{rank}.log").read_text() == f"[{int(number)}]\n"


def test_ctrl_c_that_comes_when_all_are_done_is_not_lost(tmp_path: Path) -> None:
    """The children no longer answer it; the stages after this one must not begin."""
    code = "signal.signal(signal.SIGINT, lambda n, f: None)\nunblock()\nready()\ntime.sleep(0.3)"
    thread = when_ready(tmp_path, 1, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        launch(code, 1, tmp_path)
    thread.join()


def test_signal_during_start_up_is_held_back(tmp_path: Path) -> None:
    """A child that installs its handlers late finds the signal waiting, it does not die of it."""
    code = """
    ready()
    wait_for("go", "now")
    signal.signal(signal.SIGTERM, lambda n, f: sys.exit(85))
    unblock()
    time.sleep(60)
    """

    def early() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        (tmp_path / "go.now").write_text("x")

    thread = when_ready(tmp_path, 1, early)
    assert launch(code, 1, tmp_path) == 85
    thread.join()


def test_signals_are_not_held_back_when_not_wanted(tmp_path: Path) -> None:
    thread = when_ready(tmp_path, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert launch("ready(); time.sleep(60)", 1, tmp_path, hold_signals=False) == 143
    thread.join()


FIRST_FAILURES = [
    # (what each rank does, code of the whole)
    (["sys.exit(0)", "sys.exit(0)"], 0),
    (["ready(); unblock(); time.sleep(60)", "wait_for('ready', 0); sys.exit(7)"], 7),
    (["ready(); unblock(); time.sleep(60)", "wait_for('ready', 0); os.kill(os.getpid(), 9)"], 137),
    (["wait_for('ready', 1); sys.exit(85)", "ready(); unblock(); os.kill(os.getpid(), 15)"], 85),
    (["unblock(); os.kill(os.getpid(), 15)", "time.sleep(0.3); sys.exit(87)"], 87),
    (["sys.exit(85)", "sys.exit(87)"], 87),
    (["sys.exit(85)", "os.kill(os.getpid(), 9)"], 137),
    (["sys.exit(2)", "time.sleep(0.5); sys.exit(70)"], 2),
]


@pytest.mark.parametrize(("actions", "expected"), FIRST_FAILURES)
def test_exit_code_of_the_whole(tmp_path: Path, actions: list[str], expected: int) -> None:
    cases = "\n".join(f"if rank == {rank}:\n    {action}" for rank, action in enumerate(actions))
    if expected == 137 and "85" in actions[0]:
        cases = cases.replace("sys.exit(85)", "time.sleep(0.3); sys.exit(85)")  # the killed one is first
    started = time.monotonic()
    assert launch(cases, 2, tmp_path) == expected
    assert time.monotonic() - started < 20.0  # nobody waited for a grace time of 30 s or a sleep of 60


def test_the_first_failure_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    launch("if rank: os.kill(os.getpid(), 9)\nunblock(); time.sleep(60)", 2, tmp_path)
    assert re.search(r"rank 1 was killed by SIGKILL; the others are stopped; .*rank_1.log", capfd.readouterr().err)


def test_stubborn_ranks_are_killed_after_the_grace_time(tmp_path: Path) -> None:
    code = """
    if rank == 1:
        wait_for("ready", 0)
        sys.exit(64)
    signal.signal(signal.SIGTERM, lambda n, f: ready("asked"))
    unblock()
    ready()
    while True: time.sleep(1)
    """
    started = time.monotonic()
    assert launch(code, 2, tmp_path, grace_s=0.5) == 64
    assert (tmp_path / "asked.0").exists()
    assert 0.4 < time.monotonic() - started < 20.0
    assert not is_alive(int((tmp_path / "ready.0").read_text()))


def test_ranks_on_their_way_to_a_requeue_are_left_alone(tmp_path: Path) -> None:
    """85 is a collective exit: the rank that is still writing gets its time and no second signal."""
    code = """
    if rank == 0:
        wait_for("ready", 1)
        sys.exit(85)
    signal.signal(signal.SIGTERM, lambda n, f: sys.exit(99))
    unblock()
    ready()
    time.sleep(0.5)
    sys.exit(85)
    """
    assert launch(code, 2, tmp_path) == 85


@pytest.mark.parametrize("held", [True, False])
def test_children_die_with_a_killed_parent(tmp_path: Path, held: bool) -> None:
    parent = f"""
import pathlib
from hpc_gen.runtime.launch import run_ranks
run_ranks({child("ready(); time.sleep(60)")!r}, 2, env={{"TEST_FOLDER": {str(tmp_path)!r}}}, log_dir=None,
          threads=1, hold_signals={held})
"""
    process = subprocess.Popen([sys.executable, "-c", parent])
    wait_for_files(tmp_path, "ready.0", "ready.1")
    pids = [int((tmp_path / f"ready.{rank}").read_text()) for rank in range(2)]
    assert all(is_alive(pid) for pid in pids)
    process.kill()
    process.wait()
    limit = time.monotonic() + 30.0
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < limit, "children outlived their parent"
        time.sleep(0.01)


def test_in_a_thread_other_than_the_main_one(tmp_path: Path) -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(launch("sys.exit(3)", 1, tmp_path)))
    thread.start()
    thread.join()
    assert codes == [3]


def test_mistakes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="world_size is 0"):
        launch("", 0, tmp_path)
    with pytest.raises(UserError, match="tasks is 0"):
        run_tasks(["true"], 0, env={}, log_dir=None, threads=1)
    assert run_ranks(["/no/such/program"], 1, env={}, log_dir=None, threads=1) == 127
    assert "cannot start /no/such/program: No such file" in capfd.readouterr().err
