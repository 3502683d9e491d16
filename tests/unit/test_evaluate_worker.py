"""The evaluate stage on a real tiny run: features in units, metrics from them, provenance, refusals."""

import json
import shutil

import numpy as np
import pytest
import torch

from eval_jobs import evaluate, sample
from eval_jobs.read_once import ReadOnce
from hpc_gen.metrics import extractors, fidelity
from hpc_gen.metrics.extractors import ExtractorSpec, NetworkExtractor, RandomConvolutions
from hpc_gen.metrics.results import compare, read
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.sampling.images import png_bytes
from hpc_gen.sampling.index import read_index
from hpc_gen.stages.build import open_table
from hpc_gen.stages.reference import ReferenceImages
from tests.support import toy_run


def _worker(run, resolved, workspace, **share) -> evaluate.EvaluateWorker:
    return evaluate.worker(toy_run.context(run, resolved, workspace, "evaluate", **share))


def _sample(run, resolved, workspace) -> None:
    made = sample.worker(toy_run.context(run, resolved, workspace, "sample"))
    toy_run.do_units(run, made)
    made.finish()


def _evaluate(run, resolved, workspace):
    made = _worker(run, resolved, workspace)
    toy_run.do_units(run, made)
    made.finish()
    return read(run.metrics("main"))


@pytest.fixture(scope="module", autouse=True)
def _restore_determinism():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    workspace = tmp_path_factory.mktemp("workspace")
    run, resolved = toy_run.make_run(workspace)
    _sample(run, resolved, workspace)
    return workspace, run, resolved, _evaluate(run, resolved, workspace)


def test_units_are_blocks_of_samples_and_reference(evaluated):
    workspace, run, resolved, _ = evaluated
    names = [unit.name for unit in _worker(run, resolved, workspace).units()]
    assert names == ["samples-000000", "samples-000001", "reference-000000", "reference-000001", "reference-000002"]
    assert (run.features("main") / "reference" / "000002.safetensors").is_file()
    assert toy_run.do_units(run, _worker(run, resolved, workspace)) == []


def test_metrics_equal_torch_fidelity_on_the_same_images(evaluated):
    workspace, run, _, metrics = evaluated
    network = extractors.spec("random-conv", None, None, workspace).build()
    samples = network(read_index(run.samples("main")).read(range(20))).features
    pixels = open_table(workspace, "tables/train").read(np.arange(24), ["pixels"])["pixels"]
    reference = network(pixels.expand(-1, 3, -1, -1).contiguous()).features
    module = fidelity._module("metric_fid")
    statistics = [module.fid_features_to_statistics(features.double()) for features in (samples, reference)]
    fid = module.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert metrics.get("fid").value == pytest.approx(fid, rel=1e-4)
    kid = fidelity._module("metric_kid").kid_features_to_metric(samples, reference, kid_subset_size=10, verbose=False)
    assert metrics.get("kid").value == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-3)
    assert metrics.get("kid").std == pytest.approx(kid["kernel_inception_distance_std"], rel=1e-3)
    assert [record.name for record in metrics.records] == ["fid", "fid_infinity", "kid", "precision", "recall", "isc"]


def test_every_number_says_how_it_was_made(evaluated):
    workspace, run, resolved, metrics = evaluated
    plan = read_index(run.samples("main")).plan
    for record in metrics.records:
        assert record.measure["extractor"]["name"] == "random-conv"
        assert record.measure["num_images"] == 20
        assert record.measure["classes"] == "balanced"
        assert record.subject["run_identity"] == resolved.identity
        assert record.subject["plan"]["hash"] == plan.hash
        assert record.subject["plan"]["seed"] == 11
        assert record.subject["checkpoint"]["manifest_sha256"] == plan.checkpoint_manifest_sha256
        assert record.subject["versions"]["torch_fidelity"] == fidelity.version()
    table = open_table(workspace, "tables/train")
    assert metrics.get("fid").measure["reference"] == {"table": table.identity, "rows": 24}
    assert "singular covariance" in metrics.get("fid").note


