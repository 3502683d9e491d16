"""The KL autoencoder as a tokenizer: images to the moments of their latents, scaled latents to images.

One class for SD f8, KL16, VA-VAE and our own exports; facts in specs/energy.md sections 3.4, 6 and 7. Stored are the
moments of each image and of its mirror image, each encoded (a mirrored latent is not the latent of a mirrored image).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpc_gen.config.kl_vae import KlVaeConfig
from hpc_gen.data.images import normalize
from hpc_gen.data.ptshard import content_sha256
from hpc_gen.nn.posterior import LatentScale
from hpc_gen.runtime import tensor_files
from hpc_gen.runtime.errors import DataError, UserError, nearest
from hpc_gen.tokenizers.batches import BATCH, full_batches
from hpc_gen.tokenizers.kl_vae_model import KlAutoencoder, to_pixels
from hpc_gen.tokenizers.kl_vae_weights import FileFacts, PerChannel, facts_of, import_flat, typed_architecture
from hpc_gen.tokenizers.official import KL_VAE, read_official

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Preset:
    """A published autoencoder. `scale` None = its file of latent statistics says it, and the config must."""

    architecture: KlVaeConfig
    scale: float | None
    shift: float | None


PRESETS: dict[str, Preset] = {
    # Stable Diffusion's f8: attention in the middle only; scale of its authors.
    "sd_f8": Preset(KlVaeConfig(ch_mult=(1, 2, 4, 4), z_channels=4, embed_dim=4), 0.18215, 0.0),
    # MAR: about 1 / std of the latents of ImageNet, mean not corrected.
    "kl16": Preset(
        KlVaeConfig(ch_mult=(1, 1, 2, 2, 4), attn_resolutions=(16,), z_channels=16, embed_dim=16), 0.2325, 0.0
    ),
    # LightningDiT f16d32: normalised per channel by latents_stats.pt (scale = 1 / std, shift = mean).
    "va_vae": Preset(
        KlVaeConfig(
            ch_mult=(1, 1, 2, 2, 4), attn_resolutions=(16,), decoder_attention=True, z_channels=32, embed_dim=32
        ),
        None,
        None,
    ),
}


class KlVae:
    """A frozen KlAutoencoder in float32 with the scale in which diffusion sees its latents."""

    name = "kl_vae"
    columns = ("moments", "moments_flip")

    def __init__(
        self,
        weights: str | Path,
        *,
        workspace: Path = Path(),
        device: torch.device = CPU,
        sha256: str | None = None,
        preset: str | None = None,
        architecture: KlVaeConfig | Mapping[str, Any] | None = None,
        scale: float | Sequence[float] | None = None,
        shift: float | Sequence[float] | None = None,
        statistics: str | Path | None = None,
    ) -> None:
        """Read `weights` (relative to `workspace`): an official file, or an export of the method `autoencoder`.

        What is not given comes from the file where it speaks of itself, then from the preset. Raises UserError for
        settings that contradict each other or the file, DataError for a file that is not what it should be.
        """
        path = workspace / weights
        flat = read_official(path, KL_VAE, sha256)
        facts = facts_of(tensor_files.metadata_of(path), str(path))
        chosen = _preset(preset)
        self.architecture = _architecture(path, architecture, chosen, facts)
        if statistics is not None:
            scale, shift = scale_of_statistics(workspace / statistics)
        self.scale, self.shift = _scale(path, scale, shift, chosen, facts, self.architecture.embed_dim)
        with torch.device("meta"):
            self.model = KlAutoencoder(self.architecture)
        self.model.to_empty(device=CPU)
        self.left_out = import_flat(self.model, flat, str(path))
        """Keys of the file that belong to training and were left out: number by first part of the key."""
        self.weights_sha256 = content_sha256(self.model.state_dict())
        self.model.eval().requires_grad_(False).to(device)
        self._latent_scale = LatentScale.of({"scale": self.scale, "shift": self.shift})
        if self.left_out:
            counted = ", ".join(f"{number} of '{part}'" for part, number in sorted(self.left_out.items()))
            print(f"{path}: left out tensors that only training needs: {counted}", flush=True)

    @property
    def identity(self) -> dict[str, Any]:
        """Architecture, hash of the tensors' content, scale and shift; nothing of the file's name or layout."""
        return {
            "name": self.name,
            "architecture": self.architecture.model_dump(mode="json"),
            "weights_sha256": self.weights_sha256,
            "scale": self.scale,
            "shift": self.shift,
        }

    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        """uint8 [N, C, H, W] -> moments and moments_flip, both float16 [N, 2Z, H / stride, W / stride] on the CPU.

        Z is embed_dim. Every forward pass has BATCH images, the last filled up with black ones: so on one machine and
        thread count a row's bytes depend on its own pixels alone, not on the rows or the number of rows beside it.
        Raises DataError for other channels, sides that are no multiples of the stride, and non-finite moments.
        """
        return {name: _halved(name, moments) for name, moments in self.encode_float32(pixels).items()}

    @torch.no_grad()
    def encode_float32(self, pixels: Tensor) -> dict[str, Tensor]:
        """As `encode`, before the moments are rounded to half precision."""
        self._check_pixels(pixels)
        return {
            "moments": self._moments(pixels),
            "moments_flip": self._moments(pixels.flip(-1)),
        }

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents, float [N, Z, h, w] as diffusion makes them, -> uint8 [N, C, H, W] on the same device.

        (x + 1) / 2 * 255, clipped and rounded (specs/energy.md section 6). Raises DataError for latents or images
        that are not finite, which uint8 would hide, and for other channels.
        """
        if latents.ndim != 4 or latents.shape[1] != self.architecture.embed_dim or not latents.is_floating_point():
            raise DataError(
                f"the autoencoder decodes float latents [N, {self.architecture.embed_dim}, h, w], got {latents.dtype} "
                f"{list(latents.shape)}; set method.channels to {self.architecture.embed_dim}"
            )
        z = self._latent_scale.restore(latents.to(torch.float32))
        images = torch.cat([self.model.decode(part.to(self._device)) for part in z.split(BATCH)])
        if not bool(torch.isfinite(images).all()):
            raise DataError("decoded images are not finite; look at the latents and at the tokenizer's scale")
        return to_pixels(images).to(latents.device)

    @property
    def _device(self) -> torch.device:
        return self.model.quant_conv.weight.device

    def _moments(self, pixels: Tensor) -> Tensor:
        parts = [self.model.encode(normalize(part).to(self._device)).cpu() for part in full_batches(pixels)]
        return torch.cat(parts)[: len(pixels)]

    def _check_pixels(self, pixels: Tensor) -> None:
        channels, stride = self.architecture.in_channels, self.architecture.stride
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != channels or not len(pixels):
            raise DataError(
                f"the autoencoder encodes uint8 pixels [N, {channels}, H, W], got {pixels.dtype} "
                f"{list(pixels.shape)}; set encode.channels to {channels}"
            )
        height, width = pixels.shape[2:]
        if height % stride or width % stride or not height or not width:
            raise DataError(
                f"images of {height} x {width} pixels do not divide into latent cells of {stride} x {stride}; "
                f"set encode.image_size to a multiple of {stride}"
            )


