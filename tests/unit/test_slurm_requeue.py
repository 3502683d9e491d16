"""What becomes of a job whose step has ended: the decision as a table, as laws, and with the files of real runs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slurm import requeue
from slurm.requeue import Decision, Facts, decide

CALM = Facts(
    stage="train", code=0, first=None, cause=None, told=False, over_time=False, preempted=False, restarts=0, limit=10, stalled=1,
    stalled_limit=3, failures=0, retries=1, chain_left=None, ill=[],
)  # fmt: skip


def after(**facts: object) -> Decision:
    """The decision where everything else is calm."""
    return decide(CALM._replace(**facts))


def test_is_of_python_3_6() -> None:
    ast.parse(Path(requeue.__file__).read_text(), feature_version=(3, 6))
    imported = {name.split(".")[0] for name in _imports(Path(requeue.__file__))}
    assert imported <= {"argparse", "json", "os", "re", "sys", "time", "typing"}


def _imports(path: Path) -> list[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return plain + [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]


@pytest.mark.parametrize(
    ("facts", "action", "code"),
    [
        ({"code": 0}, "end", 0),
        ({"code": 0, "cause": 0}, "end", 0),
        ({"code": 85}, "requeue", 85),
        ({"code": 143, "cause": 85}, "requeue", 85),  # tasks died unequally after the save
        ({"code": 137, "cause": 85}, "requeue", 85),
        ({"code": 0, "cause": 85}, "requeue", 85),  # the cause file knows better than srun
        ({"code": 137, "cause": 0}, "requeue", 137),  # rank 0 was done, another rank was killed: once more
        ({"code": 143, "preempted": True}, "requeue", 85),  # killed in its start-up
        ({"code": 1, "preempted": True}, "requeue", 85),
        ({"code": 143}, "requeue", 143),  # nobody knows why: one retry
        ({"code": 143, "failures": 1}, "end", 143),
        ({"code": 139, "retries": 0}, "end", 139),
        ({"code": 70}, "end", 70),  # our mistake would come again
        ({"code": 70, "stage": "encode"}, "requeue", 70),  # a unit may fail by its node
        ({"code": 70, "stage": "encode", "failures": 1}, "end", 70),
        ({"code": 2}, "end", 2),
        ({"code": 143, "cause": 64}, "end", 64),
        ({"code": 143, "cause": 75, "preempted": True}, "end", 75),
        ({"code": 87}, "end", 87),
        ({"code": 143, "cause": 87}, "end", 87),
        ({"code": 86}, "requeue", 86),
        ({"code": 137, "first": 86, "ill": ["n1"]}, "elsewhere", 86),  # the others were killed at the rendezvous
        ({"code": 137, "first": 64}, "end", 64),
        ({"code": 143, "first": 85}, "requeue", 85),
        ({"code": 137, "first": 85, "cause": 64}, "end", 64),
        ({"code": 143, "first": 1}, "requeue", 143),  # no code of ours: srun's own
        ({"code": 0, "first": 85}, "end", 0),
        ({"code": 86, "ill": ["n3"]}, "elsewhere", 86),
        ({"code": 137, "ill": ["n3"]}, "elsewhere", 137),
        ({"code": 85, "ill": ["n3"]}, "requeue", 85),
        ({"code": 85, "told": True}, "end", 85),  # scancel, scontrol requeue: Slurm has decided
        ({"code": 143, "told": True}, "end", 143),
        ({"code": 85, "told": True, "over_time": True}, "requeue", 85),
        ({"code": 143, "told": True, "over_time": True}, "requeue", 85),
        ({"code": 143, "told": True, "preempted": True}, "requeue", 85),  # where preempted jobs are cancelled
        ({"code": 85, "restarts": 10}, "end", 85),
        ({"code": 85, "stalled": 3}, "end", 85),
        ({"code": 85, "stalled": 9, "preempted": True}, "requeue", 85),  # preempted again and again: not our fault
        ({"code": 85, "chain_left": 2}, "next", 0),
        ({"code": 85, "chain_left": 0}, "end", 85),
        ({"code": 0, "chain_left": 2}, "end", 0),
        ({"code": 64, "chain_left": 2}, "end", 64),
    ],
)
def test_decisions(facts: dict[str, object], action: str, code: int) -> None:
    found = after(**facts)
    assert (found.action, found.code) == (action, code), found.why
    assert found.nodes == (facts.get("ill", []) if action == "elsewhere" else [])


CODES = st.sampled_from([0, 1, 2, 64, 70, 75, 85, 86, 87, 134, 137, 139, 143])
ANY = st.builds(
    Facts,
    stage=st.sampled_from(["train", "encode"]),
    code=CODES,
    first=st.none() | CODES,
    cause=st.none() | CODES,
    told=st.booleans(),
    over_time=st.booleans(),
    preempted=st.booleans(),
    restarts=st.integers(0, 12),
    limit=st.just(10),
    stalled=st.integers(1, 6),
    stalled_limit=st.just(3),
    failures=st.integers(0, 4),
    retries=st.integers(0, 2),
    chain_left=st.none() | st.integers(0, 3),
    ill=st.lists(st.sampled_from(["n1", "n2"]), max_size=2, unique=True),
).map(lambda facts: facts._replace(over_time=facts.over_time and facts.told))


@given(ANY)
def test_laws(facts: Facts) -> None:
    found = decide(facts)
    again = found.action in ("requeue", "elsewhere")
    assert found.action in ("end", "next") or again
    assert found.why
    if found.action == "end" and found.code == 0:
        assert facts.code == 0 and facts.cause in (None, 0), "only what is done ends well"
    if facts.code == 0 and facts.cause in (None, 0):
        assert (found.action, found.code) == ("end", 0), "what is done is not done again"
    said = facts.cause
    if said is None:
        said = facts.first if facts.code != 0 and facts.first in requeue.OURS else facts.code
    if said in (2, 64, 75, 87):
        assert found.action == "end" and found.code in (said, facts.code), "another start would not help"
    if facts.told and not (facts.over_time or facts.preempted):
        assert found.action == "end", "Slurm has decided already"
    if facts.restarts >= facts.limit:
        assert not again, "the limit holds"
    if facts.chain_left is not None:
        assert not again, "the site allows no requeue"
    if found.action == "next":
        assert facts.chain_left and found.code == 0
    if found.action == "elsewhere":
        assert found.nodes == facts.ill != []


@given(ANY)
def test_a_saved_state_goes_on(facts: Facts) -> None:
    """However srun and the tasks ended, a preemption with a saved state is a requeue while the limits allow it."""
    saved = facts._replace(cause=85, told=False, over_time=False, preempted=True, restarts=0, chain_left=None)
    assert decide(saved).action == "requeue"


# ---------------------------------------------------------------- with files


def begin(run: Path, attempt: int, job: str, restart: int, cause: int | None) -> None:
    """An attempt as fence.py and stages/train.py leave it."""
    journal = run / "journal"
    journal.mkdir(parents=True, exist_ok=True)
    (journal / f"{attempt:04d}.attempt").write_text(json.dumps({"job_id": job, "restart_count": restart}))
    if cause is not None:
        (journal / f"{attempt:04d}.cause.json").write_text(json.dumps({"exit_code": cause}))


def save(run: Path, images: int) -> None:
    """A whole checkpoint, as far as its name goes."""
    folder = run / "checkpoints" / f"{images:012d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")


def ended(run: Path, code: int, restart: int, shown: str = "", now: float = 1000.0, **options: object) -> Decision:
    """The program's answer for job 7 of the training."""
    given = {"stage": "train", "job": "7", "limit": 10, "stalled-limit": 3, "retries": 1, **options}
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return requeue.main(["--run", str(run), "--code", str(code), "--restart", str(restart), *words], shown, now)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(CODES, st.none() | CODES, st.booleans(), st.booleans()), min_size=30, max_size=30))
def test_every_life_ends(
    tmp_path_factory: pytest.TempPathFactory, fates: list[tuple[int, int | None, bool, bool]]
) -> None:
    """Whatever the starts of a job meet, it ends after at most limit + 1 of them, and every end is recorded."""
    run = tmp_path_factory.mktemp("life")
    for restart, (code, cause, preempted, progress) in enumerate(fates):
        begin(run, restart + 1, "7", restart, cause)
        if progress:
            save(run, restart + 1)
        found = ended(run, code, restart, "PreemptTime=2026-01-01T00:00:00" if preempted else "PreemptTime=None")
        if found.action == "end":
            break
    assert found.action == "end" and restart <= 10
    lines = requeue.history(str(run / "slurm" / "ends" / "7.jsonl"))
    assert [line["restart"] for line in lines] == list(range(restart + 1))
    assert lines[-1]["action"] == "end" and {line["action"] for line in lines[:-1]} <= {"requeue", "elsewhere"}


