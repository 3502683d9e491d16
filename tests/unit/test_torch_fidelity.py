"""The evaluate stage beside torch-fidelity itself on the same two folders of images: every number, to 1e-3 or better.

The networks have random weights, in files of the published forms: official ones cannot be had here.
"""

from __future__ import annotations

import networks
import numpy as np
import pytest
import torch
import toy_run

from eval_jobs import evaluate, sample
from hpc_gen.metrics import extractors, fidelity
from hpc_gen.metrics.results import MetricFile, read
from hpc_gen.runtime.commit import sha256_file
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.sampling.images import png_bytes
from hpc_gen.sampling.index import read_index
from hpc_gen.stages.build import open_table

COMMON = {
    "cuda": False,
    "verbose": False,
    "batch_size": 4,
    "samples_find_deep": True,
    "save_cpu_ram": True,
    "cache": False,
}


@pytest.fixture(scope="module", autouse=True)
def _restore_determinism():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A run whose samples were scored against a folder of images, by Inception and by CLIP."""
    workspace = tmp_path_factory.mktemp("workspace")
    inception, clip = networks.write_inception(workspace / "inception.pth"), networks.write_clip(workspace / "clip.pt")
    run, resolved = toy_run.make_run(
        workspace,
        "evaluate.metrics=[fid, kid, prc, isc, sfid, density_coverage, clip_fid]",
        f"evaluate.extractor={{name: inception, weights: inception.pth, sha256: {inception}}}",
        f"evaluate.clip={{name: clip-vit-b-32, weights: clip.pt, sha256: {clip}}}",
        "evaluate.reference={images: real, rows: 24}",
    )
    folder = workspace / "real"
    folder.mkdir()
    for i, pixels in enumerate(open_table(workspace, "tables/train").read(np.arange(24), ["pixels"])["pixels"]):
        (folder / f"{i:05d}.png").write_bytes(png_bytes(pixels.expand(3, -1, -1)))
    for stage, factory in (("sample", sample.worker), ("evaluate", evaluate.worker)):
        made = factory(toy_run.context(run, resolved, workspace, stage))
        toy_run.do_units(run, made)
        made.finish()
    return workspace, run, read(run.metrics("main"))


def _theirs(workspace, run, weights: str, extractor: str, **wanted) -> dict[str, float]:
    module = fidelity._module("metrics")
    return module.calculate_metrics(
        input1=str(run.samples("main") / "units"),
        input2=str(workspace / "real"),
        feature_extractor=extractor,
        feature_extractor_weights_path=str(workspace / weights),
        **{name: name in wanted for name in ("isc", "fid", "kid", "prc")},
        **{key: value for key, value in wanted.items() if key not in ("isc", "fid", "kid", "prc")},
        **COMMON,
    )


def _value(metrics: MetricFile, name: str) -> float:
    value = metrics.get(name).value
    assert value is not None
    return value


def test_inception_metrics_equal_theirs(scored):
    workspace, run, metrics = scored
    theirs = _theirs(
        workspace, run, "inception.pth", "inception-v3-compat", isc=1, fid=1, kid=1, prc=1, kid_subset_size=10
    )
    assert _value(metrics, "fid") == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert _value(metrics, "kid") == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    assert metrics.get("kid").std == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-3)
    assert _value(metrics, "isc") == pytest.approx(theirs["inception_score_mean"], rel=1e-3)
    assert metrics.get("isc").std == pytest.approx(theirs["inception_score_std"], rel=1e-3)
    assert _value(metrics, "precision") == pytest.approx(theirs["precision"], rel=1e-3)
    assert _value(metrics, "recall") == pytest.approx(theirs["recall"], rel=1e-3)
    assert theirs["frechet_inception_distance"] > 1.0 and theirs["inception_score_mean"] > 1.001  # not of nothing


def test_every_record_names_all_that_made_it(scored):
    """The list of issue 8, for every metric of two networks: nothing of it may be missing from any number."""
    workspace, run, metrics = scored
    plan = read_index(run.samples("main")).plan
    weights = {"inception": "inception.pth", "clip-vit-b-32": "clip.pt"}
    names = {"fid", "sfid", "clip_fid"}
    names |= {f"{name}_infinity" for name in names} | {"kid", "isc", "precision", "recall", "density", "coverage"}
    assert names == {record.name for record in metrics.records} | {n for n in names if n.endswith("_infinity")}
    for record in metrics.records:
        extractor, subject = record.measure["extractor"], record.subject
        assert extractor["weights_sha256"] == sha256_file(workspace / weights[extractor["name"]]), record.name
        assert extractor["resize"] and extractor["layer"] and extractor["dtype"] == "float32", record.name
        assert (record.measure["num_images"], record.measure["image_shape"]) == (20, [3, 8, 8])
        assert (record.measure["classes"], record.measure["num_classes"]) == ("balanced", 4)
        assert record.measure["settings"], record.name
        if record.name != "isc":  # which has no reference
            assert len(record.measure["reference"]["images"]) == 64 and record.measure["reference"]["rows"] == 24
        assert subject["plan"]["seed"] == 11 and subject["plan"]["settings"]["steps"] == 2
        assert subject["run_identity"] == plan.run_identity and len(subject["samples_index_sha256"]) == 64
        assert subject["checkpoint"]["images_seen"] == 64 and subject["checkpoint"]["ema"] == plan.ema
        assert subject["checkpoint"]["manifest_sha256"] == plan.checkpoint_manifest_sha256
        assert record.std is None or record.spread, record.name


def test_clip_distance_equals_theirs(scored):
    workspace, run, metrics = scored
    theirs = _theirs(workspace, run, "clip.pt", "clip-vit-b-32", fid=1)
    assert _value(metrics, "clip_fid") == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    record = metrics.get("clip_fid")
    assert record.measure["extractor"]["name"] == "clip-vit-b-32"
    assert record.measure["reference"]["rows"] == 24


def test_spatial_features_are_those_of_the_layer(scored):
    """sFID looks at the first seven channels of mixed_6/conv, height before width before channel, in the same pass."""
    workspace, _, metrics = scored
    spec = extractors.spec("inception", "inception.pth", networks.sha256_file(workspace / "inception.pth"), workspace)
    images = torch.randint(0, 256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = spec.built(torch.device("cpu"), spatial=True)(images)
    network, kept = spec.build().network, []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, given, out: kept.append(out))
    with torch.inference_mode():
        network(images)
    assert found.spatial is not None and found.spatial.shape == (2, 17 * 17 * 7)
    assert torch.equal(found.spatial.reshape(2, 17, 17, 7)[1, 3, 5], kept[0][1, :7, 3, 5])
    assert torch.equal(found.features, spec.build()(images).features)
    assert metrics.get("sfid").measure["extractor"]["layer"] == "Mixed_6d.branch1x1, first 7 channels"
    assert _value(metrics, "sfid") > 0.0


def test_second_networks_have_units_of_their_own(scored):
    """Adding a network computes its features alone; those of the first are there."""
    workspace, run, _ = scored
    folders = {path.name.partition("-")[0] for path in run.features("main").iterdir()}
    assert folders == {"samples", "reference", "clip"}
    clip = networks.sha256_file(workspace / "clip.pt")
    _, fewer = toy_run.make_run(
        workspace,
        "evaluate.metrics=[clip_fid]",
        f"evaluate.clip={{name: clip-vit-b-32, weights: clip.pt, sha256: {clip}}}",
        "evaluate.reference={images: real, rows: 24}",
        name="clip-only",
        checkpoint=False,
    )
    units = evaluate.worker(toy_run.context(run, fewer, workspace, "evaluate")).units()
    assert units and all(unit.name.startswith("clip-") for unit in units)  # and no weights of Inception are asked for


def test_refusals_of_clip(scored, tmp_path):
    workspace = scored[0]
    with pytest.raises(UserError, match="'clip-rn50' has no weights; set 'weights' beside its name"):
        extractors.spec("clip-rn50", None, None, workspace)
    with pytest.raises(DataError, match=r"clip\.pt has SHA-256 [0-9a-f]{64}, not 40d36571.*, the published one; set"):
        extractors.spec("clip-vit-b-32", "clip.pt", None, workspace)
    torch.save({"visual.proj": torch.zeros(3, 4)}, tmp_path / "odd.pt")
    odd = extractors.spec("clip-vit-b-32", "odd.pt", networks.sha256_file(tmp_path / "odd.pt"), tmp_path)
    with pytest.raises(UserError, match="do not fit the image tower of clip-vit-b-32"):
        odd.build()
    assert set(clip_names()) == set(fidelity.names_of("clip"))


def clip_names() -> tuple[str, ...]:
    from hpc_gen.metrics import clip

    return clip.NAMES


def test_dinov2_features_equal_theirs(tmp_path, monkeypatch):
    """torch-fidelity can only download DINOv2; given our network in place of the download, it computes the same."""
    from hpc_gen.stages.networks import ClassToken, extractor_spec

    sha256 = networks.write_dinov2(tmp_path / "dino.pth")
    ours = extractor_spec("dinov2-vit-s-14", "dino.pth", sha256, tmp_path).build()
    assert isinstance(ours.network.model, ClassToken)
    asked = []
    monkeypatch.setattr(torch.hub, "load", lambda *names: (asked.append(names), ours.network.model)[1])
    theirs = fidelity._module("feature_extractor_dinov2").FeatureExtractorDinoV2("dinov2-vit-s-14", ["dinov2"])
    images = torch.randint(0, 256, (2, 3, 20, 20), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.equal(ours(images).features, theirs(images)[0]) and asked == [
        ("facebookresearch/dinov2", "dinov2_vits14")
    ]
    with pytest.raises(UserError, match="'dinov2-vit-s-14' has no weights"):
        extractor_spec("dinov2-vit-s-14", None, None, tmp_path)
    with pytest.raises(DataError, match="set 'sha256' beside its name"):
        extractor_spec("dinov2-vit-s-14", "dino.pth", "0" * 64, tmp_path)
    with pytest.raises(UserError, match=r"unknown extractor 'dinov2-vit-s14' \(did you mean 'dinov2-vit-s-14'\?\)"):
        extractor_spec("dinov2-vit-s14", "dino.pth", None, tmp_path)