def test_inception_score_without_logits_says_why(evaluated):
    record = evaluated[3].get("isc")
    assert record.value is None
    assert record.note == "not available: extractor has no logits"


def test_inception_score_with_logits(tmp_path, monkeypatch):
    class WithLogits(RandomConvolutions):
        def forward(self, images):
            (features,) = super().forward(images)
            return features, features[:, :7] * 30

    def spec(weights, sha256, workspace):
        facts = {"name": "with-logits"}
        build = lambda: NetworkExtractor("with-logits", WithLogits().eval(), facts, has_logits=True)  # noqa: E731
        return ExtractorSpec("with-logits", facts, True, build)

    monkeypatch.setitem(extractors.EXTRACTORS, "with-logits", spec)
    run, resolved = toy_run.make_run(tmp_path, "evaluate.extractor.name=with-logits", "evaluate.metrics=[isc]")
    _sample(run, resolved, tmp_path)
    record = _evaluate(run, resolved, tmp_path).get("isc")
    assert record.value > 1.0
    assert record.measure["settings"] == {"splits": 10, "seed": 2020}
    assert "reference" not in record.measure


def test_number_of_tasks_does_not_change_a_bit(evaluated):
    workspace, run, resolved, metrics = evaluated
    shutil.rmtree(run.features("main"))
    run.metrics("main").unlink()
    for task in (2, 0, 1):
        made = _worker(run, resolved, workspace, task=task, tasks=3)
        assert toy_run.do_units(run, made, made.units()[task::3])
    made.finish()
    assert read(run.metrics("main")) == metrics


SECOND = ["clip: {name: random-conv}", "dinov2: {name: random-conv}"]


@pytest.mark.parametrize("tasks", [1, 2, 3, 5])
def test_images_are_decoded_once_for_all_networks(tmp_path, monkeypatch, tasks):
    """Three networks, blocks of samples larger than those of features: each task decodes what it must, and once."""
    from hpc_gen.sampling import index

    run, resolved = toy_run.make_run(
        tmp_path,
        "sample={num_images: 40, block_images: 20, batch: 4, settings: {steps: 1}}",
        f"evaluate={{metrics: [fid, clip_fid, fd_dinov2], {', '.join(SECOND)}, extractor: {{name: random-conv}}, "
        "reference: {table: tables/train, rows: 24}, batch: 4, block_images: 4}",
    )
    _sample(run, resolved, tmp_path)
    whole: list[str] = []
    read_block = index.read_block
    monkeypatch.setattr(
        index, "read_block", lambda folder, block: whole.append(block.name) or read_block(folder, block)
    )
    rows: list[range] = []
    read_rows = ReferenceImages.read
    monkeypatch.setattr(ReferenceImages, "read", lambda self, ids: rows.append(ids) or read_rows(self, ids))
    names = set()
    for task in range(tasks):
        made = _worker(run, resolved, tmp_path, task=task, tasks=tasks)
        mine = made.units()[task::tasks]
        toy_run.do_units(run, made, mine)
        names |= {unit.name for unit in mine}
    assert len(names) == 3 * (10 + 6)
    assert len(whole) <= 2 * tasks  # at most each of the two blocks of samples by each task
    assert len(rows) <= 6 + (tasks - 1)  # and each block of the reference once; a last round that is short costs more
    made.finish()
    values = {record.name: record.value for record in read(run.metrics("main")).records}
    assert values["fid"] == values["clip_fid"] == values["fd_dinov2"]


def test_blocks_of_the_same_names_are_not_mistaken_for_one_another(tmp_path):
    """Points of a sweep share what was read last, and each of them has a block 000000."""
    sets = []
    for seed in (1, 2):
        section = f"sample={{num_images: 12, block_images: 12, batch: 12, seed: {seed}, settings: {{steps: 1}}}}"
        run, resolved = toy_run.make_run(tmp_path / str(seed), section)
        _sample(run, resolved, tmp_path / str(seed))
        sets.append(read_index(run.samples("main")))
    once = ReadOnce()
    assert not torch.equal(sets[0].read(range(12)), sets[1].read(range(12)))
    for source in (*sets, *sets):
        for ids in (range(4), range(4), range(4, 8), range(2, 6)):
            assert torch.equal(once.read(source, ids), source.read(ids))


