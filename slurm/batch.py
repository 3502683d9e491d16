"""The batch script of a job, as text: what is asked of Slurm, and a body that starts the step and decides what follows.

The body runs on the first node, outside any container. Why it looks as it does was measured (specs/slurm_lab.md):

- It traps signals and waits in a loop, for Slurm signals this shell too, and it must live to requeue the job.
- A job that ends by itself within the grace time of a preemption is not requeued, whatever its exit code. So the body
  requeues it and then waits to be killed.
- Elements of an array are named ARRAY_TASK everywhere: the last one's own number is that of the whole array.
"""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from slurm.profiles import TRAIN, ClusterProfile, StageProfile

FOREIGN = (
    "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID SLURM_EXPORT_ENV "
    "HPC_GEN_TASK HPC_GEN_NUM_TASKS HPC_GEN_ATTEMPT HPC_GEN_RUNNER"
)
"""Variables of whoever submitted that would tell the tasks something wrong."""
RUN_OF_ELEMENT = Path("${run}")  # a variable of the script


@dataclass(frozen=True)
class JobSpec:
    """One job of a run: a training, or an array of the tasks of a stage (`array` elements), or one such task.

    `dependency` is Slurm's own text; `chain_left`: jobs behind this one where a site forbids requeues, else None.
    `runs`: where each element is the training of a run of its own, these runs in order; `run` is then the folder of the
    array (slurm/arrays.py), in which the link K leads to the run of element K.
    """

    name: str
    run: Path
    workspace: Path
    stage: str
    profile: ClusterProfile
    python: str
    nodes: int = 1
    tasks_per_node: int = 1
    threads: int = 1
    array: int | None = None
    dependency: str | None = None
    chain_left: int | None = None
    runs: tuple[Path, ...] = ()

    @property
    def shell_run(self) -> Path:
        """The run folder as the script writes it: of an array of runs only the script knows which."""
        return RUN_OF_ELEMENT if self.runs else self.run

    @property
    def wants(self) -> StageProfile:
        """What the profile asks for in this stage."""
        return self.profile.for_stage(self.stage)

    @property
    def id_pattern(self) -> str:
        """How Slurm writes the number of the job, or of the array and its element, into file names."""
        return "%j" if self.array is None else "%A_%a"


def launch_prefix(profile: ClusterProfile, run: Path, workspace: Path, own_python: str) -> tuple[str, str]:
    """Shell words that start a Python in what the tasks run in: (before it, the Python itself)."""
    runtime = profile.runtime
    if runtime.kind == "none":
        return "", shlex.quote(runtime.python or own_python)
    python = shlex.quote(runtime.python or "python3")
    if runtime.kind == "pyxis":
        return "", python  # srun starts the container
    binds = _binds(profile, run, workspace)
    words = [runtime.program, "exec", *runtime.options, *(word for bind in binds for word in ("--bind", bind))]
    return " ".join(_word(word) for word in [*words, str(runtime.image)]) + " ", python


def _binds(profile: ClusterProfile, run: Path, workspace: Path) -> list[str]:
    """Folders seen in a container.

    A run in its workspace comes with it: bound by itself it would be a mount of its own, and no file can be renamed
    from one mount to another, as shards are from the run's staging folder to a table.
    """
    within = run == RUN_OF_ELEMENT or Path(os.path.realpath(run)).is_relative_to(os.path.realpath(workspace))
    return list(dict.fromkeys([str(workspace), *([] if within else [str(run)]), *profile.runtime.binds]))


def python_words(profile: ClusterProfile, run: Path, workspace: Path, own_python: str) -> str:
    """What submitit is given for `python`: container, held-back signals, a Python that ignores its folder."""
    before, python = launch_prefix(profile, run, workspace, own_python)
    hold = _word(str(run / "code" / "slurm" / "hold_signals.py"))
    return f"{before}{python} -I -S {hold} {python} -P"


def flags(spec: JobSpec) -> list[tuple[str, str | None]]:
    """Flags of sbatch, sorted by name; None: a flag without a value."""
    profile, wants = spec.profile, spec.wants
    found: dict[str, str | None] = {
        "job-name": spec.name,
        "comment": str(spec.run),  # by which the jobs of a run are found again
        "chdir": str(spec.run),
        "nodes": str(spec.nodes),
        "ntasks-per-node": str(spec.tasks_per_node),
        "cpus-per-task": str(wants.cpus_per_task),
        "time": str(wants.time_limit_min),
        "output": str((spec.run / "%a" if spec.runs else spec.run) / "logs" / f"{spec.id_pattern}.log"),
        "open-mode": "append",
        "export": "ALL",
        "signal": f"USR2@{profile.notice_s}",
    }
    found["requeue" if profile.requeue else "no-requeue"] = None
    for flag, value in (
        ("partition", wants.partition),
        ("account", profile.account),
        ("qos", profile.qos),
        ("constraint", profile.constraint),
        ("dependency", spec.dependency),
    ):
        if value is not None:
            found[flag] = value
    if spec.dependency is not None:
        found["kill-on-invalid-dep"] = "yes"
    if wants.mem_per_task_gb is not None:
        found["mem"] = f"{round(wants.mem_per_task_gb * spec.tasks_per_node * 1024)}M"
    if profile.exclusive and spec.stage == TRAIN:
        found["exclusive"] = None
    if wants.gpus:
        found.update(_gpu_flag(spec))
    if spec.array is not None:
        found["array"] = f"0-{spec.array - 1}%{min(spec.array, wants.parallel or spec.array)}"
    found.update(profile.sbatch)
    return sorted(found.items())


