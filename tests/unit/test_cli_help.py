"""The command line: help with an example everywhere, no torch for it, errors as one sentence and an exit code."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from hpc_gen import cli, cli_errors
from hpc_gen.config.errors import ConfigError
from hpc_gen.runtime.errors import DataError, DivergedError, FencedError, UserError

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = "job_configs/demo/mnist16.yaml"


def commands() -> dict[str, object]:
    """Every command by its words, with its click object."""
    found: dict[str, object] = {}

    def walk(group: object, words: list[str]) -> None:
        for name, command in group.commands.items():  # type: ignore[attr-defined]
            if hasattr(command, "commands"):
                walk(command, [*words, name])
            else:
                found[" ".join([*words, name])] = command

    walk(typer.main.get_command(cli.app), [])
    return found


COMMANDS = commands()
CHANGING = ["demo", "run", "stage", "encode", "train", "sample", "evaluate", "report", "preempt", "resume", "shards fetch",
            "shards index", "shards convert", "shards split", "shards join", "shards stats", "weights fetch", "weights import", "weights export", "metrics stats",
            "checkpoints convert", "checkpoints prune", "prove-resume",
            "fork", "gc", "sweep", "lab start", "lab stop", "submit", "containers build", "cancel", "bank import", "bank export",
            "bank append", "knowledge external", "knowledge internal", "track sync"]  # fmt: skip


def call(*arguments: str, cwd: Path = REPOSITORY, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "100", **environment}
    return subprocess.run(
        [sys.executable, "-m", "hpc_gen.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        check=False,
    )


def test_all_commands_are_there() -> None:
    assert set(COMMANDS) == {
        "demo", "run", "stage", "encode", "train", "sample", "evaluate", "report", "status", "preempt", "resume", "doctor",
        "config show", "config schema", "shards fetch", "shards info", "shards rows", "shards verify", "weights fetch",
        "shards index", "shards convert", "shards split", "shards join", "shards stats", "weights list", "weights verify", "weights import", "weights export",
        "checkpoints list", "checkpoints verify", "checkpoints convert", "checkpoints prune", "prove-resume",
        "metrics stats", "metrics show", "sweep", "fork", "compare", "gc", "lab start", "lab stop", "lab status", "submit",
        "containers build", "containers check", "logs", "cancel", "bank import", "bank export", "bank append", "bank nearest",
        "knowledge external", "knowledge internal", "spans", "track sync",
    }  # fmt: skip


@pytest.mark.parametrize("words", COMMANDS)
def test_help_has_an_example_that_parses(words: str) -> None:
    command = COMMANDS[words]
    assert command.help and command.help.split("\n")[0].endswith(".")  # type: ignore[attr-defined]
    epilog = command.epilog or ""  # type: ignore[attr-defined]
    examples = [line.strip() for line in epilog.splitlines() if "hpc-gen " in line or "hpc_gen.cli" in line]
    assert examples, f"{words} has no example"
    for example in examples:
        arguments = shlex.split(example.partition("hpc_gen.cli ")[2] or example.removeprefix("hpc-gen "))
        assert arguments[: len(words.split())] == words.split()
        command.make_context(words, arguments[len(words.split()) :])  # type: ignore[attr-defined]


def test_commands_that_change_something_have_a_dry_run() -> None:
    have = [words for words, command in COMMANDS.items() if any(p.name == "dry_run" for p in command.params)]  # type: ignore[attr-defined]
    assert sorted(have) == sorted(CHANGING)


def test_help_shows_all_commands_whole() -> None:
    done = call("--help", COLUMNS="80")
    assert done.returncode == 0
    assert "..." not in done.stdout.partition("Commands:")[2]
    assert "hpc-gen demo" in done.stdout


def test_examples_are_not_broken_over_lines() -> None:
    done = call("run", "--help", COLUMNS="60")
    assert "    hpc-gen run job_configs/demo/mnist16.yaml name=quick train.total_images=6400 --dry-run" in done.stdout


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["config", "schema"], ["status", "nothing-here"]]
)
def test_starts_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom hpc_gen import cli, cli_errors\n"
        "cli_errors.exit_code_of(lambda: cli.app(sys.argv[1:], standalone_mode=False), sys.argv[1:])\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\nprint('light')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    assert done.stdout.endswith("light\n"), done.stderr


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("no"), 2),
        (ConfigError("f:1: no"), 2),
        (DataError("no"), 64),
        (DivergedError("no"), 75),
        (FencedError("no"), 87),
        (KeyboardInterrupt(), 87),
    ],
    ids=lambda value: type(value).__name__,
)
def test_error_is_one_sentence_and_a_code(error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise error

    assert cli_errors.exit_code_of(command, []) == code
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("hpc-gen: ") and captured.err.count("\n") == 1


def test_exit_code_of_a_command_is_kept() -> None:
    def leave() -> None:
        raise typer.Exit(85)

    assert cli_errors.exit_code_of(leave, []) == 85
    assert cli_errors.exit_code_of(lambda: 85, []) == 85
    assert cli_errors.exit_code_of(lambda: None, []) == 0


def test_our_mistake_goes_into_the_logs_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "runs" / "toy"
    (run / "logs").mkdir(parents=True)
    (run / "config.yaml").write_text("name: toy\n")

    def broken() -> None:
        raise ZeroDivisionError("oh")

    assert cli_errors.exit_code_of(broken, ["train", str(run)]) == 70
    (log,) = (run / "logs").iterdir()
    sentence = capsys.readouterr().err
    assert sentence == (
        f"hpc-gen: unexpected ZeroDivisionError: oh; this is a mistake of hpc-gen, its traceback is in {log}\n"
    )
    assert "Traceback" in log.read_text() and "ZeroDivisionError: oh" in log.read_text()


def test_our_mistake_outside_a_run_goes_into_a_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HPC_GEN_WORKSPACE", str(tmp_path))

    def broken() -> None:
        raise ZeroDivisionError("oh")

    assert cli_errors.exit_code_of(broken, ["doctor"]) == 70
    (log,) = tmp_path.glob("hpc-gen-*.log")
    assert str(log) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["runn"], "hpc-gen: No such command 'runn'. Did you mean 'run'? See `hpc-gen --help`"),
        (["run"], "hpc-gen: Missing argument 'CONFIG'; see `hpc-gen run --help`"),
        (["run", "--dry", "x"], "hpc-gen: No such option: --dry"),
        (["run", "no.yaml"], "hpc-gen: experiment file 'no.yaml' cannot be read: No such file or directory"),
        (
            ["run", CONFIG, "train.globl_batch=3"],
            "hpc-gen: command line: unknown key 'train.globl_batch'; did you mean 'train.global_batch'?",
        ),
        (["status", "nope"], "hpc-gen: no run 'nope' as a folder or below "),
        (["preempt", "nope"], "hpc-gen: no run 'nope' as a folder or below "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_use_is_answered_with_one_sentence(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    done = call(*arguments, HPC_GEN_WORKSPACE=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith(sentence), done.stderr
    assert done.stderr.count("\n") == 1


# ---------------------------------------------------------------- commands that need no run


def test_config_show_and_sources() -> None:
    done = call("config", "show", CONFIG, "seed=7", "--sources")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "seed = 7  # command line" in lines
    assert "data.prefetch = 4  # default" in lines
    assert any(line.startswith("train.total_images = ") and f"  # {CONFIG}:" in line for line in lines)
    assert lines[-2].startswith("# identity  ") and lines[-1].startswith("# operation ")


def test_config_schema_is_a_json_schema() -> None:
    schema = json.loads(call("config", "schema", "--json").stdout)
    assert schema["properties"]["train"] and schema["additionalProperties"] is False


def test_dry_run_of_a_run_changes_nothing(tmp_path: Path) -> None:
    done = call("run", CONFIG, "name=quick", "--stages", "train,sample", "--dry-run", HPC_GEN_WORKSPACE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/runs/quick (new)" in done.stdout
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("stage")] == ["train:", "sample:"]
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- pipes and the end of a process


@pytest.mark.parametrize("arguments", ["config schema", "run --help"])
def test_a_reader_that_leaves_is_no_failure(arguments: str) -> None:
    program = f"{sys.executable} -m hpc_gen.cli {arguments}"
    script = f"{{ sleep 0.5; {program}; echo code $? >&2; }} | true"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.stderr == "code 0\n"


def test_work_goes_on_when_nobody_reads_its_lines() -> None:
    code = (
        "import sys\nfrom hpc_gen import cli_errors, cli_parts\n"
        "def work():\n"
        "    for number in range(3):\n        cli_parts.keep_saying(f'stage {number}')\n"
        "    print('worked', file=sys.stderr)\n    return 85\n"
        "cli_errors.guarded(work, [])\n"
    )
    script = "{ sleep 0.2; " + f'{sys.executable} -c "$0"; echo code $? >&2; }} | true'
    done = subprocess.run(["bash", "-c", script, code], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.stderr == "worked\ncode 85\n"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_that_comes_when_the_work_is_done_changes_nothing(name: str) -> None:
    """Python gives signals their defaults before it takes modules apart; __del__ of a module's object comes after."""
    code = (
        "import os, signal\nfrom hpc_gen import cli_errors\nfrom hpc_gen.runtime.stop import StopToken\n"
        "class Late:\n"
        f"    def __del__(self, kill=os.kill, me=os.getpid(), number=signal.{name}):\n        kill(me, number)\n"
        "late = Late()\n"
        "cli_errors.guarded(lambda: StopToken().install(), [])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False)
    assert done.returncode == 0


def test_an_error_of_usage_names_the_help_of_its_command() -> None:
    assert call("containers", "build").stderr == (
        "hpc-gen: Missing argument 'NAME'; see `hpc-gen containers build --help`\n"
    )
