"""The KL autoencoder as a method: reconstruction and KL terms; what it generates are reconstructions of table rows.

Loss: L = (|x - d(z)| + kl_weight * KL) / values of an image, z = mean + std * noise (Rombach et al. 2022, arXiv
2112.10752, appendix G; Kingma & Welling 2014, arXiv 1312.6114). Deliberate deviations from the first: no perceptual and
no adversarial term, no learned variance of the output.

Shape suffixes: B batch; images [B, C, H, W], latents [B, Z, h, w].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from hpc_gen.data.images import normalize
from hpc_gen.methods.autoencoder.config import AutoencoderConfig, ReconstructionSettings
from hpc_gen.methods.protocol import (
    ColumnSpec,
    Conditioning,
    Losses,
    ParallelPlan,
    ParameterGroup,
    Term,
    Turn,
)
from hpc_gen.nn.posterior import kl_to_standard_normal, mean_and_std, sample_moments
from hpc_gen.runtime.errors import DataError, DivergedError
from hpc_gen.runtime.randomness import Draw, Draws, Normal, Uniform
from hpc_gen.tokenizers.kl_vae_model import KlAutoencoder, initialise, to_pixels

ROLE = "autoencoder"


class Autoencoder:
    """The method protocol for one role, `autoencoder`, and one turn per iteration."""

    def __init__(self, config: AutoencoderConfig) -> None:
        """Build the network on the meta device."""
        self.config = config
        with torch.device("meta"):
            self.model = KlAutoencoder(config.architecture)

    def roles(self) -> dict[str, nn.Module]:
        """The one network, `autoencoder`."""
        return {ROLE: self.model}

    def initialise(self, role: str, generator: torch.Generator) -> None:
        """Fill the materialised network with torch's default values for these layers."""
        assert role == ROLE, role
        initialise(self.model, generator)

    def parameter_groups(self, role: str) -> list[ParameterGroup]:
        """Norms and biases without weight decay, convolutions with the experiment's."""
        assert role == ROLE, role
        named = dict(self.model.named_parameters())
        vectors = tuple(name for name, parameter in named.items() if parameter.ndim == 1)
        kernels = tuple(name for name, parameter in named.items() if parameter.ndim > 1)
        return [ParameterGroup(vectors, weight_decay=0.0), ParameterGroup(kernels)]

    def turns(self, iteration: int, images_seen: int) -> list[Turn]:
        """One step of the autoencoder."""
        return [Turn(ROLE, "reconstruct")]

    def draws(self, turn: Turn) -> dict[str, Draw]:
        """Noise of the posterior, and a uniform number for mirroring where that is on."""
        drawn = {"posterior_noise": Draw(self.config.latent_shape, Normal())}
        if self.config.horizontal_flip:
            drawn["flip"] = Draw((), Uniform())
        return drawn

    def columns(self) -> dict[str, ColumnSpec]:
        """The images."""
        return {"pixels": ColumnSpec(("uint8",), self.config.image_shape)}

    def parallel_plan(self, role: str) -> ParallelPlan:
        """Each level and each middle is a unit."""
        assert role == ROLE, role
        levels = range(len(self.config.architecture.ch_mult))
        parts = [*(f"encoder.down.{i}" for i in levels), "encoder.mid", "decoder.mid"]
        parts += [f"decoder.up.{i}" for i in levels]
        return ParallelPlan(fsdp_units=tuple(parts), checkpoint_units=tuple(parts))

    def counts(self, turn: Turn, batch: Mapping[str, Tensor], draws: Mapping[str, Tensor]) -> dict[str, float]:
        """Images of the micro-batch."""
        images = float(len(batch["pixels"]))
        return {"reconstruction": images, "kl": images}

    def objective(self, turn: Turn, batch: Mapping[str, Tensor], draws: Mapping[str, Tensor]) -> Losses:
        """`reconstruction`: mean error of an image's values; `kl`: nats per image, weighted as the module says."""
        images = self.training_images(batch, draws)
        moments = self.model.encode(images).float()
        restored = self.model.decode(sample_moments(moments, draws["posterior_noise"])).float()
        error = restored - images
        error_B = (error.abs() if self.config.reconstruction == "l1" else error.square()).flatten(1).mean(dim=1)
        kl_B = kl_to_standard_normal(moments)
        count = float(len(images))
        return Losses(
            {
                "reconstruction": Term(error_B.sum(), count),
                "kl": Term(kl_B.sum(), count, weight=self.config.kl_weight / images[0].numel()),
            }
        )

    def training_images(self, batch: Mapping[str, Tensor], draws: Mapping[str, Tensor]) -> Tensor:
        """Images float32 [B, C, H, W] in [-1, 1], some mirrored. Raises DataError for rows of another shape."""
        images = normalize(self._checked(batch["pixels"]))
        if "flip" in draws:
            images = torch.where((draws["flip"] < 0.5).view(-1, 1, 1, 1), images.flip(-1), images)
        return images

    def conditions(self, ids: Tensor, plan: Conditioning) -> dict[str, Tensor]:
        """Image `id` is the reconstruction of row `id % rows` of the table."""
        return plan.rows(ids, ("pixels",))

    @torch.no_grad()
    def generate(
        self,
        conditions: Mapping[str, Tensor],
        draws: Draws,
        settings: ReconstructionSettings,
        poll: Callable[[], None],
    ) -> Tensor:
        """Reconstructions uint8 [N, 3, H, W] of the rows' pixels; grey ones are repeated. `beside_original`: 2 W wide.

        Raises DivergedError for pixels that are no numbers, which uint8 would hide.
        """
        poll()
        device = self.model.quant_conv.weight.device
        moments = self.model.encode(normalize(self._checked(conditions["pixels"]).to(device)))
        poll()
        z = mean_and_std(moments)[0]
        if settings.posterior == "sample":
            noise = draws.take("posterior_noise", Draw(self.config.latent_shape, Normal()))
            z = sample_moments(moments, noise.to(device))
        images = self.model.decode(z)
        if not bool(torch.isfinite(images).all()):
            raise DivergedError("reconstructed pixels are not finite; use an earlier checkpoint")
        pixels = to_pixels(images)
        if settings.beside_original:
            pixels = torch.cat([conditions["pixels"].to(device), pixels], dim=3)
        return pixels.expand(-1, 3, -1, -1).contiguous()

    def _checked(self, pixels: Tensor) -> Tensor:
        if pixels.dtype != torch.uint8 or tuple(pixels.shape[1:]) != self.config.image_shape:
            raise DataError(
                f"column 'pixels' came as {pixels.dtype} with rows of shape {list(pixels.shape[1:])}, but "
                f"method.image_size and method.architecture.in_channels need uint8 {list(self.config.image_shape)}; "
                "train on a table encoded for this config"
            )
        return pixels
