"""The tokenizer `kl_vae`: what files it takes, what it refuses, what holds of the bytes that it stores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hpc_gen import tokenizers
from hpc_gen.config.kl_vae import KlVaeConfig
from hpc_gen.data.images import normalize
from hpc_gen.runtime.commit import sha256_file
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.runtime.tensor_files import write_tensors
from hpc_gen.tokenizers.kl_vae import BATCH, KlVae
from hpc_gen.tokenizers.kl_vae_model import KlAutoencoder, initialise
from hpc_gen.tokenizers.kl_vae_weights import FileFacts, facts_of, import_flat, metadata_for

TINY = KlVaeConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, resolution=8, z_channels=2, embed_dim=3)


def weights(seed: int = 0) -> dict[str, Tensor]:
    model = KlAutoencoder(TINY)
    initialise(model, torch.Generator().manual_seed(seed))
    return dict(model.state_dict())


def write(path: Path, tensors: dict[str, Tensor] | None = None, *, scale: Any = 0.5, shift: Any = 0.0) -> Path:
    write_tensors(path, weights() if tensors is None else tensors, metadata_for(TINY, scale, shift))
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


def pixels(num: int, seed: int = 3, side: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, 3, side, side), generator=generator, dtype=torch.uint8)


# ---------------------------------------------------------------- encoding and decoding


def test_moments_of_image_and_mirror_image(exported: Path) -> None:
    tokenizer = KlVae(exported)
    images = pixels(3)
    stored = tokenizer.encode(images)
    assert tuple(stored) == tokenizer.columns == ("moments", "moments_flip")
    for name, expected in (("moments", images), ("moments_flip", images.flip(-1))):
        assert stored[name].dtype == torch.float16 and stored[name].shape == (3, 6, 4, 4)
        with torch.no_grad():
            direct = tokenizer.model.encode(normalize(expected))
        assert torch.allclose(stored[name].float(), direct, atol=2e-3), name
    # the mirror image is encoded: its latent is not the mirrored latent
    assert (stored["moments_flip"] - stored["moments"].flip(-1)).abs().max() > 1e-2


def test_halves_are_the_rounded_float32(exported: Path) -> None:
    tokenizer = KlVae(exported)
    assert isinstance(tokenizer, tokenizers.FullPrecision)
    full, half = tokenizer.encode_float32(pixels(2)), tokenizer.encode(pixels(2))
    assert full["moments"].dtype == torch.float32
    assert all(torch.equal(full[name].half(), half[name]) for name in half)


@pytest.mark.parametrize("num", [1, BATCH - 1, BATCH, BATCH + 1, 2 * BATCH + 3])
def test_a_row_does_not_depend_on_its_neighbours(exported: Path, num: int) -> None:
    """Shards of another size hold the same bytes: a forward pass always has BATCH images."""
    tokenizer = KlVae(exported)
    images = pixels(2 * BATCH + 3)
    whole = tokenizer.encode(images)
    some = tokenizer.encode(images[-num:])
    for name in whole:
        assert torch.equal(whole[name][-num:], some[name]), name


def test_decoding_undoes_the_scale(tmp_path: Path) -> None:
    images = pixels(BATCH + 2)
    decoded = []
    for scale, shift in ((1.0, 0.0), ([0.5, 2.0, 4.0], [1.0, -1.0, 0.25])):
        tokenizer = KlVae(write(tmp_path / "w.safetensors", scale=scale, shift=shift))
        latents = tokenizer.encode(images)["moments"].float()[:, :3]
        like = latents.new_tensor
        scaled = (latents - like(shift).view(-1, 1, 1)) * like(scale).view(-1, 1, 1)
        decoded.append(tokenizer.decode(scaled))
    assert decoded[0].dtype == torch.uint8 and decoded[0].shape == images.shape
    assert (decoded[0].int() - decoded[1].int()).abs().max() <= 1
    assert decoded[0].unique().numel() > 10


def test_it_is_frozen_and_in_eval_mode(exported: Path) -> None:
    tokenizer = KlVae(exported)
    assert not tokenizer.model.training and not any(p.requires_grad for p in tokenizer.model.parameters())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (pixels(1).float(), "uint8 pixels .* got torch.float32"),
        (pixels(1)[:, :1], r"\[N, 3, H, W\].*\[1, 1, 8, 8\].*encode.channels to 3"),
        (pixels(1)[0], "uint8 pixels"),
        (pixels(1)[:0], r"\[0, 3, 8, 8\]"),
        (pixels(1, side=7), "7 x 7 pixels do not divide .* 2 x 2; set encode.image_size to a multiple of 2"),
    ],
)
def test_other_pixels_are_refused(exported: Path, wrong: Tensor, words: str) -> None:
    with pytest.raises(DataError, match=words):
        KlVae(exported).encode(wrong)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (torch.zeros(1, 4, 4, 4), r"\[N, 3, h, w\].*method.channels to 3"),
        (torch.zeros(3, 4, 4), "decodes float latents"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.int64), "decodes float latents"),
        (torch.full((1, 3, 4, 4), float("nan")), "decoded images are not finite"),
    ],
)
def test_other_latents_are_refused(exported: Path, wrong: Tensor, words: str) -> None:
    with pytest.raises(DataError, match=words):
        KlVae(exported).decode(wrong)


def test_moments_beyond_half_precision_are_refused(tmp_path: Path) -> None:
    tensors = weights()
    tensors["quant_conv.bias"] = torch.full((6,), 1e6)
    tokenizer = KlVae(write(tmp_path / "w.safetensors", tensors))
    with pytest.raises(DataError, match="moments of 3 of 3 images are not finite in half precision"):
        tokenizer.encode(pixels(3))


# ---------------------------------------------------------------- identity


def test_identity_is_of_the_content_and_free_of_paths(exported: Path, tmp_path: Path) -> None:
    first = KlVae(exported).identity
    assert set(first) == {"name", "architecture", "weights_sha256", "scale", "shift"}
    assert json.loads(json.dumps(first)) == first and str(exported.parent) not in json.dumps(first)
    torch.save({"model": weights()}, tmp_path / "other.pt")  # another container, the same tensors
    again = KlVae("other.pt", workspace=tmp_path, architecture=TINY.model_dump(), scale=0.5)
    assert again.identity == first
    assert KlVae(exported, scale=0.25).identity != first
    changed = KlVae(write(tmp_path / "changed.safetensors", weights(1))).identity
    assert changed["weights_sha256"] != first["weights_sha256"]


def test_it_is_built_by_name(exported: Path) -> None:
    built = tokenizers.build("kl_vae", workspace=exported.parent, weights=exported.name, scale=0.125)
    assert built.identity["scale"] == 0.125 and built.columns == KlVae.columns


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("key", [None, "model", "state_dict"])
def test_official_containers(tmp_path: Path, key: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    flat = weights() | {"loss.logvar": torch.zeros(()), "loss.discriminator.0.weight": torch.zeros(2)}
    flat |= {"foundation_model.w": torch.zeros(3), "linear_proj.weight": torch.zeros(1)}
    torch.save(flat if key is None else {key: flat, "epoch": 3}, tmp_path / "vae.ckpt")
    tokenizer = KlVae("vae.ckpt", workspace=tmp_path, architecture=TINY, scale=1.0)
    assert tokenizer.left_out == {"loss": 2, "foundation_model": 1, "linear_proj": 1}
    said = capsys.readouterr().out
    assert "vae.ckpt: left out" in said and "2 of 'loss'" in said and "1 of 'foundation_model'" in said
    assert all(torch.equal(value, flat[name]) for name, value in tokenizer.model.state_dict().items())


def test_wrong_hash_is_refused_and_the_right_one_taken(exported: Path) -> None:
    assert KlVae(exported, sha256=sha256_file(exported)).scale == 0.5
    with pytest.raises(DataError, match="SHA-256"):
        KlVae(exported, sha256="0" * 64)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"encoder.conv_in.bias": None}, "lacks 'encoder.conv_in.bias'; ch_mult, num_res_blocks"),
        ({"decoder.up.0.attn.0.q.weight": torch.zeros(1)}, "has unknown 'decoder.up.0.attn.0.q.weight'"),
        ({"quant_conv.bias": torch.zeros(8)}, r"'quant_conv.bias' as \[8\], .* \[6\]; change embed_dim or z_channels"),
        ({"encoder.conv_out.bias": torch.zeros(8)}, "change z_channels, ch or ch_mult"),
        ({"encoder.mid.attn_1.q.bias": torch.full((32,), float("inf"))}, "attn_1.q.bias' that are not finite"),
        ({f"x{i}": torch.zeros(1) for i in range(7)}, "and 2 more"),
    ],
)
def test_other_weights_are_refused(tmp_path: Path, change: dict[str, Tensor | None], words: str) -> None:
    tensors = {name: value for name, value in {**weights(), **change}.items() if value is not None}
    with pytest.raises(DataError, match=words):
        KlVae(write(tmp_path / "w.safetensors", tensors))


def test_a_refused_import_changes_nothing() -> None:
    model = KlAutoencoder(TINY)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flat = weights(5)
    flat["post_quant_conv.bias"] = torch.full((2,), float("nan"))  # the last key
    with pytest.raises(DataError):
        import_flat(model, flat)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_truncated_and_absent_files_are_refused(exported: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(exported.read_bytes()[:-100])
    with pytest.raises(DataError, match="cut.safetensors"):
        KlVae(cut)
    with pytest.raises(UserError, match="nowhere"):
        KlVae("nowhere.safetensors", workspace=tmp_path)


def test_metadata_comes_back() -> None:
    facts = facts_of(metadata_for(TINY, [1.0, 2.0, 3.0], 0.5), "file")
    assert (facts.architecture, facts.scale, facts.shift) == (TINY, [1.0, 2.0, 3.0], 0.5)
    assert facts_of(metadata_for(TINY, None, None), "file") == FileFacts(TINY)
    assert facts_of({"another.key": "kept"}, "file") == FileFacts()


@pytest.mark.parametrize(
    "metadata",
    [
        {"hpc_gen.architecture": "{"},
        {"hpc_gen.architecture": json.dumps({"ch": 32})},
        {"hpc_gen.scale": '"two"'},
        {"hpc_gen.shift": "[]"},
        {"hpc_gen.scale": "true"},
    ],
)
def test_metadata_that_cannot_be_understood_is_refused(metadata: dict[str, str]) -> None:
    with pytest.raises(DataError, match="^file says of itself what cannot be understood"):
        facts_of(metadata, "file")


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"preset": "kl61"}, r"unknown preset 'kl61' \(did you mean 'kl16'\?\)"),
        ({"preset": "kl16"}, "says ch = 32 of its architecture, the experiment 128"),
        ({"architecture": TINY.model_copy(update={"embed_dim": 4})}, "says embed_dim = 3 .* the experiment 4"),
        ({"architecture": {"ch": 32}}, "tokenizer.architecture.ch_mult is refused: Field required"),
        ({"architecture": TINY, "preset": "kl16"}, "is not that of tokenizer.preset"),
        ({"scale": [1.0, 2.0]}, "tokenizer.scale has 2 numbers, the latents have 3 channels"),
        ({"shift": [1.0, 2.0]}, "tokenizer.shift has 2 numbers"),
        ({"scale": 0.0}, "tokenizer.scale is 0.0, but must be above 0"),
        ({"scale": [1.0, -1.0, 1.0]}, "must be above 0"),
        ({"scale": float("nan")}, "must be above 0"),
    ],
)
def test_contradicting_settings_are_refused(exported: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        KlVae(exported, **settings)


def test_a_file_that_says_nothing_needs_settings(tmp_path: Path) -> None:
    write_tensors(tmp_path / "bare.safetensors", weights(), {})
    with pytest.raises(UserError, match="does not say its architecture; set tokenizer.preset"):
        KlVae("bare.safetensors", workspace=tmp_path)
    with pytest.raises(UserError, match="does not say the scale of its latents; set tokenizer.statistics to a file"):
        KlVae("bare.safetensors", workspace=tmp_path, architecture=TINY)
    built = KlVae("bare.safetensors", workspace=tmp_path, architecture=TINY, scale=2)
    assert (built.identity["scale"], built.identity["shift"]) == (2.0, 0.0)


def test_scale_and_shift_of_a_file_of_statistics(tmp_path: Path) -> None:
    """LightningDiT's latents_stats.pt: {mean, std}, each [1, C, 1, 1]."""
    write_tensors(tmp_path / "bare.safetensors", weights(), {})
    settings = {"workspace": tmp_path, "architecture": TINY, "statistics": "stats.pt"}
    mean, std = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 2.0, 4.0])
    torch.save({"mean": mean.view(1, 3, 1, 1), "std": std.view(1, 3, 1, 1)}, tmp_path / "stats.pt")
    built = KlVae("bare.safetensors", **settings)
    assert (built.scale, built.shift) == ([2.0, 0.5, 0.25], [1.0, 2.0, 3.0])
    torch.save({"mean": mean}, tmp_path / "stats.pt")
    with pytest.raises(DataError, match="holds no 'mean' and 'std' of latents"):
        KlVae("bare.safetensors", **settings)
    torch.save({"mean": mean, "std": torch.tensor([1.0, 0.0, 1.0])}, tmp_path / "stats.pt")
    with pytest.raises(DataError, match="mean and std do not fit together"):
        KlVae("bare.safetensors", **settings)


def test_the_configs_scale_goes_before_the_files(exported: Path) -> None:
    assert (KlVae(exported).scale, KlVae(exported, scale=3.0).scale) == (0.5, 3.0)
    assert KlVae(exported, shift=[0.0, 1.0, 2.0]).shift == [0.0, 1.0, 2.0]
