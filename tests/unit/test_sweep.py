"""Sweeps: the grid as desired state, only what is missing, lines that go, the search, the Pareto table, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import toy_run
import yaml

from eval_jobs import sweep, sweep_plan, sweep_table
from hpc_gen.config.errors import ConfigError
from hpc_gen.config.sweep import SearchConfig
from hpc_gen.metrics import results
from hpc_gen.metrics.results import MetricRecord
from hpc_gen.runtime.errors import HpcGenError
from hpc_gen.runtime.journal import Journal
from hpc_gen.sampling.index import read_index
from hpc_gen.stages import run_setup

GRID = {
    "name": "grid",
    "run": "toy",
    "axes": {"guidance": [1.0, 2.0], "steps": [1, 2]},
    "sample": {"num_images": 20, "block_images": 10, "batch": 5},
    "evaluate": {"metrics": ["fid", "kid"]},
}


@pytest.fixture(scope="module", autouse=True)
def _restore_determinism():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def workspace(tmp_path):
    toy_run.make_run(tmp_path)
    return tmp_path


def _grid(workspace: Path, **changes):
    path = workspace / "grid.yaml"
    path.write_text(yaml.safe_dump({**GRID, **changes}))
    return sweep_plan.read_grid(path)


def _apply(workspace: Path, **changes):
    found, resolved = sweep_plan.plan(_grid(workspace, **changes), workspace)
    folder = sweep_plan.apply(found, resolved, workspace)
    return found, folder, run_setup.load_run(folder)


def _stage(folder, resolved, workspace, stage: str, task: int = 0, tasks: int = 1, finish: bool = True):
    worker = getattr(sweep, stage)(toy_run.context(folder, resolved, workspace, stage, task, tasks))
    done = toy_run.do_units(folder, worker, worker.units()[task::tasks])
    if finish:
        worker.finish()
    return done


def _all(folder, resolved, workspace):
    return {stage: len(_stage(folder, resolved, workspace, stage)) for stage in sweep_plan.STAGES}


def test_every_point_is_sampled_and_scored_once(workspace):
    found, folder, resolved = _apply(workspace)
    assert sweep_plan.outlook_of(found, workspace).missing == 4
    # 4 points x 2 blocks; 4 x 2 blocks of features and 3 of the reference, which they share; 4 files of metrics
    assert _all(folder, resolved, workspace) == {"points": 8, "features": 11, "scores": 4}
    assert _all(folder, resolved, workspace) == {"points": 0, "features": 0, "scores": 0}
    assert sweep_plan.outlook_of(found, workspace).missing == 0
    table = sweep_table.table_of(folder, found)
    assert [row.keys for row in table.rows][0] == {"guidance": 1.0, "steps": 1, "checkpoint": 64}
    assert [row.nfe for row in table.rows] == [1.0, 2.0, 2.0, 4.0]  # guidance doubles what a step asks
    assert all(row.value("fid") is not None and row.value("kid") is not None for row in table.rows)
    assert table.best is not None and not table.problems
    record = table.rows[0].records["fid"]
    assert record.subject["run"] == "toy" and record.subject["plan"]["settings"]["guidance"] == 1.0


def test_a_point_is_what_the_run_itself_would_sample_and_score(workspace):
    """A sweep's images and numbers are those of the stages sample and evaluate with these settings."""
    from eval_jobs import evaluate, sample

    found, folder, resolved = _apply(workspace, axes={"guidance": [2.0]})
    _all(folder, resolved, workspace)
    (name,) = found.points
    run, own = toy_run.make_run(
        workspace,
        "sample={num_images: 20, block_images: 10, batch: 5, seed: 11, settings: {steps: 2, guidance: 2.0}, checkpoint: 64}",
        "evaluate.metrics=[fid, kid]",
        name="own",
    )
    for stage, factory in (("sample", sample.worker), ("evaluate", evaluate.worker)):
        made = factory(toy_run.context(run, own, workspace, stage))
        toy_run.do_units(run, made)
        made.finish()
    assert torch.equal(
        read_index(run.samples("main")).read(range(20)), read_index(folder.samples(name)).read(range(20))
    )
    ours, theirs = results.read(folder.metrics(name)).get("fid"), results.read(run.metrics("main")).get("fid")
    assert results.compare(ours, theirs) == 0.0


def test_number_of_tasks_does_not_change_an_image(workspace):
    digests = []
    for tasks in (1, 3):
        found, folder, resolved = _apply(workspace, name=f"grid{tasks}")
        for task in reversed(range(tasks)):
            _stage(folder, resolved, workspace, "points", task, tasks, finish=task == 0)
        digests.append([read_index(folder.samples(name)).blocks for name in found.points])
    assert digests[0] == digests[1]


