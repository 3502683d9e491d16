"""The Python API: the sample stage's images bit for bit, what a run knows of itself, and mistakes in one sentence."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import hpc_gen
from eval_jobs import evaluate, sample
from hpc_gen.api import Run
from hpc_gen.data.write import write_table
from hpc_gen.runtime.errors import CheckpointError, UserError
from hpc_gen.runtime.journal import Journal
from hpc_gen.sampling.generate import sampling_mode
from hpc_gen.sampling.plan import SamplePlan
from hpc_gen.stages.generation import LabelledPlan, batch_of
from hpc_gen.training.checkpoint.read import load_role, newest
from tests.support import toy_run

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run with samples (20 images, blocks of 8, batches of 4) and metrics, made by the stages themselves."""
    workspace = tmp_path_factory.mktemp("workspace")
    folder, resolved = toy_run.make_run(workspace, "sample.block_images=6")
    for stage, factory in (("sample", sample.worker), ("evaluate", evaluate.worker)):
        made = factory(toy_run.context(folder, resolved, workspace, stage))
        toy_run.do_units(folder, made)
        made.finish()
    torch.use_deterministic_algorithms(False)  # the stages set it for their process
    yield hpc_gen.load("toy", workspace)


def refuses(error: type[Exception], action: object, *words: str) -> None:
    assert callable(action)
    with pytest.raises(error) as caught:
        action()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_images_are_those_of_the_sample_stage(run: Run) -> None:
    written = run.samples().read(range(20))
    made = run.generate(20)
    assert made.dtype == torch.uint8 and made.shape == (20, 3, 8, 8) and torch.equal(made, written)
    ids = [19, 3, 5, 4, 3, 18, 0]  # blocks of 6 in batches of 4: any subset, order and repetition
    assert torch.equal(run.generate(ids=ids), written[ids])
    assert torch.equal(run.generate(1), written[:1])
    assert not torch.equal(run.generate(20, seed=12), written)
    assert not torch.equal(run.generate(20, ema=None), written)
    assert not torch.equal(run.generate(20, steps=3), written)
    assert torch.equal(run.generate(20, steps=2, seed=11, checkpoint=64, device="cpu"), written)


def test_beyond_the_plan_and_in_other_batches(run: Run) -> None:
    many = run.generate(ids=range(16, 40))
    assert torch.equal(many[:4], run.samples().read(range(16, 20)))
    assert len({bytes(image.flatten().tolist()) for image in many}) == 24
    quick = run.generate(8, batch=2)
    assert (quick.int() - run.samples().read(range(8)).int()).abs().max() <= 2  # rounding at most


def test_a_batch_is_the_one_of_the_stage() -> None:
    plan = SamplePlan("", 0, "", None, "", 0, 20, 6, 4, 1, "cpu", "uniform", 0, {})
    cut = [range(4), range(4, 6), range(6, 10), range(10, 12), range(12, 16), range(16, 18), range(18, 20)]
    assert [batch_of(plan, i) for i in range(20)] == [batch for batch in cut for _ in batch]
    assert batch_of(plan, 20) == range(18, 22) and batch_of(plan, 23) == range(22, 24)


def test_labels_by_number_name_and_one_for_all(run: Run) -> None:
    planned = run.generate(8)
    assert torch.equal(run.generate(8, labels=[0, 1, 2, 3, 0, 1, 2, 3]), planned)  # the plan's own: balanced
    assert torch.equal(run.generate(8, labels=list("abcdabcd")), planned)
    all_c = run.generate(8, labels="c")
    same = [bool(torch.equal(all_c[i], planned[i])) for i in range(8)]
    assert torch.equal(all_c, run.generate(8, labels=2)) and same[2] and same[6] and not all(same)
    refuses(UserError, lambda: run.generate(4, labels=4), "label 4 is not a class; there are 4, numbered from 0 to 3")
    refuses(UserError, lambda: run.generate(4, labels="e"), "no class is called 'e'", "there are 4 classes")
    refuses(UserError, lambda: run.generate(4, labels=[1, 2]), "2 labels are given for 4 images")
    refuses(UserError, lambda: run.generate(ids=[1, 1], labels=[0, 2]), "one image id is given two labels")


