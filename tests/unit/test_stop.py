"""The stop token: signals only set a flag, files and time limit count, all ranks agree."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hpc_gen.runtime import clock, commit
from hpc_gen.runtime.errors import StopRequested
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.runtime.stop import Cause, Stop, StopToken

_SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT]


@pytest.fixture(autouse=True)
def _handlers_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    yield
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # one still held back must not end the test run
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    commit.make_folder(tmp_path / "run")
    return RunFolder(tmp_path / "run")


@pytest.mark.parametrize(
    ("number", "cause", "code"),
    [
        (signal.SIGTERM, Cause.PREEMPTED, 85),
        (signal.SIGUSR1, Cause.PREEMPTED, 85),
        (signal.SIGUSR2, Cause.PREEMPTED, 85),
        (signal.SIGINT, Cause.STOPPED, 87),
    ],
)
def test_a_signal_sets_the_flag_and_a_second_means_no_more(number: signal.Signals, cause: Cause, code: int) -> None:
    token = StopToken()
    token.install()
    token.install()
    assert token.poll() is None
    for _ in range(3):  # containers multiply signals
        os.kill(os.getpid(), number)
    assert token.poll() == Stop(cause, number.name)
    assert token.poll().exit_code == code  # type: ignore[union-attr]


def test_a_signal_held_back_during_start_up_is_delivered_by_install() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    # To this thread: a thread that an earlier test has left behind holds nothing back and would take it from the process.
    # (In a started process all threads inherit the mask.)
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
    token = StopToken()
    assert token.poll() is None
    token.install()
    assert token.poll() == Stop(Cause.PREEMPTED, "SIGTERM")
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_install_outside_the_main_thread_is_our_bug() -> None:
    caught: list[BaseException] = []

    def work() -> None:
        try:
            StopToken().install()
        except AssertionError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(caught) == 1


def test_the_larger_cause_wins_and_the_first_of_equals_stays() -> None:
    token = StopToken()
    token.request(Cause.NONE, "nothing")
    assert token.poll() is None
    token.request(Cause.PREEMPTED, "first")
    token.request(Cause.PREEMPTED, "second")
    assert token.poll() == Stop(Cause.PREEMPTED, "first")
    token.request(Cause.STOPPED, "user")
    token.request(Cause.TIME_LIMIT, "late")
    assert token.poll() == Stop(Cause.STOPPED, "user")


def test_the_time_limit_is_wall_time() -> None:
    with clock.use(clock.FakeClock(start=1000.0)) as fake:
        token = StopToken(deadline=1060.0)
        fake.sleep(59.9)
        assert token.poll() is None
        fake.sleep(0.1)
        assert token.poll() == Stop(Cause.TIME_LIMIT, "time limit")
        assert token.poll().exit_code == 85  # type: ignore[union-attr]
        late = StopToken()
        late.deadline = 1000.0
        assert late.poll() is not None


def test_files_are_looked_at_at_once_and_then_once_a_second(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[str] = []
    real = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: looks.append(path.name) or real(path))
    with clock.use(clock.FakeClock()) as fake:
        token = StopToken(run)
        for _ in range(80):
            assert token.poll() is None
            fake.sleep(0.03125)  # exact in binary
        assert looks.count("STOP") == looks.count("PREEMPT") == 3  # 2.5 seconds
        run.preempt_file.touch()
        fake.sleep(1.0)
        assert token.poll() == Stop(Cause.PREEMPTED, "file PREEMPT")
        run.stop_file.touch()
        fake.sleep(1.0)
        assert token.poll() == Stop(Cause.STOPPED, "file STOP")


def test_clear_files_takes_preempt_and_leaves_stop_unless_asked(run: RunFolder) -> None:
    run.stop_file.touch()
    run.preempt_file.touch()
    token = StopToken(run)
    token.clear_files()
    assert (run.stop_file.exists(), run.preempt_file.exists()) == (True, False)
    assert token.poll() == Stop(Cause.STOPPED, "file STOP")
    token.clear_files(stop=True)
    assert not run.stop_file.exists()
    token.clear_files(stop=True)
    StopToken().clear_files()


def test_check_raises_with_the_exit_code() -> None:
    token = StopToken()
    token.check()
    token.request(Cause.STOPPED, "file STOP")
    with pytest.raises(StopRequested) as caught:
        token.check()
    assert caught.value.exit_code == 87 and caught.value.stop == Stop(Cause.STOPPED, "file STOP")


class _Two:
    """Ranks as seen by rank 0 of 2; the other rank reports `other`."""

    world_size = 2

    def __init__(self, other: Cause) -> None:
        self.other = other
        self.calls = 0

    def all_reduce_max_cpu(self, tensor: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.maximum(tensor, torch.tensor([int(self.other)]), out=tensor)


@pytest.mark.parametrize(
    ("mine", "other", "agreed"),
    [
        (Cause.NONE, Cause.NONE, None),
        (Cause.NONE, Cause.PREEMPTED, Stop(Cause.PREEMPTED, "another rank was asked to")),
        (Cause.PREEMPTED, Cause.NONE, Stop(Cause.PREEMPTED, "mine")),
        (Cause.PREEMPTED, Cause.STOPPED, Stop(Cause.STOPPED, "another rank was asked to")),
        (Cause.STOPPED, Cause.TIME_LIMIT, Stop(Cause.STOPPED, "mine")),
    ],
)
def test_ranks_agree_on_the_largest_cause(mine: Cause, other: Cause, agreed: Stop | None) -> None:
    token, ranks = StopToken(), _Two(other)
    token.request(mine, "mine")
    assert token.agree(ranks) == agreed  # type: ignore[arg-type]
    assert ranks.calls == 1  # collective even when this rank knows of nothing


def test_a_signal_during_the_agreement_is_left_for_the_next_iteration() -> None:
    """Else this rank alone would stop now, and the others would wait for it in the next collective."""
    token = StopToken()

    class _Late(_Two):
        def all_reduce_max_cpu(self, tensor: torch.Tensor) -> torch.Tensor:
            token.request(Cause.PREEMPTED, "SIGTERM")
            return tensor

    assert token.agree(_Late(Cause.NONE)) is None  # type: ignore[arg-type]
    assert token.poll() == Stop(Cause.PREEMPTED, "SIGTERM")