def test_a_line_more_is_done_and_a_line_less_is_cancelled(workspace):
    found, folder, resolved = _apply(workspace)
    _all(folder, resolved, workspace)
    more, folder, resolved = _apply(workspace, points=[{"guidance": 3.0, "steps": 1}])
    assert _all(folder, resolved, workspace) == {"points": 2, "features": 2, "scores": 1}
    fewer, folder, resolved = _apply(workspace, axes={"guidance": [1.0], "steps": [1, 2]})
    outlook = sweep_plan.outlook_of(fewer, workspace)
    assert outlook.missing == 0
    assert len(sweep_table.table_of(folder, fewer).rows) == 2
    gone = [name for name in more.points if name not in fewer.points]
    assert all(folder.metrics(name).is_file() for name in gone)  # out of the table, not off the disk
    again, folder, resolved = _apply(workspace)
    assert _all(folder, resolved, workspace) == {"points": 0, "features": 0, "scores": 0}


@pytest.mark.parametrize(("every_s", "reads"), [(0.0, 19), (3600.0, 8)])
def test_the_wish_is_read_now_and_then_not_at_every_step(workspace, monkeypatch, every_s, reads):
    """Once as a unit begins, then once a second: a thousand steps a second would be as many reads of a shared disk."""
    _, folder, resolved = _apply(workspace)
    asked = []
    plain = sweep.PointsWorker.is_wanted
    monkeypatch.setattr(sweep, "LOOK_S", every_s)
    monkeypatch.setattr(sweep.PointsWorker, "is_wanted", lambda self, point: asked.append(point) or plain(self, point))
    _stage(folder, resolved, workspace, "points")
    assert len(asked) == reads if reads == 8 else len(asked) > reads


def test_work_on_a_point_that_is_not_wanted_any_more_is_left(workspace, monkeypatch):
    """A task that began with the old grid marks its units in their turn, drops the one in hand, and does the others."""
    monkeypatch.setattr(sweep, "LOOK_S", 0.0)
    found, folder, resolved = _apply(workspace)
    worker = sweep.points(toy_run.context(folder, resolved, workspace, "points"))
    units = worker.units()
    first = next(iter(found.points))
    dropped = 0

    def unwanted_while_at_work():
        nonlocal dropped
        dropped += 1
        if dropped == 3:  # in the middle of the first block
            _apply(workspace, axes={"guidance": [2.0], "steps": [1, 2]})

    done = toy_run.do_units(folder, worker, units, unwanted_while_at_work)
    assert len(done) == 8
    worker.finish()
    kept = [name for name in found.points if (folder.samples(name) / "index.json").is_file()]
    assert len(kept) == 2 and first not in kept
    marks = {path.name.partition("-")[0] for path in (folder.path / "cancelled").iterdir()}
    assert marks == set(found.points) - set(kept)
    # the others go on: a new task knows only what is wanted
    narrow, folder, resolved = _apply(workspace, axes={"guidance": [2.0], "steps": [1, 2]})
    assert _stage(folder, resolved, workspace, "points") == []
    assert (
        len(_stage(folder, resolved, workspace, "features")) == 7
        and len(_stage(folder, resolved, workspace, "scores")) == 2
    )
    # wanted again: the marks go, the work is missing again
    whole, folder, resolved = _apply(workspace)
    assert not list((folder.path / "cancelled").iterdir())
    assert len(_stage(folder, resolved, workspace, "points")) == 4


def test_a_task_that_begins_while_the_grid_changes_reads_one_of_both(workspace, monkeypatch):
    """Config and hashes are two files: a task that saw the old one of the first takes no offence at the new second."""
    found, folder, _ = _apply(workspace)
    hashes, calls = run_setup.facts_of, []

    def late(run):
        calls.append(run)
        if len(calls) == 1:
            _apply(workspace, axes={"guidance": [1.0], "steps": [1, 2]})
        return hashes(run)

    monkeypatch.setattr(run_setup, "facts_of", late)
    seen = sweep_plan.read_sweep(run_setup.load_run(folder))
    assert seen is not None and len(found.points) == 4 and len(seen.points) == 2


def test_other_metrics_take_no_new_images(workspace):
    found, folder, resolved = _apply(workspace)
    _all(folder, resolved, workspace)
    more, folder, resolved = _apply(workspace, evaluate={"metrics": ["fid", "kid", "prc"]})
    assert more.points == found.points
    counts = _all(folder, resolved, workspace)
    assert counts == {"points": 0, "features": 0, "scores": 4}
    assert sweep_table.table_of(folder, more).rows[0].value("precision") is not None


