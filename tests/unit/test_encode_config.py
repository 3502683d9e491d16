"""Keys of the encode section and of tokenizers: what contradicts itself is answered with place, key and fix."""

from __future__ import annotations

import pytest

from hpc_gen.config import loader
from hpc_gen.config.errors import ConfigError
from hpc_gen.config.experiment import TokenizerConfig

TEXT = """\
name: toy
method: {name: energy}
data:
  table: t
encode:
  source: folder
  source_path: images
  image_size: 64
  validation: false
  tokenizer:
    name: kl_vae
    weights: vae.safetensors
"""
MADE_ELSEWHERE = TEXT[: TEXT.index("encode:")]


def refused(*overrides: str, text: str = TEXT) -> str:
    with pytest.raises(ConfigError) as caught:
        loader.loads(text, overrides, "toy.yaml")
    return str(caught.value)


def test_keys_of_encode() -> None:
    encode = loader.loads(
        TEXT, ["encode.crop_size=256", "encode.format=npz", "encode.classes=[n01440764, 3]"]
    ).experiment.encode
    assert encode is not None and (encode.crop_size, encode.format) == (256, "npz")
    assert encode.classes == ["n01440764", 3]
    assert refused("encode.crop_size=32") == (
        "command line: 'encode.crop_size' = 32 is smaller than 'encode.image_size' = 64; raise it, or leave it out"
    )
    assert "'encode.format' must be " in refused("encode.format=npy") and "did you mean 'npz'?" in refused(
        "encode.format=npy"
    )


def test_a_tokenizer_has_the_keys_of_its_name() -> None:
    assert TokenizerConfig().settings() == {}
    settings = TokenizerConfig(name="kl_vae", weights="w", preset="kl16").settings()
    assert settings == {
        "weights": "w", "sha256": None, "preset": "kl16", "architecture": None, "scale": None, "shift": None,
        "statistics": None,
    }  # fmt: skip
    assert refused(text=TEXT.replace("    weights: vae.safetensors\n", "")) == (
        "toy.yaml:10: 'encode.tokenizer' is refused: name 'kl_vae' needs 'weights', the file of its network"
    )
    assert "name 'identity' has no scale, weights; remove it, or name 'kl_vae'" in refused(
        "encode.tokenizer.name=identity", "encode.tokenizer.scale=2"
    )
    both = "encode.tokenizer.architecture={ch: 32, ch_mult: [1], z_channels: 4, embed_dim: 4, resolution: 64}"
    assert "it has both 'preset' and 'architecture'; give one" in refused("encode.tokenizer.preset=kl16", both)
    assert "encode.tokenizer.architecture.z_channel" in refused("encode.tokenizer.architecture={z_channel: 4}")
    assert "'encode.tokenizer.preset' must be " in refused("encode.tokenizer.preset=kl8")


def test_the_hash_of_an_experiment_follows_what_changes_numbers() -> None:
    def identity(*overrides: str) -> str:
        return loader.loads(TEXT, overrides).identity

    assert identity("encode.tokenizer.weights=elsewhere.safetensors") == identity(), (
        "tables know the tensors by their hash"
    )
    changes = ("encode.crop_size=256", "encode.format=pt", "encode.threads=2", "encode.tokenizer.scale=0.5")
    assert len({identity(), *(identity(change) for change in changes)}) == 5


def test_a_table_made_elsewhere() -> None:
    tokenizer = "data.tokenizer={name: kl_vae, weights: kl16.ckpt, preset: kl16}"
    found = loader.loads(MADE_ELSEWHERE, [tokenizer]).experiment.data.tokenizer
    assert found is not None and found.weights == "kl16.ckpt"
    assert refused(tokenizer) == (
        "command line: 'data.tokenizer' is for tables made elsewhere; here 'encode.tokenizer' says it"
    )
