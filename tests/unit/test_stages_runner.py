"""Run folders, the plan of a run, the ledger, and how a task takes its share of a stage's units."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from experiments import LINEAR, TINY, Workspace, leftovers, resolved

from hpc_gen.config.loader import Resolved, loads
from hpc_gen.runtime import commit, journal
from hpc_gen.runtime.errors import DataError, ExitCode, UserError
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import run_setup, runner
from hpc_gen.stages.units import Ledger, StageContext, Unit

SAMPLED = TINY + "sample: {num_images: 8, block_images: 4, batch: 4}\n"
COUNTED = LINEAR + "extra_stages: {count: {worker: 'counting_worker:make', options: {units: 7}, tasks: 3}}\n"


@pytest.fixture(autouse=True)
def no_copy_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy is a hundred fsyncs; one test below makes it."""
    monkeypatch.setattr(run_setup, "PACKAGES", ("slurm",))


# --- the plan


def test_the_plan_says_what_would_happen_and_changes_nothing(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "runs" / "tiny")
    found = resolved("train.ranks=2", "train.threads=3", "sample.tasks=4", text=SAMPLED)
    assert runner.plan(run, found) == [
        f"run folder  {run.path} (new)",
        f"identity    {found.identity}",
        "stage       train: 2 ranks, 3 threads each",
        "stage       sample: 4 tasks, 1 thread each",
        "stage       report: 1 task, 1 thread each",
    ]
    assert runner.plan(run, found, ["sample"])[2:] == ["stage       sample: 4 tasks, 1 thread each"]
    assert list(tmp_path.iterdir()) == []


def test_the_plan_knows_extra_stages_and_existing_runs(tmp_path: Path) -> None:
    found = resolved(text=COUNTED)
    run = run_setup.prepare_run(found, tmp_path)
    lines = runner.plan(run, found)
    assert lines[0] == f"run folder  {run.path}"
    assert "stage       count: 3 tasks, 1 thread each" in lines


@pytest.mark.parametrize(
    ("name", "hint"), [("trian", " (did you mean 'train'?)"), ("evaluate", ""), ("smaple", " (did you mean 'sample'?)")]
)
def test_an_unknown_stage_names_the_nearest(tmp_path: Path, name: str, hint: str) -> None:
    found = resolved(text=SAMPLED)
    run = run_setup.prepare_run(found, tmp_path)
    expected = f"experiment 'tiny' has no stage '{name}'{hint}; it has: train, sample, report"
    for attempt in (
        lambda: runner.plan(run, found, [name]),
        lambda: runner.run_stages(run, ["train", name], print),  # before any stage starts
    ):
        with pytest.raises(UserError) as info:
            attempt()
        assert str(info.value) == expected
    assert list(run.journal.iterdir()) == []


# --- run folders


def test_a_new_run_folder_is_whole(tmp_path: Path) -> None:
    run = run_setup.prepare_run(loads(SAMPLED), tmp_path, name="mine")
    assert run.path == tmp_path / "runs" / "mine"
    assert run_setup.load_run(run).identity == resolved(text=SAMPLED).identity  # defaults of the method filled in
    assert json.loads(run.hashes_path.read_text())["identity"] == resolved(text=SAMPLED).identity
    assert run.journal.is_dir() and run.logs.is_dir()
    assert leftovers(run) == [] and [p.name for p in run.path.parent.iterdir()] == ["mine"]


def test_the_code_is_frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source" / "package"
    (source / "__pycache__").mkdir(parents=True)
    (source / "data").mkdir()
    for name in ("a.py", "data/table.txt", "__pycache__/a.cpython-311.pyc", "built.so"):
        (source / name).write_text(name)
    monkeypatch.setattr(run_setup, "_SOURCE", tmp_path / "source")
    monkeypatch.setattr(run_setup, "PACKAGES", ("package", "absent"))
    run = run_setup.prepare_run(loads(TINY), tmp_path)
    (source / "a.py").write_text("edited later")
    copied = {p.relative_to(run.code).as_posix(): p.read_text() for p in run.code.rglob("*") if p.is_file()}
    assert copied == {"package/a.py": "a.py", "package/data/table.txt": "data/table.txt"}


def test_the_same_experiment_goes_on(tmp_path: Path) -> None:
    run = run_setup.prepare_run(loads(SAMPLED), tmp_path)
    (run.journal / "kept").write_text("x")
    before = run.config_path.stat().st_ino
    assert run_setup.prepare_run(loads(SAMPLED), tmp_path).path == run.path
    assert (run.journal / "kept").exists()
    assert run.config_path.stat().st_ino == before  # not even rewritten


