"""What status, logs, cancel, preempt and doctor say of a run's jobs, with answers of Slurm as they really look."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from fake_slurm import EXPERIMENT, FakeSlurm

from hpc_gen.config import loader
from hpc_gen.runtime import clock
from hpc_gen.runtime.errors import UserError
from hpc_gen.runtime.fence import claim_attempt
from hpc_gen.runtime.journal import Journal
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import control, run_setup, status_view
from slurm import doctor, logs, records, steer, watch
from slurm.commands import Commands
from slurm.records import JobRecord, Submission

PROFILE: dict[str, object] = {}
JOBS = [
    JobRecord("11", "count", "tiny.count", [[0, 4], [1, 4], [2, 4], [3, 4]]),
    JobRecord("12", "train", "tiny.train", [], "afterok:11"),
    JobRecord("13", "report", "tiny.report", [], "afterok:12"),
]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    found = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{found.path}:/usr/bin:/bin")
    return found


@pytest.fixture
def run(tmp_path: Path, fake: FakeSlurm) -> RunFolder:
    """A run that was submitted once."""
    found = run_setup.prepare_run(loader.loads(EXPERIMENT), tmp_path / "w")
    records.write(found, [Submission(1, 0.0, "lab", PROFILE, JOBS)])
    return found


def live(run: RunFolder, *jobs: tuple[str, str, str], start: str = "N/A", nodes: str = "") -> str:
    """Lines of squeue: (id, state, reason)."""
    names = {job.job_id: job.name for job in JOBS}
    return "".join(
        f"{job_id}|1|{state}|{reason}|{start}|2026-11-27T09:30:00|x|low|{nodes}|{names[job_id.partition('_')[0]]}|{run.path}\n"
        for job_id, state, reason in jobs
    )


def end(run: RunFolder, job_id: str, **content: object) -> None:
    """A job's own note of how a start of it ended."""
    folder = run.path / "slurm" / "ends"
    folder.mkdir(parents=True, exist_ok=True)
    line = {"action": "end", "code": 0, "why": "done", "first": None, **content}
    with open(folder / f"{job_id}.jsonl", "a") as stream:
        stream.write(json.dumps(line) + "\n")


def told(run: RunFolder) -> list[str]:
    found = watch.jobs_of(run, Commands())
    assert found is not None
    return found.lines()


def test_a_run_that_was_never_submitted(tmp_path: Path, fake: FakeSlurm) -> None:
    run = run_setup.prepare_run(loader.loads(EXPERIMENT), tmp_path / "v")
    assert watch.jobs_of(run, Commands()) is None
    assert fake.asked("squeue") == []


def test_pending_running_and_waiting(run: RunFolder, fake: FakeSlurm) -> None:
    fake.answer(
        "squeue",
        live(run, ("11_0", "RUNNING", "None"), ("11_1", "RUNNING", "None"), nodes="n1")
        + live(
            run,
            ("11_2", "PENDING", "JobArrayTaskLimit"),
            ("12", "PENDING", "Dependency"),
            ("13", "PENDING", "Dependency"),
        ),
    )
    end(run, "11_3")
    with clock.use(clock.FakeClock(1795766400.0)):
        assert told(run) == [
            "  slurm        submission 1 to lab",
            "  job 11       count: 2 running, 1 pending, 1 done; on n1, until 09:30 at the latest; as many tasks run already as may run at a time",
            "  job 12       train: pending; waits for count",
            "  job 13       report: pending; waits for train",
        ]  # fmt: skip


def test_a_requeued_job_is_no_failure(run: RunFolder, fake: FakeSlurm) -> None:
    fake.answer("squeue", live(run, ("12", "PENDING", "BeginTime"), start="2026-11-27T08:02:10"))
    fake.answer("sacct", "11_0|11|COMPLETED|0:0|a|b|n1\n11_1|11|COMPLETED|0:0|a|b|n1\n11_2|11|COMPLETED|0:0|a|b|n1\n"
                         "11_3|11|COMPLETED|0:0|a|b|n1\n12|12|REQUEUED|0:0|a|b|n1\n")  # fmt: skip
    end(run, "12", action="requeue", code=85, why="its state is saved")
    with clock.use(clock.FakeClock(1795766400.0)):
        lines = told(run)
    assert lines[1] == "  job 11       count: 4 done"
    assert (
        lines[2]
        == "  job 12       train: pending; just requeued; Slurm lets it start in two minutes at most, expected to start 08:02"
    )
    assert not any("failed" in line for line in lines)


