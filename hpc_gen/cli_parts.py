"""What the modules of the command line share: arguments that mean the same everywhere, printing, and ending."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hpc_gen.runtime import env

Workspace = Annotated[
    Path | None,
    typer.Option("--workspace", "-w", help="Folder of runs, tables and downloads [$HPC_GEN_WORKSPACE, else here]."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would happen and change nothing.")]
Json = Annotated[bool, typer.Option("--json", help="For other programs.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="Path of a run folder, or a name below WORKSPACE/runs.")]
TableFolder = Annotated[str, typer.Argument(metavar="TABLE", help="Folder of a table, relative to WORKSPACE.")]
Config = Annotated[str, typer.Argument(metavar="CONFIG", help="Experiment file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY.PATH=VALUE", help="Keys that replace those of the file.", show_default=False),
]
WorldSize = Annotated[
    int | None,
    typer.Option("--world-size", min=1, help="With --dry-run: bytes per rank and FLOPs of training on so many ranks."),
]
Stages = Annotated[str | None, typer.Option("--stages", help="Only these stages, as in train,sample.")]


def say(line: str = "") -> None:
    """Print one line at once, also into a pipe."""
    typer.echo(line)


def keep_saying(line: str = "") -> None:
    """`say` for work that goes on when nobody reads its lines any more (`hpc-gen run CONFIG | head`)."""
    try:
        say(line)
    except BrokenPipeError:
        drop_output()


def drop_output() -> None:
    """From here on stdout leads nowhere: its reader is gone, and what is still buffered must not fail at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def stage_names(stages: str | None) -> list[str] | None:
    """The names of --stages; None: all."""
    return [name for name in stages.split(",") if name] if stages else None


def example(*commands: str) -> str:
    """Text below the options; the backspace keeps click from filling the lines."""
    return "\b\nExample:\n" + "\n".join(f"  {command}" for command in commands)


def workspace_of(given: Path | None) -> Path:
    """The workspace of a command."""
    return given.absolute() if given is not None else env.workspace()


def run_of(text: str, workspace: Path | None) -> Any:
    """The run folder that an argument means. Raises UserError naming the nearest."""
    from hpc_gen.stages.control import find_run

    return find_run(text, workspace_of(workspace))


def end(code: int) -> None:
    """Leave with an exit code that a batch script can decide by."""
    raise typer.Exit(int(code))


def report_problems(what: str, problems: list[str]) -> None:
    """Print problems and a last line, and end with the code that says whether there were any."""
    from hpc_gen.runtime.errors import ExitCode
    from hpc_gen.runtime.progress import count

    for problem in problems:
        say(problem)
    say(f"{what}: {count(len(problems), 'problem')}" if problems else f"{what}: whole")
    end(ExitCode.DATA if problems else ExitCode.DONE)


def print_json(value: Any) -> None:
    """Print a value for other programs."""
    import json

    say(json.dumps(value, indent=1, default=str))
