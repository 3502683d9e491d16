"""Golden handlers of the KL autoencoder, which belongs to no one method: kind `vae` of energy, dim and gmem.

The three folders tell the same things in other words; `_config` knows the words. A case's weights go through a file
and the tokenizer `kl_vae`, so that what encodes and decodes tables is what is compared.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from golden_compare import Produced
from golden_files import Case, OfficialModel
from golden_handling import ModelFacts, constants, handles, handles_official, known_keys
from torch import Tensor

from hpc_gen.config.kl_vae import KlVaeConfig
from hpc_gen.nn.posterior import LatentScale, kl_to_standard_normal, mean_and_std, sample_moments
from hpc_gen.runtime.tensor_files import write_tensors
from hpc_gen.tokenizers.kl_vae import PRESETS, KlVae
from hpc_gen.tokenizers.kl_vae_model import KlAutoencoder, to_pixels

# The scale is a constant of the energy reference, in its notes alone; dim has it in its config, gmem has none here.
ENERGY_SCALE = PRESETS["kl16"].scale

DIM_WORDS = ("base_channels", "multipliers", "res_blocks_per_level", "z_channels", "scale_factor")
DIM_CONSTANTS = {
    "attention_only_in_middle": True, "group_norm_groups": 32, "group_norm_eps": 1e-6, "logvar_clamp": [-30, 20],
}  # fmt: skip
ENERGY_WORDS = ("ch", "ch_mult", "num_res_blocks", "attn_resolutions", "resolution", "z", "scale")
GMEM_WORDS = (
    "base_channels", "channel_mult", "res_blocks", "latent_channels", "nominal_resolution",
    "attention_at_nominal_resolution", "input",
)  # fmt: skip


def _config(method: str, config: Mapping[str, Any]) -> tuple[KlVaeConfig, float]:
    """Architecture and latent scale in our words, from the words of the case's folder."""
    if method == "dim":
        known_keys(config, (*DIM_WORDS, *DIM_CONSTANTS), "config")
        constants(config, DIM_CONSTANTS, "config")
        z = config["z_channels"]
        return KlVaeConfig(
            ch=config["base_channels"],
            ch_mult=config["multipliers"],
            num_res_blocks=config["res_blocks_per_level"],
            z_channels=z,
            embed_dim=z,
        ), config["scale_factor"]
    words: Mapping[str, Any] = config["neutral"]
    if method == "energy":
        known_keys(words, ENERGY_WORDS, "config.neutral")
        constants(config.get("reference", {}), {"dropout": 0.0, "resamp_with_conv": True, "double_z": True}, "config")
        return KlVaeConfig(
            ch=words["ch"],
            ch_mult=words["ch_mult"],
            num_res_blocks=words["num_res_blocks"],
            attn_resolutions=words["attn_resolutions"],
            resolution=words["resolution"],
            z_channels=words["z"],
            embed_dim=words["z"],
        ), words.get("scale", ENERGY_SCALE)
    known_keys(words, GMEM_WORDS, "config.neutral")
    return KlVaeConfig(
        ch=words["base_channels"],
        ch_mult=words["channel_mult"],
        num_res_blocks=words["res_blocks"],
        attn_resolutions=words["attention_at_nominal_resolution"],
        decoder_attention=True,
        resolution=words["nominal_resolution"],
        z_channels=words["latent_channels"],
        embed_dim=words["latent_channels"],
    ), 1.0