def test_failed_tasks_come_with_the_end_of_their_logs(run: RunFolder, fake: FakeSlurm) -> None:
    fake.answer("sacct", "11_0|11|FAILED|70:0|a|b|n1\n11_1|11|COMPLETED|0:0|a|b|n1\n11_2|11|CANCELLED by 0|0:0|a|b|n1\n"
                         "11_3|11|OUT_OF_MEMORY|0:125|a|b|n1\n12|12|CANCELLED by 0|0:0|a|b|n1\n")  # fmt: skip
    end(run, "11_0", code=70, why="failed with code 70", first={"host": "n4", "task": "0", "code": 70})
    run.logs.mkdir(exist_ok=True)
    (run.logs / "11_0_0.log").write_text("one\ntwo\r 50 %\r100 %\nthree\nunexpected KeyError\n\n")
    lines = told(run)
    assert lines[1] == "  job 11       count: 1 failed with code 70, 1 done, 1 cancelled, 1 out of memory"
    assert lines[-4:] == [
        "  failed       count 11_0: failed with code 70; first failed: task 0 on n4 with code 70",
        "               | 100 %",
        "               | three",
        "               | unexpected KeyError",
    ]


def test_without_a_controller_the_jobs_own_notes_are_told(run: RunFolder, fake: FakeSlurm) -> None:
    fake.answer("squeue", "slurm_load_jobs error: Unable to contact slurm controller", code=1)
    end(run, "11_0")
    end(run, "12", action="requeue", code=85)
    lines = told(run)
    assert "cannot be asked: `squeue -h -r` ended with 1: slurm_load_jobs error" in lines[1]
    assert lines[2] == "  job 11       count: 1 done, 3 not known"
    assert lines[3] == "  job 12       train: requeued"


def test_jobs_of_a_chain(run: RunFolder, fake: FakeSlurm) -> None:
    chain = [JobRecord("12", "train", "tiny.train"), JobRecord("13", "train", "tiny.train", [], "singleton")]
    records.write(run, [Submission(1, 0.0, "lab", PROFILE, chain)])
    fake.answer("squeue", live(run, ("13", "PENDING", "Dependency")))
    fake.answer("sacct", "12|12|COMPLETED|0:0|a|b|n1\n")
    end(run, "12", action="next", code=85)
    assert told(run)[1:] == [
        "  job 12       train: saved for the next of its chain",
        "  job 13       train: pending; waits for the job before it in its chain",
    ]


def test_a_run_that_was_stopped_has_not_failed(run: RunFolder, fake: FakeSlurm) -> None:
    fake.answer("sacct", "12|12|FAILED|87:0|a|b|n1\n")
    end(run, "12", code=87, why="stopped by the user, the state is saved (code 87)")
    lines = told(run)
    assert "  job 12       train: stopped" in lines and not any("failed" in line for line in lines)


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("Resources", "waits for free nodes"),
        ("Priority", "others are before it in the queue"),
        ("PartitionTimeLimit", "asks for more time than its partition allows; it will never start"),
        (
            "QOSMaxJobsPerUserLimit",
            "a limit of the account or its quality of service is reached (QOSMaxJobsPerUserLimit)",
        ),
        ("AssocGrpGRESMinutes", "a limit of the account or its quality of service is reached (AssocGrpGRESMinutes)"),
        ("ReqNodeNotAvail, UnavailableNodes:n3", "nodes that it needs are down or reserved"),
        ("job requeued in held state", "held (job requeued in held state); `scontrol release` lets it go"),
        ("SomethingNew", "Slurm says: SomethingNew"),
    ],
)
def test_reasons_in_plain_words(reason: str, expected: str) -> None:
    assert watch.reason_words(reason) == expected


def test_a_watch_does_not_wear_the_controller_out(run: RunFolder, fake: FakeSlurm) -> None:
    with clock.use(clock.FakeClock()) as time:
        read = watch.reader(run, Commands())
        for _ in range(20):
            read()
            time.sleep(1.0)
    assert len(fake.asked("squeue")) == len(fake.asked("sacct")) == 2


