"""Stages as jobs: dependencies, arrays of missing units, one submission at a time, refusals before the queue."""

from __future__ import annotations

import json
import os
import pickle
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from fake_slurm import EXPERIMENT, FakeSlurm

from hpc_gen.config import loader
from hpc_gen.config.loader import Resolved
from hpc_gen.runtime import clock
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.runtime.fence import claim_attempt
from hpc_gen.runtime.journal import Journal
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import run_setup, runner
from hpc_gen.stages.units import Ledger, StageContext
from slurm import graph, preview, profiles, records, submission
from slurm.commands import Commands
from slurm.graph import StagePlan
from slurm.profiles import ClusterProfile
from slurm.task import StageTask

LAB = (profiles.CLUSTERS / "lab.yaml").read_text()


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    found = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{found.path}:/usr/bin:/bin")
    return found


class Bench:
    """A run of the fake experiment in a workspace, and the ways to plan and submit it."""

    def __init__(self, root: Path, *overrides: str) -> None:
        self.resolved: Resolved = run_setup.typed(loader.loads(EXPERIMENT, overrides))
        self.run: RunFolder = run_setup.prepare_run(loader.loads(EXPERIMENT, overrides), root)
        self.said: list[str] = []

    def plans(self, *settings: str, stages: str = "", text: str = LAB) -> tuple[list[StagePlan], ClusterProfile]:
        profile = profiles.loads(text, settings)
        chosen = stages.split(",") if stages else self.resolved.experiment.stage_order()
        return graph.plan_stages(self.run, self.resolved, profile, chosen, self.said.append), profile

    def submit(self, *settings: str, stages: str = "", text: str = LAB) -> records.Submission:
        plans, profile = self.plans(*settings, stages=stages, text=text)
        return submission.submit(self.run, plans, "lab", profile, Commands(), self.said.append)

    def scripts(self) -> dict[str, list[str]]:
        """Lines of the scripts by job number."""
        folder = self.run.path / "slurm" / "submitted"
        return {path.name.partition("_")[0]: path.read_text().splitlines() for path in folder.glob("*_submission.sh")}

    def commit(self, stage: str, *numbers: int) -> None:
        """These units of a stage, as tasks that died later have left them."""
        worker = runner.make_worker(StageContext(self.run, self.resolved, stage, self.run.workspace))
        ledger = Ledger(self.run.ledger(stage), self.run.path)
        for unit in worker.units():
            if unit.index in numbers:
                staging = self.run.path / "staging" / unit.name
                staging.mkdir(parents=True)
                ledger.commit(unit, worker.do(unit, staging, lambda: None), worker.fingerprint())


@pytest.fixture
def bench(tmp_path: Path, fake: FakeSlurm) -> Bench:
    return Bench(tmp_path / "w")


def test_stages_become_jobs_that_wait_for_each_other(bench: Bench, fake: FakeSlurm) -> None:
    found = bench.submit()
    assert [(job.stage, job.job_id, job.dependency) for job in found.jobs] == [
        ("count", "101", None),
        ("again", "102", "aftercorr:101"),
        ("train", "103", "afterok:102"),
        ("report", "104", "afterok:103"),
    ]
    assert found.jobs[0].tasks == [[0, 4], [1, 4], [2, 4], [3, 4]] and found.jobs[2].tasks == []
    scripts = bench.scripts()
    assert "#SBATCH --array=0-3%4" in scripts["101"] and "#SBATCH --dependency=aftercorr:101" in scripts["102"]
    assert "#SBATCH --nodes=2" in scripts["103"] and "#SBATCH --ntasks-per-node=2" in scripts["103"]
    assert all("#SBATCH --kill-on-invalid-dep=yes" in scripts[job] for job in ("102", "103", "104"))
    assert bench.said[1:3] == [
        "submitted  count: job 101, 8 of 8 units missing, an array of 4 tasks",
        "submitted  again: job 102, after 101, units not known yet, an array of 4 tasks",
    ]
    assert records.read(bench.run) == [found]


@pytest.mark.parametrize(
    ("settings", "overrides", "nodes"),
    [
        ([], ["train.ranks=1"], 4),
        (["max_nodes=2"], ["train.ranks=1"], 2),
        (["tasks_per_node=8"], ["train.ranks=1"], 1),
        ([], ["train.ranks=2"], 1),  # --nodes sets it
    ],
)
def test_a_width_asks_for_the_most_nodes_that_it_may(
    fake: FakeSlurm, tmp_path: Path, settings: list[str], overrides: list[str], nodes: int
) -> None:
    wide = ("train.width=[1,2,4,8]", "train.global_batch=16", "train.micro_batch=1")
    bench = Bench(tmp_path / "w", *wide, *overrides)
    bench.submit(*settings, stages="train")
    (script,) = bench.scripts().values()
    assert f"#SBATCH --nodes={nodes}" in script


