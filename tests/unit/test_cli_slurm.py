"""The commands that speak with Slurm, as they are typed: submit, resume, status, logs, cancel, preempt, doctor, run."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_slurm import EXPERIMENT, FakeSlurm

from hpc_gen import cli, cli_errors, cli_slurm
from hpc_gen.runtime.run_folder import RunFolder
from slurm import records


class Desk:
    """A workspace with an experiment, and commands typed in it."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self._capsys = root / "w", capsys
        self.root.mkdir()
        self.config = root / "tiny.yaml"
        self.config.write_text(EXPERIMENT)
        (root / "own.yaml").write_text("tasks_per_node: 2\nnotice_s: 60\npartition: ${MY_PARTITION}\n")
        self.own = str(root / "own.yaml")
        self.run = RunFolder(self.root / "runs" / "tiny")

    def type(self, *words: str, code: int = 0) -> str:
        """What a command printed; it must end with `code`."""
        self._capsys.readouterr()
        given = [*words, "-w", str(self.root)]
        ended = cli_errors.exit_code_of(lambda: cli.app(given, prog_name="hpc-gen", standalone_mode=False), given)
        out, err = self._capsys.readouterr()
        assert ended == code, f"{words} ended with {ended}:\n{out}{err}"
        return out + err


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    found = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{found.path}:/usr/bin:/bin")
    monkeypatch.setenv("MY_PARTITION", "low")
    return found


