"""`hpc-gen prove-resume`: how an experiment is made small, who is killed when, and what the verdict rests on."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import experiments
import pytest
from typer.testing import CliRunner

from hpc_gen import cli
from hpc_gen.runtime.errors import UserError
from hpc_gen.runtime.journal import Journal
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import prove_kills, prove_plan, prove_resume, run_setup, width
from hpc_gen.stages.prove_plan import Proof
from hpc_gen.stages.prove_resume import Disturbed
from hpc_gen.training.checkpoint import read

ROOT = Path(__file__).resolve().parents[2]
LARGE = """
name: large
seed: 3
method:
  {name: energy, input: pixels, image_size: 8, channels: 1, patch_size: 4, hidden: 16, depth: 1, heads: 2,
   diffusion_timesteps: 50}
data: {table: tables/toy, validation_table: tables/toyval}
tracking: {wandb: online}
notify: {command: [notify-send, done]}
train:
  total_images: 512000
  global_batch: 256
  micro_batch: 64
  ranks: 4
  optimizer: {lr: 1.0e-3}
  schedule: {kind: cosine, warmup_images: 10000}
  ema: {main: {decay: 0.999}, slow: {decay: 0.9999}}
  log_every: 2560
  save_every: 25600
  keep_every: 51200
  width: [1, 2, 4]
  validate: {every_images: 51200, num_images: 32}
  preview: {every_images: 51200, labels: [0, 1]}
  time_limit_s: 3600.0