def test_a_dry_run_on_a_cluster_writes_nothing(workspace):
    """Also of the plans that the workers of its first stage write; what is missing is then told without them."""
    from hpc_gen.stages.run_setup import accepted
    from slurm import graph, profiles

    found, resolved = sweep_plan.plan(_grid(workspace), workspace)
    folder = sweep_plan.folder_of(found, workspace)
    plans = graph.plan_stages(
        folder, accepted(folder, resolved, workspace), profiles.load("lab", workspace, []), [*sweep_plan.STAGES, "report"],
        print, dry_run=True,
    )  # fmt: skip
    assert [plan.stage for plan in plans] == ["points", "features", "scores", "report"]
    assert not folder.path.exists()


def test_on_slurm_only_what_the_grid_changes_is_submitted(workspace, monkeypatch):
    """First arrays for all; a line less while they run: nothing; a line more: the jobs that do not know it make way."""
    from fake_slurm import FakeSlurm
    from typer.testing import CliRunner

    from hpc_gen import cli

    fake = FakeSlurm(workspace / "slurm")
    monkeypatch.setenv("PATH", f"{fake.path}:/usr/bin:/bin")
    monkeypatch.setattr("os.umask", lambda mask: mask)  # of this process, which runs other tests, too

    def command(**changes) -> str:
        _grid(workspace, **changes)
        done = CliRunner().invoke(cli.app, ["sweep", str(workspace / "grid.yaml"), "-c", "lab", "-w", str(workspace)])
        assert done.exit_code == 0, done.output + str(done.exception)
        return done.output

    folder = workspace / "runs" / "grid"
    assert "4 points, 4 to be done" in command()
    assert len([line for line in fake.asked("sbatch") if "--test-only" not in line]) == 4
    lines = "".join(
        f"{n}|{n}|PENDING|Priority|N/A|N/A|N/A|low||grid.{s}|{folder}\n"
        for n, s in ((101, "points"), (102, "features"))
    )
    fake.answer("squeue", lines)
    fake._write("scancel", 'echo -n > "$root/squeue.txt"')
    less = command(axes={"guidance": [1.0], "steps": [1, 2]})
    assert less.count("cancelled") == 2 and "2 jobs are at it already" in less and fake.asked("scancel") == []
    assert json.loads((folder / "wanted.json").read_text()) == sorted(
        sweep_plan.read_sweep(run_setup.load_run(sweep_plan.RunFolder(folder))).points
    )
    more = command(axes={"guidance": [1.0, 4.0], "steps": [1, 2]})
    assert "2 jobs do not know the 2 new points: cancelled, and submitted with them" in more
    assert fake.asked("scancel") == ["101 102"]
    assert len([line for line in fake.asked("sbatch") if "--test-only" not in line]) == 8


# ---------------------------------------------------------------- search


def _records(values: dict[float, float], std: float | None = None) -> dict[float, MetricRecord]:
    return {key: MetricRecord("fid", value, std) for key, value in values.items()}


def test_the_search_halves_the_steps_beside_the_best():
    assert [point["guidance"] for point in SearchConfig(key="guidance", low=1, high=5).first()] == [1, 2, 3, 4, 5]
    known = {1.0: 9.0, 2.0: 5.0, 3.0: 6.0, 4.0: 8.0, 5.0: 9.0}
    assert sweep_plan._next_values(_records(known), "fid") == [1.5, 2.5]
    assert sweep_plan._next_values(_records({**known, 1.0: 1.0}), "fid") == [1.5]  # at the rim
    assert sweep_plan._next_values(_records(known, std=5.0), "fid") == []  # nothing is told from the best
    assert sweep_plan.best_of(_records(known), "precision") == 1.0


def test_a_search_goes_on_round_by_round(workspace):
    search = {"key": "guidance", "low": 1.0, "high": 3.0, "values": 3, "rounds": 2, "at": {"steps": 1}}
    found, folder, resolved = _apply(workspace, axes={}, search=search)
    assert [keys["guidance"] for keys in found.points.values()] == [1.0, 2.0, 3.0]
    _all(folder, resolved, workspace)
    # scores that tell them apart: the best is 2
    for name, keys in found.points.items():
        file = results.read(folder.metrics(name))
        value = abs(keys["guidance"] - 2.0) + 1
        records = tuple(MetricRecord(r.name, value, None, r.note, r.measure, r.subject) for r in file.records)
        results.MetricFile(file.tag, file.fingerprint, records).write(folder.metrics(name))
    second, _, _ = _apply(workspace, axes={}, search=search)
    assert [keys["guidance"] for keys in second.points.values()] == [1.0, 2.0, 3.0, 1.5, 2.5]
    assert {keys["steps"] for keys in second.points.values()} == {1}
    third, _, _ = _apply(workspace, axes={}, search={**search, "rounds": 1})
    assert len(third.points) == 3


