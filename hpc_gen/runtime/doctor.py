"""What this machine offers to hpc-gen: Python packages by a real import, programs, GPUs, disk space.

Packages are imported in a process of their own: `find_spec` says yes to packages whose import fails (mamba-ssm without
its extension, torchvision beside another torch), and one that crashes or hangs must not take `doctor` with it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from packaging.requirements import Requirement

from hpc_gen.runtime import env

IMPORT_TIMEOUT_S = 120.0
PROGRAM_TIMEOUT_S = 20.0
LOW_DISK_BYTES = 5 * 10**9

_IMPORT = """
import importlib, json
module = importlib.import_module({module!r})
if getattr(module, "__file__", None) is None:
    raise ImportError("only an empty folder of that name was found")
print(json.dumps(({facts})(module)))
"""
_TORCH_FACTS = """lambda t: {"gpus": [t.cuda.get_device_name(i) for i in range(t.cuda.device_count())],
    "cuda": t.version.cuda, "bf16": t.cuda.is_available() and t.cuda.is_bf16_supported(),
    "nccl": t.distributed.is_nccl_available(), "gloo": t.distributed.is_gloo_available()}"""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `meaning` says what its absence costs; `required` ones make the verdict."""

    group: str
    name: str
    ok: bool
    detail: str
    meaning: str
    required: bool = False


@dataclass(frozen=True)
class Package:
    """A distribution, the module that proves it works, and what its absence means."""

    distribution: str
    module: str
    meaning: str
    required: bool = False
    facts: str = "lambda module: {}"


@dataclass(frozen=True)
class Program:
    """A program, the argument that makes it print its version, and what its absence means."""

    name: str
    version_argument: str
    meaning: str


PACKAGES = (
    Package("numpy", "numpy", "nothing works without it", True),
    Package("pydantic", "pydantic", "experiments cannot be read", True),
    Package("typer", "typer", "there is no command line", True),
    Package("rich", "rich", "there is no command line", True),
    Package("pyyaml", "yaml", "experiments cannot be read", True),
    Package("pillow", "PIL.Image", "images cannot be read or written", True),
    Package("safetensors", "safetensors", "weights cannot be exported", True),
    Package("jinja2", "jinja2", "there is no report", True),
    Package("submitit", "submitit", "stages cannot be submitted to Slurm; they run here", True),
    Package(
        "torch-fidelity",
        "hpc_gen.metrics.fidelity",  # torch-fidelity by itself fails beside CPU torch; this is how we import it
        "no FID, KID, precision, recall or IS; pip install -e .[demo]",
        facts="lambda module: {'version': module.version()}",
    ),
    Package("wandb", "wandb", "tracking.wandb stays unused; the journal has everything; pip install -e .[tracking]"),
    Package("webdataset", "webdataset", "no tar shards; pip install -e .[webdataset]"),
    Package("faiss-cpu", "faiss", "k-means by torch, slower (DiGIT); pip install -e .[faiss]"),
    Package("deepspeed", "deepspeed", "no deepspeed engine; ddp works; pip install -e .[deepspeed]"),
    Package("megatron-core", "megatron.core", "no tensor-parallel layers; pip install -e .[deepspeed]"),
    Package("nvidia-dali-cuda130", "nvidia.dali", "images are decoded by pillow; pip install -e .[dali]"),
    Package(
        "mamba-ssm", "mamba_ssm", "DiM runs on the pure PyTorch scan; pip install --no-build-isolation -e .[mamba]"
    ),
    Package("causal-conv1d", "causal_conv1d", "DiM runs on the PyTorch convolution; as mamba-ssm"),
)

PROGRAMS = (
    Program("sbatch", "--version", "no submission to Slurm from this machine; `hpc-gen run` works"),
    Program("srun", "--version", "no stages inside Slurm jobs on this machine"),
    Program("scontrol", "--version", "no requeue by the batch script"),
    Program("sacct", "--version", "no accounting of past jobs"),
    Program("apptainer", "--version", "no containers on this machine"),
    Program("npm", "--version", "`hpc-gen shards fetch mnist|emoji` cannot download; apt-get install npm"),
    Program("nvidia-smi", "--version", "no NVIDIA driver; everything runs on the CPU"),
    Program("c++", "--version", "train.engine.compile can make no code for the CPU"),
    Program("git", "--version", "reports cannot name the commit"),
)


def examine(workspace: Path, say: Callable[[str], None] = lambda line: None) -> list[Check]:
    """Look at everything; takes some ten seconds. `say` is told what is being looked at."""
    say("looking at packages by importing each in a process of its own ...")
    with ThreadPoolExecutor(max_workers=max(1, min(4, num_cores()))) as pool:
        torch = pool.submit(_torch)
        packages = list(pool.map(_package, PACKAGES))
        found = [_python(), torch.result(), *packages, *pool.map(_program, PROGRAMS)]
    return [*found, _cores(), _disk(workspace)]