def test_finish_again_writes_nothing(evaluated):
    workspace, run, resolved, _ = evaluated
    before = run.metrics("main").stat().st_mtime_ns
    _worker(run, resolved, workspace).finish()
    assert run.metrics("main").stat().st_mtime_ns == before


def test_runs_are_compared_only_with_their_like(evaluated, tmp_path):
    workspace, run, resolved, metrics = evaluated
    other, changed = toy_run.make_run(workspace, "sample.seed=12", name="other")
    _sample(other, changed, workspace)
    theirs = _evaluate(other, changed, workspace)
    assert compare(metrics.get("fid"), theirs.get("fid")) != 0.0
    fewer, changed = toy_run.make_run(workspace, "evaluate.reference.rows=22", name="fewer")
    _sample(fewer, changed, workspace)
    with pytest.raises(UserError, match=r"reference\.rows is 24 in one and 22 in the other"):
        compare(metrics.get("fid"), _evaluate(fewer, changed, workspace).get("fid"))


def test_changed_samples_are_refused(evaluated):
    workspace, run, resolved, _ = evaluated
    path = read_index(run.samples("main")).path(13)
    content = path.read_bytes()
    made = _worker(run, resolved, workspace)
    try:
        for damaged in (content[: len(content) // 2], png_bytes(torch.zeros(3, 8, 8, dtype=torch.uint8))):
            path.write_bytes(damaged)
            with pytest.raises(
                DataError, match=r"000013\.png cannot be read|does not hold the images that were sampled"
            ):
                made.samples.read(range(10, 20))
    finally:
        path.write_bytes(content)


def test_features_of_other_inputs_are_refused(evaluated):
    workspace, run, resolved, _ = evaluated
    folder = run.features("main") / "samples"
    content = (folder / "000001.safetensors").read_bytes()
    metrics = run.metrics("main").read_text()
    made = _worker(run, resolved, workspace)
    run.metrics("main").unlink()
    try:
        (folder / "000001.safetensors").write_bytes((folder / "000000.safetensors").read_bytes())
        with pytest.raises(DataError, match=r"000001\.safetensors was made from other images or settings"):
            made.finish()
        (folder / "000001.safetensors").write_bytes(content[:100])
        with pytest.raises(DataError, match=r"000001\.safetensors cannot be read"):
            made.finish()
    finally:
        (folder / "000001.safetensors").write_bytes(content)
        run.metrics("main").write_text(metrics)


def test_nan_features_name_the_image(evaluated, monkeypatch):
    workspace, run, resolved, _ = evaluated
    made = _worker(run, resolved, workspace)
    network = extractors.spec("random-conv", None, None, workspace).build()

    def broken(images):
        found = network(images)
        found.features[1] = float("nan")
        return found

    monkeypatch.setattr(made.looks[0], "_network", broken)
    with pytest.raises(DataError, match=r"the features of .*units/000000/000001\.png are not finite"):
        made.do(made.units()[0], run.path / "staging", toy_run.no_poll)
    with pytest.raises(DataError, match=r"the features of row 1 of .*tables/train are not finite"):
        made.do(made.units()[2], run.path / "staging", toy_run.no_poll)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluate.reference.rows=33", r"reference\.rows is 33, but tables/train has 32 rows; lower it"),
        ("evaluate.extractor.name=inception-trunk", r"hpc-gen weights fetch inception"),
        ("evaluate.reference.table=tables/none", r"tables/none is not a folder"),
        ("evaluate.reference.table=tables/large", r"the samples are 8 x 8 pixels and the images of .* 16 x 16"),
        (
            "evaluate.reference.table=tables/few",
            r"metric 'kid' needs 10 images, but there are 20 samples and 6 reference",
        ),
    ],
)
def test_wrong_inputs_are_refused_before_any_work(evaluated, override, message):
    workspace, run, _, _ = evaluated
    if not (workspace / "tables" / "large").exists():
        toy_run.write_table(workspace / "tables" / "large", size=16)
        toy_run.write_table(workspace / "tables" / "few", rows=6)
    extra = () if "rows=" in override else ("evaluate.reference.rows=null",)
    resolved = toy_run.make_run(workspace, override, *extra, checkpoint=False, name=f"wrong-{abs(hash(override))}")[1]
    with pytest.raises((UserError, DataError), match=message):
        _worker(run, resolved, workspace)


