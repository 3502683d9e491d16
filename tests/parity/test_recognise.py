"""Every published network whose keys are known is recognised as what it is, so that a wrong file is refused by name."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
from golden_files import OfficialModel, official_models, roots

from hpc_gen.tokenizers.official import DINOV2, KL_VAE, VQGAN, recognise

# (METHOD, glob of the model, tokenizer that reads it, words for it)
EXPECTED = [
    ("*", "*vae*", KL_VAE, "a KL autoencoder"),
    ("*", "dinov2_*", DINOV2, "a DINOv2 network"),
    ("digit", "vqgan*", VQGAN, "a VQGAN of the MAGE family"),
    ("digit", "stage*", "", "a generator of DiGIT (with its tokenizer inside)"),
    ("gmem", "*/256/qknorm", None, None),  # a list of the keys that are added, not a network
    ("gmem", "*LightningDiT*", "", "the generator LightningDiT or GMem"),
    ("dim", "*", "", "the generator DiM"),
    ("energy", "mar_*", "", "a generator of the MAR family"),
    ("energy", "pure_*", "", "a generator of energy diffusion"),
    ("gdd", "edm-*", "", "a generator of EDM or GDD"),
    ("gdd", "gdd-*", "", "a generator of EDM or GDD"),
    ("gdd", "discriminator-*", "", "a discriminator of GDD"),
    ("gdd", "feature-*", None, None),  # networks that no method takes for a tokenizer
]


KNOWN = {method for method, _, _, _ in EXPECTED}


def _models() -> list[OfficialModel]:
    """Those of the methods that this test knows, whole ones alone: test_golden.py names what is wrong with others."""
    return [model for model in official_models(roots()) if model.method in KNOWN and model.problem is None]


@pytest.mark.parametrize("model", _models(), ids=lambda model: model.id)
def test_published_networks(model: OfficialModel) -> None:
    fits = [e for e in EXPECTED if fnmatchcase(model.method, e[0]) and fnmatchcase(model.name, e[1])]
    assert fits, "a published network that this test does not know"
    _, _, name, words = fits[0]
    kind = recognise(model.record["state_dict"])
    assert (kind.name if kind else None, kind.words if kind else None) == (name, words)