def healthy(checks: list[Check]) -> bool:
    """Whether everything required works."""
    return all(check.ok for check in checks if check.required)


def to_json(checks: list[Check]) -> str:
    """The checks for other programs."""
    return json.dumps({"healthy": healthy(checks), "checks": [asdict(check) for check in checks]}, indent=1)


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def import_facts(module: str, facts: str = "lambda module: {}") -> tuple[bool, dict[str, object], str]:
    """Import `module` in a new process; returns (works, what the expression `facts` says of it, why it fails)."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, env.get("PYTHONPATH")]))
    code = _IMPORT.replace("{module!r}", repr(module)).replace("{facts}", facts)
    try:
        # -P: a folder of that name in the current directory is not the package
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            capture_output=True,
            text=True,
            timeout=IMPORT_TIMEOUT_S,
            env=env.child_environment(PYTHONPATH=path, OMP_NUM_THREADS=1),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False, {}, f"its import took more than {IMPORT_TIMEOUT_S:g} s"
    if done.returncode != 0:
        last = [line for line in done.stderr.splitlines() if line.strip()]
        return False, {}, last[-1].strip()[:160] if last else f"its import ended with code {done.returncode}"
    return True, json.loads(done.stdout.splitlines()[-1]), ""


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def wanted(distribution: str) -> Requirement | None:
    """What hpc-gen's own metadata asks of a distribution, or None (not named, or hpc-gen is not installed)."""
    try:
        lines = importlib.metadata.requires("hpc-gen") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    requirements = [Requirement(line) for line in lines]
    return next((r for r in requirements if r.name.lower() == distribution and str(r.specifier)), None)


def _versions(distribution: str) -> str:
    """The installed version, and the wanted one where it is another."""
    version, requirement = _version(distribution), wanted(distribution)
    if version is None:
        return "installed without metadata"
    if requirement is not None and not requirement.specifier.contains(version, prereleases=True):
        return f"{version} (hpc-gen is tested with {requirement.specifier})"
    return version


def _package(package: Package) -> Check:
    distribution = package.distribution
    works, _, reason = import_facts(package.module, package.facts)
    if works:
        detail = _versions(distribution)
    elif _version(distribution) is None:
        detail = "not installed"
    else:
        detail = f"{_version(distribution)} is installed but fails: {reason}"
    return Check("packages", distribution, works, detail, package.meaning, package.required)


def _torch() -> Check:
    works, facts, reason = import_facts("torch", _TORCH_FACTS)
    meaning = "nothing can train"
    if not works:
        detail = reason if _version("torch") else "not installed"
        return Check("packages", "torch", False, detail, meaning, required=True)
    gpus = facts["gpus"]
    assert isinstance(gpus, list)
    where = f"CUDA {facts['cuda']}: {len(gpus)} x {gpus[0]}" if gpus else "CPU only"
    backends = [name for name in ("gloo", "nccl") if facts[name]]
    numbers = ", bf16" if facts["bf16"] else ""
    detail = f"{_versions('torch')}, {where}{numbers}, {' and '.join(backends)}"
    return Check("packages", "torch", True, detail, meaning, required=True)


def _python() -> Check:
    good = sys.version_info >= (3, 11)
    detail = f"{platform.python_version()} at {sys.executable}"
    return Check("machine", "Python", good, detail, "hpc-gen needs Python 3.11 or newer", required=True)


def _program(program: Program) -> Check:
    path = shutil.which(program.name)
    if path is None:
        return Check("programs", program.name, False, "not found", program.meaning)
    try:
        done = subprocess.run(
            [path, program.version_argument], capture_output=True, text=True, timeout=PROGRAM_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("programs", program.name, False, f"{path} does not run: {type(error).__name__}", program.meaning)
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    detail = lines[0][:80] if lines else path
    return Check("programs", program.name, done.returncode == 0, detail, program.meaning)


def _cores() -> Check:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    detail = f"{num_cores()} CPU cores for this process, {memory / 1e9:.1f} GB of memory in the machine"
    return Check("machine", "cores", True, detail, "")


def _disk(workspace: Path) -> Check:
    place = next((path for path in (workspace, *workspace.parents) if path.is_dir()), Path("/"))
    free = shutil.disk_usage(place).free
    meaning = f"less than {LOW_DISK_BYTES / 1e9:.0f} GB are free: a save that runs out of space is refused"
    return Check("machine", "disk", free >= LOW_DISK_BYTES, f"{free / 1e9:.1f} GB free below {workspace}", meaning)
