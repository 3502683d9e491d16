"""What tests/prove_slurm.py shows, case by case: preemption at every point, and the other ends that a job may come to.

Each case submits a run of its own, disturbs it for real, and returns a row: what was seen, and whether the run ended as
documented with the digest of the undisturbed one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scenes
from scenes import Scene

from hpc_gen.config import loader
from hpc_gen.runtime import goodput, journal
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import run_setup
from slurm import records

NARROW = ("train.ranks=2",)
START_LIMIT_S = 5.0  # of the preempting job, once training has started


@dataclass(frozen=True)
class Row:
    """One case: `codes` of the starts as requeue.py saw them; `states` by the accounting; `note` what else there is."""

    name: str
    place: str
    codes: str
    states: str
    seconds: dict[str, float]
    note: str
    equal: bool
    sound: bool
    waited_s: float | None = None


def row_of(
    scene: Scene, run: RunFolder, name: str, sound: bool, note: str = "", twin: RunFolder | None = None, **more: Any
) -> Row:
    """The row of a run that has come to its end; equal: its training is the undisturbed one, byte for byte.

    `twin`: the undisturbed one; None: that of the width of most cases.
    """
    twin = scene.run("narrow") if twin is None else twin
    jobs = [job for submission in records.read(run) for job in submission.jobs]
    ids = [job.job_id for job in jobs]
    ends = [(path.stem, end) for path in sorted((run.path / "slurm" / "ends").glob("*.jsonl")) for end in
            records.ends(run, path.stem)]  # fmt: skip
    equal = scenes.digests(run)["checkpoint"] == scenes.digests(twin)["checkpoint"]
    equal = equal and scenes.rows(run) == scenes.rows(twin)
    book = goodput.receipt(run, stage="train").seconds
    return Row(
        name,
        "container" if scene.image is not None else "bare",
        " ".join(str(end["code"]) for _, end in ends) or "-",
        " ".join(sorted(set(scene.states(ids).values()))),
        {key: round(value, 1) for key, value in book.items()},
        note,
        equal,
        sound and equal,
        **more,
    )


def preempted(scene: Scene, point: str) -> Row:
    """One real preemption at a point; the run must complete, and the preempting job start within seconds."""
    sampling = point == "sampling"
    name = f"at-{point}-{'in' if scene.image else 'out'}"
    run = scene.submit(name, *NARROW, stages="train,sample" if sampling else "train", points=(point,))
    (seen,) = scenes.disturb(scene, run, (point,))
    states = scene.wait_until_over(run)
    sound = set(states.values()) == {"COMPLETED"} and not scenes.committed_twice(run, "sample")
    in_time = seen.waited_s <= START_LIMIT_S or point not in scenes.STARTED_POINTS
    note = f"{seen.told} told there" + ("" if in_time else f"; the high job waited more than {START_LIMIT_S:g} s")
    return row_of(scene, run, f"preempted: {point}", sound, note, waited_s=round(seen.waited_s, 1))


def _held(scene: Scene, name: str, *overrides: str, point: str = "step") -> tuple[RunFolder, str]:
    """A training whose rank 0 waits in its fifth step; its run and job."""
    run = scene.submit(name, *NARROW, *overrides, stages="train", points=(point,))
    scenes.wait_for(lambda: bool(scene.reached(run, point, 0)), f"{name} is held\n{scene.logs(run)}")
    return run, scene.job(run, "train")


def _release(scene: Scene, run: RunFolder) -> None:
    (scene.marks / run.name / "release").touch()


def time_limit(scene: Scene) -> Row:
    """A job of two minutes whose steps take long: it saves a minute before the limit and requeues itself."""
    short = Scene(scene.lab, scene.workspace, scene.image, {**scene.profile, "time_limit_min": 2})
    run = short.submit("time-limit", *NARROW, "train.save_before_limit_s=50", stages="train", points=("slow",))
    states = short.wait_until_over(run, 420)
    first = records.ends(run, short.job(run, "train"))[0]
    sound = set(states.values()) == {"COMPLETED"} and first["code"] == 85 and not first["preempted"]
    return row_of(short, run, "time limit", sound, "saved before the limit, requeued by itself")


def cancelled(scene: Scene) -> Row:
    """scancel: CANCELLED, not requeued; submitted again it goes on from where it was saved."""
    run, job = _held(scene, "cancelled")
    scene.lab.run(["scancel", job])
    states = scene.wait_until_over(run)
    sound = list(states.values()) == ["CANCELLED"] and records.ends(run, job)[-1]["action"] == "end"
    shown = scene.command("status", "cancelled").stdout
    sound = sound and "cancelled" in shown
    scene.submit("cancelled", *NARROW, stages="train")
    sound = sound and list(scene.wait_until_over(run).values()) == ["COMPLETED"]
    return row_of(scene, run, "scancel, submitted again", sound, "status says: cancelled")


def requeued_by_hand(scene: Scene) -> Row:
    """scontrol requeue: the ranks save, Slurm starts the job again."""
    run, job = _held(scene, "requeued")
    scene.lab.run(["scontrol", "requeue", job])
    sound = list(scene.wait_until_over(run).values()) == ["COMPLETED"]
    return row_of(scene, run, "scontrol requeue", sound)


def held_and_released(scene: Scene) -> Row:
    """scontrol requeuehold, then release; status says that it is held."""
    run, job = _held(scene, "held")
    scene.lab.run(["scontrol", "requeuehold", job])
    scenes.wait_for(
        lambda: scene.shown(job).get("Reason", "").startswith(("JobHeld", "job_requeued")), "it is held", 60
    )
    shown = scene.command("status", "held").stdout
    scene.lab.run(["scontrol", "release", job])
    sound = list(scene.wait_until_over(run).values()) == ["COMPLETED"] and "held" in shown
    return row_of(scene, run, "requeuehold, release", sound, "status says: held")


def node_crash(scene: Scene) -> Row:
    """The second node of a training dies as in a power failure: Slurm requeues, the newest checkpoint stands."""
    run, job = _held(scene, "crashed", "train.collective_timeout_s=15")
    victim = scene.lab.run(["scontrol", "show", "hostnames", scene.shown(job)["NodeList"]]).stdout.split()[1]
    scene.lab.node("crash", victim)
    begun = time.monotonic()
    _release(scene, run)
    scenes.wait_for(lambda: int(scene.shown(job).get("Restarts", "0")) > 0, f"it is requeued\n{scene.logs(run)}", 120)
    passed = time.monotonic() - begun
    scene.lab.node("up", victim)
    sound = list(scene.wait_until_over(run).values()) == ["COMPLETED"]
    return row_of(scene, run, "node crash", sound, f"requeued {passed:.0f} s after the crash")


def slurmd_restart(scene: Scene) -> Row:
    """slurmd of a node stops and comes back: the training does not notice."""
    run, job = _held(scene, "slurmd")
    node = scene.lab.run(["scontrol", "show", "hostnames", scene.shown(job)["NodeList"]]).stdout.split()[1]
    scene.lab.node("down", node)
    time.sleep(2)
    scene.lab.node("up", node)
    _release(scene, run)
    sound = list(scene.wait_until_over(run).values()) == ["COMPLETED"]
    return row_of(scene, run, "slurmd restart", sound and len(records.ends(run, job)) == 1, "one start")


def controller_restart(scene: Scene) -> Row:
    """The controller is gone while the ranks end with 85: the batch body asks again until it is back."""
    run, job = _held(scene, "controller")
    pid = int((scene.lab.directory / "run" / "slurmctld.pid").read_text())
    os.kill(pid, 15)
    scenes.wait_for(lambda: not Path(f"/proc/{pid}").exists(), "slurmctld has ended", 30)
    (run.path / "PREEMPT").touch()  # what `hpc-gen preempt` writes
    _release(scene, run)
    scenes.wait_for(lambda: bool(records.ends(run, job)), "the step has ended", 60)
    scene.lab.run(["slurmctld"])
    states = scene.wait_until_over(run)
    ends = records.ends(run, job)
    sound = list(states.values()) == ["COMPLETED"] and [end["action"] for end in ends] == ["requeue", "end"]
    return row_of(scene, run, "controller restart", sound, "gone while the job wanted to be requeued")


def full_log_disk(scene: Scene) -> Row:
    """The disk of the logs becomes full while a training runs: the work goes on without them."""
    run = run_setup.prepare_run(loader.load(scene.config(), ["name=full-log", *NARROW]), scene.workspace)
    disk = scene.lab.directory.parent / "small"  # mounted before the lab was started: nodes see mounts of that moment
    shutil.rmtree(run.logs, ignore_errors=True)
    run.logs.symlink_to(disk)
    _held(scene, "full-log")
    with open(disk / "filler", "wb", buffering=0) as stream:
        try:
            while True:
                stream.write(b"x" * 512)
        except OSError:
            pass
    free = os.statvfs(disk).f_bavail
    _release(scene, run)
    sound = list(scene.wait_until_over(run).values()) == ["COMPLETED"] and free == 0
    (disk / "filler").unlink()
    return row_of(scene, run, "full log disk", sound, "full from the fifth step on; the journal has everything")


def hanging_rank(scene: Scene) -> Row:
    """Rank 1 does not come: the others name it and its host when the collective times out, and go on elsewhere."""
    run = scene.submit("hanging", *NARROW, "train.collective_timeout_s=8", stages="train", points=("hang",))
    states = scene.wait_until_over(run)
    ends = records.ends(run, scene.job(run, "train"))
    said = scene.logs(run, 200)
    host = next((node for node in scene.lab.node_names if f"rank 1 of 2 on {node} did not come" in said), "")
    sound = list(states.values()) == ["COMPLETED"] and bool(host) and ends[0]["code"] == 86
    return row_of(
        scene, run, "hanging rank", sound, f"named: rank 1 on {host or 'nobody'}; excluded {ends[0]['nodes']}"
    )


def side_by_side(scene: Scene) -> Row:
    """Two runs at once, both preempted by the same job: neither touches the other."""
    runs = [scene.submit(f"side-{k}", *NARROW, stages="train", points=("step",)) for k in "ab"]
    for run in runs:
        scenes.wait_for(lambda r=run: bool(scene.reached(r, "step", 0)), "both train")  # type: ignore[misc]
    scene.preempt()
    sound = all(list(scene.wait_until_over(run).values()) == ["COMPLETED"] for run in runs)
    rows = [row_of(scene, run, "two runs side by side", sound) for run in runs]
    return rows[0] if rows[1].sound else rows[1]


def side_by_side_in_one_array(scene: Scene) -> Row:
    """Two runs as the two elements of one array, each on two nodes: both preempted by one job; then one is requeued by
    hand while the other goes on; each ends as its undisturbed twin."""
    twin = scene.undisturbed("other", *NARROW, "seed=8", stages="train")
    first, second = scene.submit_array("array", "seed=7,8", *NARROW, stages="train", points=("step", "step"))
    ids = [scene.job(run, "train") for run in (first, second)]

    def held(restart: int, job: str) -> bool:
        return bool(list((scene.marks / "array").glob(f"step.{job}.{restart}.0.reached")))

    for restart in (0, 1):
        for job in ids:
            scenes.wait_for(
                lambda r=restart, j=job: held(r, j),  # type: ignore[misc]
                lambda r=restart, j=job: (
                    f"{j} is held in start {r}\n{scene.queue()}\n{scene.logs(first)}\n{scene.logs(second)}"
                ),  # type: ignore[misc]
            )
        if restart == 0:
            waited_s = scene.preempt()
    shown = scene.command("status", first.name).stdout
    scene.lab.run(["scontrol", "requeue", ids[0]])
    scenes.wait_for(lambda: len(records.ends(first, ids[0])) == 2, f"the one has ended\n{scene.logs(first)}", 60)
    alone = scene.state(ids[1]) == "RUNNING" and len(records.ends(second, ids[1])) == 1
    (scene.marks / "array" / "release").touch()
    states = {**scene.wait_until_over(first), **scene.wait_until_over(second)}
    sound = alone and f"job {ids[0]}" in shown and [states[job] for job in ids] == ["COMPLETED"] * 2
    sound = sound and [len(records.ends(run, job)) for run, job in zip((first, second), ids, strict=True)] == [3, 2]
    equal = scenes.digests(second) == scenes.digests(twin)
    note = "one array of two runs; one requeued by hand while the other went on" + ("" if equal else "; UNEQUAL twin")
    return row_of(scene, first, "two runs in one array", sound and equal, note, waited_s=round(waited_s, 1))


def chain(scene: Scene) -> Row:
    """A site that forbids requeues: the job that is preempted saves and ends well, the next of its chain goes on."""
    site = Scene(scene.lab, scene.workspace, scene.image, {**scene.profile, "requeue": False, "chain": 2})
    run = site.submit("chained", *NARROW, stages="train", points=("step",))
    scenes.wait_for(lambda: bool(site.reached(run, "step", 0)), lambda: f"it is held\n{site.logs(run)}")
    waited_s = site.preempt()
    shown = site.command("status", run.name).stdout
    _release(site, run)  # the second job has a first start, too
    states = site.wait_until_over(run)
    first, second = (job.job_id for job in records.read(run)[-1].jobs)
    ends = [(end["action"], end["code"]) for job in (first, second) for end in records.ends(run, job)]
    sound = set(states.values()) == {"COMPLETED"} and ends == [("next", 85), ("end", 0)]
    sound = sound and "saved for the next of its chain" in shown
    note = "two jobs of one name, --no-requeue; status says: saved for the next of its chain"
    return row_of(site, run, "a chain of jobs", sound, note, waited_s=round(waited_s, 1))


def ill_node(scene: Scene) -> Row:
    """The health probe of the second node fails: the job is requeued without that node."""
    run = scene.submit("ill", *NARROW, stages="train", points=("ill",))
    states = scene.wait_until_over(run)
    job = scene.job(run, "train")
    first = records.ends(run, job)[0]
    (host,) = first["nodes"]
    hosts = {
        event.fields["host"] for event in journal.read(run) if event.kind == "attempt_start" and event.stage == "train"
    }
    sound = list(states.values()) == ["COMPLETED"] and (first["code"], first["action"]) == (86, "elsewhere")
    sound = sound and host in scene.lab.node_names and len(hosts) == 2 and host not in hosts
    sound = sound and f"node {host}: its memory is gone" in scene.logs(run, 200)
    return row_of(scene, run, "ill node", sound, f"{host} was left out of the second start")


def without_network(scene: Scene) -> Row:
    """Compute nodes without a network: `submit` fetches the images here, and the jobs need nothing from outside."""
    wrapper = scene.workspace / "python-without-network"
    wrapper.write_text(f'#!/bin/bash\nexec unshare --net -- {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    port = int((scene.lab.directory / "etc" / "slurm.conf").read_text().split("SlurmctldPort=")[1].split()[0])
    reach = f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"
    inside = subprocess.run([wrapper, "-c", reach], capture_output=True, check=False).returncode
    outside = subprocess.run([sys.executable, "-c", reach], capture_output=True, check=False).returncode
    profile = {**scene.profile, "compute_network": False, "runtime": {"kind": "none", "python": str(wrapper)}}
    far = Scene(scene.lab, scene.workspace, None, profile)
    digits = (
        "train.ranks=1", "encode.source=mnist", "encode.source_path=null", "encode.limit=96", "sample.num_images=20",
        "data.table=tables/digits", "data.validation_table=tables/digits-validation",
    )  # fmt: skip
    run = far.submit("far", *digits, stages="encode,train,sample")
    states = far.wait_until_over(run)
    twin = far.undisturbed("near", *digits, stages="encode,train,sample")
    sound = set(states.values()) == {"COMPLETED"} and (inside, outside) == (1, 0)
    sound = sound and scenes.digests(run) == scenes.digests(twin)
    return row_of(far, run, "no network on the nodes", sound, "MNIST was fetched where it was submitted", twin)


def demo(scene: Scene) -> Row:
    """The experiment of `make demo`, shortened, with all its stages on two nodes with two processes each; its twin runs on
    this machine with four processes."""
    wide = Scene(scene.lab, scene.workspace, scene.image, {**scene.profile, "tasks_per_node": 2})
    run, twin = wide.run("demo-jobs"), wide.run("demo-here")
    config = str(scenes.ROOT / "job_configs" / "demo" / "mnist16.yaml")
    short = ("train.ranks=4", "train.total_images=1280", "train.schedule.warmup_images=320", "train.save_every=640",
             "train.keep_every=640", "train.validate.every_images=640", "train.preview=null")  # fmt: skip
    wide.command("submit", config, "--cluster", str(wide.profile_file(run)), f"name={run.name}", *short)
    states = wide.wait_until_over(run, 900)
    wide.command("run", config, f"name={twin.name}", *short, limit_s=900)
    stages = [job.stage for job in records.read(run)[-1].jobs]
    sound = set(states.values()) == {"COMPLETED"} and scenes.digests(run) == scenes.digests(twin)
    sound = sound and stages == ["encode", "train", "sample", "evaluate", "report"] and run.report.is_file()
    return row_of(wide, run, "the demo, all stages", sound, f"{len(scenes.digests(run))} digests equal", twin)


EVENTS: dict[str, Callable[[Scene], Row]] = {
    "time limit": time_limit,
    "scancel": cancelled,
    "requeue": requeued_by_hand,
    "requeuehold": held_and_released,
    "node crash": node_crash,
    "slurmd restart": slurmd_restart,
    "controller restart": controller_restart,
    "full log disk": full_log_disk,
    "hanging rank": hanging_rank,
    "side by side": side_by_side,
    "side by side in one array": side_by_side_in_one_array,
    "chain": chain,
    "ill node": ill_node,
    "without network": without_network,
}
INSIDE: dict[str, Callable[[Scene], Row]] = {"demo": demo}
"""Cases in a container only."""
