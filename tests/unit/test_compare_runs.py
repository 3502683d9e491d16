"""`hpc-gen compare`: config, losses at the same clock, metrics where they were measured alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from experiments import LINEAR, Workspace

from hpc_gen.metrics.results import MetricFile, MetricRecord
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.runtime.journal import Journal
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages.compare import CURVE_ROWS, Difference, compare, lines
from hpc_gen.stages.parent import FORKED


@pytest.fixture
def pair(tmp_path: Path) -> tuple[RunFolder, RunFolder]:
    """Two runs that differ in the learning rate and in keys of operation."""
    workspace = Workspace(tmp_path)
    first = workspace.run("first", "name=first", text=LINEAR)
    second = workspace.run("second", "name=second", "train.optimizer.lr=0.5", "train.save_every=32", text=LINEAR)
    return first, second


def log(run: RunFolder, losses: dict[int, float], name: str = "loss") -> None:
    journal = Journal(run, 1, "train")
    for images, loss in losses.items():
        journal.row(images, {name: loss, "grad_norm": 1.0})
    journal.close()


def metrics(run: RunFolder, tag: str, value: float | None, **measure: object) -> None:
    record = MetricRecord("fid", value, note=None if value is not None else "too few", measure={"count": 50, **measure})
    MetricFile(tag, "f", (record, MetricRecord(f"only-{run.name}", 1.0))).write(run.metrics(tag))


def test_keys_that_differ_and_which_of_them_change_numbers(pair: tuple[RunFolder, RunFolder]) -> None:
    found = compare(*pair)
    assert found.differences == [
        Difference("train.optimizer.lr", 0.001, 0.5, True),
        Difference("train.save_every", 16, 32, False),
    ]
    text = "\n".join(lines(found))
    assert "config: 2 differences, 1 in keys that change numbers" in text
    assert "train.optimizer.lr  0.001  0.5  changes numbers" in text
    assert "train.save_every    16     32   operation" in text


def test_no_difference_and_nothing_logged(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    found = compare(workspace.run("a", text=LINEAR), workspace.run("b", text=LINEAR))
    assert found.differences == [] and found.curves == [] and found.metrics == []
    text = "\n".join(lines(found))
    assert "config: no difference" in text and "losses: the runs have none in common" in text
    assert "metrics: no set of samples was evaluated in both" in text


def test_other_methods_have_keys_that_the_other_lacks(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    second = workspace.run(
        "b", text=LINEAR.replace('{name: "tiny_method:ENTRY"}', '{name: "tiny_method:ENTRY", bad_from: 8}')
    )
    found = compare(workspace.run("a", "train.init_from=null", text=LINEAR), second)
    assert found.differences == [Difference("method.bad_from", None, 8, True)]


def test_losses_at_the_images_seen_that_both_logged(pair: tuple[RunFolder, RunFolder]) -> None:
    log(pair[0], {16: 4.0, 32: 3.0, 48: 2.0})
    log(pair[1], {24: 9.0, 32: 3.5, 48: float("nan")})
    [curve] = compare(*pair).curves
    assert curve.name == "loss" and curve.common == 2 and curve.points[0] == (32, 3.0, 3.5)
    text = "\n".join(lines(compare(*pair)))
    assert "loss at the images seen that both logged (2)" in text and "32      3  3.5  -0.5" in text
    shown = json.loads(compare(*pair).to_json())  # strict JSON
    assert shown["curves"][0]["points"][1] == [48, 2.0, "nan"] and shown["images_seen"] == [48, 48]


def test_long_curves_are_thinned_and_the_last_point_stays(pair: tuple[RunFolder, RunFolder]) -> None:
    for run in pair:
        log(run, {images: 1.0 / images for images in range(16, 16 * 1001, 16)})
    [curve] = compare(*pair).curves
    places = [images for images, _, _ in curve.points]
    assert curve.common == 1000 and len(places) == CURVE_ROWS + 1 == len(set(places))
    assert places[0] == 16 and places[-1] == 16000 and places == sorted(places)


def test_never_at_the_same_clock(pair: tuple[RunFolder, RunFolder]) -> None:
    log(pair[0], {16: 1.0})
    log(pair[1], {24: 1.0})
    assert "loss: logged by both, but never at the same images seen" in list(lines(compare(*pair)))


def test_losses_of_validation_and_of_several_turns(pair: tuple[RunFolder, RunFolder]) -> None:
    for run in pair:
        log(run, {16: 1.0}, "validation/loss")
        log(run, {16: 2.0}, "generator/loss")
    assert [curve.name for curve in compare(*pair).curves] == ["generator/loss", "validation/loss"]


def test_metrics_alike_are_compared_and_unlike_ones_refused(pair: tuple[RunFolder, RunFolder]) -> None:
    metrics(pair[0], "main", 10.0)
    metrics(pair[1], "main", 12.5)
    metrics(pair[0], "other", 10.0, extractor={"weights": "a"})
    metrics(pair[1], "other", 9.0, extractor={"weights": "b"})
    metrics(pair[0], "void", None)
    metrics(pair[1], "void", 9.0)
    metrics(pair[1], "online-64", 9.0)
    found = compare(*pair)
    assert [(each.tag, each.name, each.difference) for each in found.metrics] == [
        ("main", "fid", -2.5),
        ("other", "fid", None),
        ("void", "fid", None),
    ]
    refused = found.metrics[1].refused
    assert refused is not None and "'fid' was measured in two ways: extractor.weights is 'a' in one and 'b'" in refused
    text = "\n".join(lines(found))
    assert "main/fid   10    12.5  -2.5" in text and "refused" in text and "not compared: other/fid: 'fid' was" in text
    assert "void/fid: 'fid' has no value (too few)" in text and "only second has metrics of: online-64" in text


def test_a_damaged_metrics_file_is_named(pair: tuple[RunFolder, RunFolder]) -> None:
    metrics(pair[0], "main", 1.0)
    pair[1].metrics("main").parent.mkdir()
    pair[1].metrics("main").write_text("{")
    with pytest.raises(DataError, match=r"second/metrics/main.json is not a metrics file"):
        compare(*pair)


def test_whose_child_it_is(pair: tuple[RunFolder, RunFolder]) -> None:
    told = {"run": "first", "identity": "a" * 64, "manifest_sha256": "b" * 64, "images_seen": 32, "changed": ["seed"]}
    commit.write_json(pair[1].hashes_path, {**json.loads(pair[1].hashes_path.read_text()), FORKED: told})
    expected = f"   forked from first at 32 images (identity {'a' * 16}, checkpoint {'b' * 16}); changed: seed"
    assert expected in list(lines(compare(*pair)))


def test_a_run_with_itself(pair: tuple[RunFolder, RunFolder]) -> None:
    with pytest.raises(UserError, match="'first' and 'first' are the same run; give two"):
        compare(pair[0], RunFolder(pair[0].path))
