"""The goodput receipt: sums, and what is booked where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_gen.runtime.goodput import CATEGORIES, Goodput, receipt, receipt_of
from hpc_gen.runtime.journal import Event, journal_path
from hpc_gen.runtime.run_folder import RunFolder


def start(t: float, process_start: float, resumed_from: int | None, world_size: int = 1) -> dict[str, object]:
    fields = {"process_start": process_start, "resumed_from": resumed_from, "world_size": world_size}
    return {"t": t, "kind": "attempt_start", **fields}


def interval(
    t: float, images_seen: int, productive: float, data: float = 0, save: float = 0, other: float = 0
) -> dict[str, object]:
    seconds = {"productive_s": productive, "data_wait_s": data, "save_stall_s": save, "other_s": other}
    return {"t": t, "kind": "interval", "images_seen": images_seen, "images": 100, **seconds}


def end(t: float, code: int = 0) -> dict[str, object]:
    return {"t": t, "kind": "attempt_end", "exit_code": code}


def events(attempt: int, *lines: dict[str, object], task: int = 0, stage: str = "train") -> list[Event]:
    rest = [{k: v for k, v in line.items() if k not in ("t", "kind")} for line in lines]
    return [Event(attempt, stage, task, float(x["t"]), str(x["kind"]), f) for x, f in zip(lines, rest)]  # type: ignore[arg-type]


def seconds(found: Goodput) -> dict[str, float]:
    return {name: value for name, value in found.seconds.items() if value}


def test_one_attempt_is_booked_to_the_second() -> None:
    found = receipt_of(
        events(
            1,
            start(5.0, 0.0, None),
            interval(20.0, 100, 8.0, 1.0, 0.5, 2.5),
            interval(30.0, 200, 9.0, 1.0),
            end(33.0),
        )
    )
    # 0 ... 8 start-up, then 12 + 10 seconds of intervals, then 3 seconds nobody tells of.
    assert seconds(found) == pytest.approx(
        {
            "start_up": 8.0,
            "productive": 17.0,
            "data_wait": 2.0,
            "save_stall": 0.5,
            "idle": 2.5,
            "unknown": 3.0,
        }
    )
    assert found.total_s == 33.0 and found.goodput == pytest.approx(17 / 33) and found.ettr == found.goodput
    assert found.elapsed_s == 33.0 and found.waiting_s == 0.0


def test_work_above_the_resume_point_is_redone() -> None:
    first = events(1, start(0.0, 0.0, None), *(interval(10.0 * i, 100 * i, 10.0) for i in range(1, 6)))
    assert seconds(receipt_of(first)) == {"productive": 50.0}  # nobody has resumed yet
    second = events(2, start(101.0, 100.0, 300), *(interval(101.0 + 10 * i, 300 + 100 * i, 10.0) for i in range(1, 3)))
    found = receipt_of(first + second)
    assert seconds(found) == {"productive": 50.0, "redone": 20.0, "start_up": 1.0}
    assert found.waiting_s == 50.0 and found.elapsed_s == 121.0 and found.ettr == pytest.approx(50 / 121)
    # A fall-back below a resume point that was good: what both attempts did above it is redone.
    third = events(3, start(200.0, 200.0, 250))
    assert seconds(receipt_of(first + second + third)) == {
        "productive": 25.0,
        "redone": 45.0,
        "start_up": 1.0,
    }
    # A fresh start undoes all.
    fresh = events(3, start(200.0, 200.0, None))
    assert seconds(receipt_of(first + second + fresh)) == {"redone": 70.0, "start_up": 1.0}


def test_rollback_books_what_it_undid_as_redone() -> None:
    rollback = {"t": 30.0, "kind": "rollback", "resumed_from": 150}
    lines = [interval(10.0, 100, 10.0), interval(20.0, 200, 10.0), interval(30.0, 300, 10.0)]
    found = receipt_of(events(1, start(0.0, 0.0, None), *lines, rollback, interval(40.0, 250, 10.0), end(40.0)))
    assert seconds(found) == {"productive": 25.0, "redone": 15.0}


def test_units() -> None:
    def unit(t: float, kind: str, name: str, took: float = 0.0) -> dict[str, object]:
        return {"t": t, "kind": kind, "unit": name, **({"seconds": took} if took else {})}

    first = events(
        1,
        start(1.0, 0.0, None),
        unit(2.0, "unit_begin", "a"),
        unit(6.0, "unit_committed", "a", 4.0),
        unit(6.0, "unit_begin", "b"),
        {"t": 9.0, "kind": "heartbeat"},
        stage="sample",
    )
    second = events(1, start(1.0, 0.0, None), {"t": 3.0, "kind": "attempt_end"}, task=1, stage="sample")
    found = receipt_of(first + second)
    # Task 0: 2 s start-up, unit a, 3 s of unit b lost. Task 1 found nothing to do, 6 s before the end.
    assert seconds(found) == {"start_up": 3.0, "productive": 4.0, "redone": 3.0, "idle": 6.0, "unknown": 2.0}
    assert found.attempts[0].world_size == 2 and found.total_s == 18.0


def test_ranks_without_a_journal_count_like_the_others() -> None:
    found = receipt_of(events(1, start(1.0, 0.0, None, world_size=4), interval(11.0, 100, 10.0), end(12.0)))
    assert seconds(found) == {"productive": 40.0, "start_up": 4.0, "unknown": 4.0}


def test_a_rank_that_died_early_is_idle() -> None:
    mine = events(1, start(0.0, 0.0, None, 2), interval(10.0, 100, 10.0), end(30.0))
    dead = events(1, start(0.0, 0.0, None, 2), interval(10.0, 100, 10.0), task=1)
    assert seconds(receipt_of(mine + dead)) == {"productive": 20.0, "unknown": 20.0, "idle": 20.0}


def test_nothing_and_an_attempt_that_never_got_ready() -> None:
    nothing = receipt_of([])
    assert nothing.total_s == 0.0 and set(nothing.fractions) == set(CATEGORIES) and nothing.ettr == 0.0
    early = receipt_of(events(1, start(3.0, 0.0, None), {"t": 10.0, "kind": "fault"}))
    assert seconds(early) == {"start_up": 3.0, "unknown": 7.0}


def test_from_the_files_of_a_run_and_by_stage(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for attempt, stage in ((1, "encode"), (2, "train")):
        path = journal_path(run, attempt, stage, 0)
        path.parent.mkdir(exist_ok=True)
        lines = [start(attempt, attempt, None), interval(attempt + 4.0, 100, 4.0)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert seconds(receipt(run)) == {"productive": 8.0}
    assert [a.stage for a in receipt(run, stage="train").attempts] == ["train"]


durations = st.floats(0.0, 1e4, allow_nan=False) | st.sampled_from(["nan", "inf"])


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 3),  # attempt
            st.integers(0, 2),  # task
            st.floats(0.0, 1e6),  # t
            st.sampled_from(
                [
                    "attempt_start",
                    "interval",
                    "rollback",
                    "unit_begin",
                    "unit_committed",
                    "attempt_end",
                    "row",
                ]
            ),
            durations,
            durations,
            st.integers(0, 1000) | st.none(),
        ),
        min_size=1,
        max_size=30,
    )
)
def test_fractions_sum_to_one_whatever_the_journal_holds(lines: list[tuple]) -> None:  # type: ignore[type-arg]
    found = []
    for attempt, task, t, kind, some, other, images in sorted(lines, key=lambda line: line[:3]):
        fields = {"productive_s": some, "data_wait_s": other, "seconds": some, "process_start": t - 1.0,
                  "unit": "u", "images_seen": images, "images": 10, "resumed_from": images, "world_size": 2}  # fmt: skip
        found.append(Event(attempt, "train", task, t, kind, fields))
    result = receipt_of(found)
    assert all(value >= 0.0 for value in result.seconds.values())
    if result.total_s > 0:
        assert sum(result.fractions.values()) == pytest.approx(1.0)
    # Nothing is left out: at least the rank that began first is booked for the whole of each attempt.
    for attempt in result.attempts:
        assert sum(attempt.seconds.values()) >= attempt.wall_s * (1 - 1e-9)
