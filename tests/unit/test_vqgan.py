"""The tokenizer `vqgan`: codes of image and mirror image, decoding, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_tokenizers import VQGAN, pixels, state, write_vqgan
from torch import Tensor

from hpc_gen import tokenizers
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.runtime.tensor_files import write_tensors
from hpc_gen.tokenizers.batches import BATCH
from hpc_gen.tokenizers.vqgan import Vqgan
from hpc_gen.tokenizers.vqgan_model import VqganModel, to_pixels


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vqgan(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


def test_codes_of_image_and_mirror_image(weights: Path) -> None:
    tokenizer = Vqgan(weights)
    images = pixels(3, side=16)
    found = tokenizer.encode(images)
    assert tuple(found) == tokenizer.columns == ("vq_codes", "vq_codes_flip")
    for name, each in (("vq_codes", images), ("vq_codes_flip", images.flip(-1))):
        assert found[name].dtype == torch.int32 and found[name].shape == (3, 16)
        with torch.no_grad():
            assert torch.equal(found[name].view(3, 4, 4).long(), tokenizer.model.encode(each.float() / 255)), name
    assert found["vq_codes"].unique().numel() > 2 and not torch.equal(*found.values())
    assert not tokenizer.model.training and not any(p.requires_grad for p in tokenizer.model.parameters())


@pytest.mark.parametrize("num", [1, BATCH, BATCH + 3])
def test_a_row_does_not_depend_on_its_neighbours(weights: Path, num: int) -> None:
    tokenizer = Vqgan(weights)
    images = pixels(2 * BATCH, side=16)
    whole, some = tokenizer.encode(images), tokenizer.encode(images[-num:])
    assert all(torch.equal(whole[name][-num:], some[name]) for name in whole)


def test_decoding(weights: Path) -> None:
    tokenizer = Vqgan(weights)
    codes = tokenizer.encode(pixels(BATCH + 1, side=16))["vq_codes"]
    images = tokenizer.decode(codes)
    assert images.dtype == torch.uint8 and images.shape == (BATCH + 1, 3, 16, 16)
    assert torch.equal(images, tokenizer.decode(codes.view(-1, 4, 4).long()))
    with torch.no_grad():
        assert torch.equal(images[:1], to_pixels(tokenizer.model.decode(codes[:1].view(1, 4, 4))))


def test_pixels_are_cut_not_rounded() -> None:
    values = torch.tensor([-0.1, 0.0, 0.999 / 255, 1.0 / 255, 254.999 / 255, 1.0, 1.5])
    assert to_pixels(values).tolist() == [0, 0, 0, 1, 254, 255, 255]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (pixels(1, 16).float(), "uint8 pixels .* got torch.float32"),
        (pixels(1, 16)[:, :1], "encode.channels to 3"),
        (pixels(1, 18), "18 x 18 pixels do not divide into codes of 4 x 4; set encode.image_size to a multiple of 4"),
    ],
)
def test_other_pixels_are_refused(weights: Path, wrong: Tensor, words: str) -> None:
    with pytest.raises(DataError, match=words):
        Vqgan(weights).encode(wrong)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (torch.zeros(1, 16), "integer codes .* got torch.float32"),
        (torch.zeros(1, 15, dtype=torch.int32), r"\[1, 15\]"),
        (torch.full((1, 16), 16), "codes run from 16 to 16, the codebook has 0 to 15; take special tokens off"),
        (torch.full((1, 16), -1), "codes run from -1"),
    ],
)
def test_other_codes_are_refused(weights: Path, wrong: Tensor, words: str) -> None:
    with pytest.raises(DataError, match=words):
        Vqgan(weights).decode(wrong)


def test_files_and_settings_that_are_refused(weights: Path, tmp_path: Path) -> None:
    path, good = tmp_path / "w.safetensors", state(VqganModel(VQGAN))

    def refused(tensors: dict[str, Tensor], words: str) -> None:
        write_tensors(path, tensors, {})
        with pytest.raises(DataError, match=words):
            Vqgan(path, vqgan=VQGAN)

    one = torch.zeros(1)
    refused(
        {"quantize.embedding.weight": one, "quant_conv.weight": one, "encoder.conv_in.weight": one},
        "holds a VQGAN of taming-transformers, another network than MAGE's",
    )
    refused({"dit.x_embedder.proj.weight": one}, "a generator of energy diffusion, .*this is not the tokenizer")
    refused({k: v for k, v in good.items() if k != "encoder.conv_out.bias"}, "lacks 'encoder.conv_out.bias'")
    refused({**good, "quantize.embedding.weight": torch.zeros(9, 8)}, r"as \[9, 8\], but the network needs \[16, 8\]")
    write_tensors(path, good, {})
    with pytest.raises(UserError, match="does not say its sizes; set tokenizer.preset=mage"):
        Vqgan(path)
    with pytest.raises(UserError, match="tokenizer.vqgan.ch is refused"):
        Vqgan(path, vqgan={"ch": 0})
    with pytest.raises(UserError, match="unknown preset 'image'"):
        tokenizers.build("vqgan", workspace=tmp_path, weights=str(path), preset="image")


def test_identity_is_of_the_content(weights: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": state(VqganModel(VQGAN))}, tmp_path / "official.ckpt")
    official = Vqgan(tmp_path / "official.ckpt", vqgan=VQGAN)
    assert official.identity == Vqgan(weights).identity
    assert official.identity != Vqgan(write_vqgan(tmp_path / "o.safetensors", seed=1)).identity
