"""A real Slurm on this machine, for tests and for learning: the Python face of the scripts in `slurm/lab/`.

A lab is one private directory with its own munge key, controller, accounting database and several slurmd,
each with its own host name; jobs in it see a cluster. It needs root and Debian's Slurm packages, which
`slurm/lab/install_slurm.sh` installs; nothing outside its directory is changed. In what it behaves like a
real cluster, and in what not, was measured (specs/slurm_lab.md).

    from slurm import lab
    cluster = lab.start(lab.default_directory())
    print(cluster.run(["srun", "-N2", "hostname"]).stdout)
    lab.stop(cluster.directory, purge=True)
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hpc_gen.runtime import env
from hpc_gen.runtime.errors import UserError

SCRIPTS = Path(__file__).with_name("lab")
DEFAULT_PORT_BASE = 17000
START_TIMEOUT_S = 180.0  # it takes 2.5 s on an idle machine and 9 s on a busy one
_PROGRAMS = ("bash", "unshare", "munged", "slurmctld", "slurmd", "srun", "sinfo", "slurmdbd", "mariadbd")


@dataclass(frozen=True)
class Lab:
    """A lab in `directory`, and the variables that make Slurm's commands talk to it."""

    directory: Path
    settings: Mapping[str, str]

    @property
    def node_names(self) -> list[str]:
        """Names of all nodes, in order."""
        prefix, count = self.settings["SLURM_LAB_PREFIX"], int(self.settings["SLURM_LAB_NODES"])
        return [f"{prefix}{number}" for number in range(1, count + 1)]

    def environment(self, **extra: str) -> dict[str, str]:
        """Variables for a process that uses this lab: ours (no other Slurm job's), its own, and `extra`."""
        return {**_environment(), **self.settings, **extra}

    def run(
        self, argv: Sequence[str], timeout_s: float = 60.0, check: bool = True, **extra: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a Slurm command here with `extra` environment variables. Raises UserError when it fails."""
        done = subprocess.run(
            list(argv),
            env=self.environment(**extra),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if check and done.returncode != 0:
            why = _last_line(done.stderr) or "it printed no error"
            raise UserError(f"{shlex.join(argv)} ended with {done.returncode} in the lab: {why}")
        return done

    def node(self, action: Literal["up", "down", "crash"], name: str) -> None:
        """Start the slurmd of a node, stop it (its jobs go on), or kill all that runs on the node."""
        self.run(["bash", str(SCRIPTS / "node.sh"), action, name])


@dataclass(frozen=True)
class Status:
    """What lives of a lab: daemon name -> alive, node name -> Slurm's state, job state -> number of jobs."""

    directory: Path
    daemons: Mapping[str, bool]
    nodes: Mapping[str, str]
    jobs: Mapping[str, int]

    @property
    def running(self) -> bool:
        """Whether every daemon that was started is alive and the controller answers."""
        return bool(self.nodes) and all(self.daemons.values())

    def lines(self) -> list[str]:
        """The status as lines for a person."""
        if not self.daemons:
            return [f"no lab in {self.directory}; start one with: hpc-gen lab start"]
        dead = [name for name, alive in self.daemons.items() if not alive]
        text = [f"lab in {self.directory}: {'running' if self.running else 'not running'}"]
        if dead:
            text.append(f"  ended: {', '.join(dead)}; logs in {self.directory / 'log'}")
        text += [f"  {name}  {state}" for name, state in self.nodes.items()]
        if self.running:
            text.append("  jobs: " + (", ".join(f"{count} {state}" for state, count in self.jobs.items()) or "none"))
            text.append(f"  use it:  . {shlex.quote(str(self.directory / 'env'))}")
        return text


def default_directory() -> Path:
    """Where the command line keeps its lab: one per user, below the folder for temporary files."""
    return Path(env.get("SLURM_LAB_DIR") or Path(tempfile.gettempdir()) / f"slurm-lab-{os.getuid()}")


def why_not() -> str | None:
    """Why no lab can run on this machine, in one sentence; None when it can."""
    if os.geteuid() != 0:
        return "the Slurm lab needs root: its nodes get host names of their own"
    if _distribution() != "debian":
        return f"the Slurm lab is made for Debian, and this is {_distribution()}"
    missing = [name for name in _PROGRAMS if shutil.which(name, path=_environment()["PATH"]) is None]
    if missing:
        install = SCRIPTS / "install_slurm.sh"
        return f"programs of the Slurm lab are missing ({', '.join(missing)}); as root run: bash {install}"
    probe = ["unshare", "--uts", "--mount", "--propagation", "private", "true"]
    if subprocess.run(probe, capture_output=True, env=_environment(), check=False).returncode != 0:
        return "the Slurm lab needs host name and mount namespaces, which are forbidden here (CAP_SYS_ADMIN)"
    return None


def start(
    directory: Path,
    *,
    nodes: int = 4,
    port_base: int | None = None,
    prefix: str | None = None,
    accounting: bool = True,
    gpus: int = 4,
    grace_s: int = 10,
    kill_wait_s: int = 5,
    on_line: Callable[[str], None] | None = None,
    **settings: str,
) -> Lab:
    """Start a lab in `directory` and return it when all its nodes are idle; an older lab there is replaced.

    `port_base` None takes free ports; `prefix` None names nodes labn1, ... (with the port base in it for a
    second lab, because control groups go by node name). `grace_s` and `kill_wait_s` are Slurm's GraceTime of
    partition low and KillWait. `settings` are further variables of `slurm/lab/lab.env.sh`, for instance
    SLURM_LAB_NET="veth". `on_line` gets each line of progress. Raises UserError with the reason on failure;
    nothing is left running then.
    """
    reason = why_not()
    if reason is not None:
        raise UserError(reason)
    directory = directory.absolute()
    stop(directory)  # frees the ports of an older lab in the same directory
    base = port_base if port_base is not None else free_port_base(nodes)
    wanted = {
        "SLURM_LAB_DIR": str(directory),
        "SLURM_LAB_NODES": str(nodes),
        "SLURM_LAB_PORT_BASE": str(base),
        "SLURM_LAB_PREFIX": prefix or ("labn" if base == DEFAULT_PORT_BASE else f"lab{base}n"),
        "SLURM_LAB_ACCT": "dbd" if accounting else "none",
        "SLURM_LAB_GPUS": str(gpus),
        "SLURM_LAB_GRACE": str(grace_s),
        "SLURM_LAB_KILL_WAIT": str(kill_wait_s),
    }
    directory.parent.mkdir(parents=True, exist_ok=True)
    argv = ["timeout", "--kill-after=10", str(START_TIMEOUT_S), "bash", str(SCRIPTS / "start.sh")]
    lines: list[str] = []
    environment = {**_environment(), **wanted, **settings}
    with subprocess.Popen(
        argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line.rstrip())
                if on_line is not None:
                    on_line(lines[-1])
        except BaseException:
            process.terminate()
            process.wait()  # start.sh takes down what it had started
            raise
    if process.returncode != 0:
        late = f"; it took longer than {START_TIMEOUT_S:.0f} s" if process.returncode in (124, 137) else ""
        raise UserError(f"{_last_line(chr(10).join(lines)) or 'the lab did not start'}{late}")
    return attach(directory)


def attach(directory: Path) -> Lab:
    """The lab that was started in `directory`. Raises UserError when there is none."""
    directory = directory.absolute()
    file = directory / "env"
    if not (directory / ".slurm_lab").is_file() or not file.is_file():
        raise UserError(f"there is no Slurm lab in {directory}; start one with: hpc-gen lab start")
    words = [word for line in file.read_text().splitlines() for word in shlex.split(line) if word != "export"]
    return Lab(directory, dict(word.split("=", 1) for word in words))


def stop(directory: Path, purge: bool = False) -> bool:
    """Stop the lab in `directory` and its jobs; `purge` removes the directory. False: there was no lab."""
    directory = directory.absolute()
    if not (directory / ".slurm_lab").is_file():
        return False
    argv = ["bash", str(SCRIPTS / "stop.sh"), "--quiet", *(["--purge"] if purge else [])]
    done = subprocess.run(
        argv,
        env={**_environment(), "SLURM_LAB_DIR": str(directory)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise UserError(f"the lab in {directory} could not be stopped: {_last_line(done.stderr)}")
    return True


def status(directory: Path) -> Status:
    """What lives of the lab in `directory`; an empty status when there is none."""
    directory = directory.absolute()
    if not (directory / ".slurm_lab").is_file() or not (directory / "env").is_file():
        return Status(directory, {}, {}, {})
    lab = attach(directory)
    names = ["munged", "slurmctld", *(f"slurmd-{node}" for node in lab.node_names)]
    if lab.settings["SLURM_LAB_ACCT"] == "dbd":
        names += ["mariadbd", "slurmdbd"]
    daemons = {name: _is_alive(directory / "run" / f"{name}.pid") for name in names}
    if not daemons["slurmctld"]:  # each client command would wait many seconds for it
        return Status(directory, daemons, {}, {})
    node_lines = lab.run(["sinfo", "-h", "-N", "-p", "low", "-o", "%N %T"], check=False).stdout.splitlines()
    job_lines = lab.run(["squeue", "-h", "-o", "%T"], check=False).stdout.split()
    nodes = {name: state for name, _, state in (line.partition(" ") for line in node_lines)}
    return Status(directory, daemons, nodes, Counter(job_lines))


def free_port_base(nodes: int, first: int = DEFAULT_PORT_BASE) -> int:
    """The first port base, counting up in hundreds, whose ports are all free. Raises UserError."""
    for base in range(first, 32000, 100):  # below the ports the kernel gives out by itself
        if all(_is_free(port) for port in (base + 1, base + 2, base + 3, *range(base + 11, base + 11 + nodes))):
            return base
    raise UserError(f"no free ports for a Slurm lab between {first} and 32000; stop what uses them or give a port base")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ports of a lab that has just ended are free
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _environment() -> dict[str, str]:
    """Our environment without the Slurm job we may be in, with the folders of the daemons on PATH."""
    variables = {
        name: value
        for name, value in env.snapshot().items()
        if not name.startswith(("SLURM_", "SRUN_", "SBATCH_", "SALLOC_"))
    }
    variables["PATH"] = f"{variables.get('PATH', '/usr/bin:/bin')}:/usr/local/sbin:/usr/sbin:/sbin"
    return variables


def _distribution() -> str:
    """The ID of /etc/os-release, for instance "debian"."""
    try:
        lines = Path("/etc/os-release").read_text().splitlines()
    except OSError:
        return "an unknown system"
    return next((line[3:].strip("\"'") for line in lines if line.startswith("ID=")), "an unknown system")


def _is_alive(pid_file: Path) -> bool:
    """Whether the process of a pid file lives (a dead one that nobody has waited for yet does not)."""
    try:
        pid = int(pid_file.read_text())
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, ValueError, IndexError):
        return False
    return state not in ("Z", "X")


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""
