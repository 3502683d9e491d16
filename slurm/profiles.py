"""Cluster profiles: what a site wants to be asked for, and how its nodes run us: resources, paths, environment.

A profile is a YAML file, `slurm/clusters/NAME.yaml` or one of the user's, typed as experiments are: an unknown key is
an error with file:line. ${NAME} in a text is an environment variable of whoever submits; `--set key.path=value`
replaces a key. What a profile says never changes a number of the run: it belongs to neither hash.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hpc_gen.config import loader
from hpc_gen.config.base import KeyName, NonEmpty, PositiveInt, Section
from hpc_gen.config.errors import ConfigError, KeyProblem
from hpc_gen.runtime import env
from hpc_gen.runtime.errors import UserError, nearest

CLUSTERS = Path(__file__).with_name("clusters")
OWN_CLUSTERS = "clusters"  # folder of the workspace with profiles of the user's own
TRAIN = "train"

_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
_DROPS_SLURM = ("--cleanenv", "-e", "--containall", "-C")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")

Flag = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")]
EnvironmentName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Seconds = Annotated[float, Field(ge=0.0)]


class GpuProfile(Section):
    """How GPUs are asked for."""

    style: Literal["gpus-per-node", "gres", "gpus-per-task", "none"] = "none"
    """Flag of sbatch: --gpus-per-node=T:N, --gres=gpu:T:N, --gpus-per-task=T:1; none = the site gives whole nodes, or
    has no GPUs."""
    type: NonEmpty | None = None
    """Type in that flag, as in a100; null = any."""


class RuntimeProfile(Section):
    """What the processes run in."""

    kind: Literal["none", "apptainer", "pyxis"] = "none"
    """none = the Python that submits; apptainer or pyxis = a container image."""
    image: NonEmpty | None = None
    """Image: a .sif file for apptainer, what --container-image takes for pyxis."""
    python: NonEmpty | None = None
    """Python to start; null = python3 in a container, else the one that submits."""
    program: NonEmpty = "apptainer"
    """Apptainer's program on the compute nodes."""
    binds: list[NonEmpty] = Field(default_factory=list)
    """Folders seen inside, as in /scratch or /data:/data:ro; the workspace always is, with the runs in it."""
    options: list[NonEmpty] = Field(default_factory=list)
    """Further options of `apptainer exec`, as in --nv; or of srun for pyxis."""

    @model_validator(mode="after")
    def _whole(self) -> RuntimeProfile:
        if self.kind != "none" and self.image is None:
            raise KeyProblem(
                "runtime.image", f"'runtime.kind' = '{self.kind}' needs 'runtime.image', the image to run in"
            )
        dropping = next((option for option in self.options if option in _DROPS_SLURM), None)
        if dropping is not None:
            raise KeyProblem(
                "runtime.options",
                f"'runtime.options' holds {dropping}, which drops the SLURM_ variables that tell a task its rank; "
                "leave it out (--no-home and --contain keep them)",
            )
        return self


class StageProfile(Section):
    """What one stage asks for where it differs; null = as the profile says."""

    cpus_per_task: PositiveInt | None = None
    """CPUs of one task."""
    mem_per_task_gb: Annotated[float, Field(gt=0.0)] | None = None
    """Memory of one task, in GB."""
    gpus: bool | None = None
    """Whether a task gets a GPU."""
    partition: NonEmpty | None = None
    """Partition."""
    time_limit_min: PositiveInt | None = None
    """Time limit of a job, in minutes."""
    units_per_task: PositiveInt | None = None
    """Units that one array task does, one after the other; null = the stage's `tasks` share all of them."""
    parallel: PositiveInt | None = None
    """Array tasks that run at the same time."""


