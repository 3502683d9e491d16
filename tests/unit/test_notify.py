"""The notification at the end of a stage: what it is told, when, and that its failure is harmless."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from experiments import LINEAR, Workspace, make_workspace

from hpc_gen.config import loader
from hpc_gen.config.errors import ConfigError
from hpc_gen.runtime import clock, journal
from hpc_gen.runtime.errors import DataError, ExitCode, UserError
from hpc_gen.runtime.notify import notify, outcome
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import ending, run_setup, runner

WRITE = "import json, os, sys; open(sys.argv[1], 'a').write(json.dumps({k: v for k, v in os.environ.items() if k.startswith('HPC_GEN_')}) + '\\n')"


def teller(path: Path) -> list[str]:
    """A command that writes down what it was told."""
    return [sys.executable, "-c", WRITE, str(path)]


def heard(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def configured(tmp_path: Path, command: list[str] | None = None, on: str = "", text: str = LINEAR) -> RunFolder:
    run = Workspace(tmp_path).run(
        "toy", f"notify.command={json.dumps(command or teller(tmp_path / 'heard'))}", *([on] if on else []), text=text
    )
    return run


def ended(run: RunFolder, code: int, cause: str, stage: str = "train", number: int = 1) -> None:
    book = journal.Journal(run, number, stage)
    book.event("attempt_start", world_size=1, rank=0)
    book.event("attempt_end", exit_code=code, cause=cause)
    book.close()


# --- the command


def test_what_the_command_is_told(tmp_path: Path) -> None:
    assert notify(teller(tmp_path / "heard"), tmp_path / "runs" / "toy", "train", 85, "SIGTERM; $(x) `y`\0") is None
    [told] = heard(tmp_path / "heard")
    expected = {
        "HPC_GEN_RUN": str(tmp_path / "runs" / "toy"),
        "HPC_GEN_STAGE": "train",
        "HPC_GEN_OUTCOME": "requeued",
        "HPC_GEN_EXIT_CODE": "85",
        "HPC_GEN_MESSAGE": "SIGTERM; $(x) `y` ",
    }
    assert {key: told[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("code", "word"),
    [(0, "done"), (2, "failed"), (64, "failed"), (70, "failed"), (75, "diverged"), (85, "requeued"), (86, "requeued"),
     (87, "stopped"), (137, "failed"), (-9, "failed")],
)  # fmt: skip
def test_one_word_for_each_ending(code: int, word: str) -> None:
    assert outcome(code) == word


def test_failures_are_told_and_not_raised(tmp_path: Path) -> None:
    assert notify(["/nowhere/program"], tmp_path, "train", 0, "") == (
        "'/nowhere/program' cannot be started: [Errno 2] No such file or directory: '/nowhere/program'"
    )
    said = notify([sys.executable, "-c", "import sys; print('no route'); sys.exit(3)"], tmp_path, "train", 0, "")
    assert said == f"'{sys.executable}' ended with code 3: no route"


def test_a_command_that_hangs_is_killed_with_all_it_started(tmp_path: Path) -> None:
    child = f"import time; time.sleep(2); open({str(tmp_path / 'late')!r}, 'w')"
    hang = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    begun = clock.monotonic()
    assert notify([sys.executable, "-c", hang], tmp_path, "train", 0, "", limit_s=1.0) == (
        f"'{sys.executable}' was killed after 1 s"
    )
    assert clock.monotonic() - begun < 20
    clock.sleep(2.5)
    assert not (tmp_path / "late").exists()


# --- when


def test_outcomes_that_nobody_wants_to_hear_of(tmp_path: Path) -> None:
    run = configured(tmp_path, on="notify.on=[diverged, failed]")
    resolved = run_setup.load_run(run)
    for code in (0, 85, 87):
        ending.tell(run, resolved, "train", code)
    assert heard(tmp_path / "heard") == []
    ended(run, 75, "loss was NaN 8 times")
    ending.tell(run, resolved, "train", 75)
    [told] = heard(tmp_path / "heard")
    assert (told["HPC_GEN_OUTCOME"], told["HPC_GEN_MESSAGE"]) == ("diverged", "loss was NaN 8 times")


def test_a_kill_and_the_cause_of_another_stage(tmp_path: Path) -> None:
    run = configured(tmp_path)
    ended(run, 0, "done", "encode")
    ending.tell(run, run_setup.load_run(run), "train", 137)
    [told] = heard(tmp_path / "heard")
    assert told["HPC_GEN_MESSAGE"] == "train ended with code 137" and told["HPC_GEN_OUTCOME"] == "failed"


def test_without_the_section_nobody_is_told(tmp_path: Path) -> None:
    run = Workspace(tmp_path).run("toy", text=LINEAR)
    ended(run, 0, "done")
    before = [event.kind for event in journal.read(run)]
    ending.tell(run, run_setup.load_run(run), "train", 0)
    assert [event.kind for event in journal.read(run)] == before == ["attempt_start", "attempt_end"]


def test_a_failing_notification_is_journaled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = configured(tmp_path, ["/nowhere/program"])
    ended(run, 0, "done")
    ending.tell(run, run_setup.load_run(run), "train", 0)
    fault = journal.read(run)[-1]
    assert fault.kind == "fault" and fault.fields["what"] == "notification failed"
    assert "'/nowhere/program' cannot be started" in fault.fields["detail"]
    assert "train: the notification failed: '/nowhere/program'" in capsys.readouterr().err
    [attempt] = journal.attempts(run)
    assert attempt.exit_code == 0 and attempt.cause == "done"


# --- by whom


def test_the_runner_tells_once_per_stage_and_its_code_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = configured(tmp_path)
    codes = {"train": 0, "report": 70}
    monkeypatch.setattr(runner, "launch_stage", lambda run, resolved, name: codes[name])
    assert runner.run_stages(run, None, lambda line: None) == 70
    told = heard(tmp_path / "heard")
    assert [(each["HPC_GEN_STAGE"], each["HPC_GEN_EXIT_CODE"]) for each in told] == [("train", "0"), ("report", "70")]


@pytest.mark.parametrize(("rank", "times"), [("0", 1), ("1", 0)])
def test_rank_0_of_a_lone_training_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str, times: int
) -> None:
    run = configured(tmp_path)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(runner, "_stage_body", lambda run, resolved, name, stop: (87, True))
    monkeypatch.setattr(runner.StopToken, "install", lambda self: None)
    assert runner.run_stage(run, "train") == 87
    assert [each["HPC_GEN_OUTCOME"] for each in heard(tmp_path / "heard")] == ["stopped"] * times


def test_a_process_of_the_runner_keeps_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = configured(tmp_path)
    monkeypatch.setenv(ending.RUNNER, "1")
    monkeypatch.setattr(runner, "_stage_body", lambda run, resolved, name, stop: (0, True))
    monkeypatch.setattr(runner.StopToken, "install", lambda self: None)
    assert runner.run_stage(run, "train") == 0 and heard(tmp_path / "heard") == []


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [(DataError("shard 3 is cut off"), "64", "shard 3 is cut off"), (KeyError("x"), "70", "unexpected KeyError: 'x'")],
)
def test_an_error_is_told_with_its_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str, message: str
) -> None:
    run = configured(tmp_path)

    def fail(*given: object) -> tuple[int, bool]:
        raise error

    monkeypatch.setattr(runner, "_stage_body", fail)
    monkeypatch.setattr(runner.StopToken, "install", lambda self: None)
    with pytest.raises(type(error)):
        runner.run_stage(run, "train")
    [told] = heard(tmp_path / "heard")
    assert (told["HPC_GEN_EXIT_CODE"], told["HPC_GEN_MESSAGE"]) == (code, message)


def test_a_real_stage_tells_of_its_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_workspace(tmp_path)
    text = LINEAR + "extra_stages: {odd: {worker: 'nowhere:make'}}\n"
    run = configured(tmp_path, text=text)
    monkeypatch.setattr(runner.StopToken, "install", lambda self: None)
    with pytest.raises(UserError):
        runner.run_stage(run, "odd")
    [told] = heard(tmp_path / "heard")
    assert (
        told["HPC_GEN_EXIT_CODE"] == "2"
        and "'nowhere:make' of stage 'odd' cannot be imported" in told["HPC_GEN_MESSAGE"]
    )
    [attempt] = journal.attempts(run)
    assert attempt.exit_code == ExitCode.USER and "cannot be imported" in str(attempt.cause)


# --- the section


def test_the_section_is_operation_and_checked() -> None:
    plain, told = loader.loads(LINEAR), loader.loads(LINEAR, ["notify.command=[mail, me]"])
    assert plain.identity == told.identity and plain.operation != told.operation
    for wrong, message in (
        ("notify.command=[]", "'notify.command'"),
        ("notify.command=mail", "'notify.command' must be a list"),
        ("notify={command: [a], on: [dnoe]}", "done"),
    ):
        with pytest.raises(ConfigError, match=message):
            loader.loads(LINEAR, [wrong])
