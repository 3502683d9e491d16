"""Official tokenizer files: imported strictly, known by their hash, and wrong ones refused by what they are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_tokenizers import state
from torch import Tensor

from hpc_gen.config.dinov2 import Dinov2Architecture
from hpc_gen.config.kl_vae import KlVaeConfig
from hpc_gen.config.vqgan import VqganConfig
from hpc_gen.runtime.commit import sha256_file
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.runtime.tensor_files import metadata_of, read_tensors
from hpc_gen.stages import tokenizer_weights
from hpc_gen.stages.tokenizer_weights import import_tokenizer, list_imported, list_tokenizer, verify_tokenizer
from hpc_gen.tokenizers import build, dinov2, kl_vae, vqgan
from hpc_gen.tokenizers.dinov2_model import Dinov2
from hpc_gen.tokenizers.kl_vae_model import KlAutoencoder
from hpc_gen.tokenizers.vqgan_model import VqganModel

# The published ones are large, so small ones take their names here; the real keys are held by tests/parity.
KL = KlVaeConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, resolution=8, z_channels=2, embed_dim=2)
VA = KL.model_copy(update={"attn_resolutions": (4,), "decoder_attention": True})
VIT = Dinov2Architecture(width=24, depth=3, heads=3)
VQ = VqganConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=4, codes=8)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kl_vae.PRESETS, "sd_f8", kl_vae.Preset(KL.model_copy(update={"ch": 64}), 0.18215, 0.0))
    monkeypatch.setitem(kl_vae.PRESETS, "kl16", kl_vae.Preset(KL, 0.2325, 0.0))
    monkeypatch.setitem(kl_vae.PRESETS, "va_vae", kl_vae.Preset(VA, None, None))
    for name in dinov2.PRESETS:
        registers = 4 if name.endswith("_reg4") else 0
        depth = {"vits14": 2, "vitb14": 3, "vitl14": 4, "vitg14": 5}[name.removesuffix("_reg4")]
        monkeypatch.setitem(dinov2.PRESETS, name, VIT.model_copy(update={"registers": registers, "depth": depth}))
    monkeypatch.setitem(vqgan.PRESETS, "mage", VQ)


def weights(name: str, seed: int = 0) -> dict[str, Tensor]:
    makers: list[tuple[dict[str, Any], Callable[[Any], Any]]] = [
        ({key: preset.architecture for key, preset in kl_vae.PRESETS.items()}, KlAutoencoder),
        (dinov2.PRESETS, Dinov2),
        (vqgan.PRESETS, VqganModel),
    ]
    presets, maker = next((presets, maker) for presets, maker in makers if name in presets)
    return state(maker(presets[name]), seed)


class Official:
    """Files as their authors publish them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str) -> Path:
        flat = weights(name)
        extra = {"loss.discriminator.weight": torch.ones(2), "foundation_model.norm.bias": torch.ones(2)}
        content: Any = {
            "sd_f8": flat,  # bare, as DiM's autoencoder_kl_ema.pth
            "kl16": {"model": flat},
            "va_vae": {"state_dict": flat | extra, "epoch": 3, "callbacks": {}},
            "mage": {"state_dict": flat},
        }.get(name, flat)
        path = self.folder / f"{name}.pth"
        torch.save(content, path)
        return path


@pytest.fixture
def official(tmp_path: Path) -> Official:
    return Official(tmp_path)


@pytest.mark.parametrize("name", ["sd_f8", "kl16", "mage", "vits14", "vitb14", "vitl14_reg4", "vitg14_reg4"])
def test_import(tmp_path: Path, official: Official, name: str) -> None:
    said: list[str] = []
    source = official(name)
    target = import_tokenizer(name, source, tmp_path, said.append)
    assert target == tmp_path / "downloads/tokenizers" / f"{name}.safetensors"
    expected, found = weights(name), read_tensors(target)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    metadata = metadata_of(target)
    assert metadata["hpc_gen.source_sha256"] == sha256_file(source) and metadata["hpc_gen.source"] == source.name
    assert str(tmp_path) not in json.dumps(metadata)
    assert sha256_file(target) in said[-1] and sha256_file(source) in said[0]
    kind = "vqgan" if name == "mage" else "kl_vae" if name in kl_vae.PRESETS else "dinov2"
    imported = build(kind, workspace=tmp_path, weights=f"downloads/tokenizers/{name}.safetensors")
    assert imported.identity == build(kind, workspace=tmp_path, weights=source.name, preset=name).identity