@pytest.mark.parametrize(
    ("override", "change"),
    [
        ("method.hidden=32", "method.hidden (16 -> 32)"),
        ("seed=8", "seed (7 -> 8)"),
        ("train.optimizer.lr=0.1", "train.optimizer.lr (0.001 -> 0.1)"),
        ("train.ema={other: {decay: 0.5}}", "train.ema."),
        ("data.shuffle_shards=3", "data.shuffle_shards (2 -> 3)"),
        ("train.threads=2", "train.threads (1 -> 2)"),
    ],
)
def test_other_weights_are_refused_naming_the_key(tmp_path: Path, override: str, change: str) -> None:
    run = run_setup.prepare_run(loads(TINY), tmp_path)
    (run.checkpoints / "16").mkdir(parents=True)
    before = run.config_path.read_bytes(), run.hashes_path.read_bytes()
    with pytest.raises(UserError, match="run 'tiny' was made with other settings") as info:
        run_setup.prepare_run(loads(TINY, [override]), tmp_path)
    assert change in str(info.value) and "choose another name" in str(info.value)
    assert (run.config_path.read_bytes(), run.hashes_path.read_bytes()) == before


CHANGES = [
    ("train.save_every=32", False),
    ("train.stop_at_images=48", False),
    ("train.ranks=2", False),
    ("data.prefetch=1", False),
    ("sample.num_images=16", True),
    ("sample.settings={steps: 10}", True),
]


@pytest.mark.parametrize(("override", "other_identity"), CHANGES)
def test_operation_and_sampling_are_taken_over(tmp_path: Path, override: str, other_identity: bool) -> None:
    run = run_setup.prepare_run(loads(SAMPLED), tmp_path)
    before = run_setup.load_run(run)
    run_setup.prepare_run(loads(SAMPLED, [override]), tmp_path)
    now = run_setup.load_run(run)
    assert (now.identity, now.operation) == (
        resolved(override, text=SAMPLED).identity,
        resolved(override, text=SAMPLED).operation,
    )
    assert (now.identity != before.identity) == other_identity
    assert (now.operation != before.operation) == (not other_identity)
    assert leftovers(run) == []


def test_a_kill_between_the_two_files_leaves_a_run_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """config.yaml and hashes.json cannot change at once; die after each write in turn."""

    class Killed(BaseException):
        pass

    wanted = loads(SAMPLED, ["sample.num_images=16"])
    writes = 0
    for die_at in range(1, 10):
        run = run_setup.prepare_run(loads(SAMPLED), tmp_path, name=f"run{die_at}")
        calls = 0

        def die_after(write: Callable[..., None], die_at: int = die_at) -> Callable[..., None]:
            def wrapped(*args: object) -> None:
                nonlocal calls
                write(*args)
                calls += 1
                if calls == die_at:
                    raise Killed

            return wrapped

        with monkeypatch.context() as patch:
            patch.setattr(commit, "write_text", die_after(commit.write_text))
            patch.setattr(commit, "write_json", die_after(commit.write_json))
            try:
                run_setup.prepare_run(wanted, tmp_path, name=f"run{die_at}")
            except Killed:
                writes += 1
            else:
                break
        run_setup.load_run(run)  # is not taken for one that was edited
        run_setup.prepare_run(wanted, tmp_path, name=f"run{die_at}")
        experiment = run_setup.load_run(run).experiment
        assert experiment.sample is not None and experiment.sample.num_images == 16
    assert writes >= 2


def test_an_edited_config_is_refused(tmp_path: Path) -> None:
    run = run_setup.prepare_run(loads(TINY), tmp_path)
    text = run.config_path.read_text()
    assert "hidden: 16" in text
    run.config_path.write_text(text.replace("hidden: 16", "hidden: 32"))
    for attempt in (lambda: run_setup.load_run(run), lambda: run_setup.prepare_run(loads(TINY), tmp_path)):
        with pytest.raises(DataError, match=r"config.yaml no longer has the identity of hashes.json.*undo the edit"):
            attempt()
    run.config_path.write_text(text.replace("save_every: 16", "save_every: 32"))  # operation: the user's own affair
    experiment = run_setup.load_run(run).experiment
    assert experiment.train is not None and experiment.train.save_every == 32


