"""The tokenizer section: the map between pixels and what a table stores."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hpc_gen.config.base import OPERATION, WHEN_SET, NonEmpty, Section, Sha256
from hpc_gen.config.dinov2 import Dinov2Config
from hpc_gen.config.kl_vae import KlVaeConfig
from hpc_gen.config.vqgan import VqganConfig

PerChannel = float | Annotated[list[float], Field(min_length=1)]

KL_VAE_PRESETS = ("sd_f8", "kl16", "va_vae")
DINOV2_PRESETS = (
    *("vits14", "vitb14", "vitl14", "vitg14"),
    *("vits14_reg4", "vitb14_reg4", "vitl14_reg4", "vitg14_reg4"),
)
VQGAN_PRESETS = ("mage",)

# Keys that each tokenizer has besides `name`.
_WEIGHTS = frozenset({"weights", "sha256", "preset"})
KEYS: dict[str, frozenset[str]] = {
    "identity": frozenset(),
    "kl_vae": _WEIGHTS | {"architecture", "scale", "shift", "statistics"},
    "dinov2": _WEIGHTS | {"dinov2"},
    "vqgan": _WEIGHTS | {"vqgan"},
}
PRESETS_OF: dict[str, tuple[str, ...]] = {
    "identity": (),
    "kl_vae": KL_VAE_PRESETS,
    "dinov2": DINOV2_PRESETS,
    "vqgan": VQGAN_PRESETS,
}


class TokenizerConfig(Section):
    """The map between pixels and what is stored."""

    name: Literal["identity", "kl_vae", "dinov2", "vqgan"] = "identity"
    """identity stores the pixels themselves; kl_vae the moments of a KL autoencoder's latents; dinov2 features of a
    DINOv2 network or their nearest centroids; vqgan the codes of a VQGAN."""
    weights: NonEmpty | None = Field(default=None, json_schema_extra=OPERATION)
    """File of the network's weights, relative to the workspace; tables and samples know its tensors by their hash."""
    sha256: Sha256 | None = None
    """SHA-256 that this file must have; null = any."""
    preset: (
        Literal[
            "sd_f8",
            "kl16",
            "va_vae",
            "vits14",
            "vitb14",
            "vitl14",
            "vitg14",
            "vits14_reg4",
            "vitb14_reg4",
            "vitl14_reg4",
            "vitg14_reg4",
            "mage",
        ]
        | None
    ) = None
    """A published architecture, of kl_vae with its scale; null = as the section says, or what the file says of
    itself."""
    architecture: KlVaeConfig | None = None
    """kl_vae: keys of the network, as method 'autoencoder' has them; null = the preset's, or the file's."""
    scale: PerChannel | None = None
    """kl_vae: diffusion sees (latent - shift) * scale, one number or one per channel; null = the preset's or file's."""
    shift: PerChannel | None = None
    """kl_vae: see scale."""
    statistics: NonEmpty | None = Field(default=None, json_schema_extra=OPERATION)
    """kl_vae: file with mean and std per channel (LightningDiT's latents_stats.pt), relative to the workspace, in place
    of scale = 1 / std and shift = mean; what it holds is part of the tokenizer's identity."""
    dinov2: Dinov2Config | None = Field(default=None, json_schema_extra=WHEN_SET)
    """dinov2: which columns it makes, and how; null = class and patch tokens, as GMem."""
    vqgan: VqganConfig | None = Field(default=None, json_schema_extra=WHEN_SET)
    """vqgan: sizes of the network; null = the preset's, or the file's."""

    def settings(self) -> dict[str, Any]:
        """What `tokenizers.build` takes besides the name: the keys that this tokenizer has."""
        return self.model_dump(include=set(KEYS[self.name]))

    @model_validator(mode="after")
    def _keys_of_the_named(self) -> TokenizerConfig:
        if self.name != "identity" and self.weights is None:
            raise ValueError(f"name '{self.name}' needs 'weights', the file of its network")
        strange = sorted(
            key for key, value in self if key != "name" and value is not None and key not in KEYS[self.name]
        )
        if strange:
            other = next((name for name, keys in KEYS.items() if keys.issuperset(strange)), "kl_vae")
            raise ValueError(f"name '{self.name}' has no {', '.join(strange)}; remove it, or name '{other}'")
        if self.preset is not None and self.preset not in PRESETS_OF[self.name]:
            known = ", ".join(PRESETS_OF[self.name])
            raise ValueError(f"preset '{self.preset}' is not one of '{self.name}', which has {known}; name one")
        if self.statistics is not None and (self.scale is not None or self.shift is not None):
            raise ValueError("it has both 'statistics' and 'scale' or 'shift'; give one")
        given = self.architecture or self.vqgan or (self.dinov2.architecture if self.dinov2 is not None else None)
        if self.preset is not None and given is not None:
            raise ValueError(
                "it has both 'preset' and 'vqgan'; give one"
                if self.name == "vqgan"
                else "it has both 'preset' and 'architecture'; give one"
            )
        return self
