"""The `lab` commands: a real Slurm on this machine, to try submissions and preemptions before a cluster does."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from hpc_gen.cli_parts import DryRun, Json, end, example, say
from hpc_gen.runtime.errors import ExitCode, UserError

lab_app = typer.Typer(
    no_args_is_help=True,
    help="A real Slurm on this machine, to try things.\n\n"
    "For root on Debian: one private directory with a controller, accounting and several nodes; partition low is "
    "preempted by high.",
)

Directory = Annotated[
    Path | None, typer.Option("--directory", "-d", help="Folder of the lab [$SLURM_LAB_DIR, else in /tmp, per user].")
]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.add_typer(lab_app, name="lab")


def _place(given: Path | None) -> Path:
    from slurm import lab

    return given.absolute() if given is not None else lab.default_directory()


@lab_app.command("start", epilog=example("hpc-gen lab start", "hpc-gen lab start --nodes 2 --gpus 0 --grace 30"))
def lab_start(
    directory: Directory = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, max=64, help="Number of nodes.")] = 4,
    gpus: Annotated[int, typer.Option("--gpus", min=0, max=16, help="GPUs that each node claims; none is real.")] = 4,
    grace_s: Annotated[int, typer.Option("--grace", min=1, help="Seconds of grace at a preemption.")] = 10,
    port_base: Annotated[
        int | None, typer.Option("--port-base", help="First of its ports [17000, or the next free ones].")
    ] = None,
    accounting: Annotated[bool, typer.Option("--accounting/--no-accounting", help="With sacct; or quicker.")] = True,
    dry_run: DryRun = False,
) -> None:
    """Start the lab and wait until all its nodes are idle.

    One that runs in the same folder already is replaced, and its jobs end. Nothing outside the folder is changed.
    What is missing is said, with the command that installs it.
    """
    from slurm import lab

    place, reason = _place(directory), lab.why_not()
    if dry_run:
        sacct = "with" if accounting else "without"
        say(f"would start a lab of {nodes} nodes with {gpus} claimed GPUs each, {sacct} accounting, in {place}")
        say(f"it cannot start: {reason}" if reason else "it can start here")
        end(UserError.exit_code if reason else ExitCode.DONE)
    lab.start(place, nodes=nodes, gpus=gpus, grace_s=grace_s, port_base=port_base, accounting=accounting, on_line=say)
    for line in lab.status(place).lines():
        say(line)


@lab_app.command("stop", epilog=example("hpc-gen lab stop", "hpc-gen lab stop --purge"))
def lab_stop(
    directory: Directory = None,
    purge: Annotated[bool, typer.Option("--purge", help="Remove its folder with the logs, too.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Stop the lab and its jobs; other labs and other Slurms go on.

    Its folder with the logs of all daemons stays, unless --purge is given.
    """
    from slurm import lab

    place = _place(directory)
    if dry_run:
        found = lab.status(place)
        jobs = sum(found.jobs.values())
        what = f"would stop it, {jobs} jobs end{', its folder is removed' if purge else ''}"
        say(f"lab in {place}: {what}" if found.daemons else f"no lab in {place}")
        return
    if not lab.stop(place, purge=purge):
        raise UserError(f"there is no lab in {place}; give its folder with --directory")
    say(f"stopped the lab in {place}{' and removed its folder' if purge else ''}")


@lab_app.command("status", epilog=example("hpc-gen lab status", "hpc-gen lab status --json"))
def lab_status(directory: Directory = None, json: Json = False) -> None:
    """What lives of the lab: daemons, nodes, jobs.

    Ends with code 0 when it runs, 2 when it does not.
    """
    from slurm import lab

    found = lab.status(_place(directory))
    if json:
        facts = {"directory": str(found.directory), "running": found.running, "daemons": dict(found.daemons)}
        say(json_module.dumps({**facts, "nodes": dict(found.nodes), "jobs": dict(found.jobs)}, indent=1))
    else:
        for line in found.lines():
            say(line)
    end(ExitCode.DONE if found.running else UserError.exit_code)