def test_the_cause_is_that_of_this_very_start(tmp_path: Path) -> None:
    begin(tmp_path, 1, "7", 0, 85)
    begin(tmp_path, 2, "7", 1, 64)
    begin(tmp_path, 3, "8", 1, 75)
    assert requeue.cause_of(str(tmp_path), "7", 0)["exit_code"] == 85
    assert requeue.cause_of(str(tmp_path), "7", 1)["exit_code"] == 64
    assert requeue.cause_of(str(tmp_path), "7", 2) == {}  # killed before it could claim an attempt
    (tmp_path / "journal" / "0004.attempt").write_text("")  # killed while claiming
    assert requeue.cause_of(str(tmp_path), "7", 1)["exit_code"] == 64


def test_starts_without_progress_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 640)
    actions = [ended(tmp_path, 85, restart).action for restart in range(3)]
    assert actions == ["requeue", "requeue", "end"]
    assert "the last 3 starts brought no progress" in capsys.readouterr().err


def test_progress_and_preemptions_start_the_count_again(tmp_path: Path) -> None:
    for restart in range(8):
        save(tmp_path, restart)
        assert ended(tmp_path, 85, restart).action == "requeue"
    ours = tmp_path / "ours"  # ended by Slurm: scontrol requeue, a lost node, the end of a grace time
    for restart in range(8):
        assert ended(ours, 143, restart, "JobState=COMPLETING Reason=None", told=" TERM").action == "end"
    assert ended(ours, 85, 8).action == "requeue"
    calm = tmp_path / "calm"
    for restart in range(8):
        assert ended(calm, 143, restart, "JobState=RUNNING PreemptTime=2026-11-27T07:26:30").action == "requeue"


