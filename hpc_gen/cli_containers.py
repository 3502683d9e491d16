"""The `containers` commands: what the images are made of is checked anywhere, and built where it can be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hpc_gen.cli_parts import DryRun, end, example, say
from hpc_gen.runtime.errors import ExitCode, UserError

containers_app = typer.Typer(no_args_is_help=True, help="Apptainer images: check and build them.")


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.add_typer(containers_app, name="containers")


@containers_app.command(
    "build",
    epilog=example(
        "hpc-gen containers build cpu", "hpc-gen containers build gh200 --output $SCRATCH/gh200.sif --dry-run"
    ),
)
def containers_build(
    name: Annotated[str, typer.Argument(metavar="NAME", help="cpu, a100 or gh200.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Image to write [images/NAME.sif].")] = None,
    argument: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Replaces one of the definition's %arguments, as base=...."),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Build an image from its definition.

    cpu: from a Debian tree that is made here and the packages of this environment; as root on Debian, about a minute.
    a100, gh200: from the vendor's PyTorch, on a node of that kind; these two could not be tried by this project.
    """
    from slurm import containers

    given: dict[str, str] = {}
    for each in argument or []:
        key, mark, value = each.partition("=")
        if not mark:
            raise UserError(f"--set {each} has no value; write it as in base=IMAGE")
        given[key] = value
    image = (output or Path("images") / f"{name}.sif").absolute()
    if not dry_run:
        containers.build(name, image, say, given)
        return
    definition = containers.read(name)
    shown = {"tree": "TREE", "machine": "MACHINE", **given} if name == containers.CPU else given
    say(f"in {containers.FOLDER}: {' '.join(containers.command(definition, image, shown))}")
    reason = containers.why_not(definition)
    say(f"it cannot be built here: {reason}" if reason else "nothing speaks against building it here")
    end(UserError.exit_code if reason else ExitCode.DONE)


@containers_app.command(
    "check", epilog=example("hpc-gen containers check", "hpc-gen containers check cpu --image images/cpu.sif")
)
def containers_check(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="cpu, a100 or gh200 [all].")] = None,
    image: Annotated[Path | None, typer.Option("--image", help="Also a built image: its age, machine, %test.")] = None,
) -> None:
    """Look for mistakes in definitions, and in an image.

    Sections, syntax of the scripts (with shellcheck where it is installed), versions against pyproject.toml. Ends with
    code 64 when something is wrong.
    """
    from slurm import containers

    if image is not None and name is None:
        raise UserError("say which definition the image is of, as in: hpc-gen containers check cpu --image FILE")
    found = 0
    for each in [name] if name is not None else containers.names():
        definition = containers.read(each)
        wrong = containers.problems(definition)
        if image is not None:
            wrong += containers.image_problems(image.absolute(), each)
        reason = containers.why_not(definition)
        for line in wrong:
            say(line)
        tried = "it is built by the tests" if each == containers.CPU else "building it was never tried"
        here = f"it cannot be built here: {reason}" if reason else tried
        say(f"{each}: {len(wrong)} problems" if wrong else f"{each}: sound; {here}")
        found += len(wrong)
    end(ExitCode.DATA if found else ExitCode.DONE)
