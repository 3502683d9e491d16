"""Between the steps of a real tiny training: previews, averages, stops that cut work short and what is made up for."""

from __future__ import annotations

import json
from pathlib import Path

import experiments
import pytest
import torch
from experiments import TINY, Workspace

from hpc_gen.data.table import Table
from hpc_gen.methods.protocol import Curve
from hpc_gen.runtime.errors import DataError, DivergedError, ExitCode, UserError
from hpc_gen.runtime.journal import Event, read
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.runtime.stop import Cause, Stop, StopToken
from hpc_gen.sampling.images import read_png
from hpc_gen.stages import run_setup
from hpc_gen.stages.class_names import class_names
from hpc_gen.stages.periodic import cuts_of
from hpc_gen.stages.surroundings import scalars

PREVIEW = "train.preview={every_images: 16, labels: [0, 3, 0], settings: {steps: 2}}"


def events(run: RunFolder, kind: str) -> list[Event]:
    return [event for event in read(run) if event.kind == kind]


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


def pictures(run: RunFolder) -> dict[str, str]:
    return experiments.contents(run.previews)


# ---------------------------------------------------------------- previews


def test_a_preview_writes_a_grid_and_each_picture(workspace: Workspace) -> None:
    run = workspace.run("preview", PREVIEW, "train.stop_at_images=32", "train.preview.at_images=[24]")
    assert workspace.train(run) == ExitCode.DONE
    folder = run.previews / f"{24:012d}"
    assert sorted(path.name for path in folder.iterdir()) == ["class_0.png", "class_0_2.png", "class_3.png"]
    assert sorted(path.name for path in run.previews.glob("*.png")) == [f"{n:012d}.png" for n in (16, 24, 32)]
    assert read_png(folder / "class_0.png").shape == (3, 8, 8)
    assert not torch.equal(read_png(folder / "class_0.png"), read_png(folder / "class_0_2.png"))  # other noise
    (_, told, _) = events(run, "preview")
    assert told.fields["images_seen"] == 24 and told.fields["file"] == f"previews/{24:012d}.png"
    assert [Path(file).name for file in told.fields["files"]] == ["class_0.png", "class_3.png", "class_0_2.png"]
    assert told.fields["captions"] == ["class 0", "class 3", "class 0"]
    assert (told.fields["seed"], told.fields["ema"]) == (7, "main")


def test_seed_average_and_batch_of_a_preview(workspace: Workspace) -> None:
    """The average is the first one unless named; null is the raw weights; a batch changes nothing but last bits."""
    found = {}
    for name, *changes in (
        ("plain",),
        ("named", "train.preview.ema=main"),
        ("batch", "train.preview.batch=2"),
        ("raw", "train.preview.ema=null"),
        ("seed", "train.preview.seed=8"),
    ):
        run = workspace.run(name, PREVIEW, "train.stop_at_images=16", "train.optimizer.lr=0.05", *changes)
        workspace.train(run)
        found[name] = torch.stack([read_png(path) for path in sorted((run.previews / f"{16:012d}").iterdir())]).int()
    assert torch.equal(found["plain"], found["named"])
    assert (found["plain"] - found["batch"]).abs().max() <= 1
    assert not torch.equal(found["plain"], found["raw"]) and not torch.equal(found["plain"], found["seed"])


def test_previews_change_nothing_of_the_training(workspace: Workspace) -> None:
    """No random state is touched, and networks are back in train mode."""
    with_them, without = (workspace.run(name, *more) for name, more in (("with", [PREVIEW]), ("without", [])))
    for run in (with_them, without):
        workspace.train(run, "train.stop_at_images=32")
    assert experiments.rows(with_them) == experiments.rows(without)
    name = f"{32:012d}"
    kept = [
        {file: sha for file, sha in experiments.contents(run.checkpoints / name).items() if file != "manifest.json"}
        for run in (with_them, without)
    ]
    assert kept[0] == kept[1]  # the manifest names the experiment, which differs