def test_status_shows_them(run: RunFolder, fake: FakeSlurm) -> None:
    fake.answer("squeue", live(run, ("12", "PENDING", "Priority")))
    shown = io.StringIO()
    status_view.tell(run, run.workspace, stream=shown, jobs=watch.reader(run, Commands()))
    assert "  job 12       train: pending; others are before it in the queue\n" in shown.getvalue()
    shown = io.StringIO()
    status_view.tell(run, run.workspace, as_json=True, stream=shown, jobs=watch.reader(run, Commands()))
    stages = json.loads(shown.getvalue())["slurm"]["stages"]
    assert stages[1]["states"] == {"pending": 1} and stages[1]["job_id"] == "12"


# ---------------------------------------------------------------- logs


def write_logs(run: RunFolder) -> None:
    run.logs.mkdir(exist_ok=True)
    for age, name in enumerate(["train_0", "11_0", "11_0_0", "11_3", "11_3_0", "12", "12_0", "12_1"]):
        path = run.logs / f"{name}.log"
        path.write_text(f"first of {name}\nlast of {name}\n")
        import os

        os.utime(path, (1000 + age, 1000 + age))


def test_logs_of_jobs_and_of_the_local_runner(run: RunFolder) -> None:
    write_logs(run)
    (run.logs / "error-17-rank0.log").write_text("not a log of a process")
    found = [(log.stage, log.what, log.script) for log in logs.find(run)]
    assert found == [
        ("train", "process 0", False),
        ("count", "batch script of job 11_0", True),
        ("count", "task 0 of job 11", False),
        ("count", "batch script of job 11_3", True),
        ("count", "task 3 of job 11", False),
        ("train", "batch script of job 12", True),
        ("train", "process 0 of job 12", False),
        ("train", "process 1 of job 12", False),
    ]
    assert [log.path.stem for log in logs.newest(run)] == ["12", "12_0"]
    assert [log.path.stem for log in logs.newest(run, task=1)] == ["12_1"]
    assert [log.path.stem for log in logs.newest(run, "count", 3)] == ["11_3_0"]
    with pytest.raises(UserError, match=r"has no logs of 'trian' \(did you mean 'train'\?\); it has train, count"):
        logs.find(run, "trian")
    with pytest.raises(UserError, match="has no logs of task 9; there are 0, 3"):
        logs.find(run, "count", 9)


def test_no_logs_yet(run: RunFolder) -> None:
    with pytest.raises(UserError, match="run 'tiny' has no logs yet"):
        logs.newest(run)
    assert logs.tail(run.logs / "none.log", 3) == []


def test_follow_prints_whole_lines(run: RunFolder) -> None:
    write_logs(run)
    chosen = logs.newest(run, "train", 0)
    said: list[str] = []
    rounds = iter(["one\ntw", "o\nthree\n", ""])

    def until() -> bool:
        text = next(rounds)
        with open(chosen[-1].path, "a") as stream:
            stream.write(text)
        return text == ""

    with clock.use(clock.FakeClock()):
        logs.follow(chosen, said.append, until)
    assert said == ["one", "two", "three"]


# ---------------------------------------------------------------- steering


def test_cancel_lets_running_jobs_save(run: RunFolder, fake: FakeSlurm) -> None:
    fake.answer("squeue", live(run, ("12", "RUNNING", "None"), ("13", "PENDING", "Dependency")))
    said: list[str] = []
    steer.cancel(run, Commands(), said.append, dry_run=True)
    assert said[0] == "would cancel tiny.report (13, pending)" and not run.stop_file.exists()
    assert fake.asked("scancel") == []
    steer.cancel(run, Commands(), said.append)
    assert run.stop_file.exists() and fake.asked("scancel") == ["13"]


def test_cancel_now(run: RunFolder, fake: FakeSlurm) -> None:
    fake.answer("squeue", live(run, ("12", "RUNNING", "None"), ("13", "PENDING", "Dependency")))
    steer.cancel(run, Commands(), lambda line: None, now=True)
    assert fake.asked("scancel") == ["13 12"] and not run.stop_file.exists()


