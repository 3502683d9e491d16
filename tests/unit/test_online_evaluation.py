"""Evaluation during training: rows and files, the numbers of the evaluate stage, the end, stops, refusals."""

from __future__ import annotations

import time

import experiments
import pytest
import toy_run
from experiments import Workspace
from torch import Tensor

from eval_jobs import evaluate, sample
from hpc_gen.metrics.results import read as read_metrics
from hpc_gen.runtime.errors import DataError, ExitCode, StopRequested, UserError
from hpc_gen.runtime.journal import Event, read
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.runtime.stop import Cause, Stop, StopToken
from hpc_gen.stages import run_setup
from hpc_gen.stages.online import in_background

ONLINE = (
    "train.evaluate={every_images: 32, num_images: 12, batch: 4, seed: 11, settings: {steps: 2}}",
    "evaluate={metrics: [fid, kid, prc, isc], extractor: {name: random-conv}, kid_subset_size: 6, batch: 4, "
    "reference: {table: tables/toyval, rows: 14}}",
)
KEYS = {f"evaluate/{name}" for name in ("fid", "kid_mean", "kid_std", "precision", "recall")}


def events(run: RunFolder, kind: str) -> list[Event]:
    return [event for event in read(run) if event.kind == kind]


def values(run: RunFolder) -> dict[int, dict[str, float]]:
    """Place -> what the rows say of evaluations."""
    found = {
        place: {k: v for k, v in data.items() if k.startswith("evaluate/")} for place, data in experiments.rows(run)
    }
    return {place: data for place, data in found.items() if data}


def test_rows_files_and_events(workspace: Workspace) -> None:
    run = workspace.run("online", *ONLINE, "train.total_images=80")
    assert workspace.train(run) == ExitCode.DONE
    found = values(run)
    assert list(found) == [32, 64, 80]  # the interval, and the final weights
    assert all(set(data) == KEYS for data in found.values())  # random-conv has no logits: no inception score
    assert [event.fields["images_seen"] for event in events(run, "evaluate")] == [32, 64, 80]
    record = read_metrics(run.metrics(f"online-{80:012d}")).get("fid")
    assert record.value == found[80]["evaluate/fid"]
    assert record.measure["num_images"] == 12 and record.measure["image_shape"] == [3, 8, 8]
    assert record.measure["reference"]["rows"] == 14
    assert record.subject["checkpoint"] == {"images_seen": 80, "manifest_sha256": None, "ema": "main"}
    assert record.subject["plan"]["seed"] == 11 and record.subject["plan"]["settings"]["steps"] == 2
    assert read_metrics(run.metrics(f"online-{80:012d}")).get("isc").note == "not available: extractor has no logits"


def test_the_numbers_are_those_of_the_sample_and_evaluate_stages(workspace: Workspace) -> None:
    """The same seed, weights and settings make the same images; the same code scores them."""
    run = workspace.run(
        "stages",
        *ONLINE,
        "train.total_images=32",
        "sample={num_images: 12, block_images: 12, batch: 4, seed: 11, settings: {steps: 2}}",
    )
    workspace.train(run)
    resolved = run_setup.load_run(run)
    for stage, factory in (("sample", sample.worker), ("evaluate", evaluate.worker)):
        made = factory(toy_run.context(run, resolved, workspace.path, stage))
        toy_run.do_units(run, made)
        made.finish()
    offline, online = read_metrics(run.metrics("main")), values(run)[32]
    for key, name in (("fid", "fid"), ("kid_mean", "kid"), ("precision", "precision"), ("recall", "recall")):
        assert online[f"evaluate/{key}"] == pytest.approx(offline.get(name).value, rel=1e-5, abs=1e-9)


def test_evaluation_changes_nothing_of_the_training(workspace: Workspace) -> None:
    runs = [workspace.run(name, *more, "train.total_images=64") for name, more in (("with", ONLINE), ("without", ()))]
    for run in runs:
        workspace.train(run)
    plain = [[(at, {k: v for k, v in data.items() if "/" not in k}) for at, data in experiments.rows(r)] for r in runs]
    assert plain[0] == plain[1]


class AtPoll(StopToken):
    """A token that is asked to stop at its N-th look, whoever looks."""

    def __init__(self, run: RunFolder, poll: int) -> None:
        super().__init__(run)
        self._left = poll

    def poll(self) -> Stop | None:
        self._left -= 1
        if self._left == 0:
            self.request(Cause.PREEMPTED, "SIGTERM")
        return super().poll()


@pytest.mark.parametrize("poll", [5, 8, 10, 17])
def test_an_evaluation_that_a_stop_cuts_short_is_repeated(workspace: Workspace, poll: int) -> None:
    """Looks 1 to 4 are those of the steps; then the reference's batches, the sampler's, and those beside the metrics.

    At 32, the end: however often it is cut short there, it is made in the end, and nothing is trained again.
    """
    changes = (*ONLINE, "train.total_images=32", "train.log_every=32", "train.save_every=32")
    whole, cut = (workspace.run(name, *changes) for name in ("whole", "cut"))
    workspace.train(whole)
    for _ in range(3):
        assert (
            workspace.train(cut, stop=AtPoll(cut, poll if not events(cut, "attempt_start") else 1)) == ExitCode.REQUEUE
        )
        assert experiments.rows(cut) == []
    assert workspace.train(cut) == ExitCode.DONE
    assert experiments.rows(cut) == experiments.rows(whole)
    assert len(events(cut, "cut_short")) == 3 and not events(cut, "dropped")
    assert sum(event.fields["images"] for event in events(cut, "interval")) == 32


