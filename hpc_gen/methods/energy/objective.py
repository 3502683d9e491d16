"""Energy diffusion as a method: losses and sampling of its standard and energy variants (specs/energy.md 4 to 6).

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
from hpc_gen.methods.energy.inner import INNER_STEPS_TRAINING, InnerTrace, inner_step_counts
from hpc_gen.methods.energy.losses import contrastive_errors, refinement_errors, refinement_path
from hpc_gen.methods.energy.recipe import COLUMN_DTYPES, decay_groups
from hpc_gen.methods.energy.sampler import InnerLoop, ancestral_steps, guided_prediction, to_images
from hpc_gen.methods.energy.second_order import squared_errors
from hpc_gen.methods.protocol import (
    ColumnSpec,
    Conditioning,
    Curve,
    Losses,
    ParallelPlan,
    ParameterGroup,
    TensorSplit,
    Term,
    Turn,
)
from hpc_gen.nn.posterior import LatentScale, sample_moments
from hpc_gen.runtime.errors import DataError, DivergedError, UserError
from hpc_gen.runtime.randomness import Draw, Draws, Integers, Normal, Uniform

ROLE = "denoiser"
FLIP = "_flip"  # suffix of the column with the mirrored image's moments


class EnergyDiffusion:
    """The method protocol for one role, `denoiser`, and one turn per iteration."""

    def __init__(self, config: EnergyConfig, num_classes: int, scale: LatentScale | None = None) -> None:
        """Build the network on the meta device; `num_classes` is also the index of the null class.

        `scale`: of the latents that a tokenizer's moments give; not used for other inputs.
        """
        self.config = config
        self.num_classes = num_classes
        self.scale = scale if scale is not None else LatentScale()
        self._trace = InnerTrace()
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
        """Biases without weight decay, the rest with it, a learnable step size with its own rate.

        The frozen position code is in no group.
        """
        assert role == ROLE, role
        groups = decay_groups((name, p.ndim) for name, p in self.model.named_parameters() if p.requires_grad)
        found = [ParameterGroup(groups.undecayed, weight_decay=0.0), ParameterGroup(groups.decayed)]
        if groups.step_size:
            lr_scale = self.config.energy.step_size_lr_scale
            found.append(ParameterGroup(groups.step_size, weight_decay=0.0, lr_scale=lr_scale))
        return found

    def turns(self, iteration: int, images_seen: int) -> list[Turn]:
        """One step of the denoiser."""
        return [Turn(ROLE, "denoise")]

    def draws(self, turn: Turn) -> dict[str, Draw]:
        """Timestep and noise; more noise and uniform numbers for what is switched on."""
        noise = Draw(self.config.input_shape, Normal())
        drawn = {
            "t": Draw((), Integers(0, self.config.diffusion_timesteps)),
            "noise": noise,
        }
        if self.config.input == "moments":
            drawn["posterior"] = noise
        if self._contrasts:
            drawn["contrastive_noise"] = drawn["perturbation"] = noise
        if self._refines:
            drawn["refinement_noise"] = noise
        if self.config.label_dropout > 0:
            drawn["drop"] = Draw((), Uniform())
        if self.config.horizontal_flip:
            drawn["flip"] = Draw((), Uniform())
        return drawn

    def columns(self) -> dict[str, ColumnSpec]:
        """The images or latents, and their labels."""
        rows = ColumnSpec(COLUMN_DTYPES[self.config.input], self.config.row_shape)
        names = [self.config.column]
        if self.config.input == "moments" and self.config.horizontal_flip:
            names.append(self.config.column + FLIP)
        labels = ColumnSpec(("int64",), (), max_value=self.num_classes - 1)
        return {**dict.fromkeys(names, rows), "labels": labels}

    @property
    def _contrasts(self) -> bool:
        return self.config.variant == "energy" and self.config.energy.contrastive_weight > 0

    @property
    def _refines(self) -> bool:
        return self.config.variant == "energy" and self.config.energy.learnable_step_size

    def parallel_plan(self, role: str) -> ParallelPlan:
        """Each transformer block is a unit, split by heads; the energy variant differentiates inside its objective."""
        assert role == ROLE, role
        blocks = tuple(f"dit.blocks.{i}" for i in range(self.config.depth))
        if self.config.variant == "energy":
            return ParallelPlan(fsdp_units=blocks, checkpoint_units=blocks, differentiates_inside=True)
        splits = {
            "attn.qkv": TensorSplit("column", fused=3),
            "attn.proj": TensorSplit("row"),
            "mlp.fc1": TensorSplit("column"),
            "mlp.fc2": TensorSplit("row"),
        }
        return ParallelPlan(
            fsdp_units=blocks,
            checkpoint_units=blocks,
            tensor_splits={f"{block}.{name}": split for block in blocks for name, split in splits.items()},
            tensor_divides=(self.config.heads, int(self.config.hidden * self.config.mlp_ratio)),
        )

    def counts(self, turn: Turn, batch: Mapping[str, Tensor], draws: Mapping[str, Tensor]) -> dict[str, float]:
        """Samples of the micro-batch; groups of them where the refinement loss sums over a group."""
        samples = float(len(batch["labels"]))
        counted = {"mse": samples}
        if self._contrasts:
            counted["contrastive"] = samples
        if self._refines:
            whole = self.config.energy.refinement == "reference"
            counted["refinement"] = samples / self.config.energy.step_group if whole else samples
            counted["step_size"] = samples
        return counted

    def objective(self, turn: Turn, batch: Mapping[str, Tensor], draws: Mapping[str, Tensor]) -> Losses:
        """Squared error of the predicted noise (eq. 14 of 2006.11239), and the energy variant's further losses.

        One timestep and one class, dropped or not, per sample for all of them. `step_size` is logged only.
        """
        x0, t_B, y_B = self.training_input(batch, draws), draws["t"], batch["labels"]
        if "drop" in draws:
            y_B = torch.where(draws["drop"] < self.config.label_dropout, self.num_classes, y_B)
        _, mse_B = self.noise_errors(x0, t_B, y_B, draws["noise"])
        values = {"mse": mse_B}
        config = self.config.energy
        weights = {"contrastive": config.contrastive_weight, "refinement": config.refinement_weight, "step_size": 0.0}
        if (self._contrasts or self._refines) and len(t_B) % config.step_group:
            raise UserError(
                f"a micro-batch of {len(t_B)} samples is not whole groups of method.energy.step_group = "
                f"{config.step_group}; set train.coupling_group to a multiple of it"
            )
        if self._contrasts:
            noise, perturbation = draws["contrastive_noise"], draws["perturbation"]
            values["contrastive"] = contrastive_errors(
                self.model, self.diffusion, config, x0, t_B, y_B, noise, perturbation
            )
        if self._refines:
            noise = draws["refinement_noise"]
            *_, energies_KB = refinement_path(self.model, self.diffusion, config, x0, t_B, y_B, noise)
            counts_B = inner_step_counts(t_B, self.diffusion.num_timesteps, INNER_STEPS_TRAINING, config.step_group)
            values["refinement"] = refinement_errors(energies_KB, counts_B, config)
            values["step_size"] = self.model.alpha.detach().expand(len(t_B))
        return Losses(
            {name: Term(each.sum(), float(len(each)), weights.get(name, 1.0)) for name, each in values.items()}
        )

    def training_input(self, batch: Mapping[str, Tensor], draws: Mapping[str, Tensor]) -> Tensor:
        """Clean samples [B, C, S, S] in the dtype of the noise, some of them of the mirrored image.

        Pixels are scaled to [-1, 1], moments sampled and scaled as the tokenizer says, latents taken as they are.
        Raises DataError for rows of another shape or dtype than the config says.
        """
        kind, noise = self.config.input, draws["noise"]
        rows = self._rows(batch, self.config.column)
        mirrored = (draws["flip"] < 0.5).view(-1, 1, 1, 1) if "flip" in draws else None
        if kind == "moments":
            if mirrored is not None:
                rows = torch.where(mirrored, self._rows(batch, self.config.column + FLIP), rows)
            return self.scale.normalise(sample_moments(rows, draws["posterior"]))
        x0 = rows.to(noise.dtype)
        if kind == "pixels":
            x0 = x0 / 127.5 - 1
        return x0 if mirrored is None else torch.where(mirrored, x0.flip(-1), x0)

    def _rows(self, batch: Mapping[str, Tensor], name: str) -> Tensor:
        """A column of the batch, its shape and dtype checked."""
        rows, config = batch[name], self.config
        if tuple(rows.shape[1:]) != config.row_shape:
            raise DataError(
                f"column '{name}' came with rows of shape {list(rows.shape[1:])}, but method.image_size and "
                f"method.channels need {list(config.row_shape)}; train on a table encoded for this config"
            )
        pixels = config.input == "pixels"
        if not (rows.dtype == torch.uint8 if pixels else rows.dtype.is_floating_point):
            wanted = "uint8" if pixels else "floats"
            raise DataError(f"column '{name}' holds {rows.dtype}, but must hold {wanted}; encode the table anew")
        return rows

    def noise_errors(self, x0: Tensor, t_B: Tensor, y_B: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Noised input [B, C, S, S] and squared error of the predicted noise per sample [B], fp32 or better."""
        x_t = self.diffusion.add_noise(x0, t_B, noise)
        if self.config.variant == "energy" and self.config.energy.second_order == "forward_over_reverse":
            return x_t, squared_errors(self.model, x_t, t_B, y_B, noise)[1]
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
        """uint8 images [N, 3, H, W] when trained on pixels, else scaled float32 latents [N, C, h, w].

        Raises DivergedError for pixels that are no numbers, which uint8 would hide; latents are returned as they are.
        """
        x = deque(self.trajectory(conditions, draws, settings, poll), maxlen=1).pop()
        if self.config.input != "pixels":
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
        self._check_settings(settings)
        chain = self.diffusion.respaced(settings.steps)
        inner = None
        if settings.inner_loop:
            inner = InnerLoop(self.model, self.diffusion, chain, y_B, self.num_classes, settings, self._trace)
        yield from ancestral_steps(
            guided_prediction(self.model, y_B, self.num_classes, settings.guidance),
            chain,
            draws.take("x_T", shape).to(device),
            lambda k: draws.take("step_noise", shape, k=k),
            clip=settings.clip_limit(self.config.input),
            poll=poll,
            after_step=inner,
        )

    def take_curves(self) -> dict[str, Curve]:
        """What the inner loops have measured since the last call: energy change per inner step, accept rate."""
        trace, self._trace = self._trace, InnerTrace()
        return trace.curves() if trace.change_sums else {}

    def _check_settings(self, settings: SamplingSettings) -> None:
        if settings.guidance != 1.0 and self.config.label_dropout == 0:
            raise UserError(
                "sample.settings.guidance needs a trained null class, but method.label_dropout is 0; "
                "set guidance to 1.0 or train with label_dropout above 0"
            )
        if settings.inner_loop and self.config.variant != "energy":
            raise UserError(
                "sample.settings.inner_loop descends on an energy, but method.variant is 'standard'; set it to false, "
                "or train with method.variant=energy"
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
