"""Extractors: the torchvision mend, networks without a download, the mapping of the Inception trunk, pinned files."""

import hashlib
import io
import math
import zipfile

import pytest
import torch

from hpc_gen.metrics import extractors, fidelity, trunk
from hpc_gen.runtime import env
from hpc_gen.runtime.errors import DataError, UserError

REAL_FILE = env.workspace() / trunk.LOCATION


def _smooth_images(count: int = 2, size: int = 299) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    coarse = torch.rand(count, 3, 12, 12, generator=generator) * 255
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def random_state() -> dict[str, torch.Tensor]:
    """Weights of the whole network, logits included, of small random numbers."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in fidelity.convolution_shapes().items():
        fan_in = math.prod(shape[1:])
        state[f"{name}.conv.weight"] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
        state[f"{name}.bn.weight"] = torch.ones(shape[0])
        state[f"{name}.bn.bias"] = torch.zeros(shape[0])
        state[f"{name}.bn.running_mean"] = torch.zeros(shape[0])
        state[f"{name}.bn.running_var"] = torch.ones(shape[0])
    state["fc.weight"] = torch.randn(1008, 2048, generator=generator) / 45
    state["fc.bias"] = torch.zeros(1008)
    return state


def test_torchvision_operators_are_declared_once_and_torch_fidelity_imports():
    first = fidelity.declare_torchvision_operators()
    assert fidelity.declare_torchvision_operators() is first
    assert fidelity.version()
    assert torch.ops.torchvision.nms


def test_all_94_blocks_are_mapped_in_the_order_of_torch_fidelity():
    names = trunk.block_names()
    assert [name for name, _ in names] == list(fidelity.convolution_shapes())
    assert len({other for _, other in names}) == 94
    assert names[5] == ("Mixed_5b.branch1x1", "net.layers.mixed.conv")
    assert names[-1] == ("Mixed_7c.branch_pool", "net.layers.mixed_10.tower_2_conv")
    total = sum(math.prod(shape) + 3 * shape[0] for shape in fidelity.convolution_shapes().values())
    assert total == 21_802_784  # 21.80 M values, no classifier


def test_network_is_built_without_any_download(monkeypatch, random_state):
    def forbidden(*args, **kwargs):
        raise AssertionError("a download was tried")

    monkeypatch.setattr(fidelity._module("feature_extractor_inceptionv3"), "load_state_dict_from_url", forbidden)
    before = torch.get_rng_state()
    network = fidelity.inception(random_state, logits=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert not network.training
    images = _smooth_images(2, 20)
    found = extractors.NetworkExtractor("inception", network, {}, has_logits=True)(images)
    assert found.features.shape == (2, 2048)
    assert found.logits is not None and found.logits.shape == (2, 1008)
    again = extractors.NetworkExtractor("inception", network, {}, has_logits=True)(images)
    assert torch.equal(found.features, again.features)
    found.features.add_(1.0)  # an ordinary tensor, not one of inference mode


def test_weights_that_do_not_fit_are_refused(random_state):
    without = {name: value for name, value in random_state.items() if name != "Mixed_5b.branch1x1.conv.weight"}
    with pytest.raises(UserError, match=r"do not fit .*Mixed_5b\.branch1x1\.conv\.weight"):
        fidelity.inception(without, logits=True)


def test_inception_reads_a_local_file_whose_hash_is_given(tmp_path, random_state):
    path = tmp_path / "weights.pth"
    torch.save(random_state, path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    spec = extractors.spec("inception", "weights.pth", sha256, tmp_path)
    assert spec.has_logits
    assert spec.description["weights_sha256"] == sha256
    assert spec.build()(_smooth_images(1, 20)).logits is not None
    with pytest.raises(DataError, match=r"has SHA-256 .*, not 6726825d\.\.\."):
        extractors.spec("inception", "weights.pth", None, tmp_path)
    with pytest.raises(UserError, match=r"no weights of the extractor 'inception' at .*none\.pth"):
        extractors.spec("inception", "none.pth", None, tmp_path)


def test_trunk_file_is_read_member_by_member(tmp_path, monkeypatch):
    shapes = list(fidelity.convolution_shapes().values())
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for i, shape in enumerate(shapes):
            for j in range(4):
                size = math.prod(shape) if j == 0 else shape[0]
                archive.writestr(
                    f"out_jit_module/data/{4 * i + j}", torch.full((size,), float(4 * i + j)).numpy().tobytes()
                )
    path = tmp_path / "default_1.pt"
    path.write_bytes(content.getvalue())
    with pytest.raises(DataError, match=r"is not default_1\.pt .* hpc-gen weights fetch inception"):
        trunk.read(path)
    monkeypatch.setattr(trunk, "SHA256", hashlib.sha256(content.getvalue()).hexdigest())
    state = trunk.read(path)
    assert len(state) == 5 * 94
    for i, (name, _) in enumerate(trunk.block_names()):
        for j, field in enumerate(trunk.FIELDS):
            assert float(state[f"{name}.{field}"].flatten()[0]) == 4 * i + j
        assert float(state[f"{name}.bn.weight"].min()) == 1.0


def test_trunk_refuses_other_files_and_says_where_to_get_it(tmp_path):
    with pytest.raises(UserError, match=r"downloads/inception/default_1\.pt .*hpc-gen weights fetch inception"):
        extractors.spec("inception-trunk", None, None, tmp_path)
    (tmp_path / "downloads" / "inception").mkdir(parents=True)
    (tmp_path / trunk.LOCATION).write_bytes(b"\x80\x04not a model")
    with pytest.raises(DataError, match="reads only the file with 7ff4a85c"):
        extractors.spec("inception-trunk", None, None, tmp_path)


@pytest.mark.skipif(
    not REAL_FILE.is_file(), reason=f"{REAL_FILE} is absent; get it with: hpc-gen weights fetch inception"
)
def test_trunk_equals_the_torchscript_itself():
    spec = extractors.spec("inception-trunk", None, None, env.workspace())
    images = _smooth_images()
    found = spec.build()(images).features
    script = torch.jit.load(REAL_FILE, map_location="cpu")  # its SHA-256 was checked by spec()
    names = [name.removesuffix(".weight") for name in script.state_dict() if name.endswith(".weight")]
    assert names == [other for _, other in trunk.block_names()]
    with torch.no_grad():
        expected = script((images.float() - 128) / 128)
        control = script(images.float() / 127.5 - 1)
    assert float((found - expected).norm() / expected.norm()) < 3e-6  # 1.2e-07 in the same memory format
    assert float((found - control).norm() / control.norm()) > 1e-3


def test_random_conv_is_fixed_and_has_no_logits(tmp_path):
    spec = extractors.spec("random-conv", None, None, tmp_path)
    images = _smooth_images(3, 16)
    found = spec.build()(images)
    assert found.features.shape == (3, 64)
    assert found.logits is None
    assert torch.equal(found.features, spec.build()(images).features)
    assert float(found.features.std()) > 0.01
    with pytest.raises(UserError, match="takes uint8 images"):
        spec.build()(images.float())


def test_unknown_extractors_are_named(tmp_path):
    with pytest.raises(UserError, match=r"unknown extractor 'inceptoin' \(did you mean 'inception'\?\)"):
        extractors.spec("inceptoin", None, None, tmp_path)
