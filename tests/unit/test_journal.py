"""The journal: lines that survive kills, merging over processes, and the history over resumes."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_gen.runtime.errors import ExitCode
from hpc_gen.runtime.fence import claim_attempt
from hpc_gen.runtime.journal import (
    Journal,
    Reader,
    Row,
    attempts,
    attempts_of,
    ends,
    history,
    journal_path,
    last_attempt,
    read,
)
from hpc_gen.runtime.run_folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def write_lines(run: RunFolder, attempt: int, stage: str, task: int, *lines: dict[str, object]) -> Path:
    path = journal_path(run, attempt, stage, task)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in lines)
    return path


def start(t: float, resumed_from: int | None = None, **fields: object) -> dict[str, object]:
    return {
        "t": t,
        "kind": "attempt_start",
        "world_size": 2,
        "host": "node1",
        "resumed_from": resumed_from,
        **fields,
    }


def row(t: float, images_seen: int, **data: float) -> dict[str, object]:
    return {"t": t, "kind": "row", "images_seen": images_seen, "data": data or {"loss": float(images_seen)}}


def test_what_is_written_is_read(run: RunFolder) -> None:
    journal = Journal(run, 3, "train", task=1)
    journal.event("save_begin", images_seen=128, path=Path("/a/b"), code=ExitCode.REQUEUE, odd={1}, none=None)
    journal.event("interval", loss=float("nan"), parts=[1.5, float("-inf")], deep={"x": float("inf")})
    journal.close()
    events = read(run)
    assert [(e.attempt, e.stage, e.task, e.kind) for e in events] == [
        (3, "train", 1, "save_begin"),
        (3, "train", 1, "interval"),
    ]
    assert events[0].fields == {"images_seen": 128, "path": "/a/b", "code": 85, "odd": "{1}", "none": None}
    assert events[1].fields == {"loss": "nan", "parts": [1.5, "-inf"], "deep": {"x": "inf"}}
    assert events[0].t <= events[1].t and events.torn == 0
    assert [line["kind"] for line in map(json.loads, journal.path.read_text().splitlines())] == [
        "save_begin",
        "interval",
    ]


def test_scalars_of_numpy(run: RunFolder) -> None:
    import numpy as np

    journal = Journal(run, 1, "train")
    journal.event("interval", count=np.int64(3), loss=np.float32(0.5), bad=np.float64("nan"))
    journal.row(64, {"loss": np.float32(0.25)})
    assert read(run)[0].fields == {"count": 3, "loss": 0.5, "bad": "nan"}
    assert history(run)[0].data == {"loss": 0.25}


def test_torn_lines_are_skipped_and_counted(run: RunFolder) -> None:
    path = write_lines(run, 1, "train", 0, start(1.0), row(2.0, 64))
    with open(path, "ab") as stream:
        stream.write(b'{"t": 3.0, "kind": "row", "images_se')
    write_lines(run, 1, "train", 1, start(1.0)).write_bytes(b'\xff\xfe\n[1]\n{"t": 1.0}\n\n{"t": 4.0, "kind": "x"}\n')
    events = read(run)
    assert [(e.task, e.kind) for e in events] == [(0, "attempt_start"), (0, "row"), (1, "x")]
    assert events.torn == 4
    assert len(history(run)) == 1


def test_a_journal_opened_again_ends_the_torn_line_first(run: RunFolder) -> None:
    path = write_lines(run, 1, "train", 0, start(1.0))
    with open(path, "ab") as stream:
        stream.write(b'{"t": 2.0, "kind": "ro')
    journal = Journal(run, 1, "train")
    journal.row(64, {"loss": 1.0})
    journal.close()
    events = read(run)
    assert [e.kind for e in events] == ["attempt_start", "row"] and events.torn == 1


def test_a_killed_writer_costs_at_most_one_line(run: RunFolder) -> None:
    code = f"""
