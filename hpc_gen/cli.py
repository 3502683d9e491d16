"""The command line. One command, every heavy import inside the command that needs it: `--help` starts no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hpc_gen import cli_bank, cli_containers, cli_daily, cli_lab, cli_prove, cli_slurm, cli_sweep, cli_watch
from hpc_gen.cli_checkpoints import checkpoints_app
from hpc_gen.cli_metrics import metrics_app
from hpc_gen.cli_parts import (
    Config,
    DryRun,
    Json,
    Overrides,
    Run,
    Stages,
    Workspace,
    WorldSize,
    end,
    example,
    keep_saying,
    print_json,
    run_of,
    say,
    stage_names,
    workspace_of,
)
from hpc_gen.cli_shards import shards_app
from hpc_gen.cli_weights import weights_app
from hpc_gen.runtime.errors import UserError

app = typer.Typer(
    name="hpc-gen",
    help="Train, resume, sample and score image generators on machines that are taken away at any moment.\n\n"
    "Begin with: hpc-gen demo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(no_args_is_help=True, help="Show experiments and the keys they may have.")


@app.command(epilog=example("hpc-gen demo", "hpc-gen demo latents --workspace /tmp/try"))
def demo(
    name: Annotated[str, typer.Argument(metavar="[pixels|latents|gmem]", help="Which demo.")] = "pixels",
    workspace: Workspace = None,
    dry_run: DryRun = False,
) -> None:
    """Everything once, here and now, on real images.

    pixels: digits; images become shards, a generator trains on two processes, is preempted and resumes exactly,
    samples are drawn and scored, a report is written. latents: coloured emoji; an autoencoder is trained, encodes them,
    and energy diffusion learns its latents, is killed and resumes. gmem: the same with snippets and a memory bank, then
    pictures of new images. Minutes on two cores; a second call repeats nothing.
    """
    from hpc_gen.stages import demo as demos

    if dry_run:
        _print_plan(str(demos.config_of(name)), [], workspace, None)
    else:
        end(demos.run_demo(name, workspace_of(workspace), say))


@app.command(
    epilog=example(
        "hpc-gen run job_configs/demo/mnist16.yaml",
        "hpc-gen run job_configs/demo/mnist16.yaml name=quick train.total_images=6400 --dry-run",
        "hpc-gen run job_configs/demo/mnist16.yaml --dry-run --world-size 4",
    )
)
def run(
    config: Config,
    overrides: Overrides = None,
    workspace: Workspace = None,
    stages: Stages = None,
    dry_run: DryRun = False,
    world_size: WorldSize = None,
) -> None:
    """All stages of an experiment on this machine.

    They work in the run folder WORKSPACE/runs/NAME, NAME being the key `name`. The same command again goes on where it
    was: done units and images are not repeated.
    """
    if dry_run:
        _print_plan(config, overrides or [], workspace, stages, world_size)
        return
    if world_size is not None:
        raise UserError("--world-size is for --dry-run, which plans for any number of ranks; train.ranks starts them")
    from hpc_gen.config import loader
    from hpc_gen.stages import runner

    resolved = loader.load(config, overrides or [])
    cli_slurm.refuse_queued_name(resolved.experiment.name, workspace_of(workspace))
    runner.check_stages(resolved, stage_names(stages))
    folder = runner.prepare_run(resolved, workspace_of(workspace))
    end(runner.run_stages(folder, stage_names(stages), keep_saying))


def _print_plan(
    config: str, overrides: list[str], workspace: Path | None, stages: str | None, world_size: int | None = None
) -> None:
    from hpc_gen.config import loader
    from hpc_gen.runtime.run_folder import RunFolder
    from hpc_gen.stages import run_setup
    from hpc_gen.stages.control import runs_folder

    root = workspace_of(workspace)
    wide = [] if world_size is None else [f"train.ranks={world_size}"]
    resolved = run_setup.typed(loader.load(config, [*overrides, *wide]))
    folder = RunFolder(runs_folder(root) / resolved.experiment.name)
    _say_plan(folder, run_setup.accepted(folder, resolved, root), stage_names(stages))
    if wide:
        from hpc_gen.stages import train_plan

        for line in train_plan.lines(resolved, root):
            say(f"memory      {line}")


def _say_plan(folder: Any, resolved: Any, stages: list[str] | None) -> None:
    from hpc_gen.stages import forecast_plan, runner

    for line in runner.plan(folder, resolved, stages):
        say(line)
    for line in forecast_plan.lines(folder, resolved, runner.in_order(resolved, stages)):
        say(f"disk        {line}")


@app.command(
    epilog=example(
        "hpc-gen stage demo-mnist16 train", "torchrun --nproc-per-node 2 -m hpc_gen.cli stage demo-mnist16 train"
    )
)
def stage(run: Run, name: Annotated[str, typer.Argument(metavar="NAME", help="Stage, as `encode` or `train`.")],
          workspace: Workspace = None, dry_run: DryRun = False) -> None:  # fmt: skip
    """One stage of a run, in this very process.

    This is what a task runs; torchrun, srun and plain python start it alike.
    """
    _stage(run, name, workspace, dry_run)


def _stage(text: str, name: str, workspace: Path | None, dry_run: bool) -> None:
    from hpc_gen.stages import runner

    folder = run_of(text, workspace)
    if dry_run:
        _say_plan(folder, runner.load_run(folder), [name])
    else:
        end(runner.run_stage(folder, name))


def _short_form(name: str, what: str) -> None:
    """`hpc-gen NAME RUN` as a short form of `hpc-gen stage RUN NAME`."""

    def command(run: Run, workspace: Workspace = None, dry_run: DryRun = False) -> None:
        _stage(run, name, workspace, dry_run)

    text = f"{what}\n\nShort for: hpc-gen stage RUN {name}"
    app.command(name, help=text, epilog=example(f"hpc-gen {name} demo-mnist16"))(command)


_short_form(
    "encode",
    "Turn the images of a run into shards.\n\nWhich images, at which size and in which format is said by the "
    "experiment when the run is begun, as in:\n\n\b\n  hpc-gen run CONFIG --stages encode "
    "'encode.classes=[n01440764,3]' encode.crop_size=256 \\\n      encode.image_size=64 encode.format=ptshard",
)
_short_form("train", "Train, from the newest whole checkpoint if there is one.")
_short_form("sample", "Draw the samples of a run.")
_short_form("evaluate", "Compute the metrics of a run.")
_short_form("report", "Write the report of a run.")


@app.command(epilog=example("hpc-gen status", "hpc-gen status demo-mnist16 --watch"))
def status(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="Path or name of a run; without it all runs of the workspace.")
    ] = None,
    workspace: Workspace = None,
    json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again until the run is over, or Ctrl-C.")] = False,
    every_s: Annotated[float, typer.Option("--every", help="Seconds between two looks of --watch.")] = 2.0,
) -> None:
    """What a run has done and is doing, in plain words.

    Stages, attempts, last numbers, goodput, checkpoints and disk space, from the run folder; jobs, as Slurm tells of
    them. Without RUN: all runs of the workspace, a line each.
    """
    from hpc_gen.stages import status_view

    folder = run_of(run, workspace) if run is not None else None
    jobs = cli_slurm.jobs_of(folder)
    status_view.tell(folder, workspace_of(workspace), as_json=json, watch=watch, every_s=every_s, jobs=jobs)


@app.command(epilog=example("hpc-gen preempt demo-mnist16 --wait"))
def preempt(
    run: Run,
    workspace: Workspace = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the attempt has ended.")] = False,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Longest wait, in seconds.")] = 300.0,
    dry_run: DryRun = False,
) -> None:
    """Ask a running attempt to save and end, as Slurm would.

    Nothing is lost, and `hpc-gen resume` goes on; a job of Slurm requeues itself. SIGTERM is sent to an attempt on this
    host and to the tasks of jobs, one on another host finds a PREEMPT file in the run folder.
    """
    from hpc_gen.stages import control

    folder = run_of(run, workspace)
    asked = cli_slurm.asking_jobs(folder, dry_run)
    ended = control.preempt(folder, say, dry_run=dry_run, wait_s=timeout_s if wait else None, jobs=asked)
    end(0 if ended else UserError.exit_code)


@app.command(
    epilog=example("hpc-gen resume demo-mnist16", "hpc-gen resume demo-mnist16 train.total_images=192000 train.ranks=1")
)
def resume(
    run: Run,
    overrides: Overrides = None,
    workspace: Workspace = None,
    stages: Stages = None,
    cluster: cli_slurm.ClusterIfAny = None,
    settings: cli_slurm.Setting = None,
    dry_run: DryRun = False,
) -> None:
    """Go on with a run, from its folder alone.

    Its frozen config, the units that are committed and the newest whole checkpoint say what is left to do. Keys that
    change no number computed so far may be replaced: those marked * by `config schema`, and a larger
    train.total_images where the learning rate is constant. For others there is `hpc-gen fork`. --cluster submits what
    is left to Slurm; without it, it is done here.
    """
    from hpc_gen.stages import control, run_setup, runner

    folder = run_of(run, workspace)
    if cluster is not None:
        cli_slurm.resume_on(cluster, folder, overrides or [], stages, settings or [], dry_run)
        return
    cli_slurm.refuse_queued(folder)
    if dry_run:
        _say_plan(folder, run_setup.changed(folder, overrides or []), stage_names(stages))
    else:
        runner.check_stages(run_setup.changed(folder, overrides or []), stage_names(stages))
        run_setup.change_run(folder, overrides or [])
        control.lift_stop(folder, keep_saying)
        end(runner.run_stages(folder, stage_names(stages), keep_saying))


cli_daily.add_to(app)
cli_prove.add_to(app)
cli_slurm.add_to(app)
cli_sweep.add_to(app)
cli_watch.add_to(app)


@app.command(epilog=example("hpc-gen doctor", "hpc-gen doctor --cluster lab --json"))
def doctor(
    workspace: Workspace = None,
    json: Json = False,
    cluster: cli_slurm.ClusterIfAny = None,
    settings: cli_slurm.Setting = None,
) -> None:
    """What this machine offers, and what is missing.

    Packages are looked at by a real import; then programs, GPUs, cores and disk space. What is missing is told with
    what its absence means. --cluster looks at a cluster profile and its Slurm, too.
    """
    from hpc_gen.runtime import doctor as looking

    root = workspace_of(workspace)
    checks = looking.examine(root, lambda line: typer.echo(line, err=True))
    if cluster is not None:
        checks += cli_slurm.checks_of(cluster, root, settings or [])
    if json:
        say(looking.to_json(checks))
    else:
        for check in checks:
            mark = "ok     " if check.ok else "MISSING" if check.required else "absent "
            say(f"{mark} {check.name:<20} {check.detail}")
            if not check.ok and check.meaning:
                say(f"{'':28} -> {check.meaning}")
        say("everything required works" if looking.healthy(checks) else "something required is missing")
    end(0 if looking.healthy(checks) else UserError.exit_code)


@config_app.command("show", epilog=example("hpc-gen config show job_configs/demo/mnist16.yaml train.optimizer.lr=1e-4"))
def config_show(
    config: Config,
    overrides: Overrides = None,
    sources: Annotated[bool, typer.Option("--sources", help="Say where each key comes from.")] = False,
) -> None:
    """The whole experiment, checked, with every default.

    Printed as YAML that `run` accepts, with the hashes.
    """
    from hpc_gen.config import describe, loader
    from hpc_gen.stages.run_setup import typed

    resolved = typed(loader.load(config, overrides or []))
    if sources:
        for key, value in loader.flat(resolved).items():
            say(f"{key} = {describe.show(value)}  # {resolved.sources.get(key, 'default')}")
    else:
        say(resolved.to_yaml().rstrip())
    say(f"# identity  {resolved.identity}\n# operation {resolved.operation}")


@config_app.command("schema", epilog=example("hpc-gen config schema", "hpc-gen config schema --method energy"))
def config_schema(
    json: Annotated[bool, typer.Option("--json", help="As a JSON schema, for editors.")] = False,
    method: Annotated[str | None, typer.Option("--method", help="The keys of a method and its sampler too.")] = None,
) -> None:
    """Every key that an experiment may have.

    What it allows, its default in brackets, its meaning; * marks keys that are not part of the identity.
    """
    from hpc_gen.config import describe, loader

    if json:
        print_json(loader.schema())
        return
    facts = loader.key_facts()
    if method is not None:
        from hpc_gen.methods import registry

        entry = registry.entry(method)
        facts += describe.keys(entry.config, "method.")
        facts += describe.keys(entry.settings, "sample.settings.")
    for fact in facts:
        say(f"{fact.key}{'*' if fact.operation else ''}: {fact.allowed} [{fact.default}]")
        if fact.meaning:
            say(f"    {fact.meaning}")


app.add_typer(config_app, name="config")
app.add_typer(shards_app, name="shards")
app.add_typer(weights_app, name="weights")
app.add_typer(checkpoints_app, name="checkpoints")
app.add_typer(metrics_app, name="metrics")
cli_lab.add_to(app)
cli_containers.add_to(app)
cli_bank.add_to(app)


def main() -> None:
    """The console script: runs the command and turns errors into one sentence and an exit code."""
    from hpc_gen.cli_errors import guarded

    guarded(lambda: app(prog_name="hpc-gen", standalone_mode=False))


if __name__ == "__main__":
    main()