def test_latents_that_are_not_finite_cost_the_picture_only(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverges(*args: object, **kwargs: object) -> None:
        raise DivergedError("3 of 3 latents are not finite")

    monkeypatch.setattr("hpc_gen.stages.periodic.preview", diverges)
    run = workspace.run("diverges", PREVIEW, "train.stop_at_images=16")
    assert workspace.train(run) == ExitCode.DONE
    (fault,) = events(run, "fault")
    assert fault.fields["what"] == "preview failed" and "not finite" in fault.fields["detail"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("train.preview.labels=[4]", UserError, "has class 4, but the table has 4 classes; use 0 to 3"),
        ("train.preview.labels=[cat]", UserError, "names class 'cat', but there are no class names"),
        ("data.class_names=none.txt", UserError, r"data\.class_names: .*none\.txt cannot be read"),
    ],
)
def test_a_wrong_preview_is_refused_before_the_first_step(
    workspace: Workspace, change: str, error: type[Exception], message: str
) -> None:
    run = workspace.run("wrong", PREVIEW, change)
    with pytest.raises(error, match=message):
        workspace.train(run)
    assert not events(run, "interval")


def test_class_names_from_a_file(workspace: Workspace) -> None:
    table = Table.open(workspace.path / experiments.TABLE)
    experiment = experiments.resolved("data.class_names=names.txt").experiment
    path = workspace.path / "names.txt"
    path.write_text("0 tench, Tinca tinca\n2 hen,\n\n")
    assert class_names(experiment, table, workspace.path) == ("tench, Tinca tinca", "", "hen", "")
    for text, line in (("0 cat\ndog 1\n", 2), ("0\n", 1), ("-1 cat\n", 1)):
        path.write_text(text)
        with pytest.raises(DataError, match=rf"names\.txt:{line}: .* is not 'ID NAME'"):
            class_names(experiment, table, workspace.path)
    assert class_names(experiments.resolved().experiment, table, workspace.path) == ()


# ---------------------------------------------------------------- stops

BOTH = ("train.validate={every_images: 24, num_images: 16}", "train.log_every=48", "train.save_every=48")


@pytest.mark.parametrize("poll", [5, 6, 7, 8])
def test_what_a_stop_cuts_short_is_made_up_for(workspace: Workspace, poll: int) -> None:
    """At 24 images: looks 1 to 3 are those of the steps, then two of validation, then of the previews and its steps."""
    changes = (*BOTH, PREVIEW, "train.preview.every_images=24", "train.stop_at_images=48", "train.micro_batch=8")
    whole, cut = (workspace.run(name, *changes) for name in ("whole", "cut"))
    assert workspace.train(whole) == ExitCode.DONE
    assert workspace.train(cut, stop=AtPoll(cut, poll)) == ExitCode.REQUEUE
    (told,) = events(cut, "cut_short")
    assert told.fields["images_seen"] == 24
    assert told.fields["what"] == ("validate" if poll < 6 else "preview")
    assert not cut.previews.exists() and experiments.rows(cut) == []
    assert [path.name for path in cut.checkpoints.iterdir()] == [f"{24:012d}"]
    assert workspace.train(cut) == ExitCode.DONE
    assert [event.fields["images_seen"] for event in events(cut, "caught_up")] == [24]
    assert experiments.rows(cut) == experiments.rows(whole)
    assert pictures(cut) == pictures(whole)
    end = f"{48:012d}"
    assert experiments.contents(cut.checkpoints / end) == experiments.contents(whole.checkpoints / end)


def test_a_stop_at_a_log_interval_leaves_it_open(workspace: Workspace) -> None:
    """The row at 16 has the means of the interval, though another attempt writes it."""
    whole, cut = (workspace.run(name, PREVIEW, "train.stop_at_images=32") for name in ("whole", "cut"))
    workspace.train(whole)
    assert workspace.train(cut, stop=AtPoll(cut, 4)) == ExitCode.REQUEUE
    assert experiments.rows(cut) == []
    assert workspace.train(cut) == ExitCode.DONE
    assert experiments.rows(cut) == experiments.rows(whole)