from hpc_gen.runtime.journal import Journal
from hpc_gen.runtime.run_folder import RunFolder
journal = Journal(RunFolder({str(run.path)!r}), 1, "train")
for i in range(10**9):
    journal.event("tick", i=i, filler="x" * 5000)
    if i == 20: print("going", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"going\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    events = read(run)
    assert [e.fields["i"] for e in events] == list(range(len(events))) and len(events) > 20 and events.torn <= 1


def test_lines_of_threads_stay_whole(run: RunFolder) -> None:
    journal = Journal(run, 1, "train")

    def write(name: int) -> None:
        for i in range(200):
            journal.event("tick", name=name, i=i)

    threads = [threading.Thread(target=write, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = read(run)
    assert len(events) == 800 and events.torn == 0
    for name in range(4):
        assert [e.fields["i"] for e in events if e.fields["name"] == name] == list(range(200))


def test_write_errors_never_stop_the_work(run: RunFolder, capfd: pytest.CaptureFixture[str]) -> None:
    run.path.mkdir()
    run.journal.write_text("a file where the folder should be")
    journal = Journal(run, 1, "train")
    journal.event("save_begin", images_seen=0)
    journal.row(64, {"loss": 1.0})
    journal.sync()
    assert journal.failed_writes == 2
    run.journal.unlink()
    journal.event("later")  # the disk is back
    journal.close()
    journal.close()
    assert [e.kind for e in read(run)] == ["later"]
    said = capfd.readouterr().err
    assert said.count("2 writes") == 1 and str(journal.path) in said


def test_rows_are_durable_before_a_save_begins(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(run, 1, "train")
    journal.row(64, {"loss": 1.0})
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(journal.path.stat().st_size))
    journal.row(128, {"loss": 1.0})
    assert synced == []
    journal.event("save_begin", images_seen=128)
    journal.event("attempt_end", exit_code=0)
    sizes = [len(line) + 1 for line in journal.path.read_bytes().splitlines()]
    assert synced == [sum(sizes[:3]), sum(sizes)]


def test_events_are_ordered_by_attempt_and_time_and_keep_the_order_of_a_file(run: RunFolder) -> None:
    write_lines(run, 2, "train", 0, {"t": 1.0, "kind": "late attempt, slow clock"})
    clock_set_back = [{"t": 5.0, "kind": "a"}, {"t": 3.0, "kind": "b"}, {"t": 6.0, "kind": "d"}]
    write_lines(run, 1, "train", 0, *clock_set_back)
    write_lines(run, 1, "train", 1, {"t": 5.5, "kind": "c"}, {"t": 7.0, "kind": "e"})
    assert [e.kind for e in read(run)] == ["a", "b", "c", "d", "e", "late attempt, slow clock"]


def test_a_reader_reads_only_what_is_new(run: RunFolder) -> None:
    reader = Reader(run, stage="train", task=0)
    assert list(reader.events()) == []
    path = write_lines(run, 1, "train", 0, start(1.0), row(2.0, 64))
    write_lines(run, 1, "train", 1, row(2.0, 999))
    write_lines(run, 1, "sample", 0, row(2.0, 998))
    assert len(reader.events()) == 2
    with open(path, "ab") as stream:
        stream.write(b'{"t": 3.0, "kind": "row", "images_seen": 128,')
    events = reader.events()
    assert len(events) == 2 and events.torn == 1
    with open(path, "ab") as stream:
        stream.write(b' "data": {}}\n')
    write_lines(run, 2, "train", 0, start(4.0, 128))
    events = reader.events()
    assert [e.kind for e in events] == ["attempt_start", "row", "row", "attempt_start"] and events.torn == 0


def test_the_ends_of_a_long_file_tell_of_its_attempt(run: RunFolder) -> None:
    middle = [row(float(i), 64 * i) for i in range(2, 3000)]
    path = write_lines(run, 1, "train", 0, start(1.0), *middle, {"t": 3000.0, "kind": "attempt_end", "exit_code": 85})
    write_lines(run, 1, "train", 1, start(1.5), {"t": 3500.0, "kind": "x"})
    write_lines(run, 2, "train", 0, start(4000.0, 64))
    found = ends(run)
    assert len(found) < 500 < len(read(run)) and found.torn == 0
    assert attempts(run) == attempts_of(read(run)) and attempts(run)[0].exit_code == 85
    assert last_attempt(run) == attempts(run)[-1] and attempts(run)[0].last_seen == 3500.0
    with open(path, "ab") as stream:
        stream.write(b'{"t": 1')
    assert attempts(run) == attempts_of(read(run))
    # whose ends do not tell is read whole
    path.write_text("".join(json.dumps({"t": 1.0, "kind": "x", "text": "y" * 99}) + "\n" for _ in range(400)))
    assert len(ends(run, 1)) == 402
    path.write_text(json.dumps(start(1.0)) + "\n" + json.dumps({"t": 2.0, "kind": "x", "text": "y" * 50_000}) + "\n")
    assert [e.kind for e in ends(run, 1) if e.task == 0] == ["attempt_start", "x"]


def test_torn_lines_between_thousands_are_found_and_pieces_that_fit_are_not_joined(run: RunFolder) -> None:
    lines = [json.dumps(row(float(i), i)) for i in range(1, 2001)]
    lines[700] = lines[700][:30]
    lines[1500:1502] = ['{"t": 1, "kind": "x", "list": [1', "2]}"]
    path = write_lines(run, 1, "train", 0)
    path.write_text("\n".join(lines) + "\n")
    events = read(run)
    assert events.torn == 3 and len(events) == 1997 and {e.kind for e in events} == {"row"}


def test_last_attempt_that_was_killed_before_its_first_line(run: RunFolder) -> None:
    assert last_attempt(run) is None
    write_lines(run, claim_attempt(run, "train"), "train", 0, start(1.0))
    claim_attempt(run, "sample")
    found = last_attempt(run)
    assert found is not None and (found.number, found.stage, found.exit_code) == (2, "sample", None)


def test_no_journal_at_all(run: RunFolder) -> None:
    assert list(read(run)) == [] and attempts(run) == [] and history(run) == []


# ---------------------------------------------------------------- attempts


def test_attempts_over_kills_and_stages(run: RunFolder) -> None:
    write_lines(
        run,
        1,
        "encode",
        0,
        start(10.0, process_start=8.0, world_size=1),
        {"t": 12.0, "kind": "attempt_end", "exit_code": 0, "cause": None},
    )
    write_lines(run, 2, "train", 1, start(21.0, process_start=19.5, host="node2"), {"t": 29.0, "kind": "heartbeat"})
    write_lines(run, 2, "train", 0, start(21.0, process_start=20.0), row(25.0, 64))
    end = {"t": 50.0, "kind": "attempt_end", "exit_code": 85, "cause": "PREEMPTED", "images_seen": 128}
    write_lines(run, 3, "train", 0, start(41.0, 64, process_start=40.0), end)
    (run.journal / "0003.attempt").write_text(
        json.dumps({"stage": "train", "time": 39.0, "world_size": 2, "host": "n"})
    )
    (run.journal / "0004.attempt").write_text(
        json.dumps({"stage": "train", "time": 60.0, "world_size": 4, "host": "n4"})
    )
    (run.journal / "0005.attempt").write_text("{")
    first, second, third, fourth = attempts(run)
    assert (first.number, first.stage, first.start, first.end, first.exit_code, first.world_size) == (
        1,
        "encode",
        8.0,
        12.0,
        0,
        1,
    )
    assert (second.start, second.end, second.last_seen, second.exit_code, second.cause) == (
        19.5,
        None,
        29.0,
        None,
        None,
    )
    assert (second.host, second.resumed_from, second.world_size) == (
        "node1",
        None,
        2,
    )  # rank 0 speaks for all
    assert (third.start, third.end, third.cause, third.resumed_from) == (39.0, 50.0, "PREEMPTED", 64)
    assert (fourth.number, fourth.start, fourth.last_seen, fourth.end, fourth.world_size, fourth.host) == (
        4,
        60.0,
        60.0,
        None,
        4,
        "n4",
    )


# ---------------------------------------------------------------- history


def seen(rows: list[Row]) -> list[tuple[int, int]]:
    return [(row.images_seen, row.attempt) for row in rows]


def test_undone_rows_vanish(run: RunFolder) -> None:
    write_lines(run, 1, "train", 0, start(1.0), *(row(2.0, n) for n in (64, 128, 192, 256)))
    assert seen(history(run)) == [(64, 1), (128, 1), (192, 1), (256, 1)]
    write_lines(run, 2, "train", 0, start(3.0, 128))
    assert seen(history(run)) == [(64, 1), (128, 1)]
    write_lines(run, 2, "train", 0, *(row(4.0, n) for n in (192, 256, 320)))
    write_lines(run, 3, "train", 0, start(5.0, 256), row(6.0, 320))
    # What a zombie of the first attempt still writes does not count.
    write_lines(run, 1, "train", 0, row(7.0, 320))
    assert seen(history(run)) == [(64, 1), (128, 1), (192, 2), (256, 2), (320, 3)]
    assert seen(history(run, upto=256)) == [(64, 1), (128, 1), (192, 2), (256, 2)]


def test_a_fresh_start_undoes_all(run: RunFolder) -> None:
    write_lines(run, 1, "train", 0, start(1.0), row(2.0, 0), row(2.0, 64))
    write_lines(run, 2, "train", 0, start(3.0, None), row(4.0, 64))
    assert seen(history(run)) == [(64, 2)]


def test_a_resume_from_zero_keeps_the_row_at_zero(run: RunFolder) -> None:
    write_lines(run, 1, "train", 0, start(1.0), row(2.0, 0), row(2.0, 64))
    write_lines(run, 2, "train", 0, start(3.0, 0))
    assert seen(history(run)) == [(0, 1)]


def test_fall_back_to_an_older_checkpoint(run: RunFolder) -> None:
    write_lines(run, 1, "train", 0, start(1.0), *(row(2.0, n) for n in (64, 128, 192)))
    write_lines(run, 2, "train", 0, start(3.0, 192), row(4.0, 256))
    write_lines(run, 3, "train", 0, start(5.0, 64), row(6.0, 128))
    assert seen(history(run)) == [(64, 1), (128, 3)]


def test_rollback_inside_an_attempt(run: RunFolder) -> None:
    rollback = {"t": 3.0, "kind": "rollback", "images_seen": 192, "resumed_from": 64}
    write_lines(run, 1, "train", 0, start(1.0), row(2.0, 64), row(2.0, 128), row(2.0, 192), rollback, row(4.0, 128))
    assert [(r.images_seen, r.t) for r in history(run)] == [(64, 2.0), (128, 4.0)]


def test_rows_at_one_place_are_merged(run: RunFolder) -> None:
    write_lines(run, 1, "train", 0, start(1.0), row(2.0, 64, loss=1.0, lr=0.5), row(3.0, 64, validation=2.0))
    assert history(run) == [Row(64, 2.0, {"loss": 1.0, "lr": 0.5, "validation": 2.0}, 1)]


def test_a_lost_start_line_makes_no_duplicates(run: RunFolder) -> None:
    write_lines(run, 1, "train", 0, start(1.0), *(row(2.0, n) for n in (64, 128, 192)))
    write_lines(run, 2, "train", 0, row(4.0, 128), row(4.0, 192))
    assert seen(history(run)) == [(64, 1), (128, 2), (192, 2)]


def test_numbers_that_json_does_not_know_come_back(run: RunFolder) -> None:
    journal = Journal(run, 1, "train")
    journal.row(64, {"nan": float("nan"), "inf": float("inf"), "low": float("-inf")})
    data = history(run)[0].data
    assert math.isnan(data["nan"]) and data["inf"] == math.inf and data["low"] == -math.inf


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6), st.integers(0, 3)), min_size=1, max_size=8),
    st.integers(1, 4),
)
def test_any_series_of_kills_leaves_one_history(
    tmp_path_factory: pytest.TempPathFactory, series: list[tuple[int, int, int]], save_every: int
) -> None:
    """Attempts of any length; checkpoints every `save_every` rows, the newest lost now and then."""
    run = RunFolder(tmp_path_factory.mktemp("series"))
    checkpoints: list[int] = []
    position = 0
    for number, (length, torn, lost) in enumerate(series, start=1):
        checkpoints = checkpoints[: max(0, len(checkpoints) - (lost if lost > 1 else 0))]
        position = checkpoints[-1] if checkpoints else 0
        resumed = checkpoints[-1] if checkpoints else None
        path = write_lines(run, number, "train", 0, start(number, resumed))
        for step in range(position + 1, position + length + 1):
            write_lines(run, number, "train", 0, row(number + step / 1000, step, attempt=number))
            if step % save_every == 0:
                checkpoints.append(step)
            position = step
        if torn:
            with open(path, "ab") as stream:
                stream.write(json.dumps(row(0.0, position + 1)).encode()[:torn])
    rows = history(run)
    assert [r.images_seen for r in rows] == list(range(1, position + 1))  # no duplicates, no holes
    assert [r.attempt for r in rows] == sorted(r.attempt for r in rows)
    assert all(r.data["attempt"] == r.attempt for r in rows)
