"""What a set of samples is: class lists, .npz, features in place of images, gaps filled, work shared evenly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import toy_run

from eval_jobs import evaluate, sample
from hpc_gen.config.errors import ConfigError
from hpc_gen.metrics.results import compare, read
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.sampling.class_file import classes_sha256, read_classes
from hpc_gen.sampling.index import read_index
from hpc_gen.stages.units import Ledger

LISTED = [3, 0, 0, 1, 2] * 4


@pytest.fixture(scope="module", autouse=True)
def _restore_determinism():
    yield
    torch.use_deterministic_algorithms(False)


def _stage(run, resolved, workspace, stage="sample"):
    made = {"sample": sample, "evaluate": evaluate}[stage].worker(toy_run.context(run, resolved, workspace, stage))
    done = toy_run.do_units(run, made)
    made.finish()
    return done


# ---------------------------------------------------------------- classes from a file


def test_classes_of_a_file_are_those_of_the_images(tmp_path, capsys):
    (tmp_path / "classes.txt").write_text("\n".join(map(str, LISTED)) + "\n")
    chosen = ("sample.classes=file", "sample.class_file=classes.txt")
    run, resolved = toy_run.make_run(tmp_path, *chosen)
    _stage(run, resolved, tmp_path)
    index = read_index(run.samples("main"))
    assert index.plan.labels(torch.arange(20)).tolist() == LISTED
    assert index.plan.class_plan == f"file {classes_sha256(LISTED)}"
    assert "its classes have 4 to 8 images: not the equal counts" in capsys.readouterr().out
    # image 1 of class 0 is that of any plan which gives it that class
    plain, same = toy_run.make_run(tmp_path, "sample.classes=sorted", name="sorted")
    _stage(plain, same, tmp_path)
    one, other = index.read(range(20)), read_index(plain.samples("main")).read(range(20))
    assert torch.equal(one[1], other[1])
    # another list is another plan
    (tmp_path / "classes.txt").write_text("\n".join(map(str, LISTED[::-1])))
    with pytest.raises(UserError, match="is another plan: classes_sha256 is"):
        sample.worker(toy_run.context(run, resolved, tmp_path, "sample"))


def test_every_form_of_a_list_is_read(tmp_path):
    np.save(tmp_path / "a.npy", np.array(LISTED))
    np.savez(tmp_path / "b.npz", arr_0=np.zeros(1), arr_1=np.array(LISTED))
    (tmp_path / "c.txt").write_text("\n".join(map(str, LISTED)))
    found = {read_classes(tmp_path / name, 20, 4) for name in ("a.npy", "b.npz", "c.txt")}
    assert found == {tuple(LISTED)}


@pytest.mark.parametrize(
    ("name", "content", "count", "message"),
    [
        ("none.txt", None, 20, r"none\.txt does not exist; name a file of class numbers"),
        ("short.txt", "1\n2\n", 20, r"lists the classes of 2 images, but sample\.num_images is 20"),
        ("word.txt", "1\ncat\n", 2, r"cannot be read as class numbers .*'cat'.*; write one number per line"),
        ("far.txt", "1\n4\n", 2, r"gives image 1 the class 4, but the table has 4 classes \(1 such images\)"),
        ("torn.npy", "x", 2, r"torn\.npy cannot be read as class numbers"),
    ],
)
def test_wrong_lists_are_refused(tmp_path, name, content, count, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises((UserError, DataError), match=message):
        read_classes(tmp_path / name, count, 4)


def test_more_wrong_lists(tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=np.zeros(2))
    with pytest.raises(DataError, match="has no 'arr_1', so it lists no classes"):
        read_classes(tmp_path / "images.npz", 2, 4)
    np.save(tmp_path / "float.npy", np.zeros((2, 2)))
    with pytest.raises(DataError, match=r"holds float64 \[2, 2\], not class numbers"):
        read_classes(tmp_path / "float.npy", 2, 4)
    for keys in (("sample.classes=file",), ("sample.class_file=a.txt",)):
        with pytest.raises(ConfigError, match="'sample.classes' = 'file' and 'sample.class_file' belong together"):
            toy_run.make_run(tmp_path, *keys, name="wrong", checkpoint=False)


# ---------------------------------------------------------------- what is kept


def test_npz_holds_all_images_and_classes(tmp_path):
    run, resolved = toy_run.make_run(tmp_path, "sample.output=npz")
    _stage(run, resolved, tmp_path)
    path = run.samples("main") / "samples.npz"
    with np.load(path) as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
    index = read_index(run.samples("main"))
    assert images.dtype == np.uint8 and images.shape == (20, 8, 8, 3)
    assert torch.equal(torch.from_numpy(images).permute(0, 3, 1, 2), index.read(range(20)))
    assert labels.tolist() == index.plan.labels(torch.arange(20)).tolist()
    content = path.read_bytes()
    path.unlink()
    sample.worker(toy_run.context(run, resolved, tmp_path, "sample")).finish()
    assert path.read_bytes() == content  # the same bytes whenever it is written
    assert not list(run.samples("main").glob(".tmp-*"))


def test_features_alone_give_the_same_numbers(tmp_path):
    """Nothing but features is stored, and every metric is that of the stored images, bit for bit."""
    same = ("evaluate.block_images=8", "evaluate.metrics=[fid, sfid, kid, prc, density_coverage]")
    kept, resolved = toy_run.make_run(tmp_path, *same, name="kept")
    _stage(kept, resolved, tmp_path), _stage(kept, resolved, tmp_path, "evaluate")
    lean, resolved = toy_run.make_run(tmp_path, *same, "sample.output=features", name="lean")
    _stage(lean, resolved, tmp_path)
    files = [path.name for path in lean.samples("main").rglob("*") if path.is_file()]
    assert sorted(set(files)) == ["block.json", "features.safetensors", "index.json", "plan.json"]
    worker = evaluate.worker(toy_run.context(lean, resolved, tmp_path, "evaluate"))
    assert all(unit.name.startswith("reference-") for unit in worker.units())
    _stage(lean, resolved, tmp_path, "evaluate")
    ours, theirs = read(lean.metrics("main")), read(kept.metrics("main"))
    assert [record.name for record in ours.records] == [record.name for record in theirs.records]
    for record in ours.records:
        assert record.value == theirs.get(record.name).value and compare(record, theirs.get(record.name)) == 0.0
    with pytest.raises(UserError, match=r"holds features only \(sample\.output = features\); sample with output=png"):
        read_index(lean.samples("main")).read(range(2))


def test_features_of_other_metrics_are_made_anew(tmp_path):
    """What was not looked at cannot be looked at again: a layer or network more means sampling again."""
    lean = ("sample.output=features", "evaluate.metrics=[fid]")
    run, resolved = toy_run.make_run(tmp_path, *lean)
    assert len(_stage(run, resolved, tmp_path)) == 3
    assert _stage(run, resolved, tmp_path) == []
    _, more = toy_run.make_run(tmp_path, lean[0], "evaluate.metrics=[fid, sfid]", checkpoint=False, name="more")
    assert len(toy_run.do_units(run, sample.worker(toy_run.context(run, more, tmp_path, "sample")))) == 3
    other = toy_run.make_run(
        tmp_path, lean[0], "evaluate.metrics=[fid]", "evaluate.batch=2", checkpoint=False, name="o"
    )[1]
    with pytest.raises(DataError, match="was made from other images or settings"):
        evaluate.worker(toy_run.context(run, other, tmp_path, "evaluate")).finish()


def test_metrics_may_be_added_to_samples_that_are_there(tmp_path):
    """The plan knows the weights and settings; what is evaluated later does not make other images of them."""
    run, resolved = toy_run.make_run(tmp_path, "evaluate.metrics=[fid]")
    _stage(run, resolved, tmp_path)
    _, more = toy_run.make_run(tmp_path, "evaluate.metrics=[fid, kid]", checkpoint=False, name="more")
    assert more.identity != resolved.identity
    assert _stage(run, more, tmp_path) == []
    assert len(_stage(run, more, tmp_path, "evaluate")) == 5


def test_features_alone_need_to_know_which(tmp_path):
    run, resolved = toy_run.make_run(tmp_path, "sample.output=features", "evaluate=null")
    with pytest.raises(UserError, match="there is no section 'evaluate' that says which; add one, or sample with"):
        sample.worker(toy_run.context(run, resolved, tmp_path, "sample"))


def test_gaps_are_filled_and_nothing_else(tmp_path):
    """A lost or cut image means its block again, the same bytes; the other blocks are not touched."""
    run, resolved = toy_run.make_run(tmp_path)
    _stage(run, resolved, tmp_path)
    paths = sorted(run.samples("main").rglob("*.png"))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}
    paths[9].unlink()
    paths[18].write_bytes(b"cut")
    assert _stage(run, resolved, tmp_path) == ["000001", "000002"]
    for path in paths:
        assert path.read_bytes() == before[path][0]
    untouched = [path for path in paths if path.parent.name == "000000"]
    assert len(untouched) == 8 and all(path.stat().st_mtime_ns == before[path][1] for path in untouched)


# ---------------------------------------------------------------- many tasks


@pytest.mark.parametrize("tasks", [1, 3, 7, 32])
def test_parallel_efficiency_of_fifty_thousand_images(tmp_path, tasks):
    """Blocks of unequal simulated cost over tasks that never wait for one another: at least 95 % of the time is work.

    The blocks and their shares are the real ones; a block takes 0.8 to 1.2 of the mean, and a task ends when its share
    is done. There is no barrier: a task's time is the sum of its own blocks.
    """
    run, resolved = toy_run.make_run(tmp_path, "sample.num_images=50000", "sample.block_images=64")
    worker = sample.worker(toy_run.context(run, resolved, tmp_path, "sample"))
    units = worker.units()
    missing = Ledger(run.ledger("sample"), run.path).missing(units, worker.fingerprint())
    assert len(missing) == 782
    images = [len(block.ids) for block in worker.plan.blocks()]
    cost = np.random.RandomState(0).uniform(0.8, 1.2, len(units)) * np.array(images)
    shares = [sum(cost[unit.index] for unit in units[task::tasks]) for task in range(tasks)]
    assert sum(shares) == pytest.approx(cost.sum())
    efficiency = cost.sum() / (tasks * max(shares))
    assert efficiency >= 0.95, f"{tasks} tasks: {efficiency:.3f}"


def test_pixels_of_equal_images_are_told(tmp_path):
    """Copies count, and every record says how many there are."""
    run, resolved = toy_run.make_run(tmp_path, "evaluate.metrics=[fid, kid]")
    _stage(run, resolved, tmp_path)
    worker = evaluate.worker(toy_run.context(run, resolved, tmp_path, "evaluate"))
    read_all = worker.samples.read

    def twice(ids):
        images = read_all(ids)
        images[1] = images[0]
        return images

    worker._images = lambda kind, ids: twice(ids) if kind == "samples" else worker._images_of_reference.read(ids)
    toy_run.do_units(run, worker)
    worker.finish()
    for record in read(run.metrics("main")).records:
        assert "2 of 20 images are copies of others; they count" in record.note


def test_the_file_is_no_pickle(tmp_path):
    np.save(tmp_path / "object.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read as class numbers"):
        read_classes(tmp_path / "object.npy", 1, 4)