def test_va_vae_with_its_statistics(tmp_path: Path, official: Official) -> None:
    said: list[str] = []
    stats = {"mean": torch.tensor([0.5, -1.0]).view(1, 2, 1, 1), "std": torch.tensor([2.0, 4.0]).view(1, 2, 1, 1)}
    torch.save(stats, tmp_path / "latents_stats.pt")
    target = import_tokenizer(
        "va_vae", official("va_vae"), tmp_path, said.append, statistics=tmp_path / "latents_stats.pt"
    )
    assert "left out, for training alone needs it: 2 tensors" in said
    tokenizer = kl_vae.KlVae(target)
    assert tokenizer.scale == [0.5, 0.25] and tokenizer.shift == [0.5, -1.0] and tokenizer.architecture == VA


def test_statistics_that_are_refused(tmp_path: Path, official: Official) -> None:
    path, source = tmp_path / "stats.pt", official("va_vae")
    good = {"mean": torch.zeros(1, 2, 1, 1), "std": torch.ones(1, 2, 1, 1)}
    for change, words in (
        ({"std": torch.zeros(1, 2, 1, 1)}, "std that is not above 0"),
        ({"mean": torch.zeros(1, 3, 1, 1)}, "no 'mean' of 2 finite numbers"),
        ({"std": torch.full((1, 2, 1, 1), float("nan"))}, "no 'std' of 2 finite numbers"),
        ({"mean": "text"}, "no 'mean'"),
    ):
        torch.save({**good, **change}, path)
        with pytest.raises(DataError, match=words):
            import_tokenizer("va_vae", source, tmp_path, print, statistics=path)
    with pytest.raises(UserError, match="--statistics are those of latents, which mage does not make"):
        import_tokenizer("mage", official("mage"), tmp_path, print, statistics=path)


def test_the_same_again_does_nothing_and_others_are_refused(tmp_path: Path, official: Official) -> None:
    said: list[str] = []
    source = official("kl16")
    import_tokenizer("kl16", source, tmp_path, said.append, dry_run=True)
    assert said[-1].startswith("would write ") and not (tmp_path / "downloads").exists()
    target = import_tokenizer("kl16", source, tmp_path, said.append)
    before = target.stat().st_mtime_ns
    import_tokenizer("kl16", source, tmp_path, said.append)
    assert said[-1].endswith("holds these weights already") and target.stat().st_mtime_ns == before
    torch.save({"model": weights("kl16", seed=1)}, source)
    with pytest.raises(UserError, match=r"holds other weights or another scale of kl16, from kl16\.pth"):
        import_tokenizer("kl16", source, tmp_path, said.append)
    assert target.stat().st_mtime_ns == before


GENERATOR = {"x_embedder.proj.weight": torch.zeros(4, 2, 1, 1), "feat_rope.freqs_cos": torch.zeros(2, 2)}


DIFFUSERS = (  # LDM's name -> diffusers'
    (r"\.mid\.block_([12])\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}."),
    (r"\.mid\.attn_1\.norm\.", r".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.(q|k|v)\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", r".mid_block.attentions.0.to_out.0."),
    (r"\.down\.(\d)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d)\.block\.", lambda m: f".up_blocks.{2 - int(m[1])}.resnets."),
    (r"\.up\.(\d)\.upsample\.", lambda m: f".up_blocks.{2 - int(m[1])}.upsamplers.0."),
    (r"\.nin_shortcut\.", r".conv_shortcut."),
    (r"coder\.norm_out\.", r"coder.conv_norm_out."),
)


