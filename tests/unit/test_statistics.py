"""Stored statistics: round trip, published layouts, every kind of damage, other extractors, `metrics stats`."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_run

from eval_jobs.statistics import StatisticsJob, make_statistics
from hpc_gen.metrics import extractors, statistics, suite
from hpc_gen.metrics.frechet import frechet_distance
from hpc_gen.metrics.moments import Moments
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.stages.build import open_table


@pytest.fixture(scope="module", autouse=True)
def _restore_determinism():
    yield
    torch.use_deterministic_algorithms(False)


def _moments(rows: int = 200, seed: int = 0) -> Moments:
    return Moments.of(torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed)) * torch.arange(1, 7))


def _save(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def _good() -> dict[str, np.ndarray]:
    moments = _moments()
    return {"mu": moments.mean.numpy(), "sigma": moments.covariance.numpy()}


def test_round_trip_with_provenance(tmp_path):
    moments = _moments()
    path = tmp_path / "deep" / "a.npz"
    sha256 = statistics.write(path, moments, {"extractor": {"name": "x"}})
    found = statistics.read(path, sha256)
    assert torch.equal(found.mean, moments.mean) and torch.equal(found.covariance, moments.covariance)
    assert found.sha256 == sha256 and found.count == 200
    assert found.provenance["extractor"] == {"name": "x"}
    other = tmp_path / "b.npz"
    assert statistics.write(other, moments, {"extractor": {"name": "x"}}) == sha256  # the same bytes
    assert frechet_distance(moments, found) == pytest.approx(0.0, abs=1e-9)
    with np.load(path, allow_pickle=False) as archive:
        np.testing.assert_allclose(archive["sigma"], np.cov((torch.randn(
            200, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7)).double().numpy(), rowvar=False))  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_published_layout_without_provenance(tmp_path, dtype):
    path = _save(tmp_path / "adm.npz", **{name: value.astype(dtype) for name, value in _good().items()})
    found = statistics.read(path)
    assert found.provenance is None and found.count is None and found.mean.dtype == torch.float64
    other = _moments(seed=1)
    assert frechet_distance(other, found) == pytest.approx(frechet_distance(other, _moments()), rel=1e-5)
    statistics.check_extractor(found, {"name": "y", "layer": "6"}, path)


def test_a_singular_sigma_of_float32_gives_no_negative_distance(tmp_path):
    """Rounding makes eigenvalues negative; without care the distance of a set to itself is below zero."""
    moments = Moments.of(torch.randn(5, 300, generator=torch.Generator().manual_seed(0)) * 100)
    arrays = {"mu": moments.mean.numpy().astype(np.float32), "sigma": moments.covariance.numpy().astype(np.float32)}
    found = statistics.read(_save(tmp_path / "a.npz", **arrays))
    assert torch.linalg.eigvalsh(found.covariance).min() > -1e-9 * found.covariance.max()
    assert frechet_distance(moments, found) >= 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("mu"), r"has no keys 'mu' and 'sigma' \(it has: sigma\)"),
        (lambda a: a.update(mu=a["mu"][:5]), r"'mu' has shape \[5\] and 'sigma' \[6, 6\]"),
        (lambda a: a.update(mu=a["mu"][None]), r"'mu' has shape \[1, 6\]"),
        (lambda a: a.update(mu=a["mu"].astype(np.float16)), "'mu' is float16, not float32 or float64"),
        (lambda a: a.update(sigma=a["sigma"].astype(np.int64)), "'sigma' is int64"),
        (lambda a: a["sigma"].__setitem__((1, 2), np.nan), "'sigma' holds NaN or infinity"),
        (lambda a: a["mu"].__setitem__(0, np.inf), "'mu' holds NaN or infinity"),
        (lambda a: a["sigma"].__setitem__((1, 2), 50.0), "'sigma' is not a covariance"),
        (lambda a: a["sigma"].__setitem__((0, 0), -1.0), "'sigma' is not a covariance"),
        (lambda a: a.update(provenance=np.array(["{"])), "its provenance cannot be read"),
        (lambda a: a.update(provenance=np.array(['{"format": "other"}'])), "its provenance cannot be read"),
        (lambda a: a.update(provenance=np.array([])), "its provenance cannot be read"),
    ],
)
def test_damaged_files_are_refused(tmp_path, change, message):
    arrays = _good()
    change(arrays)
    with pytest.raises(DataError, match=message):
        statistics.read(_save(tmp_path / "a.npz", **arrays))


def test_objects_are_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    for name in ("mu", "provenance"):
        stream = io.BytesIO()
        np.savez(stream, allow_pickle=True, **{**_good(), name: np.array([Bomb()], dtype=object)})
        (tmp_path / "a.npz").write_bytes(stream.getvalue())
        with pytest.raises(DataError, match="cannot be read as"):
            statistics.read(tmp_path / "a.npz")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("keep", [0, 30, 200, 500])
def test_torn_missing_and_exchanged_files(tmp_path, keep):
    path = _save(tmp_path / "a.npz", **_good())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"a\.npz cannot be read as \.npz"):
        statistics.read(path)
    with pytest.raises(DataError, match="has SHA-256 .*, not 0000"):
        statistics.read(path, "0" * 64)
    with pytest.raises(UserError, match="no statistics at .*hpc-gen metrics stats"):
        statistics.read(tmp_path / "none.npz")


def test_statistics_of_another_extractor_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    description = {"name": "x", "layer": "6", "weights_sha256": "ab"}
    statistics.write(path, _moments(), {"extractor": description})
    found = statistics.read(path)
    statistics.check_extractor(found, description, path)
    with pytest.raises(DataError, match="another extractor: weights_sha256 is 'ab' there and 'cd' here"):
        statistics.check_extractor(found, {**description, "weights_sha256": "cd"}, path)
    with pytest.raises(DataError, match="statistics of 6 features, the extractor 'x' has 2048"):
        statistics.check_extractor(found, {**description, "layer": "2048"}, path)


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(("rows", "channels"), [(None, 1), (7, 3)])
def test_statistics_of_a_table(tmp_path, rows, channels):
    toy_run.write_table(tmp_path / "tables" / "t", rows=32, channels=channels)
    said: list[str] = []
    job = StatisticsJob("tables/t", tmp_path / "t.npz", extractor="random-conv", rows=rows, batch=3)
    make_statistics(job, tmp_path, said.append)
    found = statistics.read(tmp_path / "t.npz")
    spec = extractors.spec("random-conv", None, None, tmp_path)
    pixels = open_table(tmp_path, "tables/t").read(np.arange(rows or 32), ["pixels"])["pixels"].expand(-1, 3, -1, -1)
    expected = Moments.of(spec.build()(pixels.contiguous()).features)
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.covariance, expected.covariance, rtol=1e-5, atol=1e-6)
    assert found.count == (rows or 32) and found.provenance["rows"] == (rows or 32)
    assert found.provenance["image_shape"] == [3, 8, 8]
    assert found.provenance["table"] == open_table(tmp_path, "tables/t").identity
    statistics.check_extractor(found, spec.description, tmp_path / "t.npz")
    assert found.sha256 in said[-1]


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (StatisticsJob("tables/t", Path("t.txt"), "random-conv"), "does not end in .npz"),
        (StatisticsJob("tables/t", Path("t.npz"), "random-cnv"), "unknown extractor 'random-cnv' .did you mean"),
        (
            StatisticsJob("tables/t", Path("t.npz"), "random-conv", rows=99),
            "metrics stats.rows is 99, but tables/t has 32",
        ),
        (StatisticsJob("tables/latents", Path("t.npz"), "random-conv"), "no column 'pixels' of uint8"),
        (
            StatisticsJob("tables/t", Path("t.npz"), "random-conv", rows=1),
            "has 1 images; a covariance needs at least 2",
        ),
    ],
)
def test_wrong_jobs_are_refused(tmp_path, job, message):
    from hpc_gen.data.write import write_table

    toy_run.write_table(tmp_path / "tables" / "t", rows=32)
    write_table(tmp_path / "tables" / "latents", {"moments": torch.zeros(4, 8, 2, 2)}, shard_rows=4)
    with pytest.raises((UserError, DataError), match=message):
        make_statistics(job, tmp_path, print)
    assert not (tmp_path / "t.npz").exists()


# ---------------------------------------------------------------- metrics with statistics


def test_numbers_with_statistics_and_without_images(tmp_path):
    statistics.write(tmp_path / "a.npz", _moments(), {"extractor": {"name": "x"}})
    _save(tmp_path / "b.npz", **_good())
    samples = list((torch.randn(40, 6, generator=torch.Generator().manual_seed(3))).split(16))
    for name, said in (("a.npz", None), ("b.npz", suite.UNKNOWN_EXTRACTOR)):
        stored = statistics.read(tmp_path / name)
        found = suite.numbers(
            ["fid", "kid", "prc", "isc"], samples, None, suite.Reference(None, stored), suite.Choices(10, errors=False)
        )
        by_name = {number.name: number for number in found}
        assert by_name["fid"].value == pytest.approx(frechet_distance(Moments.of(torch.cat(samples)), _moments()))
        assert by_name["fid"].note == said
        for missing in ("kid", "precision", "recall"):
            assert by_name[missing].value is None and by_name[missing].note == suite.NO_IMAGES
        assert suite.row_values(found) == {"evaluate/fid": by_name["fid"].value}
        reference = suite.Reference(None, stored)
        assert reference.facts_of("fid")["reference"]["statistics_sha256"] == stored.sha256


def test_rows_have_the_names_of_the_seed():
    found = [suite.Number("kid", 0.5, 0.1), suite.Number("isc", 2.0, 0.3), suite.Number("recall", 0.25)]
    expected = {
        "evaluate/kid_mean": 0.5,
        "evaluate/kid_std": 0.1,
        "evaluate/inception_score": 2.0,
        "evaluate/recall": 0.25,
    }
    assert suite.row_values(found) == expected


def test_the_evaluate_stage_takes_statistics(tmp_path):
    """With statistics alone no feature of the reference is computed; the record names the file by its hash."""
    from eval_jobs import evaluate, sample
    from hpc_gen.metrics.results import read

    run, resolved = toy_run.make_run(
        tmp_path, "evaluate.reference={statistics: ref.npz}", "evaluate.metrics=[fid, kid, prc]"
    )
    job = StatisticsJob("tables/train", tmp_path / "ref.npz", "random-conv", rows=24, batch=4)
    make_statistics(job, tmp_path, lambda line: None)
    made = sample.worker(toy_run.context(run, resolved, tmp_path, "sample"))
    toy_run.do_units(run, made)
    made.finish()
    worker = evaluate.worker(toy_run.context(run, resolved, tmp_path, "evaluate"))
    assert all(unit.name.startswith("samples-") for unit in worker.units())
    toy_run.do_units(run, worker)
    worker.finish()
    found = read(run.metrics("main"))
    assert found.get("fid").value is not None and found.get("kid").value is None
    reference = found.get("fid").measure["reference"]
    assert reference == {"statistics_sha256": statistics.read(tmp_path / "ref.npz").sha256, "rows": 24}
    # the same number from the table itself
    both, again = toy_run.make_run(tmp_path, "evaluate.metrics=[fid]", name="table")
    for each, factory in (("sample", sample.worker), ("evaluate", evaluate.worker)):
        made = factory(toy_run.context(both, again, tmp_path, each))
        toy_run.do_units(both, made)
        made.finish()
    assert read(both.metrics("main")).get("fid").value == pytest.approx(found.get("fid").value, rel=1e-6)
    assert json.loads(run.metrics("main").read_text())["metrics"][2]["note"] == suite.NO_IMAGES


def test_the_evaluate_stage_refuses_statistics_of_other_sizes(tmp_path):
    from eval_jobs import evaluate, sample

    run, resolved = toy_run.make_run(tmp_path, "evaluate.reference={statistics: ref.npz}", "evaluate.metrics=[fid]")
    toy_run.write_table(tmp_path / "tables" / "large", size=16)
    make_statistics(StatisticsJob("tables/large", tmp_path / "ref.npz", "random-conv"), tmp_path, lambda line: None)
    made = sample.worker(toy_run.context(run, resolved, tmp_path, "sample"))
    toy_run.do_units(run, made)
    made.finish()
    with pytest.raises(DataError, match="the samples are 8 x 8 pixels and the images of .*ref.npz 16 x 16"):
        evaluate.worker(toy_run.context(run, resolved, tmp_path, "evaluate"))
