"""The tokenizer `dinov2`: which columns it makes of what pixels, and which files and settings it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_tokenizers import DINOV2, pixels, state, toy_settings, write_dinov2
from torch import Tensor

from hpc_gen import tokenizers
from hpc_gen.config.dinov2 import Dinov2Architecture
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.runtime.tensor_files import write_tensors
from hpc_gen.tokenizers.batches import BATCH
from hpc_gen.tokenizers.dinov2 import PRESETS, Dinov2Tokenizer
from hpc_gen.tokenizers.dinov2_model import Dinov2, positions_of
from hpc_gen.tokenizers.kl_vae_model import KlAutoencoder
from hpc_gen.tokenizers.kmeans import Centroids


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dinov2(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="module")
def centroids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("centroids") / "km.npy"
    Centroids(torch.randn(6, DINOV2.width, generator=torch.Generator().manual_seed(1))).write(path)
    return path


def tokenizer(weights: Path, **changes: Any) -> Dinov2Tokenizer:
    return Dinov2Tokenizer(weights, dinov2=toy_settings(**changes))


def test_columns_of_gmem(weights: Path) -> None:
    made = tokenizer(weights)
    found = made.encode(pixels(3))
    assert list(found) == ["cls_tokens", "cls_tokens_flip", "representations", "representations_flip"]
    assert tuple(found) == made.columns
    assert {name: (t.dtype, tuple(t.shape)) for name, t in found.items() if "flip" not in name} == {
        "cls_tokens": (torch.float32, (3, 24)), "representations": (torch.float16, (3, 4, 24)),
    }  # fmt: skip
    mirrored = made.encode(pixels(3).flip(-1))
    for name in ("cls_tokens", "representations"):
        assert torch.equal(found[name + "_flip"], mirrored[name]), name
        assert not torch.equal(found[name], mirrored[name]), name
    assert torch.equal(made.snippets(pixels(3)), found["cls_tokens"])
    assert not torch.allclose(made.snippets(pixels(3), legacy_range=True), found["cls_tokens"], atol=0.1)


def test_columns_of_digit(weights: Path, centroids: Path) -> None:
    made = tokenizer(weights, columns=["features", "codes"], flip=False, precision="float32", centroids=str(centroids))
    found = made.encode(pixels(3))
    assert list(found) == ["features", "codes"]
    assert found["features"].dtype == torch.float32 and found["features"].shape == (3, 4, 24)
    assert found["codes"].dtype == torch.int32 and found["codes"].shape == (3, 4)
    vectors = torch.from_numpy(np.load(centroids))
    nearest = torch.cdist(found["features"].double(), vectors.double().expand(3, -1, -1)).argmin(-1)
    assert torch.equal(found["codes"].long(), nearest) and found["codes"].unique().numel() > 1


def test_layer_counts_from_the_end_and_the_final_norm_is_applied(weights: Path) -> None:
    images = pixels(2)
    last = tokenizer(weights, columns=["features", "representations"], layer_from_end=1, precision="float32")
    found = last.encode(images)
    assert torch.equal(found["features"], found["representations"])
    inner = tokenizer(weights, columns=["features"], layer_from_end=3, precision="float32")
    tokens = inner.model.embed(inner.prepare(images), positions_of(inner.model.pos_embed, 2, "digit"))
    with torch.no_grad():
        for block in inner.model.blocks[:2]:
            tokens = block(tokens)
        expected = inner.model.norm(tokens)[:, 5:]
    assert torch.allclose(inner.encode(images)["features"], expected, atol=1e-5)


@pytest.mark.parametrize("num", [1, BATCH, BATCH + 3])
def test_a_row_does_not_depend_on_its_neighbours(weights: Path, num: int) -> None:
    made = tokenizer(weights)
    images = pixels(2 * BATCH)
    whole, some = made.encode(images), made.encode(images[-num:])
    assert all(torch.equal(whole[name][-num:], some[name]) for name in whole)


def test_it_is_frozen_and_decodes_nothing(weights: Path) -> None:
    made = tokenizer(weights)
    assert not made.model.training and not any(p.requires_grad for p in made.model.parameters())
    with pytest.raises(UserError, match="decodes nothing; name the one .* in encode.also"):
        made.decode(torch.zeros(1))


def test_position_rules() -> None:
    table = torch.randn(1, 1 + 37 * 37, 8, generator=torch.Generator().manual_seed(0))
    rules = {rule: positions_of(table, 16, rule) for rule in ("gmem", "digit", "hub")}
    assert all(found.shape == (1, 257, 8) and torch.equal(found[:, 0], table[:, 0]) for found in rules.values())
    assert torch.equal(rules["gmem"], rules["hub"]) and not torch.allclose(rules["gmem"], rules["digit"], atol=0.1)
    assert positions_of(table, 32, "gmem").shape == (1, 1025, 8)
    assert not torch.allclose(positions_of(table, 32, "gmem"), positions_of(table, 32, "hub"), atol=0.1)
    assert all(torch.equal(positions_of(table, 37, rule), table) for rule in ("digit", "hub"))


def test_identity_has_no_path_and_knows_what_changes_numbers(weights: Path, centroids: Path, tmp_path: Path) -> None:
    base = tokenizer(weights)
    assert str(weights.parent) not in str(base.identity) and base.identity["name"] == "dinov2"
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(weights.read_bytes())
    assert tokenizer(copy).identity == base.identity
    others = [
        tokenizer(write_dinov2(tmp_path / "other.safetensors", seed=1)),
        tokenizer(weights, positions="hub"),
        tokenizer(weights, flip=False),
        tokenizer(weights, grid=3),
        tokenizer(weights, precision="float32"),
        tokenizer(weights, columns=["features"]),
        tokenizer(weights, columns=["features"], layer_from_end=2),
        tokenizer(weights, columns=["features", "codes"], centroids=str(centroids)),
    ]
    assert len({str(each.identity) for each in [base, *others]}) == len(others) + 1


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (pixels(1).float(), "uint8 pixels .* got torch.float32"),
        (pixels(1)[:, :1], "encode.channels to 3"),
        (pixels(1)[:0], r"\[0, 3, 28, 28\]"),
        (pixels(1, side=30), "256 x 256 pixels .* or of 28 x 28, got 30 x 30; set encode.image_size"),
    ],
)
def test_other_pixels_are_refused(weights: Path, wrong: Tensor, words: str) -> None:
    with pytest.raises(DataError, match=words):
        tokenizer(weights).encode(wrong)


def test_other_files_are_refused_by_name(weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"

    def refused(tensors: dict[str, Tensor], words: str) -> None:
        write_tensors(path, tensors, {})
        with pytest.raises(DataError, match=words):
            Dinov2Tokenizer(path, dinov2=toy_settings(architecture=DINOV2))

    one = torch.zeros(1)
    refused({"x_embedder.proj.weight": one, "feat_rope.freqs_cos": one}, "generator LightningDiT .*not the tokenizer")
    refused(
        {"patch_embed.proj.weight": one, "cls_token": one},
        "a vision transformer without DINOv2's layer scale, not a DINOv2 network",
    )
    from hpc_gen.config.kl_vae import KlVaeConfig

    tiny = KlAutoencoder(KlVaeConfig(ch=32, ch_mult=(1,), num_res_blocks=1, resolution=8, z_channels=2, embed_dim=2))
    refused(
        dict(tiny.state_dict()), "holds a KL autoencoder, not a DINOv2 network; it is read by tokenizer.name=kl_vae"
    )
    good = state(Dinov2(DINOV2))
    refused({**good, "extra": one}, "has unknown 'extra'; choose another tokenizer.preset")
    refused({k: v for k, v in good.items() if k != "norm.bias"}, "lacks 'norm.bias'")
    refused({**good, "norm.bias": torch.zeros(5)}, r"'norm.bias' as \[5\], but the network needs \[24\]")
    refused({**good, "norm.bias": torch.full((24,), float("nan"))}, "'norm.bias' that are not finite")


def test_a_checkpoint_of_digit_holds_it_inside(tmp_path: Path) -> None:
    inner = {f"pretrained_encoder.{name}": value for name, value in state(Dinov2(DINOV2)).items()}
    torch.save({"model": inner | {"decoder.embed_tokens.weight": torch.zeros(3, 2)}, "args": None}, tmp_path / "c.pt")
    made = Dinov2Tokenizer(tmp_path / "c.pt", dinov2=toy_settings(architecture=DINOV2))
    direct = Dinov2Tokenizer(write_dinov2(tmp_path / "d.safetensors"), dinov2=toy_settings())
    assert made.identity == direct.identity


def test_settings_are_refused(weights: Path, centroids: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="layer_from_end = 5, but the network has 4 blocks"):
        tokenizer(weights, columns=["features"], layer_from_end=5)
    with pytest.raises(UserError, match="columns names 'codes', which need 'centroids'"):
        tokenizer(weights, columns=["codes"])
    with pytest.raises(UserError, match="names one twice"):
        tokenizer(weights, columns=["features", "features"])
    with pytest.raises(UserError, match="'centroids' is given, but columns does not name 'codes'"):
        tokenizer(weights, centroids=str(centroids))
    with pytest.raises(UserError, match=r"unknown preset 'vitb15' \(did you mean 'vitb14"):
        tokenizers.build("dinov2", workspace=tmp_path, weights=str(weights), preset="vitb15")
    unsaid = tmp_path / "unsaid.safetensors"
    write_tensors(unsaid, state(Dinov2(DINOV2)), {})
    with pytest.raises(UserError, match="does not say which DINOv2 it is; set tokenizer.preset"):
        Dinov2Tokenizer(unsaid)
    with pytest.raises(DataError, match="SHA-256"):
        Dinov2Tokenizer(weights, sha256="0" * 64)
    np.save(tmp_path / "narrow.npy", np.zeros((6, 5), np.float32))
    with pytest.raises(DataError, match="centroids of 5 numbers, the features have 24"):
        tokenizer(weights, columns=["codes"], centroids=str(tmp_path / "narrow.npy"))


@pytest.mark.parametrize(
    ("preset", "millions"), [("vits14", 22.1), ("vitb14", 86.6), ("vitl14_reg4", 304.4), ("vitg14", 1136.5)]
)
def test_published_sizes(preset: str, millions: float) -> None:
    """ViT-g has the gated feed-forward; no list of its keys is at hand, its number of parameters is published."""
    with torch.device("meta"):
        model = Dinov2(PRESETS[preset])
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
    assert hasattr(model.blocks[0].mlp, "w12") == preset.startswith("vitg")


def test_gated_feed_forward_runs(tmp_path: Path) -> None:
    sizes = Dinov2Architecture(width=24, depth=2, heads=3, swiglu=True)
    made = Dinov2Tokenizer(write_dinov2(tmp_path / "g.safetensors", sizes=sizes), dinov2=toy_settings())
    assert sizes.hidden == 64 and made.encode(pixels(1))["cls_tokens"].isfinite().all()
