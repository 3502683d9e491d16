"""The lab is a cluster: nodes, accounting, the variables of a step; stopped, it leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_gen.runtime import ranks
from hpc_gen.runtime.errors import UserError
from slurm import lab as slurm_lab
from slurm.lab import Lab

pytestmark = pytest.mark.slurm_real

Until = Callable[..., None]
SHELL_FILES = sorted(slurm_lab.SCRIPTS.glob("*.sh"))


def processes_of(directory: Path) -> list[int]:
    """Live processes with `directory` in their environment or on their command line, without this one."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            text = (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
        except OSError:
            continue
        if f"{directory}/".encode() in text and int(process.name) != os.getpid():
            found.append(int(process.name))
    return found


def test_nodes_are_idle_and_status_says_so(lab: Lab) -> None:
    lines = lab.run(["sinfo", "-h", "-N", "-p", "low", "-o", "%N %T"]).stdout.split("\n")
    assert sorted(filter(None, lines)) == [f"{name} idle" for name in lab.node_names]
    status = slurm_lab.status(lab.directory)
    assert status.running and set(status.nodes) == set(lab.node_names)
    assert any("running" in line for line in status.lines())
    assert slurm_lab.attach(lab.directory) == lab


def test_every_node_has_its_own_name_and_knows_the_others(lab: Lab) -> None:
    script = "hostname; getent hosts " + " ".join(lab.node_names) + " | wc -l"
    output = lab.run(["srun", "-N4", "bash", "-c", script]).stdout.split()
    assert sorted(output) == sorted([*lab.node_names, *["4"] * 4])


def test_sacct_knows_how_a_job_ended(lab: Lab, until: Until) -> None:
    submitted = lab.run(["sbatch", "--parsable", "-o", "/dev/null", "--wrap", "exit 7"])
    job = submitted.stdout.strip()

    def record() -> str:
        return lab.run(["sacct", "-X", "-P", "-n", "-j", job, "-o", "State,ExitCode"]).stdout.strip()

    until(lambda: record() == "FAILED|7:0", f"sacct of job {job} is FAILED 7:0")


