"""Claims on units: one owner at a time, nobody waits for the dead, and work is shared without being done twice."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hpc_gen.runtime import claims as claims_module
from hpc_gen.runtime import clock
from hpc_gen.runtime.claims import FRESH_S, STALE_S, TOUCH_S, Claims, units_in_turn
from hpc_gen.runtime.fence import Job

NOBODY = Job()


def written_by_another(folder: Path, unit: str, age_s: float = 0.0, **facts: object) -> Path:
    """A claim of a task on another host, touched `age_s` seconds ago."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{unit}.claim"
    path.write_text(
        json.dumps({"host": "elsewhere", "pid": 1, "pid_start": 2, "job_id": "", "restart_count": 0} | facts)
    )
    then = time.time() - age_s
    os.utime(path, (then, then))
    return path


def test_one_owner_at_a_time(tmp_path: Path) -> None:
    one, two = Claims(tmp_path / "c", NOBODY), Claims(tmp_path / "c", NOBODY)
    assert one.state("a") == "gone" and one.take("a")
    assert not two.take("a") and two.state("a") == "alive"
    assert two.take("b")
    one.release()
    two.release()
    assert two.take("a") and not list((tmp_path / "c").glob("b.claim"))


def test_many_at_once(tmp_path: Path) -> None:
    winners: list[int] = []
    start = threading.Barrier(8)

    def race(i: int) -> None:
        mine = Claims(tmp_path / "c", NOBODY)
        start.wait()
        if mine.take("a"):
            winners.append(i)

    threads = [threading.Thread(target=race, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1


@pytest.mark.parametrize(
    ("age_s", "state"),
    [
        (0, "alive"),
        (FRESH_S - 5, "alive"),
        (FRESH_S + 5, "unsure"),
        (STALE_S + 5, "gone"),
        (-STALE_S - 5, "gone"),  # a file server whose clock is ahead
    ],
)
def test_state_by_age(tmp_path: Path, age_s: float, state: str) -> None:
    written_by_another(tmp_path, "a", age_s)
    mine = Claims(tmp_path, NOBODY)
    assert mine.state("a") == state and mine.take("a") == (state == "gone")


def test_torn_claims_count_by_age(tmp_path: Path) -> None:
    for text in ("", "[1]", "{"):
        written_by_another(tmp_path, "a").write_text(text)
        assert Claims(tmp_path, NOBODY).state("a") == "alive"


def test_a_dead_process_of_this_host_is_not_waited_for(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    written_by_another(tmp_path, "a", host=socket.gethostname(), pid=process.pid, pid_start=1)
    assert Claims(tmp_path, NOBODY).state("a") == "gone"
    written_by_another(tmp_path, "b", host=socket.gethostname(), pid=os.getpid(), pid_start=1)
    assert Claims(tmp_path, NOBODY).state("b") == "gone", "the number is ours, the process was another"


def test_an_earlier_start_of_the_own_job_is_not_waited_for(tmp_path: Path) -> None:
    written_by_another(tmp_path, "a", job_id="7_1", restart_count=0)
    assert Claims(tmp_path, Job("7_1", 1)).state("a") == "gone"
    assert Claims(tmp_path, Job("7_1", 0)).state("a") == "alive"
    assert Claims(tmp_path, Job("7_2", 1)).state("a") == "alive"


def test_work_keeps_a_claim_fresh(tmp_path: Path) -> None:
    mine = Claims(tmp_path / "c", NOBODY)
    mine.touch()  # without a claim: nothing
    assert mine.take("a")
    path = tmp_path / "c" / "a.claim"
    os.utime(path, (1, 1))
    with clock.use(clock.FakeClock(time.time())) as fake:
        mine._touched = fake.monotonic()
        mine.touch()
        assert path.stat().st_mtime == 1
        fake.sleep(TOUCH_S)
        mine.touch()
        assert path.stat().st_mtime > 1
        path.unlink()
        fake.sleep(TOUCH_S)
        mine.touch()  # somebody took it for stale: no error
    mine.release()


def work(folder: Path, units: list[str], done: list[str], job: Job = NOBODY) -> list[str]:
    mine = []
    for unit in units_in_turn(units, Claims(folder, job), lambda name: name in done, lambda: None):
        mine.append(unit)
        done.append(unit)
    return mine


def test_units_in_their_order_each_once(tmp_path: Path) -> None:
    done = ["c"]
    assert work(tmp_path / "c", ["a", "b", "c", "d"], done) == ["a", "b", "d"]
    assert work(tmp_path / "c", ["a", "b", "c", "d"], done) == []
    assert not list((tmp_path / "c").iterdir())


def test_units_in_hand_elsewhere_are_left_to_their_owner(tmp_path: Path) -> None:
    written_by_another(tmp_path, "b")
    assert work(tmp_path, ["a", "b", "c"], []) == ["a", "c"]


def test_an_owner_that_may_be_dead_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not touched for a while: either it commits, or its claim becomes stale and the unit is ours."""
    for ending in ("stale", "committed"):
        folder, done, waits = tmp_path / ending, [], []
        written_by_another(folder, "b", FRESH_S + 5)

        def sleep(
            _: float, folder: Path = folder, done: list = done, waits: list = waits, ending: str = ending
        ) -> None:
            waits.append(1)
            if len(waits) == 3 and ending == "committed":
                done.append("b")
            elif len(waits) == 3:
                written_by_another(folder, "b", STALE_S + 5)

        monkeypatch.setattr(claims_module.clock, "sleep", sleep)
        assert work(folder, ["a", "b"], done) == (["a", "b"] if ending == "stale" else ["a"])
        assert len(waits) == 3


def test_a_claim_is_given_up_when_the_work_is_left(tmp_path: Path) -> None:
    turns = units_in_turn(["a", "b"], Claims(tmp_path / "c", NOBODY), lambda name: False, lambda: None)
    assert next(turns) == "a" and (tmp_path / "c" / "a.claim").exists()
    turns.close()
    assert not (tmp_path / "c" / "a.claim").exists()
