"""`hpc-gen submit` on a real Slurm: a whole experiment with a task that fails once; really preempted trainings, bare and in
a container. Whatever happens, the result is the one that `hpc-gen run` gives on this machine.

The short set. All twelve points of preemption, in both, and the other ends of a job are in tests/prove_slurm.py.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import scenes
import slurm_cases
from scenes import Scene

from hpc_gen.runtime import goodput, journal
from hpc_gen.runtime.goodput import CATEGORIES
from hpc_gen.stages import runner
from slurm import records
from slurm.lab import Lab

pytestmark = [pytest.mark.slurm_real, pytest.mark.timeout(600)]

ONE_PER_NODE = ("train.ranks=2",)


@pytest.fixture(scope="module")
def scene(lab: Lab) -> Iterator[Scene]:
    """A workspace beside the lab."""
    found = Scene(lab, lab.directory.parent / "scene")
    yield found
    found.clean()


@pytest.fixture(scope="module")
def narrow(scene: Scene) -> Scene:
    """The same workspace with one training process per node, and the undisturbed training of that width."""
    found = Scene(scene.lab, scene.workspace, profile={"tasks_per_node": 1})
    found.undisturbed("narrow", *ONE_PER_NODE, stages="encode,train")
    return found


def test_a_whole_experiment_is_what_it_is_on_one_machine(scene: Scene) -> None:
    """Encode array (task 1 is killed once and refilled), 2 nodes x 2 tasks, sample and evaluate arrays, report.

    Files get the mode and group of the profile, and a key of wandb that is in the environment reaches no file.
    """
    secret = "0123456789abcdef" * 2 + "deadbeef"
    there = Scene(scene.lab, scene.workspace, profile={"umask": "027", "group": "games"})
    run = there.submit("whole", fail="encode:1", WANDB_API_KEY=secret)
    local = Scene(there.lab, there.lab.directory.parent / "local")
    twin = local.undisturbed("whole")  # while Slurm is at work
    states = there.wait_until_over(run)
    assert set(states.values()) == {"COMPLETED"}, f"{states}\n{there.logs(run)}"
    stages = [job.stage for job in records.read(run)[-1].jobs]
    assert stages == ["encode", "train", "sample", "evaluate", "report"]
    first, second = records.ends(run, f"{there.job(run, 'encode')}_1")
    assert (first["code"], first["action"], second["code"], second["action"]) == (137, "requeue", 0, "end")
    assert first["first"]["code"] == 137 and "tried again (1 of 1)" in first["why"]
    assert (there.marks / "whole" / "failed.encode.1").exists()
    for stage in ("encode", "sample", "evaluate", "report"):
        assert scenes.committed_twice(run, stage) == []
    hosts = {
        event.fields["host"] for event in journal.read(run) if event.kind == "attempt_start" and event.stage == "train"
    }
    assert len(hosts) == 2 and run.report.is_file()

    assert scenes.digests(run) == scenes.digests(twin)
    shutil.rmtree(local.workspace)

    files = [path for path in run.path.rglob("*") if path.is_file() and run.code not in path.parents]
    assert len(files) > 50
    assert {path.relative_to(run.path).as_posix() for path in files if path.stat().st_mode & 0o7} == set()
    assert {path.group() for path in files} == {"games"}
    assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_the_same_run_cannot_be_submitted_twice(narrow: Scene) -> None:
    run = narrow.submit("twice", *ONE_PER_NODE, stages="train")
    again = narrow.command(
        "submit", str(narrow.config()), "--cluster", str(narrow.profile_file(run)), "name=twice", *ONE_PER_NODE, "--stages",
        "train", expected=2,
    )  # fmt: skip
    assert "run 'twice' is submitted already: job " in again.stderr and len(records.read(run)) == 1
    narrow.lab.run(["scancel", narrow.job(run, "train")])
    assert list(narrow.wait_until_over(run).values()) == ["CANCELLED"]


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("partition=lo", "the cluster has no partition 'lo' (did you mean 'low'?); it has "),
        (
            "cpus_per_task=17",
            "train cannot run in partition 'low': 1 processes of 17 CPUs do not fit into its nodes of 16",
        ),
        ("max_nodes=1", "training wants 2 nodes of 1 processes and the profile allows 1"),
        ("sbatch.licenses=nope", "Slurm would refuse the job of train: "),
    ],
)
def test_what_the_cluster_cannot_serve_is_refused_before_the_queue(narrow: Scene, setting: str, sentence: str) -> None:
    """By sinfo, and by sbatch --test-only where only Slurm knows."""
    said = narrow.command(
        "submit", str(narrow.config()), "--cluster", str(narrow.profile_file(narrow.run("refused"))), "name=refused",
        *ONE_PER_NODE, "--stages", "train", "--set", setting, expected=2,
    )  # fmt: skip
    assert sentence in said.stderr
    assert narrow.lab.run(["squeue", "-h", "-n", "refused.train"]).stdout == ""


def test_preempted_for_real_at_three_points(narrow: Scene) -> None:
    """While torch is imported, between two collectives of a step, and in front of the rename of a checkpoint."""
    points = ("in_import", "step", "rename")
    run = narrow.submit("chain", *ONE_PER_NODE, stages="train", points=points)
    found = scenes.disturb(narrow, run, points)
    states = narrow.wait_until_over(run)
    assert list(states.values()) == ["COMPLETED"], f"{states}\n{narrow.logs(run)}"
    ends = records.ends(run, narrow.job(run, "train"))
    assert [(end["code"], end["action"]) for end in ends] == [(85, "requeue")] * 3 + [(0, "end")]
    assert all(end["preempted"] for end in ends[:3])
    assert all(each.told == 1 for each in found if each.point in scenes.STARTED_POINTS)
    assert scenes.digests(run) == scenes.digests(narrow.run("narrow"))
    attempts = [attempt for attempt in journal.attempts(run) if attempt.stage == "train"]
    assert [attempt.exit_code for attempt in attempts] == [85, 85, 0]  # the first start claimed none
    book = goodput.receipt(run, stage="train")
    print("goodput:", {name: round(book.seconds[name], 2) for name in CATEGORIES}, f"waiting {book.waiting_s:.1f} s")
    held = sum(attempt.wall_s * attempt.world_size for attempt in book.attempts)
    # every second is booked; an attempt is counted from its first process, and the others began a moment later
    assert sum(book.seconds.values()) == pytest.approx(held, rel=0.01)
    assert book.seconds["redone"] == 0.0, "a preemption that is heard costs no work"
    print("waited for the nodes:", {each.point: round(each.waited_s, 1) for each in found})


def test_two_runs_in_one_array_do_not_touch_each_other(narrow: Scene) -> None:
    """Both preempted by one job, then one requeued by hand: the case of `make prove`, with its twin of each seed."""
    row = slurm_cases.side_by_side_in_one_array(narrow)
    assert row.sound and row.equal, row


def test_in_a_container_as_an_ordinary_user(narrow: Scene, image: Path) -> None:
    """A read-only image, as nobody, preempted while the ranks agree on whether to stop."""
    profile = {**narrow.profile, "sbatch": {"uid": "nobody", "gid": "nogroup"}, "umask": "000"}
    # a workspace of its own: the profile of the whole experiment lets its group alone into what it makes
    inside = Scene(narrow.lab, narrow.lab.directory.parent / "nobody", image, profile)
    inside.undisturbed("narrow", *ONE_PER_NODE, stages="encode,train")
    (inside.workspace / "tables").chmod(0o777)
    own = ("data.table=tables/inside", "data.validation_table=tables/inside-validation")
    # shards go from the run's folder into the table by rename, which two mounts in the container would not allow
    run = inside.submit("inside", *ONE_PER_NODE, *own, stages="encode,train", points=("agreement",))
    scenes.disturb(inside, run, ("agreement",))
    states = inside.wait_until_over(run)
    assert set(states.values()) == {"COMPLETED"}, f"{states}\n{inside.logs(run)}"
    assert scenes.digests(run) == scenes.digests(inside.run("narrow"))
    budget = (
        r"train: start-up [\d.]+ s: container [\d.]+, import [\d.]+, rendezvous [\d.]+, load [\d.]+, first step [\d.]+"
    )
    assert re.search(budget, inside.logs(run, 200)), inside.logs(run)
    newest = scenes.read.newest(run).path
    assert newest.stat().st_uid == 65534, "another user than nobody has written the checkpoint"
    assert not list(run.code.rglob("__pycache__")), "bytecode was written to the shared file system"
    assert runner.load_run(run).identity == runner.load_run(inside.run("narrow")).identity
