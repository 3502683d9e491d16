"""The identity tokenizer and the way tokenizers are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hpc_gen import tokenizers
from hpc_gen.runtime.errors import DataError, UserError

HERE = Path()


def test_identity_copies_nothing() -> None:
    tokenizer = tokenizers.build("identity", workspace=HERE)
    pixels = torch.randint(0, 256, (2, 3, 4, 4)).to(torch.uint8)
    assert tokenizer.encode(pixels)["pixels"] is pixels
    assert tokenizer.decode(pixels) is pixels
    assert tokenizer.identity == {"name": "identity"}
    assert tokenizer.columns == ("pixels",)


@pytest.mark.parametrize("wrong", [torch.zeros(2, 3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8)])
def test_anything_but_pixels_is_refused(wrong: torch.Tensor) -> None:
    tokenizer = tokenizers.build("identity", workspace=HERE)
    for use in (tokenizer.encode, tokenizer.decode):
        with pytest.raises(DataError, match=r"takes uint8 pixels \[N, C, H, W\], got torch"):
            use(wrong)


def test_names_and_settings() -> None:
    with pytest.raises(
        UserError,
        match=r"unknown tokenizer 'identiy' \(did you mean 'identity'\?\); known: dinov2, identity, kl_vae, vqgan",
    ):
        tokenizers.build("identiy", workspace=HERE)
    with pytest.raises(UserError, match="does not take these settings: got an unexpected keyword argument 'scale'"):
        tokenizers.build("identity", workspace=HERE, scale=2)
    with pytest.raises(UserError, match="does not take these settings: missing a required argument: 'weights'"):
        tokenizers.build("kl_vae", workspace=HERE)