def _gpu_flag(spec: JobSpec) -> dict[str, str | None]:
    gpus = spec.profile.gpus
    kind = f"{gpus.type}:" if gpus.type is not None else ""
    if gpus.style == "gpus-per-node":
        return {"gpus-per-node": f"{kind}{spec.tasks_per_node}"}
    if gpus.style == "gres":
        return {"gres": f"gpu:{kind}{spec.tasks_per_node}"}
    return {"gpus-per-task": f"{kind}1"} if gpus.style == "gpus-per-task" else {}


def script(spec: JobSpec, command: str) -> str:
    """The whole batch script; `command` is what each task runs, as a shell command."""
    header = [f"#SBATCH --{name}" + ("" if value is None else f"={_word(value)}") for name, value in flags(spec)]
    parts = ["#!/bin/bash", *header, "", *_signals(), "", *_names(spec), "", *_environment(spec)]
    return "\n".join([*parts, "", *_step(spec, command), "", *_verdict(spec), ""])


def _names(spec: JobSpec) -> list[str]:
    return [
        "# Which run, which start of which job. An array's element is ARRAY_TASK: a plain number may mean the array.",
        *_run(spec),
        f"stage={_word(spec.stage)}",
        'job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}"',
        'job="${job:-$SLURM_JOB_ID}"',
        'restart="${SLURM_RESTART_COUNT:-0}"',
        f"umask {spec.profile.umask}",
        'echo "hpc-gen: $stage of $run, job $job, start $restart, on $SLURM_JOB_NODELIST, $(date +%FT%T%z)"',
    ]


def _run(spec: JobSpec) -> list[str]:
    if not spec.runs:
        return [f"run={_word(str(spec.run))}"]
    return ["runs=(", *(f"  {_word(str(run))}" for run in spec.runs), ")", 'run="${runs[$SLURM_ARRAY_TASK_ID]}"']


def _signals() -> list[str]:
    return [
        "# Slurm signals this shell when it ends the job by itself; the shell lives on to see how the step has ended.",
        "told=''",
        "trap 'told=\"$told TERM\"' TERM",
        "trap : USR1 USR2 CONT",
    ]


def _environment(spec: JobSpec) -> list[str]:
    profile = spec.profile
    return [
        "# What the processes find around them. Bytecode and caches stay off the shared file system.",
        *profile.modules,
        f"unset {FOREIGN}",
        f'export PYTHONPATH={_word(str(spec.shell_run / "code"))}"${{PYTHONPATH:+:$PYTHONPATH}}"',
        f"export HPC_GEN_WORKSPACE={_word(str(spec.workspace))}",
        f"export OMP_NUM_THREADS={spec.threads} MKL_NUM_THREADS={spec.threads}",
        'cache="${TMPDIR:-/tmp}/hpc-gen-$(id -u)"',
        'export PYTHONPYCACHEPREFIX="$cache/bytecode"',
        'export TRITON_CACHE_DIR="$cache/triton" TORCHINDUCTOR_CACHE_DIR="$cache/inductor"',
        *(f"export {name}={_word(value)}" for name, value in profile.environment.items()),
        "# When the time limit ends the job: Slurm's signals may be a minute early or late, so tasks watch the clock.",
        'limit="${SLURM_JOB_END_TIME:-}"',
        'if [ -z "$limit" ]; then',
        '  limit=$(squeue -h -j "$job" -o %e 2> /dev/null)',
        '  if [ -n "$limit" ]; then limit=$(date -d "$limit" +%s 2> /dev/null); fi',
        "fi",
        'export HPC_GEN_JOB_END="${limit:-0}"',
        f"export HPC_GEN_GRACE_S={profile.grace_s:g}",
        *_staging(spec),
        *([] if profile.compute_network else ["export HPC_GEN_NO_NETWORK=1"]),
        "export SUBMITIT_EXECUTOR=slurm",
    ]