@pytest.mark.parametrize("content", [None, "{", "\udcff"])
def test_unreadable_hashes_are_refused(tmp_path: Path, content: str | None) -> None:
    run = run_setup.prepare_run(loads(TINY), tmp_path)
    if content is None:
        run.hashes_path.unlink()
    else:
        run.hashes_path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match="hashes.json cannot be read .*restore it"):
        run_setup.load_run(run)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        run_setup.load_run(RunFolder(tmp_path))


# --- the ledger

A, B = Unit("a", 0), Unit("b", 1)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """A ledger with unit A committed: one file of three bytes, fingerprint "f"."""
    found = Ledger(tmp_path / "ledger", tmp_path)
    commit.make_folder(tmp_path / "staging")
    commit.write_bytes(tmp_path / "staging" / "a.bin", b"abc")
    commit.make_folder(found.folder)
    commit.make_folder(tmp_path / "out")
    assert found.commit(A, {str(tmp_path / "out" / "a.bin"): tmp_path / "staging" / "a.bin"}, "f") == 3
    return found


def test_what_is_committed_is_not_missing(ledger: Ledger, tmp_path: Path) -> None:
    assert ledger.missing([A, B], "f") == [B]
    assert (tmp_path / "out" / "a.bin").read_bytes() == b"abc"
    record = ledger.record_of("a")
    assert record is not None and list(record["files"]) == ["out/a.bin"]  # relative: the run can be moved
    assert ledger.record_of("b") is None


def test_another_fingerprint_makes_it_missing(ledger: Ledger) -> None:
    assert ledger.missing([A], "g") == [A]


@pytest.mark.parametrize("content", [b"ab", b"abcd", None])
def test_a_truncated_or_lost_file_makes_it_missing(ledger: Ledger, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "out" / "a.bin"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert ledger.missing([A], "f") == [A]


def test_a_moved_root_keeps_its_units(ledger: Ledger, tmp_path: Path) -> None:
    copy = tmp_path.parent / f"{tmp_path.name}-moved"
    shutil.copytree(tmp_path, copy)
    shutil.rmtree(tmp_path / "out")
    assert Ledger(copy / "ledger", copy).missing([A], "f") == []


def test_a_moved_workspace_keeps_the_units_of_its_tables(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    staged = here / "staged.bin"
    staged.parent.mkdir()
    staged.write_bytes(b"row" * 9)
    shard = here / "tables/t/shard.pt"
    Ledger(here / "runs/r/ledger", here / "runs/r").commit(A, {str(shard): staged}, "f")
    here.rename(there)
    moved = Ledger(there / "runs/r/ledger", there / "runs/r")
    assert moved.missing([A], "f") == []
    (there / "tables/t/shard.pt").unlink()
    assert moved.missing([A], "f") == [A]  # it is the moved file that is looked at


@pytest.mark.parametrize("text", ["{", "[]", '{"unit": "a"}', "\udcff"])
def test_a_record_that_is_none_is_refused(ledger: Ledger, text: str) -> None:
    (ledger.folder / "a.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=r"a.json is not a ledger record.*delete it to redo the unit"):
        ledger.missing([A], "f")


# --- tasks and workers


class Counting:
    """Writes each unit's name into a file; remembers what it was asked to do."""

    done: list[tuple[int, str]] = []
    finished = 0
    fail_at: str | None = None

    def __init__(self, context: StageContext) -> None:
        self.context = context

    def units(self) -> list[Unit]:
        number = int(self.context.experiment.extra_stages["count"].options["units"])
        return [Unit(f"u{i}", i) for i in range(number)]

    def fingerprint(self) -> str:
        return "f"

    def do(self, unit: Unit, staging: Path, poll: Callable[[], None]) -> dict[str, Path]:
        poll()
        commit.write_text(staging / "x", unit.name)
        if unit.name == Counting.fail_at:
            raise RuntimeError("half-way")
        Counting.done.append((self.context.task, unit.name))
        commit.make_folder(self.context.run.path / "out")
        return {str(self.context.run.path / "out" / unit.name): staging / "x"}

    def finish(self) -> None:
        Counting.finished += 1


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Counting]]:
    module = types.ModuleType("counting_worker")
    module.make = Counting  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "counting_worker", module)
    Counting.done, Counting.finished, Counting.fail_at = [], 0, None
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield Counting
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


def task(run: RunFolder, monkeypatch: pytest.MonkeyPatch, number: int, of: int) -> int:
    monkeypatch.setenv("HPC_GEN_TASK", str(number))
    monkeypatch.setenv("HPC_GEN_NUM_TASKS", str(of))
    return runner.run_stage(run, "count")