# ---------------------------------------------------------------- table


def _row(name: str, fid: float | None, nfe: float, seconds: float) -> sweep_table.Row:
    records = {} if fid is None else {"fid": MetricRecord("fid", fid, 0.1)}
    return sweep_table.Row(name, {"steps": int(nfe)}, records, None, nfe, seconds)


def test_pareto_front_of_quality_against_cost():
    rows = [_row("a", 10.0, 1, 0.5), _row("b", 5.0, 2, 0.1), _row("c", 6.0, 4, 0.2), _row("d", None, 1, 0.1)]
    found = {row.name: sweep_table._with_front(row, rows, "fid").front for row in rows}
    assert found == {"a": ("NFE",), "b": ("NFE", "time"), "c": (), "d": ()}
    twins = [_row("a", 5.0, 2, 1.0), _row("b", 5.0, 2, 1.0)]
    assert all(sweep_table._with_front(row, twins, "fid").front == ("NFE", "time") for row in twins)


def test_seconds_of_a_point_come_from_the_journal(workspace):
    found, folder, resolved = _apply(workspace)
    _all(folder, resolved, workspace)
    name = next(iter(found.points))
    journal = Journal(folder, 1, "points")
    for seconds in (9.0, 2.0, 2.0):  # the first one has read the weights
        journal.event("unit_committed", unit=f"{name}-12345678-000000", seconds=seconds, bytes=1)
    journal.close()
    table = sweep_table.table_of(folder, found)
    assert table.rows[0].seconds == pytest.approx(0.2)
    text = sweep_table.to_csv(table).splitlines()
    assert (
        text[0]
        == "point,guidance,steps,fid,fid_std,fid_infinity,fid_infinity_std,kid,kid_std,nfe,seconds_per_image,front"
    )
    assert text[1].startswith(f"{name},1.0,1,") and len(text) == 5
    document = sweep_table.to_json(table)
    assert json.loads(json.dumps(document))["points"][0]["metrics"]["fid"]["measure"]["num_images"] == 20
    lines = sweep_table.lines(table)
    assert lines[0].split() == ["point", "fid", "NFE", "s/image", "front"] and "<- best" in "".join(lines)


def test_points_measured_otherwise_are_told(workspace):
    found, folder, resolved = _apply(workspace)
    _all(folder, resolved, workspace)
    path = folder.metrics(list(found.points)[1])
    path.write_text(path.read_text().replace('"num_images": 20', '"num_images": 19'))
    (told,) = sweep_table.table_of(folder, found).problems
    assert "num_images is 20 in one and 19 in the other" in told


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes": {"guidence": [1.0]}}, r"guidence.*did you mean '?sample\.settings\.guidance"),
        ({"run": "tyo"}, r"tyo.*did you mean 'toy'"),
        ({"axes": {}}, "the sweep wants nothing: give 'axes', 'points' or 'search'"),
        ({"axes": {"num_images": [10, 20]}}, "'num_images' is no axis; points of other sizes are not comparable"),
        ({"axes": {"checkpoint": [63]}}, r"no (whole )?checkpoint at 63"),
        ({"axes": {"checkpoint": ["newest"]}}, "'newest' of a point is neither a number of images seen nor 'latest'"),
        ({"search": {"key": "guidance", "low": 2, "high": 1}}, r"'search\.high' = 1 is not above 'search\.low' = 2"),
        (
            {"search": {"key": "guidance", "low": 1, "high": 2, "at": {"guidance": 1}}},
            "fixes 'guidance', which is searched",
        ),
        ({"name": "toy"}, "has the name of its run; give it another"),
        (
            {"metric": "isc"},
            r"goes by 'metric' = 'isc', which is not among 'evaluate\.metrics' = \[fid, kid\]; name it in both, or go by",
        ),
        ({"metric": "recall"}, r"goes by 'metric' = 'recall' \(of the metric 'prc'\), which is not among"),
        ({"sample": {}, "evaluate": {"reference": {"table": "tables/large"}}}, "8 x 8 pixels .*tables/large.* 16 x 16"),
        ({"metrics": "fid"}, r"grid\.yaml:\d+.*'metrics'.*did you mean 'metric'"),
    ],
)
def test_wrong_grids_are_refused_before_anything_is_written(workspace, changes, message):
    toy_run.write_table(workspace / "tables/large", size=16)
    with pytest.raises((ConfigError, HpcGenError), match=message):
        sweep_plan.plan(_grid(workspace, **changes), workspace)
    assert not (workspace / "runs" / "grid").exists()