def test_nothing_to_cancel(run: RunFolder) -> None:
    with pytest.raises(UserError, match="nothing of run 'tiny' is queued or at work"):
        steer.cancel(run, Commands(), lambda line: None)


def test_preempt_signals_the_tasks(run: RunFolder, fake: FakeSlurm) -> None:
    said: list[str] = []
    assert not steer.preempt(run, Commands(), said.append)
    fake.answer("squeue", live(run, ("12", "RUNNING", "None"), ("13", "PENDING", "Dependency"), nodes="n[1-2]"))
    assert steer.preempt(run, Commands(), said.append, dry_run=True) and fake.asked("scancel") == []
    assert steer.preempt(run, Commands(), said.append)
    assert fake.asked("scancel") == ["--signal=TERM 12"]
    assert said[-1] == "sending SIGTERM to the tasks of tiny.train (12, on n[1-2]); it saves and requeues itself"


def test_preempt_without_a_controller_writes_a_file(run: RunFolder, fake: FakeSlurm) -> None:
    fake._write("squeue", 'echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1')
    said: list[str] = []
    with pytest.raises(UserError, match="Unable to contact slurm controller"):
        steer.preempt(run, Commands(), said.append)
    journal = Journal(run, claim_attempt(run, "train"), "train")
    journal.event("attempt_start", world_size=1, rank=0, process_start=clock.now())
    assert steer.preempt(run, Commands(), said.append, dry_run=True) and not run.preempt_file.exists()
    assert steer.preempt(run, Commands(), said.append) and run.preempt_file.exists()
    assert "Unable to contact slurm controller" in said[0] and said[-1].startswith(f"writing {run.preempt_file}")


def test_preempt_waits_for_the_end_of_the_attempt(run: RunFolder, fake: FakeSlurm) -> None:
    """`hpc-gen preempt --wait`: the jobs are asked, and the attempt that was in progress is waited for."""
    fake.answer("squeue", live(run, ("12", "RUNNING", "None"), nodes="n1"))
    journal = Journal(run, claim_attempt(run, "train"), "train")
    journal.event("attempt_start", world_size=1, rank=0, process_start=clock.now())
    said: list[str] = []

    def ask() -> bool:
        asked = steer.preempt(run, Commands(), said.append)
        journal.event("attempt_end", exit_code=85, cause="SIGTERM", images_seen=0)
        return asked

    assert control.preempt(run, said.append, wait_s=5.0, jobs=ask)
    assert fake.asked("scancel") == ["--signal=TERM 12"]
    assert "ended with code 85 (SIGTERM)" in said[-1]


# ---------------------------------------------------------------- doctor


def test_doctor_of_a_cluster(fake: FakeSlurm, tmp_path: Path) -> None:
    fake._write(
        "sinfo", f'if [ "$1" = --version ]; then echo "slurm-wlm 22.05.8"; else cat "{fake.root}/sinfo.txt"; fi'
    )
    found = {check.name: check for check in doctor.examine("lab", tmp_path, [], Commands())}
    assert all(check.ok for check in found.values())
    assert found["partition"].detail == "low: 4 nodes of 16 CPUs, 4 GPUs, up to 1440 min"
    assert found["controller"].detail == "Slurm 22.05.8"
    fake.answer("sacct", "Slurm accounting storage is disabled", code=1)
    found = {check.name: check for check in doctor.examine("lab", tmp_path, ["partition=lo"], Commands())}
    assert not found["accounting"].ok and not found["accounting"].required
    assert found["partition"].detail == "'lo' is not one of low, high"


def test_doctor_where_nothing_answers(fake: FakeSlurm, tmp_path: Path) -> None:
    fake.answer("sinfo", "slurm_load_partitions: Unable to contact slurm controller", code=1)
    settings = ["runtime.kind=apptainer", "runtime.image=/no/such.sif"]
    found = {check.name: check for check in doctor.examine("lab", tmp_path, settings, Commands())}
    assert found["runtime"].detail == "apptainer, /no/such.sif is not there" and not found["controller"].ok
    assert [check.ok for check in doctor.examine("labb", tmp_path, [], Commands())] == [False]