def _tokenizer(case: Case, tensors: Mapping[str, Tensor]) -> KlVae:
    architecture, scale = _config(case.method, case.record["config"])
    weights = {name.removeprefix("param."): value for name, value in tensors.items() if name.startswith("param.")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        write_tensors(path, weights, {})
        return KlVae(path, architecture=architecture, scale=scale)


@handles("energy", "vae")
@torch.no_grad()
def energy_vae(case: Case) -> Produced:
    """Moments of image and mirror image, posterior, KL, scaled latent, decoded image, both roundings to uint8."""
    tensors = case.tensors()
    tokenizer = _tokenizer(case, tensors)
    scale = LatentScale.of(tokenizer.identity)
    moments = tokenizer.model.encode(tensors["in.image"])
    mean, std = mean_and_std(moments)
    latent = scale.normalise(sample_moments(moments, tensors["in.posterior_noise"]))
    decoded = tokenizer.model.decode(scale.restore(latent))
    # Two formulas of the reference that are one in exact numbers: evaluation by the tokenizer, previews clipped first.
    preview = ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Produced(
        {
            "out.moments": moments,
            "out.moments_flip": tokenizer.model.encode(tensors["in.image"].flip(-1)),
            "out.mean": mean,
            "out.std": std,
            "out.kl": kl_to_standard_normal(moments),
            "out.latent": latent,
            "out.decoded": decoded,
            "out.uint8_eval": tokenizer.decode(latent).permute(0, 2, 3, 1),
            "out.uint8_preview": preview.permute(0, 2, 3, 1),
        }
    )


@handles("dim", "vae")
@torch.no_grad()
def dim_vae(case: Case) -> Produced:
    """Moments, scaled latent (also of log variances beyond the clamp), decoded image, pixels."""
    tensors = case.tensors()
    tokenizer = _tokenizer(case, tensors)
    scale = LatentScale.of(tokenizer.identity)
    moments = tokenizer.model.encode(tensors["in.image"])
    z = scale.normalise(sample_moments(moments, tensors["in.noise"]))
    out = {
        "out.moments": moments,
        "out.z": z,
        "out.decoded": tokenizer.model.decode(scale.restore(z)),
        "out.png_uint8": tokenizer.decode(z),
    }
    if "in.moments_wide" in tensors:
        out["out.z_wide"] = scale.normalise(sample_moments(tensors["in.moments_wide"], tensors["in.noise"]))
    return Produced(out)


@handles("gmem", "vae")
@torch.no_grad()
def gmem_vae(case: Case) -> Produced:
    """Moments, posterior, a sample of it, images decoded from sample and mean, pixels of the first."""
    tensors = case.tensors()
    tokenizer = _tokenizer(case, tensors)
    moments = tokenizer.model.encode(tensors["in.image"])
    mean, std = mean_and_std(moments)
    sample = sample_moments(moments, tensors["in.eps"])
    decoded = tokenizer.model.decode(sample)
    return Produced(
        {
            "out.moments": moments,
            "out.mean": mean,
            "out.std": std,
            "out.kl": kl_to_standard_normal(moments),
            "out.sample": sample,
            "out.decoded_sample": decoded,
            "out.decoded_mean": tokenizer.model.decode(mean),
            "out.decoded_uint8": to_pixels(decoded).permute(0, 2, 3, 1),
        }
    )


def _facts(architecture: KlVaeConfig) -> ModelFacts:
    with torch.device("meta"):
        model = KlAutoencoder(architecture)
    parameters = dict(model.named_parameters())
    return ModelFacts(
        state_dict={name: tuple(value.shape) for name, value in model.state_dict().items()},
        buffers=tuple(name for name, _ in model.named_buffers()),
        frozen=tuple(name for name, parameter in parameters.items() if not parameter.requires_grad),
        num_params=sum(parameter.numel() for parameter in parameters.values()),
        num_trainable=sum(parameter.numel() for parameter in parameters.values() if parameter.requires_grad),
    )


@handles_official("energy", "kl16_vae")
@handles_official("gmem", "marvae_kl16")
def kl16(model: OfficialModel) -> ModelFacts:
    """MAR's f16 autoencoder."""
    return _facts(PRESETS["kl16"].architecture)


@handles_official("dim", "sd_vae_kl_f8")
def sd_f8(model: OfficialModel) -> ModelFacts:
    """Stable Diffusion's f8 autoencoder."""
    return _facts(PRESETS["sd_f8"].architecture)


@handles_official("gmem", "vavae_f16d32")
def va_vae(model: OfficialModel) -> ModelFacts:
    """LightningDiT's f16d32 autoencoder."""
    return _facts(PRESETS["va_vae"].architecture)
