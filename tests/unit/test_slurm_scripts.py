"""The batch scripts: golden files, bash's and shellcheck's opinion, and their logic under a fake srun and scontrol.

`python tests/unit/test_slurm_scripts.py` writes the golden files anew; look at the difference before committing it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slurm import batch, profiles, requeue
from slurm.batch import JobSpec

GOLDEN = Path(__file__).with_name("slurm_scripts")
RUN, WORKSPACE = Path("/w/runs/big one"), Path("/w")
VARIABLES = {"HPC_GEN_ACCOUNT": "p42", "HPC_GEN_IMAGE": "/images/hpc gen.sif", "SCRATCH": "/scratch/me"}
PYXIS = """
runtime: {kind: pyxis, image: "nvcr.io#nvidia/pytorch:25.06-py3", binds: [/data, "/x:/y:ro"]}
requeue: false
compute_network: false
gpus: {style: gres, type: h100}
mem_per_task_gb: 12.5
constraint: "a&b"
modules: [module load cuda]
environment: {NOTE: "it's five"}
"""


def profile(name: str) -> profiles.ClusterProfile:
    text = PYXIS if name == "pyxis" else (profiles.CLUSTERS / f"{name}.yaml").read_text()
    return profiles.loads(text, (), name, **VARIABLES)


def spec(name: str, stage: str, **changes: object) -> JobSpec:
    """A job of a cluster; training on two nodes, arrays of eight."""
    found = profile(name)
    width = {"nodes": 2, "tasks_per_node": found.tasks_per_node} if stage == "train" else {"array": 8}
    python = batch.python_words(found, RUN, WORKSPACE, "/opt/hpc gen/bin/python")
    job = JobSpec(f"big.{stage}", RUN, WORKSPACE, stage, found, python, **width)  # type: ignore[arg-type]
    return replace(job, **changes)  # type: ignore[arg-type]


def of_runs(name: str, **changes: object) -> JobSpec:
    """The trainings of two runs as one array."""
    found = profile(name)
    runs = (Path("/w/runs/big-seed-1"), Path("/w/runs/it's 2"))
    python = batch.python_words(found, batch.RUN_OF_ELEMENT, WORKSPACE, "/opt/hpc gen/bin/python")
    folder = WORKSPACE / "arrays" / "big" / "0001"
    return spec(name, "train", run=folder, runs=runs, array=2, python=python, **changes)


SPECS = {
    "lab_train": spec("lab", "train"),
    "lab_encode": spec("lab", "encode", dependency=None),
    "gh200_train": spec("gh200", "train", dependency="afterok:41", threads=8),
    "a100_train": spec("a100", "train"),
    "a100_sample": spec("a100", "sample", dependency="aftercorr:41"),
    "generic_report": spec("generic", "report", array=None, dependency="afterok:41"),
    "lab_train_runs": of_runs("lab", dependency="afterok:41:43"),
    "gh200_train_runs": of_runs("gh200"),
    "pyxis_train_runs_chain": of_runs("pyxis", dependency="aftercorr:41", chain_left=2),
    "pyxis_train_chain": spec("pyxis", "train", dependency="singleton", chain_left=2),
}


def text_of(job: JobSpec) -> str:
    """The script as the executor writes it."""
    found = batch.script(job, f"{job.python} -u -m submitit.core._submit '{job.run}/slurm/submitted'")
    return found.replace(sys.executable, "PYTHON-OF-SUBMIT")


@pytest.mark.parametrize("name", SPECS)
def test_golden(name: str) -> None:
    path = GOLDEN / f"{name}.sh"
    assert text_of(SPECS[name]) == path.read_text(), (
        f"if this is wanted: python {Path(__file__).name}, then look at git diff"
    )


def test_no_golden_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.glob("*.sh")} == set(SPECS)


@pytest.mark.parametrize("name", SPECS)
def test_bash_reads_it(name: str) -> None:
    done = subprocess.run(["bash", "-n"], input=text_of(SPECS[name]), text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", SPECS)
def test_shellcheck_has_nothing_to_say(name: str, tmp_path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (Debian: apt-get install shellcheck)")
    path = tmp_path / "job.sh"
    path.write_text(text_of(SPECS[name]))
    done = subprocess.run(["shellcheck", "--severity=style", str(path)], text=True, capture_output=True, check=False)
    assert done.stdout == ""


def test_flags_that_matter_everywhere() -> None:
    for job in SPECS.values():
        lines = text_of(job).splitlines()
        assert "#SBATCH --open-mode=append" in lines and "#SBATCH --export=ALL" in lines
        assert any(line.startswith("#SBATCH --comment=") for line in lines), "live jobs are found by it"
        assert ("#SBATCH --requeue" in lines) != ("#SBATCH --no-requeue" in lines)
        assert any("srun" in line and "--kill-on-bad-exit=1" in line for line in lines)
        if job.dependency is not None:
            assert "#SBATCH --kill-on-invalid-dep=yes" in lines


def test_a_run_is_bound_by_itself_only_where_it_is_not_in_its_workspace(tmp_path: Path) -> None:
    """Two mounts of one file system are two to rename(2), and shards are renamed from the run into a table."""
    found = profile("a100")
    workspace, outside = tmp_path / "w", tmp_path / "other" / "run"
    assert " --bind " + str(workspace) in (words := batch.python_words(found, workspace / "runs" / "a", workspace, "p"))
    assert words.count("--bind") == 1
    assert batch.python_words(found, outside, workspace, "p").count("--bind") == 2
    outside.mkdir(parents=True)
    (workspace / "runs").mkdir(parents=True)
    (workspace / "runs" / "link").symlink_to(outside)
    words = batch.python_words(found, workspace / "runs" / "link", workspace, "p")
    assert f"--bind {workspace / 'runs' / 'link'} " in words


def test_a_script_holds_nothing_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t")
    assert all("s3cr3t" not in text_of(job) for job in SPECS.values())


# ---------------------------------------------------------------- its logic, with fakes on PATH


class Fake:
    """A folder of programs that stand for Slurm's, and a run folder with the decision program."""

    def __init__(self, root: Path) -> None:
        self.run = root / "w" / "runs" / "one"
        self.bin, self.log = root / "bin", root / "asked"
        (self.run / "code" / "slurm").mkdir(parents=True)
        (self.run / "logs").mkdir()
        shutil.copyfile(requeue.__file__, self.run / "code" / "slurm" / "requeue.py")
        self.bin.mkdir()
        self.program("squeue", 'echo "2026-11-27T08:00:00"')
        self.program("scancel", "")
        self.program("sinfo", 'echo "n1 mixed"')
        self.scontrol()

    def program(self, name: str, body: str) -> None:
        path = self.bin / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> "{self.log}"\n{body}\n')
        path.chmod(0o755)

    def scontrol(self, shown: str = "JobState=RUNNING Reason=None PreemptTime=None", requeue_body: str = "") -> None:
        """`scontrol show job` prints `shown`; a requeue kills the batch shell, as Slurm does."""
        kill = 'kill -KILL "$(cat "$FAKE_SHELL")"'
        body = f'case "$1" in show) echo "{shown}";; requeue | release) {requeue_body or kill};; esac'
        self.program("scontrol", body)

    def begin(self, srun: str, chain_left: int | None = None, **variables: Any) -> subprocess.Popen[str]:
        """Start the script; `srun` is the body of the fake srun. Lower-case variables are fields of the job, `id_of` its
        array and element."""
        self.program("srun", srun)
        if "id_of" in variables:
            variables["SLURM_ARRAY_JOB_ID"], variables["SLURM_ARRAY_TASK_ID"] = variables.pop("id_of")
        changes = {name: variables.pop(name) for name in list(variables) if name.islower()}
        fields = {"run": self.run, "workspace": self.run.parent.parent, "chain_left": chain_left, **changes}
        job = replace(SPECS["lab_train"], **fields)
        script = self.run / "job.sh"
        script.write_text(batch.script(job, "payload"))
        shell = self.run / "shell"
        environment = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n1",
            "SLURM_JOB_NAME": "one.train",
            "FAKE_SHELL": str(shell),
            **variables,
        }
        process = subprocess.Popen(
            ["bash", str(script)], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        shell.write_text(str(process.pid))
        return process

    def end(self, srun: str, chain_left: int | None = None, **variables: Any) -> tuple[int, str]:
        """The script's exit code (-9 for one that was requeued) and its output."""
        process = self.begin(srun, chain_left, **variables)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def asked(self, program: str) -> list[str]:
        """The commands given to a program."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line.removeprefix(f"{program} ") for line in lines if line.startswith(f"{program} ")]


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return Fake(tmp_path)


def test_done(fake: Fake) -> None:
    code, output = fake.end("exit 0")
    assert code == 0 and "hpc-gen: train of job 7, start 0: done" in output
    assert not [words for words in fake.asked("scontrol") if not words.startswith("show")]


def test_saved_and_requeued(fake: Fake) -> None:
    code, output = fake.end("exit 85", SLURM_RESTART_COUNT="2")
    assert code == -9 and "start 2: its state is saved" in output
    assert fake.asked("scontrol")[-1] == "requeue 7"


def test_an_element_of_an_array_is_requeued_alone(fake: Fake) -> None:
    fake.end("exit 85", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="3")
    assert fake.asked("scontrol") == ["show job -o 7_3", "requeue 7_3"]


def test_each_element_of_an_array_of_runs_is_its_own_run(fake: Fake) -> None:
    """Code, logs and the verdict are those of the element's run; what becomes of it is told of the element alone."""
    other = fake.run.with_name("other")
    shutil.copytree(fake.run, other)
    runs = (other, fake.run)
    changes = {"run": fake.run.parent / "array", "runs": runs, "array": 2, "id_of": ("7", "1")}
    code, output = fake.end('echo "path $PYTHONPATH"; printf "%s\\n" "$@"; exit 85', **changes)
    assert code == -9 and f"hpc-gen: train of {fake.run}, job 7_1, start 0" in output
    assert f"path {fake.run}/code" in output and f"--output={fake.run}/logs/%A_%a_%t.log" in output
    assert fake.asked("scontrol") == ["show job -o 7_1", "requeue 7_1"]
    assert (fake.run / "slurm" / "ends" / "7_1.jsonl").exists() and not (other / "slurm" / "ends").exists()


def test_an_element_of_a_chain_that_fails_takes_no_other_run_with_it(fake: Fake) -> None:
    changes = {"run": fake.run.parent / "array", "runs": (fake.run,), "array": 1, "id_of": ("7", "0")}
    assert fake.end("exit 64", chain_left=2, **changes)[0] == 64
    assert fake.asked("scancel") == []  # its own element of the next job is cancelled by its dependency


@pytest.mark.parametrize("code", [2, 64, 70, 75, 87])
def test_codes_come_through(fake: Fake, code: int) -> None:
    assert fake.end(f"exit {code}")[0] == code
    assert [words for words in fake.asked("scontrol") if words.startswith("requeue")] == []


def test_an_ill_node_is_excluded(fake: Fake) -> None:
    ill = fake.run / "slurm" / "ill"
    ill.mkdir(parents=True)
    (ill / "7.0.n1").write_text("node n1: its GPU is gone")
    code, _ = fake.end("exit 86")
    assert code == -9
    assert fake.asked("scontrol")[1:] == ["requeuehold 7", "update JobId=7 ExcNodeList=n1", "release 7"]


def test_what_srun_says_is_in_the_log_and_first_failure_is_told(fake: Fake) -> None:
    code, output = fake.end(
        'echo "srun: error: n4: task 3: Exited with exit code 70" >&2; exit 143', SLURM_RESTART_COUNT="0"
    )
    assert "srun: error: n4: task 3: Exited with exit code 70" in output
    assert "(first failed: task 3 on n4 with code 70)" in output
    assert code == 70  # that task's, not the 143 of those that were killed for it


def test_the_shell_survives_signals_and_keeps_the_code(fake: Fake) -> None:
    """SIGCONT, SIGTERM, SIGUSR1 while the step runs: the code is still that of srun, and Slurm decides."""
    process = fake.begin('echo begun > "$FAKE_SHELL.begun"; sleep 1; exit 85')
    while not (fake.run / "shell.begun").exists():
        time.sleep(0.02)
    for name in ("CONT", "TERM", "USR1", "TERM"):
        os.kill(process.pid, getattr(__import__("signal"), f"SIG{name}"))
        time.sleep(0.05)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 85
    assert "Slurm itself ends this job" in output
    assert fake.asked("scontrol") == ["show job -o 7"]


def test_a_controller_that_is_away_is_asked_again(fake: Fake) -> None:
    fake.program("sleep", "")  # nobody waits
    fake.scontrol(
        requeue_body='if [ -e "$FAKE_SHELL.once" ]; then kill -KILL "$(cat "$FAKE_SHELL")"; fi; touch "$FAKE_SHELL.once"; exit 1'
    )
    assert fake.end("exit 85")[0] == -9
    assert fake.asked("scontrol")[1:] == ["requeue 7", "requeue 7"]


def test_without_any_python_the_saved_state_is_requeued(fake: Fake) -> None:
    (fake.run / "code" / "slurm" / "requeue.py").unlink()
    assert fake.end("exit 85")[0] == -9
    assert fake.asked("scontrol")[-1] == "requeue 7"
    assert fake.end("exit 64")[0] == 64


def test_a_chain_goes_on_or_is_cancelled(fake: Fake) -> None:
    assert fake.end("exit 85", chain_left=2)[0] == 0
    assert fake.asked("scancel") == []
    assert fake.end("exit 64", chain_left=2)[0] == 64
    assert fake.asked("scancel") == ["--state=PENDING --name=one.train"]
    assert fake.end("exit 85", chain_left=0)[0] == 85
    assert not [words for words in fake.asked("scontrol") if words.startswith("requeue")]


def test_the_end_of_the_job_reaches_the_tasks(fake: Fake) -> None:
    _, output = fake.end('echo "end $HPC_GEN_JOB_END threads $OMP_NUM_THREADS rank ${RANK-none}"', RANK="3", TZ="UTC")
    assert "end 1795766400 threads 1 rank none" in output
    _, output = fake.end('echo "end $HPC_GEN_JOB_END"', SLURM_JOB_END_TIME="1795770000")
    assert "end 1795770000" in output
    fake.program("squeue", "exit 1")
    assert "end 0" in fake.end('echo "end $HPC_GEN_JOB_END"')[1]


if __name__ == "__main__":
    for golden, job in SPECS.items():
        (GOLDEN / f"{golden}.sh").write_text(text_of(job))