def test_what_submitit_pickled_is_the_task_by_name(bench: Bench) -> None:
    bench.submit(stages="count")
    folder = bench.run.path / "slurm" / "submitted"
    tasks = [pickle.loads((folder / f"101_{place}_submitted.pkl").read_bytes()).function for place in range(4)]
    assert tasks == [StageTask(str(bench.run.path), "count", place, 4) for place in range(4)]
    assert b"slurm.task" in (folder / "101_2_submitted.pkl").read_bytes()


def test_only_missing_units_are_submitted(bench: Bench) -> None:
    bench.commit("count", 0, 2, 3, 4, 6, 7)
    plans, _ = bench.plans(stages="count")
    assert (plans[0].words, plans[0].specs[0].array) == ("2 of 8 units missing", None)
    assert [(task.task, task.num_tasks) for task in plans[0].tasks] == [(1, 4)]
    plans, _ = bench.plans("stages.count.units_per_task=1", stages="count")
    assert [(task.task, task.num_tasks) for task in plans[0].tasks] == [(1, 8), (5, 8)]


def test_a_stage_that_is_done_needs_no_job(bench: Bench) -> None:
    bench.commit("count", *range(7))
    assert runner.run_stage(bench.run, "count") == 0
    assert (bench.run.path / "counted" / "count" / "sum").read_text() == "28"
    plans, _ = bench.plans(stages="count,again")
    assert bench.said[-1] == "count      done already, all its units are there"
    assert [plan.stage for plan in plans] == ["again"] and not plans[0].correspond


def test_units_that_are_there_but_not_finished_are_finished_by_one_task(bench: Bench) -> None:
    bench.commit("count", *range(8))
    plans, _ = bench.plans(stages="count")
    assert plans[0].words == "all 8 units there: checks and finishes" and len(plans[0].tasks) == 1


def test_small_units_are_grouped_and_run_a_few_at_a_time(bench: Bench) -> None:
    plans, _ = bench.plans("stages.count.units_per_task=1", "max_array=2", stages="count")
    assert [(task.task, task.num_tasks) for task in plans[0].tasks] == [(0, 2), (1, 2)]
    plans, _ = bench.plans("stages.count.units_per_task=3", "parallel=2", stages="count")
    assert plans[0].words == "8 of 8 units missing, an array of 3 tasks, 2 at a time"
    assert [(task.task, task.num_tasks) for task in plans[0].tasks] == [(0, 3), (1, 3), (2, 3)]


def test_units_that_nobody_can_list_yet(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "w" / "no-input").write_text("")
    plans, _ = bench.plans(stages="count")
    assert plans[0].words == "units not known yet, an array of 4 tasks"


def test_a_training_that_is_done_is_left_out(bench: Bench) -> None:
    attempt = claim_attempt(bench.run, "train")
    journal = Journal(bench.run, attempt, "train")
    journal.event("attempt_start", world_size=4, rank=0, process_start=clock.now())
    folder = bench.run.checkpoints / f"{64:012d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    assert [plan.stage for plan in bench.plans(stages="train,report")[0]] == ["train", "report"]
    journal.event("attempt_end", exit_code=0, cause="done", images_seen=64)
    journal.close()
    assert [plan.stage for plan in bench.plans(stages="train,report")[0]] == ["report"]
    assert bench.said[-1] == "train      done already, at 64 images"
    assert [plan.stage for plan in bench.plans(stages="count,train")[0]] == ["count", "train"]


def test_where_requeue_is_forbidden_a_chain_is_submitted(bench: Bench) -> None:
    found = bench.submit("requeue=false", "chain=3", stages="count,train,report")
    jobs = [(job.stage, job.job_id, job.dependency) for job in found.jobs]
    assert jobs == [
        ("count", "101", None),
        ("train", "102", "afterok:101"),
        ("train", "103", "singleton"),
        ("train", "104", "singleton"),
        ("report", "105", "afterok:104"),
    ]
    scripts = bench.scripts()
    assert ["--chain-left 2" in "\n".join(scripts[job]) for job in ("102", "103", "104")] == [True, False, False]
    names = {line for job in ("102", "103", "104") for line in scripts[job] if "--job-name" in line}
    assert len(names) == 1 and "#SBATCH --no-requeue" in scripts["102"]