def _halved(name: str, moments: Tensor) -> Tensor:
    halves = moments.to(torch.float16)
    good = torch.isfinite(halves).flatten(1).all(dim=1)
    if not bool(good.all()):
        raise DataError(
            f"{name} of {int((~good).sum())} of {len(good)} images are not finite in half precision; "
            "the weights are not those of a trained autoencoder, or of another architecture"
        )
    return halves


def _preset(name: str | None) -> Preset | None:
    if name is not None and name not in PRESETS:
        raise UserError(f"unknown preset '{name}'{nearest(name, PRESETS)}; known presets: {', '.join(PRESETS)}")
    return None if name is None else PRESETS[name]


def _architecture(
    path: Path, given: KlVaeConfig | Mapping[str, Any] | None, preset: Preset | None, facts: FileFacts
) -> KlVaeConfig:
    """The config's, else the preset's, else the file's; the first two must not contradict each other or the file."""
    asked = None if given is None else typed_architecture(given)
    if asked is not None and preset is not None and asked != preset.architecture:
        raise UserError("tokenizer.architecture is not that of tokenizer.preset; give one of the two")
    asked = asked or (preset.architecture if preset is not None else None)
    if asked is None:
        if facts.architecture is None:
            raise UserError(
                f"{path} does not say its architecture; set tokenizer.preset ({', '.join(PRESETS)}) or "
                "tokenizer.architecture"
            )
        return facts.architecture
    if facts.architecture is not None and asked != facts.architecture:
        ours, its = asked.model_dump(), facts.architecture.model_dump()
        key = next(key for key in ours if ours[key] != its[key])
        raise UserError(
            f"{path} says {key} = {its[key]} of its architecture, the experiment {ours[key]}; remove "
            "tokenizer.architecture and tokenizer.preset, or name another file"
        )
    return asked


def _scale(
    path: Path,
    scale: float | Sequence[float] | None,
    shift: float | Sequence[float] | None,
    preset: Preset | None,
    facts: FileFacts,
    channels: int,
) -> tuple[PerChannel, PerChannel]:
    """Scale and shift: the config's, else the file's, else the preset's; UserError when nobody says the scale."""
    if scale is None and facts.scale is None and (preset is None or preset.scale is None):
        raise UserError(
            f"{path} does not say the scale of its latents; set tokenizer.statistics to a file of their mean and std, "
            "or tokenizer.scale and tokenizer.shift (1 / std and mean, one number or one per channel)"
        )
    chosen_scale = _first(scale, facts.scale, preset.scale if preset is not None else None)
    chosen_shift = _first(shift, facts.shift, preset.shift if preset is not None else None, 0.0)
    for key, value in (("scale", chosen_scale), ("shift", chosen_shift)):
        if isinstance(value, list) and len(value) != channels:
            raise UserError(
                f"tokenizer.{key} has {len(value)} numbers, the latents have {channels} channels; give one number, or "
                "one per channel"
            )
    numbers = chosen_scale if isinstance(chosen_scale, list) else [chosen_scale]
    if not all(0 < number < float("inf") for number in numbers):
        raise UserError(f"tokenizer.scale is {chosen_scale}, but must be above 0; 1 / std of the latents is usual")
    return chosen_scale, chosen_shift


def scale_of_statistics(path: Path) -> tuple[list[float], list[float]]:
    """1 / std and mean per channel of a file {mean, std}, each [1, C, 1, 1] or [C]. Raises UserError or DataError."""
    found = tensor_files.read_nested(path)
    if not isinstance(found, Mapping) or not all(isinstance(found.get(key), Tensor) for key in ("mean", "std")):
        raise DataError(f"{path} holds no 'mean' and 'std' of latents; `hpc-gen shards stats` writes such a file")
    mean, std = (found[key].double().reshape(-1) for key in ("mean", "std"))
    if len(mean) != len(std) or not bool(torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
        raise DataError(f"{path}: mean and std do not fit together, or are not finite and above 0; make it anew")
    return (1 / std).tolist(), mean.tolist()


def _first(*values: float | Sequence[float] | None) -> PerChannel:
    value = next(value for value in values if value is not None)
    return float(value) if isinstance(value, int | float) else [float(one) for one in value]
