"""Energy diffusion as a method: noise prediction loss and sampling of the standard variant (specs/energy.md 4 to 6).

Shape suffixes as in model.py: B batch, [B, C, S, S] samples.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from hpc_gen.diffusion.gaussian import GaussianDiffusion, linear_betas
from hpc_gen.methods.energy import model as energy_model
from hpc_gen.methods.energy.config import EnergyConfig, SamplingSettings
from hpc_gen.methods.energy.recipe import COLUMN_DTYPES, decay_groups
from hpc_gen.methods.energy.sampler import ancestral_steps, guided_prediction, to_images
from hpc_gen.methods.protocol import (
    ColumnSpec,
    Conditioning,
    Losses,
    ParallelPlan,
    ParameterGroup,
    Term,
    Turn,
)
from hpc_gen.runtime.errors import DataError, DivergedError, UserError
from hpc_gen.runtime.randomness import Draw, Draws, Integers, Normal, Uniform

ROLE = "denoiser"


class EnergyDiffusion:
    """The method protocol for one role, `denoiser`, and one turn per iteration."""

    def __init__(self, config: EnergyConfig, num_classes: int) -> None:
        """Build the network on the meta device; `num_classes` is also the index of the null class."""
        self.config = config
        self.num_classes = num_classes
        self.diffusion = GaussianDiffusion(linear_betas(config.diffusion_timesteps))
        with torch.device("meta"):
            self.model = energy_model.PureDiffusion(config, num_classes)

    def roles(self) -> dict[str, nn.Module]:
        """The one network, `denoiser`."""
        return {ROLE: self.model}

    def initialise(self, role: str, generator: torch.Generator) -> None:
        """Fill the materialised network (specs/energy.md section 3.1)."""
        assert role == ROLE, role
        energy_model.initialise(self.model, generator)

    def parameter_groups(self, role: str) -> list[ParameterGroup]:
        """Biases without weight decay, the rest with it; the frozen position code is in no group."""
        assert role == ROLE, role
        groups = decay_groups((name, p.ndim) for name, p in self.model.named_parameters() if p.requires_grad)
        return [ParameterGroup(groups.undecayed, weight_decay=0.0), ParameterGroup(groups.decayed)]

    def turns(self, iteration: int, images_seen: int) -> list[Turn]:
        """One step of the denoiser."""
        return [Turn(ROLE, "denoise")]

    def draws(self, turn: Turn) -> dict[str, Draw]:
        """Timestep and noise; a uniform number each for label dropout and mirroring where these are on."""
        drawn = {
            "t": Draw((), Integers(0, self.config.diffusion_timesteps)),
            "noise": Draw(self.config.input_shape, Normal()),
        }
        if self.config.label_dropout > 0:
            drawn["drop"] = Draw((), Uniform())
        if self.config.horizontal_flip:
            drawn["flip"] = Draw((), Uniform())
        return drawn

    def columns(self) -> dict[str, ColumnSpec]:
        """The images or latents, and their labels."""
        return {
            self.config.column: ColumnSpec(COLUMN_DTYPES[self.config.input], self.config.input_shape),
            "labels": ColumnSpec(("int64",), (), max_value=self.num_classes - 1),
        }

    def parallel_plan(self, role: str) -> ParallelPlan:
        """Each transformer block is a unit."""
        assert role == ROLE, role
        blocks = tuple(f"dit.blocks.{i}" for i in range(self.config.depth))
        return ParallelPlan(fsdp_units=blocks, checkpoint_units=blocks)

    def counts(self, turn: Turn, batch: Mapping[str, Tensor], draws: Mapping[str, Tensor]) -> dict[str, float]:
        """Samples of the micro-batch."""
        return {"mse": float(len(batch["labels"]))}

    def objective(self, turn: Turn, batch: Mapping[str, Tensor], draws: Mapping[str, Tensor]) -> Losses:
        """Mean squared error of the predicted noise, one timestep per sample, unweighted (eq. 14 of 2006.11239)."""
        x0 = self.training_input(batch, draws)
        y_B = batch["labels"]
        if "drop" in draws:
            y_B = torch.where(draws["drop"] < self.config.label_dropout, self.num_classes, y_B)
        _, mse_B = self.noise_errors(x0, draws["t"], y_B, draws["noise"])
        return Losses({"mse": Term(mse_B.sum(), float(len(mse_B)))})

    def training_input(self, batch: Mapping[str, Tensor], draws: Mapping[str, Tensor]) -> Tensor:
        """Clean samples [B, C, S, S] in the dtype of the noise: pixels scaled to [-1, 1], some mirrored; or latents.

        Raises DataError for rows of another shape or dtype than the config says.
        """
        name, noise = self.config.column, draws["noise"]
        rows = batch[name]
        if tuple(rows.shape[1:]) != self.config.input_shape:
            raise DataError(
                f"column '{name}' came with rows of shape {list(rows.shape[1:])}, but method.image_size and "
                f"method.channels need {list(self.config.input_shape)}; train on a table encoded for this config"
            )
        fits = rows.dtype == torch.uint8 if name == "pixels" else rows.dtype.is_floating_point
        if not fits:
            wanted = "uint8" if name == "pixels" else "floats"
            raise DataError(f"column '{name}' holds {rows.dtype}, but must hold {wanted}; encode the table anew")
        x0 = rows.to(noise.dtype)
        if name == "pixels":
            x0 = x0 / 127.5 - 1
        if "flip" in draws:
            x0 = torch.where((draws["flip"] < 0.5).view(-1, 1, 1, 1), x0.flip(-1), x0)
        return x0

    def noise_errors(self, x0: Tensor, t_B: Tensor, y_B: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Noised input [B, C, S, S] and squared error of the predicted noise per sample [B], fp32 or better."""
        x_t = self.diffusion.add_noise(x0, t_B, noise)
        error = noise - self.model(x_t, t_B, y_B).to(noise.dtype)
        return x_t, error.square().flatten(1).mean(dim=1)

    def conditions(self, ids: Tensor, plan: Conditioning) -> dict[str, Tensor]:
        """The class of each image."""
        return {"labels": plan.labels(ids)}

    @torch.no_grad()
    def generate(
        self,
        conditions: Mapping[str, Tensor],
        draws: Draws,
        settings: SamplingSettings,
        poll: Callable[[], None],
    ) -> Tensor:
        """uint8 images [N, 3, H, W] when trained on pixels, float32 latents [N, C, h, w] when trained on latents.

        Raises DivergedError for pixels that are no numbers, which uint8 would hide; latents are returned as they are.
        """
        x = deque(self.trajectory(conditions, draws, settings, poll), maxlen=1).pop()
        if self.config.input == "latents":
            return x
        if not bool(torch.isfinite(x).all()):
            raise DivergedError("sampled pixels are not finite; sample an earlier checkpoint or with other settings")
        return to_images(x)

    @torch.no_grad()
    def trajectory(
        self,
        conditions: Mapping[str, Tensor],
        draws: Draws,
        settings: SamplingSettings,
        poll: Callable[[], None],
    ) -> Iterator[Tensor]:
        """The samples [N, C, S, S] after each solver step; draws `x_T` once and `step_noise` per executed step.

        Raises UserError for labels that are no class, for steps that do not fit the chain, and for guidance with a
        network that was never trained on the null class.
        """
        shape = Draw(self.config.input_shape, Normal())
        device = self.model.alpha.device
        y_B = self._checked_labels(conditions["labels"]).to(device)
        if settings.guidance != 1.0 and self.config.label_dropout == 0:
            raise UserError(
                "sample.settings.guidance needs a trained null class, but method.label_dropout is 0; "
                "set guidance to 1.0 or train with label_dropout above 0"
            )
        yield from ancestral_steps(
            guided_prediction(self.model, y_B, self.num_classes, settings.guidance),
            self.diffusion.respaced(settings.steps),
            draws.take("x_T", shape).to(device),
            lambda k: draws.take("step_noise", shape, k=k),
            clip=settings.clip_limit(self.config.input),
            poll=poll,
        )

    def _checked_labels(self, y_B: Tensor) -> Tensor:
        """Labels in [0, num_classes]; the last is the null class, for unconditional samples."""
        if y_B.dtype != torch.int64 or y_B.ndim != 1:
            raise UserError(f"labels must be int64 [N], got {y_B.dtype} {list(y_B.shape)}; pass one class per image")
        if len(y_B) and not 0 <= int(y_B.min()) <= int(y_B.max()) <= self.num_classes:
            raise UserError(
                f"labels {int(y_B.min())} to {int(y_B.max())} were asked for, but the model has classes 0 to "
                f"{self.num_classes - 1} (and {self.num_classes} for none); choose labels in that range"
            )
        return y_B