def test_without_samples_the_fix_is_named(tmp_path):
    run, resolved = toy_run.make_run(tmp_path, checkpoint=False)
    with pytest.raises(UserError, match=r"no finished samples \(no index\.json\); run the sample stage to its end"):
        _worker(run, resolved, tmp_path)


def test_the_file_is_plain_json(evaluated):
    document = json.loads(evaluated[1].metrics("main").read_text())
    assert document["format"] == "hpc-gen-metrics-1"
    assert {record["name"] for record in document["metrics"]} == {
        "fid",
        "fid_infinity",
        "kid",
        "precision",
        "recall",
        "isc",
    }


# ---------------------------------------------------------------- keys of the section


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluate.metrics=[fd_dinov2]", "metric 'fd_dinov2' needs 'evaluate.dinov2': name and weights of its network"),
        ("evaluate.metrics=[clip_fid]", "metric 'clip_fid' needs 'evaluate.clip'"),
        ("evaluate.metrics=[fid, fdi]", r"evaluate\.metrics"),
        ("evaluate.reference={table: a, images: b}", "names both 'table' and 'images'; give one"),
    ],
)
def test_wrong_keys_are_refused(tmp_path, override, message):
    from hpc_gen.config.errors import ConfigError

    with pytest.raises(ConfigError, match=message):
        toy_run.make_run(tmp_path, override, checkpoint=False)


def test_new_keys_change_no_identity_of_experiments_without_them(tmp_path):
    """The identity of the toy experiment, pinned before networks of their own and class lists could be named."""
    _, resolved = toy_run.make_run(tmp_path, checkpoint=False)
    from hpc_gen.config.base import split

    sections = split(resolved.experiment)[0]
    assert not {"clip", "dinov2", "isc_split_images"} & set(sections["evaluate"])
    assert not {"class_file", "output"} & set(sections["sample"]) and "images" not in sections["evaluate"]["reference"]


def test_distances_without_anything_to_compare_with_are_refused(evaluated, tmp_path):
    """Statistics of the main network are none of a second one."""
    import networks

    workspace, run, _, _ = evaluated
    sha256 = networks.write_clip(workspace / "clip.pt")
    from eval_jobs.statistics import StatisticsJob, make_statistics

    make_statistics(StatisticsJob("tables/train", workspace / "ref.npz", "random-conv"), workspace, lambda line: None)
    _, resolved = toy_run.make_run(
        workspace,
        "evaluate.metrics=[fid, clip_fid]",
        "evaluate.reference={statistics: ref.npz}",
        f"evaluate.clip={{name: clip-vit-b-32, weights: clip.pt, sha256: {sha256}}}",
        checkpoint=False,
        name="nothing",
    )
    with pytest.raises(
        UserError, match="'clip_fid' has nothing to compare with: give evaluate.reference images, or eval"
    ):
        _worker(run, resolved, workspace)
    wrong = toy_run.make_run(
        workspace,
        "evaluate.metrics=[clip_fid]",
        f"evaluate.clip={{name: clip-vit-b-32, weights: clip.pt, sha256: {sha256}, statistics: ref.npz}}",
        checkpoint=False,
        name="wrong-statistics",
    )[1]
    with pytest.raises(DataError, match=r"ref\.npz was made by another extractor: dtype|layer|name"):
        _worker(run, wrong, workspace)