def test_one_retry_for_a_crash_and_another_after_progress(tmp_path: Path) -> None:
    assert ended(tmp_path, 139, 0).action == "requeue"
    save(tmp_path, 640)
    assert ended(tmp_path, 139, 1).action == "requeue"
    assert ended(tmp_path, 139, 2).action == "end"


def test_the_time_limit_of_the_job_is_told_apart_from_scancel(tmp_path: Path) -> None:
    # as Slurm 22.05.8 shows a job that it ends for its time limit, by scancel, and by a requeue of the operator's
    over = "JobState=COMPLETING Reason=TimeLimit PreemptTime=None"
    assert ended(tmp_path, 143, 0, over, told=" TERM").action == "requeue"
    assert ended(tmp_path, 143, 1, "JobState=COMPLETING Reason=None PreemptTime=None", told=" TERM").action == "end"
    # the step may have ended before this shell got its signal
    assert ended(tmp_path, 85, 0, "JobState=COMPLETING Reason=None PreemptTime=None").action == "end"
    assert ended(tmp_path / "calm", 85, 0, "JobState=RUNNING Reason=None PreemptTime=None").action == "requeue"
    # at the end of the grace time Slurm requeues the job by itself, or, where the partition says so, cancels it
    assert ended(tmp_path, 143, 0, "JobState=COMPLETING Reason=None Restarts=1", told=" TERM").action == "end"
    shown = "JobState=COMPLETING Reason=None Restarts=0 PreemptTime=2026-11-27T08:12:38"
    assert ended(tmp_path, 143, 0, shown, told=" TERM").action == "requeue"