def test_a_second_submission_is_refused_while_jobs_live(bench: Bench, fake: FakeSlurm, tmp_path: Path) -> None:
    bench.submit()
    line = f"103|103|PENDING|Dependency|N/A|N/A|2026-11-27T07:23:48|low||tiny.train|{bench.run.path}\n"
    fake.answer("squeue", line + "7|7|RUNNING|None|N/A|N/A|N/A|low|n1|other|/w/runs/other\n")
    with pytest.raises(UserError) as caught:
        bench.submit()
    assert str(caught.value) == (
        "run 'tiny' is submitted already: job 103 (train); see `hpc-gen status tiny`, or `hpc-gen cancel tiny` first"
    )
    assert len(records.read(bench.run)) == 1
    fake.answer("squeue", "")
    assert bench.submit().number == 2


def test_jobs_whose_record_was_lost_are_found_all_the_same(bench: Bench, fake: FakeSlurm) -> None:
    fake.answer("squeue", f"9|9|RUNNING|None|N/A|N/A|N/A|low|n1|tiny.train|{bench.run.path}\n")
    with pytest.raises(UserError, match="submitted already: job 9"):
        bench.submit()


def test_two_submissions_at_once(bench: Bench) -> None:
    with records.lock(bench.run), pytest.raises(UserError, match="another submission of run 'tiny' is under way"):
        bench.submit()
    lock = bench.run.path / "slurm" / "submit.lock"
    lock.write_text(json.dumps({"host": os.uname().nodename, "pid": 2**22 + 7, "pid_start": 5}))  # killed half-way
    assert bench.submit().number == 1
    assert not lock.exists()


def test_a_run_that_is_at_work_here_is_not_submitted(bench: Bench) -> None:
    claim_attempt(bench.run, "count")  # by this very process, which lives
    with pytest.raises(UserError, match=r"run 'tiny' is at work on this machine \(process \d+\)"):
        bench.submit()


def test_what_sbatch_refuses_takes_back_what_was_queued(bench: Bench, fake: FakeSlurm) -> None:
    fake.refuse("job-name=tiny.train")
    with pytest.raises(UserError) as caught:
        bench.submit()
    assert str(caught.value).startswith("sbatch refused a job of run 'tiny': ") and "Invalid account" in str(
        caught.value
    )
    assert fake.asked("scancel") == ["101 102"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["partition=lo"], "the cluster has no partition 'lo' (did you mean 'low'?); it has low, high; choose with --set partition=NAME"),
        (["partition=high", "time_limit_min=90"], "count cannot run in partition 'high': a job may last 60 minutes there and the profile asks for 90; --set time_limit_min=60"),
        (["cpus_per_task=9", "stages.count.cpus_per_task=1"], "train cannot run in partition 'low': 2 processes of 9 CPUs do not fit into its nodes of 16 CPUs; lower tasks_per_node or cpus_per_task with --set"),
        (["mem_per_task_gb=40"], "train cannot run in partition 'low': 2 processes of 40 GB do not fit into its nodes of 62 GB; lower mem_per_task_gb with --set"),
        (["partition=high", "gpus.style=gres"], "count cannot run in partition 'high': 1 GPUs per node are wanted and its nodes have 0; lower tasks_per_node with --set, or choose another partition"),
        (["gpus.style=gres", "gpus.type=h100"], "count cannot run in partition 'low': it has no GPUs of type 'h100' (did you mean 'a100'?), but a100; --set gpus.type=NAME"),
        (["tasks_per_node=1", "partition=high", "time_limit_min=30"], "train cannot run in partition 'high': it has 2 nodes and 4 are wanted; lower --nodes"),
        (["tasks_per_node=3"], "train.ranks = 4 does not fill nodes of 3 processes; use 3 or 6, or --nodes"),
        (["max_nodes=1"], "training wants 2 nodes of 2 processes and the profile allows 1; lower train.ranks or --nodes"),
        (["runtime.kind=apptainer", "runtime.image=/no/such.sif"], "the image /no/such.sif of the profile is not there; build it with `hpc-gen containers build`, or choose another with --set runtime.image=PATH"),
        (["group=no-such-group"], None),
    ],
)  # fmt: skip
def test_refused_before_the_queue(bench: Bench, fake: FakeSlurm, settings: list[str], sentence: str | None) -> None:
    with pytest.raises(UserError) as caught:
        bench.submit(*settings)
    if sentence is None:
        assert "cannot be given to group 'no-such-group'" in str(caught.value)
    else:
        assert str(caught.value) == sentence
    assert not [words for words in fake.asked("sbatch") if not words.startswith("--test-only")]


