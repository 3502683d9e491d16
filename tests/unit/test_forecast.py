"""Will it fit: what stages are forecast to write, against what is written; refusals and warnings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import toy_run
from experiments import LINEAR, TINY, Workspace, make_workspace, resolved
from toy_run import make_run

from hpc_gen.methods.materialise import materialise
from hpc_gen.runtime.errors import ExitCode, UserError
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import forecast, forecast_plan, run_setup, runner
from hpc_gen.stages.build import meta_method, open_table, table_facts
from hpc_gen.stages.forecast import Need, Room, check
from hpc_gen.stages.units import StageContext
from hpc_gen.training.checkpoint import read

GB = 10**9


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> dict[str, int | None]:
    """What the file system is made to say; change it as you like."""
    says: dict[str, int | None] = {"free": 100 * GB, "total": 200 * GB, "files": 10**6, "all_files": 2 * 10**6}

    def room(folder: Path) -> Room:
        return Room(says["free"] or 0, says["total"] or 0, says["files"], says["all_files"])

    monkeypatch.setattr(forecast, "room", room)
    return says


def said_by(need: Need, stage: str = "train", mode: str = "refuse") -> list[str]:
    said: list[str] = []
    check(stage, need, Path("runs/toy"), mode, said.append)
    return said


# --- the check


def test_what_fits_is_not_worth_a_word(disk: dict[str, int | None]) -> None:
    assert said_by(Need(50 * GB, 10**5)) == [] and said_by(Need(None, 10)) == []


def test_what_cannot_fit_is_refused_in_one_sentence(disk: dict[str, int | None]) -> None:
    disk["free"] = 3 * GB
    with pytest.raises(UserError) as info:
        said_by(Need(12 * GB, 50_000))
    assert str(info.value) == (
        "stage 'train' needs about 12.0 GB and 50,000 files in runs/toy, but only 3.0 GB are free; free space (see "
        "`hpc-gen gc`), or keep fewer checkpoints (train.keep_last, train.keep_every); data.forecast=warn starts it all "
        "the same"
    )


def test_too_few_files_are_left(disk: dict[str, int | None]) -> None:
    disk["files"] = 49_999
    with pytest.raises(
        UserError, match=r"but only 49,999 files are free; .* or draw fewer images \(sample.num_images\)"
    ):
        said_by(Need(GB, 50_000), "sample")
    with pytest.raises(UserError, match="needs about 50,000 files in"):
        said_by(Need(None, 50_000), "sample")
    disk["files"] = None  # a file system that makes them as they are needed
    assert said_by(Need(GB, 50_000), "sample") == []


def test_warn_and_off(disk: dict[str, int | None]) -> None:
    disk["free"] = GB
    [line] = said_by(Need(12 * GB, 1), mode="warn")
    assert line.startswith("warning: stage 'train' needs about 12.0 GB and 1 file in")
    assert said_by(Need(12 * GB, 1), mode="off") == []


def test_less_than_a_tenth_left_is_a_warning(disk: dict[str, int | None]) -> None:
    assert said_by(Need(80 * GB, 1)) == []  # a tenth stays
    assert said_by(Need(81 * GB, 1)) == [
        "warning: stage 'train' will write about 81.0 GB and 1 file, which leaves 10% of the disk of runs/toy"
    ]
    disk["files"] = 10**5
    assert "5% of the files of the disk" in said_by(Need(GB, 100), "sample")[0]


def test_a_real_file_system_has_room(tmp_path: Path) -> None:
    here = forecast.room(tmp_path / "not" / "yet")
    assert 0 < here.free_bytes <= here.total_bytes


# --- training


def test_the_size_of_a_checkpoint_before_there_is_one(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path)
    for name, text in (("linear", LINEAR), ("energy", TINY)):
        run = workspace.run(name, f"name={name}", "train.ema.slow={decay: 0.99}", text=text)
        experiment = run_setup.load_run(run).experiment
        method = meta_method(experiment, table_facts(open_table(tmp_path, experiment.data.table)))
        on_meta = forecast.checkpoint_bytes(method, method.roles(), 2)
        assert forecast.checkpoint_bytes(method, materialise(method, 0), 2) == on_meta
        assert workspace.train(run) is ExitCode.DONE
        tensors = sum(t.numel() * t.element_size() for t in read.storage.load(read.newest(run).path).values())
        assert on_meta == pytest.approx(tensors, rel=0.05, abs=300)  # the rest: step counters and train/*


@pytest.mark.parametrize(
    ("overrides", "checkpoints"),
    [
        (["train.keep_last=2"], 3),
        (["train.keep_last=1"], 2),
        (["train.keep_last=2", "train.keep_every=32"], 5),  # 32, 64, 80 and 96, one in flight
        (["train.keep_last=100"], 7),  # six are all there ever are
        (["train.keep_last=1", "train.validate={every_images: 16, num_images: 8}"], 3),  # the best
        (["train.keep_last=2", "train.stop_at_images=16"], 2),
    ],
)
def test_how_many_checkpoints_are_counted(tmp_path: Path, overrides: list[str], checkpoints: int) -> None:
    run = Workspace(tmp_path).run("toy", *overrides, text=LINEAR)
    config = run_setup.load_run(run).experiment.train
    assert config is not None
    assert forecast.train_need(run, config, 1000) == Need(checkpoints * 1000, checkpoints * 4)
    assert forecast.train_need(run, config) is None  # nobody knows their size yet


def test_what_is_there_is_not_counted_again(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path)
    run = workspace.run("toy", "train.keep_last=3", "train.stop_at_images=32", text=LINEAR)
    assert workspace.train(run) is ExitCode.DONE
    config = run_setup.load_run(run).experiment.train
    assert config is not None and forecast.train_need(run, config) is None  # nothing is left to train
    run_setup.change_run(run, ["train.stop_at_images=null"])
    config = run_setup.load_run(run).experiment.train
    assert config is not None
    each = read.newest(run).bytes
    assert forecast.train_need(run, config) == Need(2 * each, 8)  # two of three are there, one more is in flight
    [line] = forecast.of_run(run)
    assert line.startswith("train will write about ") and "8 files; " in line and line.endswith(" are free")


def test_training_is_refused_before_its_first_step(
    tmp_path: Path, disk: dict[str, int | None], capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = make_workspace(tmp_path)
    run = workspace.run("toy", text=LINEAR)
    disk["free"] = 1000
    with pytest.raises(UserError, match="stage 'train' needs about"):
        workspace.train(run)
    assert not list(run.checkpoints.glob("*")) and not list(run.journal.glob("*.tmp"))
    run_setup.change_run(run, ["data.forecast=warn"])
    assert workspace.train(run) is ExitCode.DONE
    assert "warning: stage 'train' needs about" in capsys.readouterr().out


# --- images and tables


def test_images_by_their_side_and_then_as_they_came_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, found = make_run(tmp_path)
    need = forecast.sample_need(run, found.experiment)
    assert need == Need(int(20 * (0.75 * 3 * 8 * 8 + 100)), 20 + 3 * 3)
    monkeypatch.setattr(runner.StopToken, "install", lambda self: None)
    assert runner.run_stage(run, "sample") == 0
    assert forecast.sample_need(run, found.experiment) is None
    sizes = [path.stat().st_size for path in run.samples("main").rglob("*.png")]
    (run.ledger("sample") / "000002.json").unlink()
    left = forecast.sample_need(run, found.experiment)
    assert left is not None and left.bytes == pytest.approx(8 * sum(sizes) / 20, rel=0.5) and left.files == 8 + 3
    (run.ledger("sample") / "000000.json").write_text("{}")
    unknown = forecast.sample_need(run, found.experiment)
    assert unknown is not None and unknown.bytes is None  # `status` must answer all the same
    assert "how large is not known yet" in forecast.line("sample", unknown, tmp_path)


def test_sampling_is_refused_before_its_first_image(
    tmp_path: Path, disk: dict[str, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = make_run(tmp_path)
    monkeypatch.setattr(runner.StopToken, "install", lambda self: None)
    disk["files"] = 7
    with pytest.raises(UserError, match="stage 'sample' needs about .* but only 7 files are free"):
        runner.run_stage(run, "sample")
    assert not list(run.samples("main").rglob("*.png"))


def folder_of_images(path: Path) -> None:
    from PIL import Image

    for split, count in (("train", 10), ("validation", 4)):
        for number in range(count):
            file = path / split / f"class{number % 2}" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number, 0, 0)).save(file)


ENCODED = TINY + "encode: {source: folder, source_path: images, image_size: 8, channels: 1, shard_rows: 4}\n"


@pytest.mark.parametrize("layout", ["ptshard", "npz"])
def test_rows_of_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    folder_of_images(tmp_path / "images")
    run = Workspace(tmp_path).run("toy", f"encode.format={layout}", text=ENCODED)
    found = run_setup.load_run(run)
    before = sorted(tmp_path.rglob("*"))
    [line] = forecast_plan.lines(run, found, ["encode"])
    assert sorted(tmp_path.rglob("*")) == before  # --dry-run
    worker = runner.make_worker(StageContext(run, found, "encode", tmp_path))
    assert isinstance(worker, forecast.Forecasts)
    need = worker.forecast()
    units = 3 + 1
    assert need == (Need(14 * (64 + 8), 3 * units) if layout == "ptshard" else Need(14 * 4096, 14 + 2 * units))
    assert line.startswith(f"encode will write about {forecast.told(need)}; ")
    monkeypatch.setattr(runner.StopToken, "install", lambda self: None)
    assert runner.run_stage(run, "encode") == 0
    done = runner.make_worker(StageContext(run, found, "encode", tmp_path))
    assert isinstance(done, forecast.Forecasts) and done.forecast() == Need(0, 0)


def test_encoding_is_refused(tmp_path: Path, disk: dict[str, int | None], monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of_images(tmp_path / "images")
    run = Workspace(tmp_path).run("toy", text=ENCODED)
    monkeypatch.setattr(runner.StopToken, "install", lambda self: None)
    disk["free"] = 100
    with pytest.raises(UserError, match=r"stage 'encode' needs about .* in .*tables/toy, .*encode.limit"):
        runner.run_stage(run, "encode")
    assert not (tmp_path / "tables").exists()


# --- the plan


def test_the_plan_knows_what_can_be_known(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "runs" / "tiny")
    found = resolved("method.num_classes=4", "sample={num_images: 8, block_images: 4, batch: 4}", text=TINY)
    lines = forecast_plan.lines(run, found)
    assert [line.split()[0] for line in lines] == ["train", "sample"] and not run.path.exists()
    assert re.match(r"train will write about \d+\.\d kB and \d+ files; ", lines[0])
    found = resolved("encode={source: folder, source_path: none, image_size: 8, channels: 1}", text=TINY)
    assert forecast_plan.lines(run, found)[0].startswith("encode: would be refused now: source 'folder': there is no")
    extra = "extra_stages={makes: {worker: 'a:b'}}"  # which may be there for the images
    found = resolved("encode={source: folder, source_path: none, image_size: 8, channels: 1}", extra, text=TINY)
    assert "encode: not known yet (source 'folder': there is no" in forecast_plan.lines(run, found, ["encode"])[0]


@pytest.mark.parametrize("text", ["", "a: [", "train: {}", "train: {total_images: 3}", "- 1"])
def test_status_answers_whatever_the_config_holds(tmp_path: Path, text: str) -> None:
    run = RunFolder(tmp_path)
    run.config_path.write_text(text)
    assert forecast.of_run(run) == []
    run.config_path.unlink()
    assert forecast.of_run(run) == []


@pytest.mark.parametrize("output", ["npz", "features"])
def test_samples_in_other_forms(tmp_path, output):
    """After the first block: features by those of that block; .npz: the PNGs, and the pixels of all once more."""
    from eval_jobs import sample

    run, found = toy_run.make_run(tmp_path, f"sample.output={output}", "evaluate.metrics=[fid]")
    before = forecast.sample_need(run, found.experiment)
    worker = sample.worker(toy_run.context(run, found, tmp_path, "sample"))
    toy_run.do_units(run, worker, worker.units()[:1])
    need = forecast.sample_need(run, found.experiment)
    assert before.bytes is not None and need.bytes is not None
    toy_run.do_units(run, worker)
    blocks = [
        path for path in run.samples("main").rglob("*") if path.is_file() and path.parent.name in ("000001", "000002")
    ]
    written = sum(path.stat().st_size for path in blocks)
    if output == "npz":
        written += 12 * 3 * 64
    assert written == pytest.approx(need.bytes, rel=0.3)  # the last block is half a block, with a whole header