def test_step_variables_are_what_ranks_expect(lab: Lab, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    script = 'env -0 > "$0/$SLURM_PROCID"'
    lab.run(["srun", "-N2", "--ntasks-per-node=2", "bash", "-c", script, str(tmp_path)])
    infos = []
    for rank in range(4):
        text = (tmp_path / str(rank)).read_text()
        environ = dict(item.split("=", 1) for item in text.split("\0") if "=" in item)
        infos.append(ranks.detect(environ))
        assert environ["SLURM_JOB_NODELIST"] == f"{lab.settings['SLURM_LAB_PREFIX']}[1-2]"
        with pytest.raises(UserError, match="SLURM_PROCID"):  # left over from a shell that once ran torchrun
            ranks.detect({**environ, "RANK": str((rank + 1) % 4), "WORLD_SIZE": "4"})
    assert [info.rank for info in infos] == [0, 1, 2, 3]
    assert [info.local_rank for info in infos] == [0, 1, 0, 1]
    assert {(info.world_size, info.local_world_size, info.launcher) for info in infos} == {(4, 2, "srun")}


def test_a_batch_shell_without_srun_is_one_rank(lab: Lab, until: Until, tmp_path: Path) -> None:
    wrap = f"env -0 > {tmp_path}/part; mv {tmp_path}/part {tmp_path}/environ"
    lab.run(["sbatch", "-N2", "--ntasks-per-node=2", "-o", "/dev/null", "--wrap", wrap])
    until((tmp_path / "environ").is_file, "the batch script has run")
    text = (tmp_path / "environ").read_text()
    info = ranks.detect(dict(item.split("=", 1) for item in text.split("\0") if "=" in item))
    assert (info.rank, info.world_size, info.launcher) == (0, 1, "python")


def test_gpus_of_a_task_are_numbered(lab: Lab) -> None:
    asked = ["srun", "-N1", "-n2", "--gpus-per-task=1", "bash", "-c", "echo $CUDA_VISIBLE_DEVICES"]
    assert sorted(lab.run(asked).stdout.split()) == ["0", "1"]


def test_a_node_goes_down_and_comes_back(lab: Lab, until: Until) -> None:
    name = lab.node_names[3]
    daemon = f"slurmd-{name}"
    lab.node("crash", name)
    until(lambda: not slurm_lab.status(lab.directory).daemons[daemon], f"{daemon} is dead")
    status = slurm_lab.status(lab.directory)
    assert not status.running and any(daemon in line for line in status.lines())
    lab.node("up", name)
    until(lambda: slurm_lab.status(lab.directory).running, "all daemons are alive")
    until(lambda: set(slurm_lab.status(lab.directory).nodes.values()) == {"idle"}, "all nodes are idle")
    assert lab.run(["srun", "-w", name, "hostname"]).stdout.strip() == name


def test_two_labs_side_by_side_and_nothing_left_after_purge(lab: Lab, until: Until) -> None:
    directory = lab.directory.parent / "second"
    base = slurm_lab.free_port_base(1, first=int(lab.settings["SLURM_LAB_PORT_BASE"]))
    second = slurm_lab.start(directory, nodes=1, port_base=base, accounting=False, gpus=0)
    try:
        second.run(["sbatch", "-o", "/dev/null", "--wrap", "setsid sleep 600 & srun sleep 601"])
        until(lambda: second.run(["squeue", "-h", "-t", "R", "-o", "%i"]).stdout != "", "the job runs")
        assert lab.run(["squeue", "-h", "-n", "wrap", "-t", "R"]).stdout == ""
    finally:
        assert slurm_lab.stop(directory, purge=True)
    assert not directory.exists() and processes_of(directory) == []
    assert not list(Path("/sys/fs/cgroup").glob(f"*/slurm_lab{base}n*"))
    assert not slurm_lab.stop(directory)
    assert slurm_lab.status(lab.directory).running


def test_refusals_name_the_reason(lab: Lab, tmp_path: Path) -> None:
    used = int(lab.settings["SLURM_LAB_PORT_BASE"])
    short = lab.directory.parent / "refused"
    with pytest.raises(UserError, match=f"port {used + 1} is in use"):
        slurm_lab.start(short, port_base=used)
    assert not short.exists()
    with pytest.raises(UserError, match="longer than 60 characters"):
        slurm_lab.start(tmp_path / ("x" * 60))
    short.mkdir()
    (short / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="is not the directory of a lab"):
        slurm_lab.start(short)
    assert (short / "thesis.tex").read_text() == "mine"
    with pytest.raises(UserError, match="there is no Slurm lab"):
        slurm_lab.attach(short)
    with pytest.raises(UserError, match=r"sbatch .* ended with 1"):
        lab.run(["sbatch", "-p", "nowhere", "--wrap", "true"])
    assert slurm_lab.status(lab.directory).running


def test_a_start_that_fails_half_way_leaves_nothing(lab: Lab) -> None:
    directory = lab.directory.parent / "half"
    with pytest.raises(UserError, match="did not start: slurmctld"):
        slurm_lab.start(directory, nodes=1, accounting=False, gpus=0, SLURM_LAB_GRACE="soon")
    assert processes_of(directory) == []


def test_free_port_base_steps_over_used_ports() -> None:
    base = slurm_lab.free_port_base(2, first=20000)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", base + 12))  # the port of the second node
        taken.listen()
        assert slurm_lab.free_port_base(2, first=base) == base + 100
        assert slurm_lab.free_port_base(1, first=base) == base


@pytest.mark.parametrize("script", SHELL_FILES, ids=lambda path: path.name)
def test_scripts_are_sound(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="shellcheck is not installed; apt-get install shellcheck"
)
@pytest.mark.parametrize("script", SHELL_FILES, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    subprocess.run(["shellcheck", "-x", "-S", "warning", str(script)], check=True)


def test_why_not_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "needs root" in str(slurm_lab.why_not())
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(slurm_lab, "_distribution", lambda: "plan9")
    assert "plan9" in str(slurm_lab.why_not())
    monkeypatch.setattr(slurm_lab, "_distribution", lambda: "debian")
    monkeypatch.setattr(slurm_lab, "_PROGRAMS", ("no-such-program",))
    assert "no-such-program" in str(slurm_lab.why_not()) and "install_slurm.sh" in str(slurm_lab.why_not())


def command(*words: str) -> subprocess.CompletedProcess[str]:
    """`hpc-gen lab ...` as typed."""
    root = Path(__file__).resolve().parents[2]
    argv = [sys.executable, "-P", "-m", "hpc_gen.cli", "lab", *words]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run(argv, capture_output=True, text=True, env=environment, check=False)


def test_the_commands(lab: Lab) -> None:
    place = lab.directory.parent / "typed"
    where = ["--directory", str(place)]
    planned = command("start", *where, "--nodes", "1", "--dry-run")
    assert planned.returncode == 0 and planned.stdout.splitlines()[-1] == "it can start here"
    assert not place.exists()
    absent = command("status", *where)
    assert (absent.returncode, absent.stdout) == (2, f"no lab in {place}; start one with: hpc-gen lab start\n")
    nothing = command("stop", *where)
    assert nothing.returncode == 2 and "there is no lab in" in nothing.stderr
    try:
        started = command("start", *where, "--nodes", "1", "--gpus", "0", "--no-accounting")
        assert started.returncode == 0 and f"lab in {place}: running" in started.stdout, started.stderr
        found = json.loads(command("status", *where, "--json").stdout)
        assert found["running"] and list(found["nodes"].values()) == ["idle"] and all(found["daemons"].values())
        assert (
            "would stop it, 0 jobs end, its folder is removed" in command("stop", *where, "--purge", "--dry-run").stdout
        )
        assert command("status", *where).returncode == 0
    finally:
        stopped = command("stop", *where, "--purge")
    assert stopped.returncode == 0 and not place.exists() and processes_of(place) == []


class TestInstall:
    """install_slurm.sh where it must not install: it says so loudly and ends with 0."""

    INSTALL = str(slurm_lab.SCRIPTS / "install_slurm.sh")

    def test_all_there(self, lab: Lab) -> None:
        done = subprocess.run(["bash", self.INSTALL], capture_output=True, text=True, check=True)
        assert "installed already" in done.stdout

    def test_not_debian(self, lab: Lab, tmp_path: Path) -> None:
        (tmp_path / "os-release").write_text("ID=plan9\n")
        inside = f"mount --bind {tmp_path}/os-release /etc/os-release && exec bash {self.INSTALL}"
        argv = ["unshare", "--mount", "--propagation", "private", "bash", "-c", inside]
        done = subprocess.run(argv, capture_output=True, text=True, check=True)
        assert "SLURM IS NOT INSTALLED: this is plan9" in done.stderr and "SKIPPED" in done.stderr

    def test_not_root(self, lab: Lab) -> None:
        # a user who sees no package: dpkg-query of this folder knows none
        folder = lab.directory.parent / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "dpkg-query").write_text("#!/bin/sh\nexit 1\n")
        (folder / "dpkg-query").chmod(0o755)
        argv = ["setpriv", "--reuid=65534", "--clear-groups", "bash", "-s"]
        done = subprocess.run(
            argv,
            input=Path(self.INSTALL).read_text(),
            env={"PATH": f"{folder}:/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert "only root can install them" in done.stderr and "SKIPPED" in done.stderr

    def test_apptainer(self, tmp_path: Path) -> None:
        script = str(slurm_lab.SCRIPTS / "install_apptainer.sh")
        if shutil.which("apptainer"):
            done = subprocess.run(["bash", script], capture_output=True, text=True, check=True)
            assert "Apptainer for the lab is installed already (apptainer version" in done.stdout
        (tmp_path / "os-release").write_text("ID=plan9\n")
        inside = f"mount --bind {tmp_path}/os-release /etc/os-release && exec bash {script}"
        argv = ["unshare", "--mount", "--propagation", "private", "bash", "-c", inside]
        done = subprocess.run(argv, capture_output=True, text=True, check=True)
        assert "APPTAINER IS NOT INSTALLED: this is plan9" in done.stderr and "SKIPPED" in done.stderr