# `scontrol show job -o` of 24.05, by its manual: ReqTRES and AllocTRES in the place of TRES, AccrueTime, LastSchedEval with
# its scheduler, and a state that may name a flag after a plus sign
SHOWN_24 = (
    "JobId=4251 ArrayJobId=4242 ArrayTaskId=7 JobName=big.train UserId=me(1000) GroupId=us(100) MCS_label=N/A Priority=99 "
    "Nice=0 Account=p42 QOS=normal JobState={state} Reason={reason} Dependency=(null) Requeue=1 Restarts=2 BatchFlag=1 "
    "Reboot=0 ExitCode=0:0 RunTime=00:10:01 TimeLimit=12:00:00 TimeMin=N/A SubmitTime=2026-11-27T07:23:48 "
    "EligibleTime=2026-11-27T07:23:48 AccrueTime=2026-11-27T07:23:48 StartTime=2026-11-27T07:28:20 EndTime=Unknown "
    "Deadline=N/A PreemptEligibleTime=2026-11-27T07:28:20 PreemptTime={preempt} SuspendTime=None SecsPreSuspend=0 "
    "LastSchedEval=2026-11-27T07:28:20 Scheduler=Backfill Partition=gpu ReqTRES=cpu=8,gres/gpu=4 AllocTRES=cpu=8,gres/gpu=4"
)


@pytest.mark.parametrize(
    ("state", "reason", "preempt", "told", "action"),
    [
        ("RUNNING", "None", "2026-11-27T07:38:20", "", "requeue"),  # in its grace time
        ("RUNNING", "None", "None", "", "requeue"),
        ("RUNNING", "None", "N/A", "", "requeue"),
        ("CANCELLED", "None", "None", " TERM", "end"),
        ("CANCELLED+COMPLETING", "None", "None", "", "end"),
        ("TIMEOUT", "TimeLimit", "None", " TERM", "requeue"),
        ("PREEMPTED", "None", "2026-11-27T07:38:20", " TERM", "requeue"),
        ("NODE_FAIL", "NodeFail", "None", " TERM", "end"),
    ],
)
def test_a_job_as_newer_versions_show_it(
    tmp_path: Path, state: str, reason: str, preempt: str, told: str, action: str
) -> None:
    shown = SHOWN_24.format(state=state, reason=reason, preempt=preempt)
    assert ended(tmp_path, 85, 0, shown, told=told).action == action


def test_ill_nodes_are_those_of_this_start_and_stay_excluded(tmp_path: Path) -> None:
    ill = tmp_path / "slurm" / "ill"
    ill.mkdir(parents=True)
    (ill / "7.0.n3").write_text("node n3: its GPU is held by another")
    (ill / "71.0.n9").write_text("another job's")
    assert ended(tmp_path, 86, 0) == Decision("elsewhere", 86, "wants other nodes: without n3", ["n3"])
    (ill / "7.1.n4").write_text("node n4: ...")
    save(tmp_path, 1)
    assert ended(tmp_path, 86, 1).nodes == ["n3", "n4"]


def test_a_host_that_the_others_waited_for_in_vain_is_left_out(tmp_path: Path) -> None:
    begin(tmp_path, 1, "7", 0, 86)
    cause = {
        "exit_code": 86,
        "blamed": [{"rank": 3, "host": "n2.cluster.site"}, {"rank": 2, "host": "n2.cluster.site"}],
    }
    (tmp_path / "journal" / "0001.cause.json").write_text(json.dumps(cause))
    assert ended(tmp_path, 143, 0, "JobState=RUNNING PreemptTime=None").nodes == ["n2"]
    # a rank that a preemption has killed is no reason to shun its node
    preempted = ended(tmp_path / "other", 86, 0, "JobState=RUNNING PreemptTime=2026-01-01T00:00:00")
    assert (preempted.action, preempted.nodes) == ("requeue", [])