def test_names_of_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three levels with a change of width, so that every rule has work; the matrices of the attention are its kernels."""
    sizes = KL.model_copy(update={"ch_mult": (1, 2, 2)})
    monkeypatch.setitem(kl_vae.PRESETS, "sd_f8", kl_vae.Preset(sizes, 0.18215, 0.0))
    expected, renamed = weights("sd_f8"), {}
    for name, value in expected.items():
        for pattern, replacement in DIFFUSERS:
            name = re.sub(pattern, replacement, name)
        flat = ".attentions." in name and name.endswith("weight") and value.ndim == 4
        renamed[name] = value[:, :, 0, 0] if flat else value
    assert not {name for name in renamed if ".block." in name or ".attn_1." in name}
    torch.save(renamed, tmp_path / "diffusion_pytorch_model.bin")
    target = import_tokenizer("sd_f8", tmp_path / "diffusion_pytorch_model.bin", tmp_path, print)
    found = read_tensors(target)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    torch.save({**renamed, "encoder.down_blocks.0.attentions.0.to_q.weight": torch.zeros(1)}, tmp_path / "more.bin")
    with pytest.raises(DataError, match="has unknown 'encoder.down_blocks.0.attentions.0.to_q.weight'"):
        import_tokenizer("sd_f8", tmp_path / "more.bin", tmp_path, print)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (GENERATOR, "holds the generator LightningDiT or GMem, not a KL autoencoder: this is not the tokenizer"),
        ({"model": GENERATOR, "ema": GENERATOR, "config": {}}, "the generator LightningDiT or GMem"),
        ({"model": {"module." + key: value for key, value in GENERATOR.items()}}, "the generator LightningDiT"),
        ({"model": {"model.map_layer0.weight": torch.zeros(1)}}, "a generator of EDM or GDD"),
        ({"encoder.down_blocks.0.resnets.0.conv1.weight": torch.zeros(1)}, "under the names of diffusers, not a KL"),
        ({"epoch": 3}, "holds no state dict"),
        ({"state_dict": {"something.weight": torch.zeros(1)}}, "lacks 'encoder.conv_in.weight'"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, content: Any, words: str) -> None:
    torch.save(content, tmp_path / "wrong.pt")
    for action in (
        lambda: import_tokenizer("va_vae", tmp_path / "wrong.pt", tmp_path, print),
        lambda: kl_vae.KlVae(tmp_path / "wrong.pt", preset="va_vae", scale=1.0),
    ):
        with pytest.raises(DataError, match=words):
            action()
    assert not (tmp_path / "downloads").exists()


def test_another_tokenizer_is_refused_by_name(tmp_path: Path, official: Official) -> None:
    for wanted, given, words in (
        ("va_vae", "kl16", "kl16.pth holds kl16, not va_vae; import it under that name"),
        ("vitb14", "vitb14_reg4", "holds vitb14_reg4, not vitb14"),
        ("vitb14_reg4", "vitb14", "holds vitb14, not vitb14_reg4"),
        ("mage", "kl16", "holds a KL autoencoder, not a VQGAN of the MAGE family; it is read by tokenizer.name=kl_vae"),
        ("kl16", "mage", "holds a VQGAN of the MAGE family, not a KL autoencoder"),
        ("sd_f8", "vitb14", "holds a DINOv2 network, not a KL autoencoder"),
    ):
        with pytest.raises(DataError, match=words):
            import_tokenizer(wanted, official(given), tmp_path, print)


def test_damage_is_refused(tmp_path: Path, official: Official) -> None:
    path, good = official("vitb14"), weights("vitb14")
    with pytest.raises(DataError, match="SHA-256"):
        import_tokenizer("vitb14", path, tmp_path, print, sha256="0" * 64)
    for flat, words in (
        ({k: v for k, v in good.items() if k != "norm.bias"}, "lacks 'norm.bias'; it is not vitb14 as published"),
        ({**good, "head.weight": torch.zeros(1)}, "has unknown 'head.weight'"),
        ({**good, "norm.bias": torch.zeros(3)}, r"'norm.bias' as \[3\], but the network needs \[24\]"),
        ({**good, "norm.bias": torch.full((24,), float("inf"))}, "not finite"),
    ):
        torch.save(flat, path)
        with pytest.raises(DataError, match=words):
            import_tokenizer("vitb14", path, tmp_path, print)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=str(path)):
        import_tokenizer("vitb14", path, tmp_path, print)
    with pytest.raises(UserError, match="cannot read"):
        import_tokenizer("vitb14", tmp_path / "none.pth", tmp_path, print)


def test_verify_lists_differences(tmp_path: Path, official: Official) -> None:
    said: list[str] = []
    assert verify_tokenizer("kl16", official("kl16"), said.append) == 0
    assert verify_tokenizer("va_vae", official("va_vae"), said.append) == 0
    found = verify_tokenizer("va_vae", official("kl16"), said.append)
    assert found > 3 and said[-1] == "  it fits kl16"
    assert any("lacks 'encoder.down.1.attn.0.norm.weight'" in line for line in said)


def test_lists(tmp_path: Path, official: Official) -> None:
    import_tokenizer("mage", official("mage"), tmp_path, print)
    lines = list(list_imported(tmp_path))
    assert lines[0].startswith("mage  ") and "from mage.pth, SHA-256 " in lines[0]
    assert sum("that `hpc-gen weights import NAME FILE` takes: " in line for line in lines) == 3
    keys = list(list_tokenizer("vitb14"))
    assert keys[0] == "cls_token  [1, 1, 24]" and keys[-1].startswith("vitb14: ")


def test_all_presets_can_be_imported() -> None:
    from hpc_gen.config.tokenizer import PRESETS_OF

    assert set(PRESETS_OF["kl_vae"]) == set(kl_vae.PRESETS)
    assert set(PRESETS_OF["dinov2"]) == set(dinov2.PRESETS)
    assert set(PRESETS_OF["vqgan"]) == set(vqgan.PRESETS)
    assert all(tokenizer_weights.known(name).kind == kind for kind, names in PRESETS_OF.items() for name in names)
