"""Several runs in one array: their names, which jobs there are and what waits for what, and the commands that know them."""

from __future__ import annotations

import grp
import os
import pickle
import stat
from pathlib import Path

import pytest
from fake_slurm import EXPERIMENT, FakeSlurm

from hpc_gen import cli, cli_errors
from hpc_gen.config import loader
from hpc_gen.runtime import clock
from hpc_gen.runtime.errors import UserError
from hpc_gen.runtime.fence import claim_attempt
from hpc_gen.runtime.journal import Journal
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import run_setup
from slurm import axes, logs, records
from slurm.task import StageTask

ENCODE = "encode: {source: folder, source_path: pictures, image_size: 8, channels: 1, validation: false, tasks: 2}\n"


class Desk:
    """A workspace with an experiment, and commands typed in it."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str], text: str = EXPERIMENT) -> None:
        self.root, self._capsys = root / "w", capsys
        self.root.mkdir()
        self.config = root / "tiny.yaml"
        self.config.write_text(text)

    def run(self, name: str) -> RunFolder:
        return RunFolder(self.root / "runs" / name)

    def submit(self, *words: str, code: int = 0) -> str:
        return self.type("submit", str(self.config), "--cluster", "lab", *words, code=code)

    def type(self, *words: str, code: int = 0) -> str:
        """What a command printed; it must end with `code`."""
        self._capsys.readouterr()
        given = [*words, "-w", str(self.root)]
        ended = cli_errors.exit_code_of(lambda: cli.app(given, prog_name="hpc-gen", standalone_mode=False), given)
        out, err = self._capsys.readouterr()
        assert ended == code, f"{words} ended with {ended}:\n{out}{err}"
        return out + err

    def jobs(self, name: str) -> list[tuple[str, str, str | None]]:
        """Stage, number and dependency of each job in the record of a run."""
        return [(job.stage, job.job_id, job.dependency) for job in records.read(self.run(name))[-1].jobs]

    def queue(self, fake: FakeSlurm, *lines: str) -> None:
        """What squeue answers: id|state, elements of the array of this workspace."""
        folder = self.root / "arrays" / "tiny" / "0001"
        parts = [line.split("|") for line in lines]
        fake.answer(
            "squeue",
            "".join(f"{i}|1|{state}|Resources|N/A|N/A|x|low|n1|tiny.train|{folder}\n" for i, state in parts),
        )


def trained(run: RunFolder) -> None:
    """As a training that has come to its end leaves its run."""
    journal = Journal(run, claim_attempt(run, "train"), "train")
    journal.event("attempt_start", world_size=4, rank=0, process_start=clock.now())
    folder = run.checkpoints / f"{64:012d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    journal.event("attempt_end", exit_code=0, cause="done", images_seen=64)
    journal.close()


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    found = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{found.path}:/usr/bin:/bin")
    return found


@pytest.fixture
def desk(tmp_path: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> Desk:
    return Desk(tmp_path, capsys)


# ---------------------------------------------------------------- names


def test_a_run_for_each_value() -> None:
    found = axes.expand("big", ["seed=1, 2"], ["train.ranks=4", "seed=7", "name=big"])
    assert found == [
        ["train.ranks=4", "seed=1", "name=big-seed-1"],
        ["train.ranks=4", "seed=2", "name=big-seed-2"],
    ]


def test_several_axes_make_a_grid() -> None:
    found = axes.expand("big", ["seed=1,2", "train.optimizer.lr=1e-3,3e-4"], [])
    names = [each[-1] for each in found]
    assert names == [f"name=big-seed-{seed}-lr-{rate}" for seed in (1, 2) for rate in ("1e-3", "3e-4")]
    assert found[3][:2] == ["seed=2", "train.optimizer.lr=3e-4"]


def test_commas_within_brackets_belong_to_the_value() -> None:
    found = axes.expand("a", ["train.width=[1,2],[1,2,4]", "method={name: x, y: 1},{name: z}"], [])
    assert found[0] == ["train.width=[1,2]", "method={name: x, y: 1}", "name=a-width-1-2-method-name-x-y-1"]
    assert len(found) == 4


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        (["seed"], "--array 'seed' is not KEY.PATH=VALUE,VALUE; as in --array seed=1,2,3"),
        (["seed="], "--array 'seed=' is not KEY.PATH=VALUE,VALUE; as in --array seed=1,2,3"),
        (["1=2"], "--array '1=2' is not KEY.PATH=VALUE,VALUE; as in --array seed=1,2,3"),
        (["seed=1, ,2"], "--array 'seed=1, ,2' is not KEY.PATH=VALUE,VALUE; as in --array seed=1,2,3"),
        (["seed=1,1"], "--array gives two runs the name 'a-seed-1'; leave out values that are there twice"),
        (["name=b,c"], "--array cannot vary 'name': each run is named after its values, as in NAME-seed-1"),
        (["seed=1,2", "seed=3"], "--array names 'seed' twice; give all its values at once, as in seed=1,2,3"),
    ],
)
def test_refused_axes(texts: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        axes.expand("a", texts, [])
    assert str(caught.value) == sentence


# ---------------------------------------------------------------- jobs


def test_trainings_are_one_array_and_the_rest_each_run_has_for_itself(desk: Desk) -> None:
    said = desk.submit("--array", "seed=1,2")
    assert desk.jobs("tiny-seed-1") == [
        ("count", "101", None),
        ("again", "102", "aftercorr:101"),
        ("train", "105_0", "afterok:102:104"),
        ("report", "106", "afterok:105_0"),
    ]
    assert desk.jobs("tiny-seed-2") == [
        ("count", "103", None),
        ("again", "104", "aftercorr:103"),
        ("train", "105_1", "afterok:102:104"),
        ("report", "107", "afterok:105_1"),
    ]
    assert "submitted  tiny train: job 105, afterok:102:104, an array of 2 runs, each 2 nodes x 2 processes" in said
    folder = desk.root / "arrays" / "tiny" / "0001"
    text = (folder / "slurm" / "submitted" / "105_submission.sh").read_text()
    assert "#SBATCH --array=0-1%2\n" in text and "#SBATCH --nodes=2\n" in text
    assert "#SBATCH --kill-on-invalid-dep=yes\n" in text
    for element in (0, 1):
        run = desk.run(f"tiny-seed-{element + 1}")
        assert (folder / str(element)).resolve() == run.path
        task = pickle.loads((folder / "slurm" / "submitted" / f"105_{element}_submitted.pkl").read_bytes()).function
        assert task == StageTask(str(run.path), "train")
        assert run_setup.load_run(run).experiment.seed == element + 1


def test_a_dry_run_prints_the_scripts_and_makes_nothing(desk: Desk, fake: FakeSlurm) -> None:
    said = desk.submit("--array", "seed=1,2", "--dry-run")
    assert not (desk.root / "arrays").exists() and not (desk.root / "runs").exists()
    assert said.count("#!/bin/bash") == 7 and "--dependency=afterok:JOB2:JOB4" in said
    assert "--dependency=afterok:JOB5_1" in said and "runs=(\n" in said
    would = "would submit  train of tiny-seed-1, tiny-seed-2: an array of 2 runs, each 2 nodes x 2 processes"
    assert would in said and said.count("Slurm says    train: Job 1 to start") == 1
    desk.submit("--array", "seed=1,2")
    script = desk.root / "arrays" / "tiny" / "0001" / "slurm" / "submitted" / "105_submission.sh"
    assert script.read_text().replace(":102:104", ":JOB2:JOB4") in said


def test_a_table_of_several_runs_is_made_by_the_first(
    tmp_path: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    text = EXPERIMENT.replace("stages: [count, again, train, report]", "stages: [encode, train, report]")
    desk = Desk(tmp_path, capsys, text + ENCODE)
    said = desk.submit("--array", "seed=1,2", "--array", "data.table=tables/a,tables/b")
    assert "tiny-seed-2-table-tables-a: its table is that of tiny-seed-1-table-tables-a" in said
    assert desk.jobs("tiny-seed-1-table-tables-a") == [
        ("encode", "101", None),
        ("train", "103_0", "afterok:101:102"),
        ("report", "104", "afterok:103_0"),
    ]
    assert desk.jobs("tiny-seed-2-table-tables-b") == [
        ("train", "103_3", "afterok:101:102"),
        ("report", "107", "afterok:103_3"),
    ]


def test_where_requeue_is_forbidden_each_element_has_its_own_chain(desk: Desk) -> None:
    desk.submit("--array", "seed=1,2", "--stages", "train,report", "--set", "requeue=false", "--set", "chain=2")
    assert desk.jobs("tiny-seed-2") == [
        ("train", "101_1", None),
        ("train", "102_1", "aftercorr:101"),
        ("report", "104", "afterok:102_1"),
    ]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--array", "train.ranks=2,4"], "the trainings of 'tiny-ranks-2' (1 nodes x 2 processes of 1 threads) and 'tiny-ranks-4' (2 nodes x 2 processes of 1 threads) are not of one size, as elements of an array must be; submit them separately"),
        (["--array", "seed=1,2,3", "--set", "max_array=2"], "3 runs do not fit into one array of this cluster (max_array = 2); submit fewer at a time"),
        (["--array", "train.global_batch=0,16"], "train.global_batch"),
        (["--array", "seed=1,2", "--stages", "trian"], "has no stage 'trian'"),
    ],
)  # fmt: skip
def test_refused_before_the_queue(desk: Desk, fake: FakeSlurm, words: list[str], sentence: str) -> None:
    said = desk.submit("--stages", "train", *words, code=2)
    assert sentence in said
    assert not [asked for asked in fake.asked("sbatch") if not asked.startswith("--test-only")]


def test_what_sbatch_refuses_takes_back_what_was_queued(desk: Desk, fake: FakeSlurm) -> None:
    fake.refuse("job-name=tiny-seed-2.report")
    said = desk.submit("--array", "seed=1,2", code=2)
    assert "sbatch refused a job of the array 'tiny': " in said and "Invalid account" in said
    assert fake.asked("scancel") == ["101 102 103 104 105 106"]


def test_the_folder_of_the_array_gets_the_group_of_the_profile(desk: Desk) -> None:
    name = grp.getgrgid(os.getgid()).gr_name
    desk.submit("--array", "seed=1,2", "--stages", "train", "--set", f"group={name}", "--set", "umask='027'")
    folder = desk.root / "arrays" / "tiny" / "0001" / "slurm" / "submitted"
    assert folder.stat().st_gid == os.getgid() and folder.stat().st_mode & stat.S_ISGID
    assert folder.stat().st_mode & 0o7 == 0
    assert desk.run("tiny-seed-2").logs.stat().st_mode & stat.S_ISGID


def test_secrets_reach_neither_the_runs_nor_the_folder_of_the_array(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t-of-mine")
    desk.submit("--array", "seed=1,2")
    files = [path for path in desk.root.rglob("*") if path.is_file()]
    assert len(files) > 20 and not [path for path in files if b"s3cr3t-of-mine" in path.read_bytes()]


def test_only_runs_that_want_training_are_in_the_array(desk: Desk) -> None:
    """The same command again: what is done is left out, whatever element it was."""
    desk.submit("--array", "seed=1,2,3", "--stages", "train")
    trained(desk.run("tiny-seed-2"))
    said = desk.submit("--array", "seed=1,2,3", "--stages", "train")
    assert "tiny-seed-2: train      done already, at 64 images" in said
    assert [desk.jobs(f"tiny-seed-{seed}")[0][1] for seed in (1, 2, 3)] == ["102_0", "101_1", "102_1"]
    assert len(records.read(desk.run("tiny-seed-2"))) == 1
    assert (desk.root / "arrays" / "tiny" / "0002" / "1").resolve() == desk.run("tiny-seed-3").path


# ---------------------------------------------------------------- the other commands


def test_commands_know_an_element_as_the_runs_own_job(desk: Desk, fake: FakeSlurm) -> None:
    desk.submit("--array", "seed=1,2", "--stages", "train,report")
    desk.queue(fake, "101_0|RUNNING", "101_1|PENDING")
    assert "job 101_0    train: running; on n1" in desk.type("status", "tiny-seed-1")
    assert "job 101_1    train: pending; waits for free nodes" in desk.type("status", "tiny-seed-2")
    assert "run 'tiny-seed-2' is submitted already: job 101_1 (train)" in desk.type("resume", "tiny-seed-2", code=2)
    before = len(fake.asked("squeue"))
    assert "'tiny-seed-1' is submitted already: job 101_0" in desk.submit("--array", "seed=1,2", code=2)
    assert len(fake.asked("squeue")) == before + 1, "one look at the queue, for any number of runs"
    assert "SIGTERM to the tasks of tiny.train (101_0, on n1)" in desk.type("preempt", "tiny-seed-1")
    assert "cancelling tiny.train (101_1, pending)" in desk.type("cancel", "tiny-seed-2")
    assert fake.asked("scancel") == ["--signal=TERM 101_0", "101_1"]
    assert not desk.run("tiny-seed-1").stop_file.exists()


def test_one_run_of_an_array_goes_on_alone(desk: Desk) -> None:
    desk.submit("--array", "seed=1,2", "--stages", "train,report")
    said = desk.type("resume", "tiny-seed-2", "--cluster", "lab", "--stages", "train")
    assert "submitted  train: job 104, 2 nodes x 2 processes" in said
    assert [each.number for each in records.read(desk.run("tiny-seed-2"))] == [1, 2]
    assert [each.number for each in records.read(desk.run("tiny-seed-1"))] == [1]


def test_what_waits_for_an_element_says_so(desk: Desk, fake: FakeSlurm) -> None:
    desk.submit("--array", "seed=1,2", "--stages", "train,report")
    run = desk.run("tiny-seed-1")
    fake.answer("squeue", f"102|102|PENDING|Dependency|N/A|N/A|x|low||tiny-seed-1.report|{run.path}\n")
    fake.answer("sacct", "101_0|102|COMPLETED|0:0|a|b|n1\n101_1|101|FAILED|75:0|a|b|n1\n")
    said = desk.type("status", "tiny-seed-1")
    assert "job 101_0    train: done" in said and "job 102      report: pending; waits for train" in said
    assert "job 101_1    train: failed with code 75" in desk.type("status", "tiny-seed-2")


def test_a_job_of_another_array_is_not_ours(desk: Desk, fake: FakeSlurm) -> None:
    desk.submit("--array", "seed=1,2", "--stages", "train")
    fake.answer("squeue", "101_0|1|RUNNING|None|N/A|N/A|x|low|n1|b.train|/elsewhere/arrays/b/0001\n")
    assert "nothing of run 'tiny-seed-1' is queued or at work" in desk.type("cancel", "tiny-seed-1", code=2)


def test_logs_of_an_element(desk: Desk) -> None:
    desk.submit("--array", "seed=1,2", "--stages", "train")
    run = desk.run("tiny-seed-2")
    for name in ("101_1", "101_1_0", "101_1_3"):
        (run.logs / f"{name}.log").write_text(f"of {name}\n")
    assert [(log.stage, log.what, log.script) for log in logs.find(run)] == [
        ("train", "batch script of job 101_1", True),
        ("train", "process 0 of job 101_1", False),
        ("train", "process 3 of job 101_1", False),
    ]
    assert "of 101_1_3" in desk.type("logs", "tiny-seed-2", "--task", "3")


def test_the_experiment_says_nothing_of_the_array(desk: Desk) -> None:
    """A run of an array is the run that its keys make, wherever they come from."""
    desk.submit("--array", "seed=1,2", "--stages", "train")
    alone = run_setup.typed(loader.loads(EXPERIMENT, ["seed=2", "name=tiny-seed-2"]))
    assert run_setup.load_run(desk.run("tiny-seed-2")).identity == alone.identity