@pytest.fixture
def desk(tmp_path: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> Desk:
    return Desk(tmp_path, capsys)


def queue(desk: Desk, fake: FakeSlurm, *lines: str) -> None:
    """What squeue answers: id|state|name."""
    parts = [line.split("|") for line in lines]
    fake.answer(
        "squeue",
        "".join(f"{i}|1|{state}|Resources|N/A|N/A|x|low|n1|tiny.{name}|{desk.run.path}\n" for i, state, name in parts),
    )


def test_submit_status_cancel_resume(desk: Desk, fake: FakeSlurm) -> None:
    said = desk.type("submit", str(desk.config), "--cluster", "lab")
    assert "submitted  train: job 103, after 102, 2 nodes x 2 processes" in said
    assert said.endswith("watch it: hpc-gen status tiny --watch\n")
    queue(desk, fake, "103|RUNNING|train", "104|PENDING|report")
    assert "job 104      report: pending; waits for free nodes" in desk.type("status", "tiny")
    assert "is submitted already" in desk.type("submit", str(desk.config), "--cluster", "lab", code=2)
    assert "is submitted already" in desk.type("resume", "tiny", code=2)
    assert "is submitted already" in desk.type("run", str(desk.config), code=2)
    assert "sending SIGTERM to the tasks of tiny.train (103, on n1)" in desk.type("preempt", "tiny")
    assert "cancelling tiny.report (104, pending)" in desk.type("cancel", "tiny")
    assert fake.asked("scancel") == ["--signal=TERM 103", "104"] and desk.run.stop_file.exists()
    fake.answer("squeue", "")
    said = desk.type("resume", "tiny", "--cluster", "lab", "--stages", "train,report", "train.ranks=2")
    assert "submitted  train: job 105, 1 node x 2 processes" in said and not desk.run.stop_file.exists()
    assert [each.number for each in records.read(desk.run)] == [1, 2]


def test_nodes_set_the_ranks(desk: Desk) -> None:
    said = desk.type("submit", str(desk.config), "--cluster", desk.own, "--nodes", "4", "--stages", "train")
    assert "4 nodes x 2 processes" in said
    assert "ranks: 8" in desk.run.config_path.read_text()


def test_settings_and_variables_of_the_profile(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    said = desk.type("submit", str(desk.config), "-c", desk.own, "--set", "partition=nope", "--dry-run", code=2)
    assert "the cluster has no partition 'nope'; it has low, high" in said
    monkeypatch.delenv("MY_PARTITION")
    said = desk.type("submit", str(desk.config), "-c", desk.own, code=2)
    assert "'partition' needs the environment variable MY_PARTITION" in said
    assert not desk.run.path.exists(), "what is refused leaves no run behind"


def test_a_dry_run_prints_scripts_and_makes_no_run(desk: Desk) -> None:
    said = desk.type("submit", str(desk.config), "--cluster", "lab", "--dry-run")
    assert said.count("#!/bin/bash") == 4 and "Slurm says    train: Job 1 to start" in said
    assert not desk.run.path.exists()
    desk.type("submit", str(desk.config), "--cluster", "lab", "--stages", "count")
    before = sorted(desk.run.path.rglob("*"))
    assert "would submit  again" in desk.type("resume", "tiny", "--cluster", "lab", "--stages", "again", "--dry-run")
    assert sorted(desk.run.path.rglob("*")) == before


def test_without_slurm_a_dry_run_says_so(desk: Desk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    said = desk.type("submit", str(desk.config), "--cluster", "lab", "--dry-run")
    assert said.endswith(
        "not asked     Slurm is not on this machine, so nobody has checked whether it would take these jobs\n"
    )
    said = desk.type("submit", str(desk.config), "--cluster", "lab", code=2)
    assert "is not on PATH, so nothing can be submitted from here" in said


def test_what_needs_the_network_is_fetched_where_it_is_submitted(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    from shard_tools import fetch

    fetched: list[str] = []
    monkeypatch.setattr(fetch, "fetch", lambda name, root, say: fetched.append(name))
    demo = str(Path(__file__).resolve().parents[2] / "job_configs" / "demo" / "mnist16.yaml")
    desk.type("submit", demo, "--cluster", "lab", "--dry-run")
    assert fetched == []
    desk.type("submit", demo, "--cluster", "lab", "--stages", "sample")
    assert fetched == []
    desk.type("submit", demo, "--cluster", "lab", "--stages", "encode,evaluate")
    assert fetched == ["mnist", "inception"]


def test_logs(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.type("submit", str(desk.config), "--cluster", "lab", "--stages", "train")
    assert "has no logs yet" in desk.type("logs", "tiny", code=2)
    (desk.run.logs / "101.log").write_text("begun\n")
    (desk.run.logs / "101_0.log").write_text("\n".join(f"line {i}" for i in range(50)))
    said = desk.type("logs", "tiny", "--lines", "2")
    assert said.splitlines()[0].startswith("==> train, batch script of job 101: ")
    assert said.splitlines()[-2:] == ["line 48", "line 49"]
    assert "process 0 of job 101" in desk.type("logs", "tiny", "--list")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("slurm.logs.follow", interrupt)
    desk.type("logs", "tiny", "--follow")


def test_doctor_of_a_cluster(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpc_gen.runtime.doctor.examine", lambda root, say: [])
    said = desk.type("doctor", "--cluster", desk.own, "--set", "partition=high")
    assert "ok      partition            high: 2 nodes of 8 CPUs, up to 60 min" in said
    assert "MISSING profile" in desk.type("doctor", "--cluster", "labb", code=2)


def test_a_run_that_slurm_knows_nothing_of(desk: Desk) -> None:
    assert cli_slurm.jobs_of(None) is None and cli_slurm.jobs_of(desk.run) is None
    assert "no run 'tiny'" in desk.type("cancel", "tiny", code=2)


def test_a_mistyped_stage_changes_nothing(desk: Desk, fake: FakeSlurm) -> None:
    config = str(desk.config)
    for words in (["run", config], ["submit", config, "--cluster", desk.own]):
        assert "has no stage 'trian'" in desk.type(*words, "--stages", "trian", code=2)
        assert not desk.run.exists()
    desk.type("submit", config, "--cluster", desk.own, "--stages", "train")
    before = desk.run.config_path.read_bytes()
    words = ["train.log_every=64", "--stages", "trian"]
    for more in ([], ["--cluster", desk.own]):
        assert "has no stage 'trian'" in desk.type("resume", "tiny", *words, *more, code=2)
    assert "has no stage 'trian'" in desk.type("run", config, *words, code=2)
    assert desk.run.config_path.read_bytes() == before


def test_a_dry_run_tells_what_it_would_change_in_a_run(desk: Desk, fake: FakeSlurm) -> None:
    config = str(desk.config)
    desk.type("submit", config, "--cluster", desk.own, "--stages", "train")
    before = desk.run.config_path.read_bytes()
    words = ["seed=8", "--stages", "report,train", "--dry-run"]  # in the order of the experiment all the same
    said = desk.type("submit", config, "--cluster", desk.own, *words)
    assert "would change  run 'tiny' has no checkpoint yet" in said and "seed (0 -> 8)" in said
    assert said.index("tiny.train") < said.index("tiny.report")
    assert desk.run.config_path.read_bytes() == before