def test_what_was_cut_short_twice_is_left_out(workspace: Workspace) -> None:
    run = workspace.run("twice", PREVIEW, "train.stop_at_images=32")
    assert workspace.train(run, stop=AtPoll(run, 4)) == ExitCode.REQUEUE
    assert workspace.train(run, stop=AtPoll(run, 1)) == ExitCode.REQUEUE  # at once, in the preview that is made up for
    assert len(events(run, "cut_short")) == 2
    assert workspace.train(run) == ExitCode.DONE
    (dropped,) = events(run, "dropped")
    assert (dropped.fields["what"], dropped.fields["images_seen"]) == ("preview", 16)
    assert [row[0] for row in experiments.rows(run)] == [16, 32]  # the row of the interval is there all the same
    assert [path.name for path in run.previews.glob("*.png")] == [f"{32:012d}.png"]


def _event(kind: str, images_seen: int | None = None, resumed_from: int | None = None) -> Event:
    fields = {"resumed_from": resumed_from} if kind == "attempt_start" else {"images_seen": images_seen}
    return Event(1, "train", 0, 0.0, kind, fields)


def test_cuts_are_counted_until_the_place_is_passed_again() -> None:
    start, cut, done = _event("attempt_start"), _event("cut_short", 16), _event("caught_up", 16)
    again = _event("attempt_start", resumed_from=16)
    assert cuts_of([start], 16) == 0 == cuts_of([start, cut], 32)
    assert cuts_of([start, cut], 16) == 1 and cuts_of([start, cut, again, cut], 16) == 2
    assert cuts_of([start, cut, again, done], 16) == 0
    assert cuts_of([start, cut, _event("attempt_start", resumed_from=8)], 16) == 0  # a fall-back


def test_single_numbers_of_the_sampler_are_for_the_row() -> None:
    parts = [{"rate": Curve((3.0,), (4.0,))}, {"rate": Curve((0.0,), (4.0,)), "energy": Curve((1.0, 2.0), (1.0, 1.0))}]
    assert scalars(parts, "preview") == {"preview/rate": 0.375}
    assert scalars([{"rate": Curve((0.0,), (0.0,))}], "preview") == {}


# ---------------------------------------------------------------- the report, validation


def test_the_report_shows_the_captioned_grid(workspace: Workspace) -> None:
    from eval_jobs.report import render

    run = workspace.run(
        "report", PREVIEW, "train.stop_at_images=16", "train.validate={every_images: 16, num_images: 8}"
    )
    workspace.train(run)
    page = render(run, run_setup.load_run(run))
    assert "Previews during training" in page and "Samples after 16 images" in page


def test_validation_by_average_and_term(workspace: Workspace) -> None:
    values = {}
    for name, ema in (("first", None), ("main", "main"), ("raw", "null")):
        more = [] if ema is None else [f"train.validate.ema={ema}"]
        run = workspace.run(name, "train.validate={every_images: 16, num_images: 16}", "train.optimizer.lr=0.05", *more)
        workspace.train(run, "train.stop_at_images=16")
        values[name] = experiments.rows(run)[0][1]
        assert {"validation/loss", "validation/mse"} <= values[name].keys()
        (told,) = events(run, "validate")
        assert told.fields["ema"] == ("main" if ema != "null" else None)
    assert values["first"] == values["main"]
    assert values["raw"]["validation/loss"] != values["main"]["validation/loss"]


def test_intervals_tell_the_peak_of_memory(workspace: Workspace) -> None:
    run = workspace.run("memory", "train.stop_at_images=16", text=TINY)
    workspace.train(run)
    peaks = [event.fields["peak_bytes"] for event in events(run, "interval")]
    assert all(2**20 < peak < 2**40 for peak in peaks)
    assert json.loads(json.dumps(peaks)) == sorted(peaks)