"""


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large.yaml"
    path.write_text(LARGE)
    return path


def make(path: Path, *overrides: str, kills: int = 3, images: int | None = None, sizes: Any = (4, 2)) -> Proof:
    return prove_plan.make(path, overrides, kills=kills, seed=1, images=images, world_sizes=sizes)


# -- small -------------------------------------------------------------------------------------------------------------


def test_length_batch_and_intervals_shrink_and_what_is_computed_stays(large: Path) -> None:
    proof = make(large)
    small, given = proof.resolved.experiment, run_setup.typed(experiments.loader.load(large)).experiment
    train, before = small.train, given.train
    assert train is not None and before is not None
    assert (small.method, small.seed, small.data) == (given.method, given.seed, given.data)
    assert (train.engine, train.optimizer, train.ema, train.precision) == (
        before.engine, before.optimizer, before.ema, before.precision,
    )  # fmt: skip
    assert (proof.batch, train.global_batch, train.micro_batch) == (16, 16, 2)  # accumulated on 4 ranks, too
    assert (proof.window, proof.images, train.total_images) == (96, 384, 384)
    assert (train.log_every, train.save_every, train.keep_last, train.keep_every) == (16, 48, 2, None)
    assert train.schedule.warmup_images == 96 and train.schedule.kind == "cosine"
    assert train.validate is not None
    assert (train.validate.every_images, train.validate.num_images) == (48, 32)
    assert train.preview is None and train.time_limit_s is None and train.width is None and train.ranks == 4
    assert small.tracking.wandb == "disabled" and small.notify is None and small.name == "large-proof"


def test_what_the_command_line_gives_stays(large: Path) -> None:
    proof = make(large, "train.global_batch=64", "train.micro_batch=8", "name=mine", images=1024)
    assert (proof.batch, proof.train.micro_batch, proof.window, proof.images) == (64, 8, 256, 1024)
    assert proof.resolved.experiment.name == "mine"


def test_coupling_groups_stay_whole(large: Path) -> None:
    proof = make(large, "train.coupling_group=4", sizes=(2, 3))
    assert (proof.train.micro_batch, proof.batch) == (4, 48)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"kills": 0}, "--kills is 0; at least one kill proves something"),
        ({"images": 100}, "--images 100 leaves less than two batches of 16 images between 3 kills; give at least 128"),
        ({"sizes": (2, 2)}, "--world-sizes are 2, 2; give different numbers of ranks, at least 1"),
        (
            {"sizes": (4, 2), "engine": ("train.engine.name=fsdp", "train.engine.shards=4", "train.width=null")},
            "--world-sizes has 2, which train.engine.tensor_parallel = 1 or train.engine.shards = 4 does not divide; give",
        ),
        ({"sizes": (0,)}, "--world-sizes are 0; give different numbers of ranks, at least 1"),
    ],
)
def test_what_proves_nothing_is_refused(large: Path, arguments: dict[str, Any], sentence: str) -> None:
    engine = arguments.pop("engine", ())
    with pytest.raises(UserError) as caught:
        make(large, *engine, **arguments)
    assert str(caught.value).startswith(sentence)


def test_more_ranks_than_gpus_are_refused(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(width, "num_gpus", lambda: 2)
    with pytest.raises(UserError, match="asks for 4 ranks and there are 2 GPUs; give sizes up to 2"):
        make(large)


@pytest.mark.parametrize(("ranks", "sizes"), [(4, (4, 2)), (1, (1, 2)), (2, (2, 1))])
def test_sizes_that_nobody_chose(large: Path, ranks: int, sizes: tuple[int, ...]) -> None:
    assert make(large, "train.width=null", f"train.ranks={ranks}", sizes=None).world_sizes == sizes


def test_an_experiment_without_training_has_nothing_to_resume(tmp_path: Path) -> None:
    path = tmp_path / "no.yaml"
    path.write_text(experiments.TINY.partition("train:")[0])
    with pytest.raises(UserError, match="has no 'train' section, so there is nothing to resume"):
        make(path)


def test_the_dry_run_changes_nothing(large: Path) -> None:
    words = ["prove-resume", str(large), "-w", str(large.parent), "--world-sizes", "2,1", "--kills", "5", "--dry-run"]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.exception
    assert "kills       5, one in each 48 images, seed 0" in done.stdout and "world sizes 2, 1" in done.stdout
    assert list(large.parent.iterdir()) == [large]
    wrong = CliRunner().invoke(cli.app, [*words[:5], "two,one"])
    assert str(wrong.exception) == "--world-sizes is 'two,one'; give whole numbers of ranks, as in 2,1"


# -- kills -------------------------------------------------------------------------------------------------------------


def test_kills_are_a_function_of_the_seed_and_each_has_its_window() -> None:
    plans = [prove_kills.plan(number, 5, 64, 4) for number in range(60)]
    assert plans == [prove_kills.plan(number, 5, 64, 4) for number in range(60)]
    assert plans != [prove_kills.plan(number, 6, 64, 4) for number in range(60)]
    assert all(number * 64 < plan.target < (number + 1) * 64 for number, plan in enumerate(plans))
    assert {plan.kind for plan in plans[: len(prove_kills.KINDS)]} == set(prove_kills.KINDS)
    assert set(Counter(plan.moment for plan in plans)) == {"training", "saving", "starting"}
    assert {plan.rank for plan in plans} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("kind", "victims"),
    [
        ("SIGKILL one rank", [102]),
        ("SIGTERM one rank", [102]),
        ("SIGKILL all ranks", [100, 101, 102, 103]),
        (prove_kills.NODE, [102, 103]),
        ("SIGKILL the launcher", [99]),
        ("SIGTERM the launcher", [99]),
    ],
)
def test_who_gets_the_signal(kind: str, victims: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    launched = prove_kills.Launched.__new__(prove_kills.Launched)
    monkeypatch.setattr(launched, "process", type("Process", (), {"pid": 99})(), raising=False)
    monkeypatch.setattr(launched, "ranks", lambda: {rank: 100 + rank for rank in range(4)})
    plan = prove_kills.Plan(0, kind, "training", 8, 0.0, rank=2)
    assert sorted(launched._victims(plan)) == victims


# -- the verdict -------------------------------------------------------------------------------------------------------


@dataclass
class Scene:
    """Runs whose journals say what the test wants."""

    folder: Path
    proof: Proof

    def run(self, name: str, commits: dict[int, tuple[str, str]], rows: dict[int, dict[str, float]]) -> RunFolder:
        run = RunFolder(self.folder / "runs" / name)
        run.journal.mkdir(parents=True)
        book = Journal(run, 1, "train")
        book.event("attempt_start", world_size=1, rank=0, host="here", resumed_from=None)
        for images_seen, data in rows.items():
            book.row(images_seen, data)
            if images_seen in commits:
                sha, digest = commits[images_seen]
                book.event("save_committed", images_seen=images_seen, manifest=sha, digest=digest)
        book.close()
        return run

    def judge(self, disturbed: RunFolder, same_size: bool = True) -> tuple[list[str], str]:
        each = Disturbed(disturbed, same_size)
        each.note_commits()
        problems, page = prove_resume.judge(self.proof, RunFolder(self.folder / "runs" / "a"), each)
        return problems, "\n".join(page)


COMMITS = {48: ("m48", "d48"), 96: ("m96", "d96")}
ROWS = {48: {"loss": 1.0}, 96: {"loss": 0.5}}


@pytest.fixture
def scene(tmp_path: Path, large: Path) -> Scene:
    scene = Scene(tmp_path, make(large))
    scene.run("a", COMMITS, ROWS)
    return scene


def test_equal_is_equal(scene: Scene) -> None:
    problems, page = scene.judge(scene.run("b", COMMITS, ROWS))
    assert problems == [] and "| equal bytes |" in page and "2 checkpoints committed" in page


@pytest.mark.parametrize(
    ("commits", "same", "resized"),
    [
        ({**COMMITS, 48: ("other", "d48")}, "the checkpoint at 48 images is another", None),
        ({**COMMITS, 96: ("m96", "other")}, "the checkpoint at 96 images is another", "the checkpoint at 96 images is another"),
        ({96: ("m96", "d96")}, "no checkpoint at 48 images was ever committed", "no checkpoint at 48 images was ever committed"),
        ({**COMMITS, 80: ("m80", "d80")}, None, None),  # a preempted attempt saves where it stands
    ],
    ids=["bytes", "digest", "missing", "one more"],
)  # fmt: skip
def test_checkpoints_are_compared(scene: Scene, commits: Any, same: str | None, resized: str | None) -> None:
    run = scene.run("b", commits, {48: ROWS[48], 80: {"loss": 0.7}, 96: ROWS[96]} if 80 in commits else ROWS)
    if 80 in commits:
        scene.folder = scene.folder / "more"
        scene.run("a", COMMITS, {48: ROWS[48], 80: {"loss": 0.7}, 96: ROWS[96]})
    for same_size, expected in ((True, same), (False, resized)):
        problems, page = scene.judge(run, same_size)
        assert problems == ([f"b: {expected}"] if expected else [])
        assert ("UNEQUAL" in page) == bool(expected and "another" in expected)


@pytest.mark.parametrize(
    ("row", "same", "resized"),
    [
        ({"loss": 0.5 * (1 + 1e-15)}, False, True),
        ({"loss": 0.5 * (1 + 9e-5)}, False, True),
        ({"loss": 0.5 * (1 + 2e-4)}, False, False),
        ({"loss": math.nan}, False, False),
        ({"loss": 0.5, "more": 1.0}, False, False),
    ],
    ids=["last bit", "within", "beyond", "nan", "column"],
)
def test_rows_are_compared(scene: Scene, row: dict[str, float], same: bool, resized: bool) -> None:
    run = scene.run("b", COMMITS, {**ROWS, 96: row})
    assert (scene.judge(run)[0] == []) is same and (scene.judge(run, same_size=False)[0] == []) is resized


def test_a_row_too_few_is_a_problem(scene: Scene) -> None:
    problems, _ = scene.judge(scene.run("b", COMMITS, {48: ROWS[48]} | {96: ROWS[96]} | {144: {"loss": 0.4}}))
    assert problems == ["b: 3 rows were logged, the undisturbed run has 2"]


def test_a_commit_without_a_line_in_the_journal_is_found(tmp_path: Path) -> None:
    """The kill came between the rename and the line: the next attempt goes on from it and never saves there again."""
    space = experiments.make_workspace(tmp_path)
    run = space.run("real", "train.keep_last=9")
    assert space.train(run) == 0
    told = prove_resume.commits_of(run)
    assert [each.images_seen for each in told] == [16, 32, 48, 64, 80, 96]
    assert {each.images_seen: each.manifest for each in told} == prove_kills.manifests(run)
    for path in run.journal.glob("*.jsonl"):
        lines = [line for line in path.read_text().splitlines(True) if "save_committed" not in line]
        path.write_text("".join(lines))
    found = prove_resume.commits_of(run)
    assert [(each.images_seen, each.manifest, each.digest) for each in found] == [
        (each.images_seen, each.manifest, each.digest) for each in told
    ]
    assert read.newest(run).images_seen == 96


def test_runs_of_others_are_not_removed(tmp_path: Path, large: Path) -> None:
    proof = make(large)
    first = prove_resume._begin(proof, tmp_path, "")
    assert prove_resume._begin(proof, tmp_path, "").path == first.path  # an earlier proof goes
    experiments.Workspace(tmp_path).run("large-proof-killed")
    with pytest.raises(UserError, match="is not the run of an earlier proof; choose another name with name="):
        prove_resume._begin(proof, tmp_path, "-killed")
    with pytest.raises(
        UserError, match="is not there and the experiment has no stage before 'train' that would make it"
    ):
        prove_resume._make_table(proof, first, lambda line: None)


def test_the_stages_before_training_make_a_table_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = ROOT / "job_configs" / "demo" / "mnist16.yaml"
    proof = make(shipped, sizes=(2, 1))
    run = RunFolder(tmp_path / "runs" / "proof")
    asked: list[list[str]] = []
    monkeypatch.setattr(prove_resume.runner, "run_stages", lambda run, stages, say: asked.append(list(stages)) or 0)
    prove_resume._make_table(proof, run, lambda line: None)
    assert asked == [["encode"]]
    (tmp_path / "tables" / "mnist16").mkdir(parents=True)
    prove_resume._make_table(proof, run, lambda line: None)
    assert len(asked) == 1
    monkeypatch.setattr(prove_resume.runner, "run_stages", lambda run, stages, say: 64)
    (tmp_path / "tables" / "mnist16").rmdir()
    with pytest.raises(prove_resume.ProofFailed, match="could not be made: stages encode ended with code 64"):
        prove_resume._make_table(proof, run, lambda line: None)


def test_every_shipped_training_can_be_made_small() -> None:
    shrunk = 0
    for path in sorted((ROOT / "job_configs").rglob("*.yaml")):
        if "\ntrain:" not in path.read_text():
            continue  # a reference table, or a sweep
        proof = make(path, sizes=(2, 1))
        assert proof.images <= 1000 and proof.train.total_images == proof.images, path
        shrunk += 1
    assert shrunk >= 10