def test_nodes_that_slurm_has_lost_are_left_out(tmp_path: Path) -> None:
    states = "n1 mixed\nn2 down*\nn2 down*\nn3 idle*\nn4 drained\nn5 allocated\nn6 fail\nn7 draining\n"
    assert requeue.lost_nodes(states) == ["n2", "n3", "n4", "n6", "n7"]
    assert ended(tmp_path, 143, 0, nodes=states) == Decision(
        "elsewhere", 143, "failed with code 143; tried again (1 of 1)", ["n2", "n3", "n4", "n6", "n7"]
    )
    assert requeue.lost_nodes("sinfo: error: something\n") == []


SRUN = """srun: Job step aborted: Waiting up to 7 seconds for job step to finish.
srun: error: lchn2: task 3: Exited with exit code 7
slurmstepd-lchn1: error: *** STEP 12.0 ON lchn1 CANCELLED AT 2026-11-27T07:26:30 ***
srun: error: lchn1: tasks 0-1: Terminated
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SRUN, ("lchn2", "3", 7)),
        ("srun: error: nid001: tasks 0,2-3: Exited with exit code 85\n", ("nid001", "0,2-3", 85)),
        ("srun: error: n1: task 0: Killed\n", ("n1", "0", 137)),
        ("srun: error: n1: task 0: Segmentation fault (core dumped)\n", ("n1", "0", 139)),
        ("srun: error: n1: task 0: User defined signal 2\n", ("n1", "0", 140)),
        ("srun: error: n1: task 2: Out Of Memory\n", ("n1", "2", 1)),
        ("srun: error: Unable to create step for job 5: Invalid partition\n", None),
        ("", None),
    ],
)
def test_first_failure(text: str, expected: tuple[str, str, int] | None) -> None:
    assert requeue.first_failure(text) == expected


def test_first_failure_is_recorded_with_its_host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = tmp_path / "said"
    said.write_text(SRUN)
    ended(tmp_path, 143, 0, srun=said)
    line = requeue.history(str(tmp_path / "slurm" / "ends" / "7.jsonl"))[0]
    assert line["first"] == {"host": "lchn2", "task": "3", "code": 7}
    assert "(first failed: task 3 on lchn2 with code 7)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (
            "JobId=12 JobState=RUNNING PreemptEligibleTime=2026-11-27T07:25:16 PreemptTime=None TimeLimit=01:00:00",
            False,
        ),
        ("JobId=12 JobState=RUNNING PreemptEligibleTime=2026-11-27T07:25:16 PreemptTime=2026-11-27T07:26:30", True),
        ("slurm_load_jobs error: Unable to contact slurm controller", False),
        ("", False),
    ],
)
def test_a_preemption_under_way_shows(shown: str, expected: bool) -> None:
    assert requeue.is_preempted(shown) is expected


def test_as_a_program(tmp_path: Path) -> None:
    """As the batch body calls it: by path, with an interpreter that sees nothing of ours."""
    begin(tmp_path, 1, "7", 0, 85)
    words = ["--run", str(tmp_path), "--stage", "train", "--job", "7", "--restart", "0", "--code", "143"]
    limits = [
        "--limit",
        "9",
        "--stalled-limit",
        "3",
        "--retries",
        "1",
        "--told",
        "",
        "--srun",
        "none",
    ]
    done = subprocess.run(
        [sys.executable, "-I", "-S", requeue.__file__, *words, *limits],
        input="PreemptTime=None", capture_output=True, text=True, cwd="/", check=True,
    )  # fmt: skip
    assert done.stdout == "requeue 85 \n"
    assert done.stderr == "hpc-gen: train of job 7, start 0: its state is saved\n"


def test_a_full_disk_does_not_keep_a_job_from_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "slurm").write_text("a file where a folder is needed")
    assert ended(tmp_path, 85, 0).action == "requeue"
    assert "the end of the job is not recorded" in capsys.readouterr().err