def test_a_partition_that_is_down(bench: Bench, fake: FakeSlurm) -> None:
    fake.answer("sinfo", "low*|down|1-00:00:00|4|16|64000|(null)|(null)\n")
    with pytest.raises(UserError, match="count cannot run in partition 'low': it is down"):
        bench.submit()


def test_what_only_slurm_knows(bench: Bench, fake: FakeSlurm) -> None:
    fake._write("sbatch", 'echo "sbatch: error: Batch job submission failed: Invalid qos specification" >&2; exit 1')
    with pytest.raises(UserError) as caught:
        bench.submit("qos=nope")
    assert (
        str(caught.value)
        == "Slurm would refuse the job of count: Batch job submission failed: Invalid qos specification"
    )


def test_an_old_run_has_no_code_for_it(bench: Bench) -> None:
    (bench.run.code / "slurm" / "task.py").unlink()
    with pytest.raises(UserError, match="was begun by a version without Slurm: .* lacks slurm/task.py"):
        bench.submit()


def test_a_dry_run_changes_nothing(bench: Bench, fake: FakeSlurm) -> None:
    before = sorted(str(path) for path in bench.run.path.rglob("*"))
    plans, profile = bench.plans()
    preview.show(bench.run, plans, profile, Commands(), bench.said.append)
    assert sorted(str(path) for path in bench.run.path.rglob("*")) == before
    scripts = [text for text in bench.said if text.startswith("#!/bin/bash")]
    assert (
        len(scripts) == 4 and "--dependency=aftercorr:JOB1" in scripts[1] and "--dependency=afterok:JOB2" in scripts[2]
    )
    assert "Slurm says    train: Job 1 to start at 2026-11-27T07:23:29" in bench.said
    assert not [words for words in fake.asked("sbatch") if not words.startswith("--test-only")]
    bench.submit()
    for number, text in enumerate(scripts, 1):
        numbered = text.replace(":JOB", ":10")
        assert bench.scripts()[f"10{number}"] == numbered.splitlines()


def test_secrets_stay_out_of_the_run_folder(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t-of-mine")
    bench.submit()
    holding = [path for path in bench.run.path.rglob("*") if path.is_file() and b"s3cr3t-of-mine" in path.read_bytes()]
    assert holding == []


def test_files_get_the_group_of_the_profile(bench: Bench) -> None:
    import grp

    name = grp.getgrgid(os.getgid()).gr_name
    bench.submit(f"group={name}", "umask='027'")
    logs = bench.run.logs.stat()
    assert logs.st_gid == os.getgid() and logs.st_mode & stat.S_ISGID
    assert "umask 027" in bench.scripts()["101"]


def test_a_stop_of_before_is_lifted(bench: Bench) -> None:
    bench.run.stop_file.write_text("")
    bench.run.preempt_file.write_text("")
    bench.submit()
    assert not bench.run.stop_file.exists() and not bench.run.preempt_file.exists()


def test_a_damaged_record_is_named(bench: Bench) -> None:
    path = records.path_of(bench.run)
    path.parent.mkdir()
    path.write_text('{"submissions": [{"number": 1}]}')
    with pytest.raises(DataError, match="is not a record of submissions"):
        records.read(bench.run)


def test_the_time_limit_of_the_job_becomes_a_deadline(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The config's own limit and that of the job: the earlier one counts, less the time for a save."""
    monkeypatch.setenv("HPC_GEN_JOB_END", "5000")
    assert runner._deadline(bench.resolved, "train") == 5000 - 120
    assert runner._deadline(bench.resolved, "count") == 5000 - 30
    monkeypatch.setenv("HPC_GEN_JOB_END", "0")
    assert runner._deadline(bench.resolved, "train") is None
    short = run_setup.typed(loader.loads(EXPERIMENT, ["train.time_limit_s=600"]))
    assert runner._deadline(short, "train") == pytest.approx(clock.process_start() + 480)
    monkeypatch.setenv("HPC_GEN_JOB_END", str(clock.process_start() + 300))
    assert runner._deadline(short, "train") == pytest.approx(clock.process_start() + 180)


def test_no_two_elements_share_a_unit(bench: Bench) -> None:
    """Any number of tasks: every unit belongs to exactly one of them."""
    for per_task in range(1, 9):
        plans, _ = bench.plans(f"stages.count.units_per_task={per_task}", stages="count")
        shares = [list(range(8))[task.task :: task.num_tasks] for task in plans[0].tasks]
        assert sorted(unit for share in shares for unit in share) == list(range(8))
        assert replace(plans[0].specs[0], array=None).id_pattern == "%j"
