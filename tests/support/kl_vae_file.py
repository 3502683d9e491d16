"""A small KL autoencoder with random values in a file that says its architecture and scale."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_tokenizers import state

from hpc_gen.config.kl_vae import KlVaeConfig
from hpc_gen.runtime.tensor_files import write_tensors
from hpc_gen.tokenizers.kl_vae_model import KlAutoencoder
from hpc_gen.tokenizers.kl_vae_weights import metadata_for

# stride 4, two latent channels
KL_VAE = KlVaeConfig(ch=32, ch_mult=[1, 1, 1], num_res_blocks=1, resolution=16, z_channels=2, embed_dim=2)


def write_kl_vae(path: Path, scale: float | list[float] = 1.0, shift: float | list[float] = 0.0) -> Path:
    """The file, for images of three channels."""
    with torch.device("meta"):
        model = KlAutoencoder(KL_VAE)
    write_tensors(path, state(model), metadata_for(KL_VAE, scale, shift))
    return path