def test_labels_given_to_a_plan() -> None:
    plan = SamplePlan("", 0, "", None, "", 0, 8, 8, 4, 1, "cpu", "balanced", 4, {})
    facts = {name: getattr(plan, name) for name in plan.__dataclass_fields__}
    given = LabelledPlan(**facts, given={5: 3})
    assert given.labels(torch.tensor([4, 5, 6])).tolist() == [0, 3, 2]


def test_a_run_without_a_sample_section_and_without_classes(tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    columns = {"pixels": torch.zeros(8, 1, 8, 8, dtype=torch.uint8), "labels": torch.zeros(8, dtype=torch.int64)}
    write_table(tmp_path / "tables" / "train", columns, shard_rows=8, num_classes=0)
    toy_run.make_run(tmp_path, "sample=null", "evaluate=null", "method.num_classes=1")
    plain = hpc_gen.load(tmp_path / "runs" / "toy")
    images = plain.generate(3, steps=2, batch=3)
    assert images.shape == (3, 3, 8, 8) and plain.workspace == tmp_path
    assert torch.equal(plain.generate(ids=torch.tensor([2, 0]), steps=2, batch=3), images[[2, 0]])  # type: ignore[arg-type]
    refuses(UserError, lambda: plain.generate(2, labels=0), "run 'toy' was trained without classes")
    refuses(UserError, lambda: plain.samples(), "has no samples with the tag 'main'; run its sample stage first")


def test_torch_is_left_as_it_was(run: Run) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run.generate(1)
        assert torch.get_num_threads() == 2 and not torch.are_deterministic_algorithms_enabled()

        def stop() -> None:
            assert torch.are_deterministic_algorithms_enabled() and torch.get_num_threads() == 1
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run.generate(1, poll=stop)
        assert torch.get_num_threads() == 2 and not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.set_num_threads(threads)


def test_weights_are_read_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.generate(1)
    monkeypatch.setattr("hpc_gen.training.checkpoint.read.load_role", None)
    first = run.generate(2)
    assert torch.equal(first, run.generate(2))
    with pytest.raises(TypeError):  # other weights are another method
        run.generate(1, ema=None)


def test_mistakes_are_told(run: Run) -> None:
    refuses(UserError, lambda: run.generate(), "give either num_images or ids")
    refuses(UserError, lambda: run.generate(4, ids=[1]), "give either num_images or ids")
    refuses(UserError, lambda: run.generate(0), "no image ids are no images")
    refuses(UserError, lambda: run.generate(ids=[-1]), "negative image ids")
    refuses(UserError, lambda: run.generate(1, step=3), "has no setting 'step' (did you mean 'steps'?)", "guidance")
    refuses(UserError, lambda: run.generate(1, guidance=-1.0), "guidance = -1.0 is refused")
    refuses(UserError, lambda: run.generate(1, batch=0), "batch 0 is not a number of images")
    refuses(CheckpointError, lambda: run.generate(1, checkpoint=65), "no checkpoint at 65 images; it has: 64")
    refuses(CheckpointError, lambda: run.generate(1, ema="other"), "has no average 'other'")
    refuses(UserError, lambda: run.metrics("mian"), "no metrics with the tag 'mian' (did you mean 'main'?)", "it has:")
    refuses(UserError, lambda: run.samples("x"), "no samples with the tag 'x'; it has: main")
    refuses(AttributeError, lambda: hpc_gen.laod, "no attribute 'laod'; it has: Run, __version__, grid, load")  # type: ignore[attr-defined]


def test_a_folder_that_is_no_run(run: Run, tmp_path: Path) -> None:
    refuses(UserError, lambda: hpc_gen.load("tyo", run.workspace), "no run 'tyo' (did you mean 'toy'?)")
    refuses(UserError, lambda: hpc_gen.load(tmp_path), "as a folder or below")
    moved = tmp_path / "copied"
    moved.symlink_to(run.path)
    assert torch.equal(hpc_gen.load(moved, run.workspace).generate(2), run.generate(2))


def test_what_a_run_knows(run: Run) -> None:
    assert (
        run.name == "toy" and run.path == run.workspace / "runs" / "toy" and repr(run) == f"hpc_gen.load('{run.path}')"
    )
    assert run.config.train is not None and run.config.train.total_images == 64
    assert [each.images_seen for each in run.checkpoints()] == [64]
    assert run.metrics().get("fid").value is not None and run.metrics("main").tag == "main"
    assert run.status().name == "toy" and [stage.name for stage in run.status().stages][0] == "train"
    journal = Journal(run.folder, 9, "train")
    journal.row(8, {"loss": 0.5})
    journal.row(16, {"loss": 0.25, "lr": 1e-3})
    journal.close()
    rows = run.history()
    assert [(row["images_seen"], row["loss"]) for row in rows] == [(8, 0.5), (16, 0.25)]
    assert rows[1]["lr"] == 1e-3 and rows[1]["attempt"] == 9 and rows[1]["t"] > 1e9
    journal.path.unlink()


def test_export(run: Run, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = run.export(tmp_path / "weights.safetensors")
    role = next(iter(load_role_names(run)))
    average = load_role(newest(run.folder).path, role, "main")
    found = load_file(path)
    assert path == tmp_path / "weights.safetensors" and found.keys() <= average.keys() and found
    assert all(torch.equal(found[name], average[name]) for name in found)
    raw = load_file(run.export(tmp_path / "raw.safetensors", ema=None, checkpoint=64))
    assert any(not torch.equal(raw[name], found[name]) for name in found)
    refuses(UserError, lambda: run.export(ema="x"), "no average 'x'")
    refuses(UserError, lambda: run.export(role="x"), "no role 'x'")


def load_role_names(run: Run) -> list[str]:
    """Roles of the run's method."""
    from hpc_gen.stages.weights import meta_of

    return list(meta_of(run.config, run.workspace).roles())


def test_grid_is_a_picture(run: Run, tmp_path: Path) -> None:
    images = run.generate(5)
    picture = hpc_gen.grid(images, scale=2)
    assert picture.size == (3 * (16 + 2) + 2, 2 * (16 + 2) + 2)
    assert hpc_gen.grid(images, 5, gap=0).size == (40, 8)
    picture.save(tmp_path / "grid.png")
    with pytest.raises(ValueError, match="needs images"):
        hpc_gen.grid(images[:0])


def test_importing_and_loading_start_no_torch(run: Run) -> None:
    code = (
        "import sys, hpc_gen\n"
        "assert 'hpc_gen.api' not in sys.modules and 'pydantic' not in sys.modules\n"
        f"run = hpc_gen.load('toy', {str(run.workspace)!r})\n"
        "run.history(), run.status(), run.path, dir(hpc_gen)\n"
        "print([name for name in ('torch', 'numpy', 'PIL') if name in sys.modules])"
    )
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.stdout == "[]\n", done.stderr


def test_sampling_leaves_the_modules_as_they_were(run: Run) -> None:
    run.generate(1)
    assert run._ready is not None
    method = run._ready[1]
    with sampling_mode(method):
        pass
    assert all(not parameter.requires_grad for role in method.roles().values() for parameter in role.parameters())


# ---------------------------------------------------------------- the page


def test_the_code_of_the_page_runs(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python block of docs/python_api.md, in order, as one session on the toy run."""
    page = (REPOSITORY / "docs" / "python_api.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 5
    monkeypatch.setenv("HPC_GEN_WORKSPACE", str(run.workspace))
    monkeypatch.chdir(tmp_path)
    session: dict[str, object] = {}
    for block in blocks:
        code = block.replace("demo-mnist16", "toy").replace('"7"', '"c"')
        exec(compile(code, "docs/python_api.md", "exec"), session)
    assert (tmp_path / "samples.png").is_file() and (tmp_path / "model.safetensors").is_file()