class ClusterProfile(Section):
    """One cluster."""

    description: str = ""
    """For people: which machine, what was tried there."""
    partition: NonEmpty | None = None
    """Partition; null = the cluster's default."""
    account: NonEmpty | None = None
    """Account that is charged."""
    qos: NonEmpty | None = None
    """Quality of service."""
    constraint: NonEmpty | None = None
    """Node features."""
    tasks_per_node: PositiveInt = 1
    """Training processes of one node: as many as it has GPUs."""
    max_nodes: PositiveInt | None = None
    """Largest number of nodes of one job; null = what Slurm allows."""
    cpus_per_task: PositiveInt = 1
    """CPUs of each process."""
    mem_per_task_gb: Annotated[float, Field(gt=0.0)] | None = None
    """Memory of each process, in GB; null = the cluster's default."""
    exclusive: bool = False
    """Whether training takes whole nodes."""
    gpus: GpuProfile = GpuProfile()
    runtime: RuntimeProfile = RuntimeProfile()
    modules: list[NonEmpty] = Field(default_factory=list)
    """Shell lines run before anything else, as in 'module load PrgEnv-gnu'."""
    environment: dict[EnvironmentName, str] = Field(default_factory=dict)
    """Variables of the processes: NICs, NCCL. No secrets: they end up in the scripts."""
    sbatch: dict[Flag, str] = Field(default_factory=dict)
    """Further flags of sbatch, without dashes, as in {reservation: mine}."""
    srun: list[NonEmpty] = Field(default_factory=list)
    """Further options of srun, as in --cpu-bind=none."""
    time_limit_min: PositiveInt = 60
    """Time limit of a job, in minutes."""
    grace_s: Seconds = 30.0
    """Seconds between the notice of a preemption and the kill: Slurm's GraceTime."""
    notice_s: Annotated[int, Field(ge=1, le=65535)] = 300
    """Seconds before the time limit at which Slurm is asked to send a signal, should our own clock have failed."""
    requeue: bool = True
    """Whether jobs may requeue themselves; false = a chain of jobs, each going on where the last one stopped."""
    chain: PositiveInt = 4
    """Jobs of such a chain."""
    requeue_limit: PositiveInt = 200
    """Requeues of one job after which it fails."""
    stalled_limit: PositiveInt = 3
    """Requeues in a row that brought no progress after which it fails."""
    retries: Annotated[int, Field(ge=0)] = 1
    """Times that a task of an array which failed, or a training that crashed, is started again by itself."""
    host_python: NonEmpty = "python3"
    """Python (3.6 or newer) on the nodes, outside any container, that decides about requeues; where there is none, the
    container's is used."""
    parallel: PositiveInt = 32
    """Array tasks that run at the same time."""
    max_array: PositiveInt = 1000
    """Most tasks of one array (Slurm's MaxArraySize less one, `scontrol show config`); each then does more units."""
    stages: dict[KeyName, StageProfile] = Field(default_factory=dict)
    """What single stages ask for."""
    stage_to: NonEmpty | None = None
    """Folder on a disk of each node, expanded there, as in ${TMPDIR}: the training table is copied to it, if there is
    room; null = it is read where it lies."""
    umask: Annotated[str, Field(pattern=r"^0?[0-7]{3}$")] = "022"
    """File mode mask of all that a run writes, as in 027."""
    group: NonEmpty | None = None
    """Group of the run folder and of all in it; null = the user's."""
    compute_network: bool = True
    """Whether compute nodes reach the internet; false = jobs do not try wandb, `track sync` publishes from elsewhere.
    What stages need is downloaded by `submit` in any case."""

    @model_validator(mode="after")
    def _time_to_work(self) -> ClusterProfile:
        limits = {"time_limit_min": self.time_limit_min}
        limits.update({f"stages.{name}.time_limit_min": own.time_limit_min for name, own in self.stages.items()
                       if own.time_limit_min is not None})  # fmt: skip
        for key, limit in limits.items():
            if 2 * self.notice_s > limit * 60:
                raise KeyProblem(
                    key,
                    f"'{key}' = {limit} minutes leaves too little time before the notice that comes 'notice_s' = "
                    f"{self.notice_s} s before its end; lower 'notice_s' to {limit * 30} at most",
                )
        return self

    @model_validator(mode="after")
    def _no_secrets(self) -> ClusterProfile:
        for name in self.environment:
            if _SECRET.search(name):
                raise KeyProblem(
                    f"environment.{name}",
                    f"'environment.{name}' looks like a secret, and what stands here ends up in scripts that others "
                    "can read; export it where you submit: jobs inherit the whole environment",
                )
        return self

    def for_stage(self, stage: str) -> StageProfile:
        """What a stage asks for, with the profile's own values where it says nothing."""
        own = self.stages.get(stage, StageProfile())
        inherited = {
            "cpus_per_task": self.cpus_per_task,
            "mem_per_task_gb": self.mem_per_task_gb,
            "gpus": self.gpus.style != "none",
            "partition": self.partition,
            "time_limit_min": self.time_limit_min,
            "parallel": self.parallel,
        }
        missing = {name: value for name, value in inherited.items() if getattr(own, name) is None}
        return own.model_copy(update=missing)


def names(workspace: Path) -> list[str]:
    """Clusters that can be named: shipped ones and those of the workspace."""
    folders = (CLUSTERS, workspace / OWN_CLUSTERS)
    return sorted({path.stem for folder in folders if folder.is_dir() for path in folder.glob("*.yaml")})


def load(cluster: str, workspace: Path, overrides: Sequence[str] = ()) -> ClusterProfile:
    """The profile of a cluster: a name, or the path of a YAML file; `overrides` as in "account=mine".

    A file of the workspace's folder `clusters` goes before a shipped one. Raises UserError for an unknown name,
    ConfigError for what is wrong in the file.
    """
    path = Path(cluster)
    if path.suffix not in (".yaml", ".yml"):
        places = [folder / f"{cluster}.yaml" for folder in (workspace / OWN_CLUSTERS, CLUSTERS)]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            known = names(workspace)
            raise UserError(
                f"no cluster '{cluster}'{nearest(cluster, known)}; there are {', '.join(known)}, or give the path of a "
                f"YAML file, or put one into {workspace / OWN_CLUSTERS}"
            )
        path = found
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cluster profile '{path}' cannot be read ({error}); give the path of a YAML file") from error
    return loads(text, overrides, str(path))


def loads(text: str, overrides: Sequence[str] = (), name: str = "profile", **variables: str) -> ClusterProfile:
    """`load` of text; `variables` go before those of the environment."""
    for number, line in enumerate(text.splitlines(), 1):
        secret = next((found for found in _VARIABLE.findall(line.partition("#")[0]) if _SECRET.search(found)), None)
        if secret is not None:
            raise ConfigError(
                f"{name}:{number}: ${{{secret}}} looks like a secret, and a profile ends up in scripts that others can "
                "read; leave it out: jobs inherit the whole environment of whoever submits"
            )
    later = {name: f"${{{name}}}" for name in ("SLURM_TMPDIR", "SLURM_JOB_ID", "TMPDIR")}  # known on the node only
    return loader.load_section(ClusterProfile, text, overrides, name, {**_environment(), **later, **variables})


def _environment() -> Mapping[str, str]:
    return env.snapshot()


def to_json(profile: ClusterProfile) -> dict[str, Any]:
    """The whole profile, for the record in the run folder."""
    found: dict[str, Any] = profile.model_dump(mode="json")
    return found