def test_a_task_does_its_share_first_and_then_what_others_have_not_begun(
    tmp_path: Path, counting: type[Counting], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The share is cut from all units, not from the missing ones, so tasks that start at different times agree on it."""
    run = Workspace(tmp_path).run("r", text=COUNTED)
    counting.fail_at = "u4"
    with pytest.raises(RuntimeError, match="half-way"):
        task(run, monkeypatch, 1, 3)
    assert counting.done == [(1, "u1")] and leftovers(run) == []
    counting.fail_at = "u3"
    with pytest.raises(RuntimeError, match="half-way"):
        task(run, monkeypatch, 0, 3)
    assert counting.done[1:] == [(0, "u0")]
    counting.fail_at = None
    assert task(run, monkeypatch, 2, 3) == ExitCode.DONE
    assert counting.done[2:] == [(2, name) for name in ("u2", "u5", "u3", "u4", "u6")]
    assert counting.finished == 1
    assert task(run, monkeypatch, 1, 3) == ExitCode.DONE and task(run, monkeypatch, 0, 1) == ExitCode.DONE
    assert len(counting.done) == 7 and counting.finished == 3, "nothing was left to do"
    assert sorted(p.name for p in (run.path / "out").iterdir()) == [f"u{i}" for i in range(7)]
    assert leftovers(run) == [] and list(run.claims("count").iterdir()) == []


def test_a_failed_unit_commits_nothing_and_the_next_attempt_does_it(
    tmp_path: Path, counting: type[Counting], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Workspace(tmp_path).run("r", text=COUNTED)
    counting.fail_at = "u2"
    with pytest.raises(RuntimeError, match="half-way"):
        task(run, monkeypatch, 0, 1)
    assert counting.done == [(0, "u0"), (0, "u1")] and leftovers(run) == []
    assert journal.attempts(run)[-1].exit_code == ExitCode.BUG
    counting.fail_at = None
    assert task(run, monkeypatch, 0, 1) == ExitCode.DONE
    assert [name for _, name in counting.done] == [f"u{i}" for i in range(7)]  # none twice
    assert counting.finished == 1


def test_a_stop_between_units_keeps_what_is_done(
    tmp_path: Path, counting: type[Counting], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Workspace(tmp_path).run("r", text=COUNTED)

    def do(
        self: Counting, unit: Unit, staging: Path, poll: Callable[[], None], original: Callable = Counting.do
    ) -> dict:
        files = original(self, unit, staging, poll)
        if unit.name == "u1":
            signal.raise_signal(signal.SIGTERM)
        return files

    with monkeypatch.context() as patch:
        patch.setattr(Counting, "do", do)
        assert task(run, monkeypatch, 0, 1) == ExitCode.REQUEUE
    assert [name for _, name in counting.done] == ["u0", "u1"] and counting.finished == 0
    assert journal.attempts(run)[-1].exit_code == ExitCode.REQUEUE
    assert task(run, monkeypatch, 0, 1) == ExitCode.DONE
    assert [name for _, name in counting.done] == [f"u{i}" for i in range(7)]


def context_of(found: Resolved, stage: str, folder: Path) -> StageContext:
    return StageContext(RunFolder(folder / "runs" / "r"), found, stage, folder)


@pytest.mark.parametrize(
    ("target", "reason"),
    [("no_such_module:make", "No module named 'no_such_module'"), ("counting_worker:gone", "no attribute 'gone'")],
)
def test_a_worker_that_cannot_be_imported(tmp_path: Path, counting: type[Counting], target: str, reason: str) -> None:
    found = resolved(text=COUNTED.replace("counting_worker:make", target))
    with pytest.raises(UserError, match=f"the worker '{target}' of stage 'count' cannot be imported: .*{reason}"):
        runner.make_worker(context_of(found, "count", tmp_path))


@pytest.mark.parametrize("stage", sorted(runner.WORKERS))
def test_the_built_in_workers_exist(stage: str) -> None:
    module, _, attribute = runner.WORKERS[stage].partition(":")
    __import__(module)
    assert callable(getattr(sys.modules[module], attribute))


def test_an_extra_stage_gets_its_own_worker(tmp_path: Path, counting: type[Counting]) -> None:
    worker = runner.make_worker(context_of(resolved(text=COUNTED), "count", tmp_path))
    assert isinstance(worker, Counting) and len(worker.units()) == 7