def _staging(spec: JobSpec) -> list[str]:
    """Where the tasks copy the training table to (data/staging.py)."""
    folder = spec.profile.stage_to
    return [f"export HPC_GEN_STAGE_TO={_word(folder)}"] if folder is not None and spec.stage == TRAIN else []


def _step(spec: JobSpec, command: str) -> list[str]:
    output = str(spec.shell_run / "logs" / f"{spec.id_pattern}_%t.log")
    words = [
        "srun",
        "--unbuffered",
        "--kill-on-bad-exit=1",
        "--export=ALL",
        "--open-mode=append",
        f"--cpus-per-task={spec.wants.cpus_per_task}",
        f"--output={output}",
        *_pyxis(spec),
        *spec.profile.srun,
    ]
    return [
        "# The step. It runs in the background, because a shell looks at its traps only between two commands.",
        'said=$(mktemp "${TMPDIR:-/tmp}/hpc-gen-srun.XXXXXX") || said=/dev/stderr',
        "HPC_GEN_LAUNCHED=$(date +%s.%N)  # what the start costs is counted from here",
        "export HPC_GEN_LAUNCHED",
        f'{" ".join(_word(word) for word in words)} {command} 2> "$said" &',
        "step=$!",
        'wait "$step"',
        "code=$?",
        'while [ "$code" -gt 128 ] && kill -0 "$step" 2> /dev/null; do',
        '  wait "$step"',
        "  code=$?",
        "done",
        "# a signal may have ended the last wait just before the step ended: then its code is still to be had",
        'wait "$step" 2> /dev/null',
        "late=$?",
        'if [ "$late" -ne 127 ]; then code=$late; fi',
        'if [ -f "$said" ]; then cat "$said" >&2; fi',
    ]


def _pyxis(spec: JobSpec) -> list[str]:
    runtime = spec.profile.runtime
    if runtime.kind != "pyxis":
        return []
    binds = _binds(spec.profile, spec.shell_run, spec.workspace)
    mounts = ",".join(bind if ":" in bind else f"{bind}:{bind}" for bind in binds)
    return [f"--container-image={runtime.image}", f"--container-mounts={mounts}", *runtime.options]


def _verdict(spec: JobSpec) -> list[str]:
    profile = spec.profile
    before, python = launch_prefix(profile, spec.shell_run, spec.workspace, sys.executable)
    limits = f"--limit {profile.requeue_limit} --stalled-limit {profile.stalled_limit} --retries {profile.retries}"
    chain = f" --chain-left {spec.chain_left}" if spec.chain_left is not None else ""
    return [
        "# What becomes of the job: slurm/requeue.py decides by the cause file, srun's code and Slurm's own words.",
        'shown=$(scontrol show job -o "$job" 2>&1)',
        'nodes=$(sinfo -h -N -n "$SLURM_JOB_NODELIST" -o "%N %T" 2> /dev/null)',
        "decide() {",
        '  printf "%s\\n" "$shown" | "$@" -I "$run/code/slurm/requeue.py" --run "$run" --stage "$stage" \\',
        '    --job "$job" --restart "$restart" --code "$code" --told "$told" --srun "$said" \\',
        f'    --nodes "$nodes" {limits}{chain}',
        "}",
        f"verdict=$(decide {_word(profile.host_python)}) || verdict=$(decide {before}{python}) || verdict=''",
        'if [ -f "$said" ]; then rm -f "$said"; fi',
        'read -r action final without <<< "$verdict"',
        'if [ -z "$action" ]; then  # no Python here: the one rule that needs none',
        "  final=$code action=end",
        *(['  if [ "$code" = 85 ] && [ -z "$told" ]; then action=requeue; fi'] if spec.chain_left is None else []),
        "fi",
        'case "$action" in',
        "  requeue | elsewhere)",
        "    # until Slurm kills this shell; a controller that is being restarted is asked again",
        "    for _ in $(seq 120); do",
        '      if [ "$action" = elsewhere ]; then',
        '        scontrol requeuehold "$job" && scontrol update "JobId=$job" "ExcNodeList=$without"',
        '        scontrol release "$job" && break',
        "      else",
        '        scontrol requeue "$job" && break',
        "      fi",
        "      sleep 5",
        "    done",
        "    sleep 300 & wait $!",
        "    ;;",
        *(
            ['  end) if [ "$final" != 0 ]; then scancel --state=PENDING "--name=$SLURM_JOB_NAME"; fi ;;']
            if spec.chain_left and not spec.runs
            else []
        ),
        "esac",
        'exit "${final:-$code}"',
    ]


def _word(text: str) -> str:
    """A shell word in which only ${NAME} is expanded."""
    if "${" not in text:
        return shlex.quote(text)
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("`", "\\`")
    return f'"{escaped}"'