def test_features_of_the_reference_are_kept_for_the_next_attempt(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpc_gen.stages.reference import ReferenceImages

    reads: list[int] = []
    plain = ReferenceImages.read
    monkeypatch.setattr(ReferenceImages, "read", lambda self, ids: (reads.append(len(ids)), plain(self, ids))[1])
    run = workspace.run("kept", *ONLINE)
    for end in (32, 64):
        workspace.train(run, f"train.stop_at_images={end}")
    assert len(reads) == 4  # batches of 4 of 14 rows, once
    path = run.features("online") / "reference.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    workspace.train(run, "train.stop_at_images=96")
    assert len(reads) == 8 and list(values(run)) == [32, 64, 96]


def test_degenerate_features_cost_the_score_only(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def degenerate(*args: object) -> None:
        raise DataError("metric 'fid' came out as nan; its features are degenerate")

    monkeypatch.setattr("hpc_gen.metrics.suite.numbers", degenerate)
    run = workspace.run("degenerate", *ONLINE, "train.total_images=32")
    assert workspace.train(run) == ExitCode.DONE
    (fault,) = events(run, "fault")
    assert fault.fields["what"] == "evaluate failed" and "degenerate" in fault.fields["detail"]
    assert values(run) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.evaluate.num_images=10", "num_images 10 is not a multiple of the 4 classes; use 12, or"),
        ("train.evaluate.num_images=8", "metric 'isc' needs 10 images, but there are 8 samples"),
        ("evaluate.reference.rows=99", "evaluate.reference.rows is 99, but tables/toyval has 32 rows"),
        ("evaluate.reference.rows=3", "evaluate.kid_subset_size"),
        ("evaluate.extractor.name=incepton", "unknown extractor 'incepton' .did you mean 'inception'"),
        ("evaluate.reference={statistics: none.npz}", "no statistics at .*none.npz"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(workspace: Workspace, change: str, message: str) -> None:
    with pytest.raises((UserError, ValueError), match=message):
        workspace.train(workspace.run("refused", *ONLINE, change))


def test_work_in_the_background_is_left_when_a_stop_comes() -> None:
    assert in_background(lambda: 7, lambda: None) == 7
    with pytest.raises(ZeroDivisionError):
        in_background(lambda: 1 / 0, lambda: None)

    def poll() -> None:
        raise StopRequested(Stop(Cause.PREEMPTED, "SIGTERM"))

    began = time.monotonic()
    with pytest.raises(StopRequested):
        in_background(lambda: time.sleep(1), poll)
    assert time.monotonic() - began < 0.9


# ---------------------------------------------------------------- its budget


def test_an_evaluation_beyond_its_budget_is_given_up_and_told(workspace: Workspace) -> None:
    """Training goes on, with the numbers of a training that does not evaluate."""
    changes = (ONLINE[0].replace("every_images: 32", "every_images: 32, budget_s: 0.000001"), ONLINE[1])
    run = workspace.run("budget", *changes, "train.total_images=64")
    plain = workspace.run("plain", "train.total_images=64")
    assert workspace.train(run) == ExitCode.DONE and workspace.train(plain) == ExitCode.DONE
    assert values(run) == {} and not list(run.path.glob("metrics/online-*.json"))
    told = [event.fields["detail"] for event in events(run, "fault")]
    assert len(told) == 2 and all(
        "train.evaluate.budget_s = 1e-06 is spent; raise it, or draw fewer images" in t for t in told
    )
    assert [data["loss"] for _, data in experiments.rows(run)] == [data["loss"] for _, data in experiments.rows(plain)]


def test_a_reference_larger_than_the_budget_is_looked_at_over_several_evaluations(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes up where the one before was given up, or the budget would never be enough."""
    from hpc_gen.runtime import clock
    from hpc_gen.stages.reference import ReferenceImages

    late_s, reads, now = 0.0, 0, clock.monotonic
    plain = ReferenceImages.read

    def read_slowly(self: ReferenceImages, ids: range) -> Tensor:
        nonlocal late_s, reads
        reads += 1
        late_s += 700  # of a budget of 1000 s: the second batch of an evaluation is its last
        return plain(self, ids)

    monkeypatch.setattr(ReferenceImages, "read", read_slowly)
    monkeypatch.setattr(clock, "monotonic", lambda: now() + late_s)
    changes = (ONLINE[0].replace("every_images: 32", "every_images: 32, budget_s: 1000"), ONLINE[1])
    run = workspace.run("slow", *changes, "train.total_images=96")
    assert workspace.train(run) == ExitCode.DONE
    assert reads == 4  # batches of 4 of 14 rows, each once
    assert len(events(run, "fault")) == 2 and list(values(run)) == [96]
    plain_run = workspace.run("quick", *ONLINE, "train.total_images=96")
    assert workspace.train(plain_run) == ExitCode.DONE
    assert values(run)[96] == values(plain_run)[96]


def test_metrics_of_the_evaluate_stage_alone_are_left_out(workspace: Workspace) -> None:
    """sfid, clip_fid and fd_dinov2 look at other layers and networks; they do not slow the training."""
    offline = ONLINE[1].replace("[fid, kid, prc, isc]", "[fid, sfid]")
    run = workspace.run("main-only", ONLINE[0], offline, "train.total_images=32")
    assert workspace.train(run) == ExitCode.DONE
    assert set(values(run)[32]) == {"evaluate/fid"}
    with pytest.raises(UserError, match="train.evaluate has nothing to measure: sfid are for the evaluate stage"):
        workspace.train(workspace.run("none", ONLINE[0], ONLINE[1].replace("[fid, kid, prc, isc]", "[sfid]")))
