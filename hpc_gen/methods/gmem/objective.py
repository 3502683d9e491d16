"""GMem and class-conditional LightningDiT as a method: flow matching on latents, its losses, and its samples.

Facts: specs/gmem.md sections 4 and 5. Time 0 is noise, time 1 is data. Shape suffixes as in model.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpc_gen.diffusion.flow import LinearPath, interpolate, lognormal_times
from hpc_gen.methods.gmem import model as gmem_model
from hpc_gen.methods.gmem.bank import as_condition
from hpc_gen.methods.gmem.config import GmemConfig, SamplingSettings
from hpc_gen.methods.gmem.recipe import (
    FLIP,
    LABELS,
    PIXELS,
    REPRESENTATIONS,
    SNIPPETS,
    column_specs,
    frozen_specs,
)
from hpc_gen.methods.gmem.sampler import guided_velocity, solution
from hpc_gen.methods.protocol import (
    ColumnSpec,
    Conditioning,
    FrozenNetwork,
    FrozenSpec,
    Losses,
    ParallelPlan,
    ParameterGroup,
    Term,
    Turn,
)
from hpc_gen.nn.posterior import LatentScale, sample_moments
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.runtime.randomness import Draw, Draws, Normal, Uniform

ROLE = "denoiser"
PATH = LinearPath()


class Gmem:
    """The method protocol for one role, `denoiser`, and one turn per iteration."""

    def __init__(self, config: GmemConfig, num_classes: int = 0, scale: LatentScale | None = None) -> None:
        """Build the network on the meta device. `num_classes`: for the class condition; `scale`: of the latents."""
        self.config = config
        self.num_classes = num_classes
        self.scale = scale if scale is not None else LatentScale()
        self._frozen: dict[str, FrozenNetwork] = {}
        with torch.device("meta"):
            self.model = gmem_model.LightningDiT(config, num_classes)
        if config.condition == "snippet" and not config.projects:
            self.model.projector.requires_grad_(False)  # no loss reaches it

    def roles(self) -> dict[str, nn.Module]:
        """The one network, `denoiser`."""
        return {ROLE: self.model}

    def initialise(self, role: str, generator: torch.Generator) -> None:
        """Fill the materialised network (specs/gmem.md section 3.1)."""
        assert role == ROLE, role
        gmem_model.initialise(self.model, generator)

    def parameter_groups(self, role: str) -> list[ParameterGroup]:
        """All parameters alike, as in the reference (its weight decay is 0); the position code is frozen."""
        assert role == ROLE, role
        return [ParameterGroup(tuple(name for name, p in self.model.named_parameters() if p.requires_grad))]

    def turns(self, iteration: int, images_seen: int) -> list[Turn]:
        """One step of the denoiser."""
        return [Turn(ROLE, "denoise")]

    def draws(self, turn: Turn) -> dict[str, Draw]:
        """Time and noise; coins for flips and for the dropout of the condition."""
        config = self.config
        noise = Draw(config.input_shape, Normal())
        drawn = {"t": Draw((), Normal() if config.lognormal_times else Uniform()), "noise": noise}
        if config.input == "moments":
            drawn["posterior"] = noise
        if config.condition == "snippet" and config.snippet_dropout > 0:
            drawn["keep"] = Draw((config.snippet_dim,), Uniform())
        if config.condition == "class" and config.label_dropout > 0:
            drawn["drop"] = Draw((), Uniform())
        if config.horizontal_flip:
            drawn["flip"] = Draw((), Uniform())
        if config.independent_flips:
            drawn["flip_snippet"] = drawn["flip_representation"] = Draw((), Uniform())
        return drawn

    def columns(self) -> dict[str, ColumnSpec]:
        """Latents, snippets and representations, each with its mirrored one; or latents and labels."""
        return column_specs(self.config, self.num_classes)

    def frozen(self) -> dict[str, FrozenSpec]:
        """The encoder of representations that are computed in training."""
        return frozen_specs(self.config)

    def take_frozen(self, networks: Mapping[str, FrozenNetwork]) -> None:
        """See AsksFrozen."""
        self._frozen = dict(networks)

    def parallel_plan(self, role: str) -> ParallelPlan:
        """Each transformer block is a unit."""
        assert role == ROLE, role
        blocks = tuple(f"blocks.{i}" for i in range(self.config.depth))
        return ParallelPlan(fsdp_units=blocks, checkpoint_units=blocks)

    def counts(self, turn: Turn, batch: Mapping[str, Tensor], draws: Mapping[str, Tensor]) -> dict[str, float]:
        """Samples of the micro-batch, for each term."""
        samples = float(len(draws["t"]))
        counted = {"mse": samples}
        if self.config.cosine_loss:
            counted["cosine"] = samples
        if self.config.projects:
            counted["projection"] = samples
        return counted

    def objective(self, turn: Turn, batch: Mapping[str, Tensor], draws: Mapping[str, Tensor]) -> Losses:
        """Squared error and cosine of the velocity, and of representations the cosine to those of DINOv2."""
        x1, t_B = self.training_input(batch, draws), self.times(draws["t"])
        x_t, target = interpolate(PATH, draws["noise"], x1, t_B)
        wanted = self.config.projects
        condition = self.training_condition(batch, draws)
        velocity, projected = self.model.with_representations(x_t, t_B, condition, project=wanted)
        terms = velocity_errors(velocity.to(target.dtype), target, self.config.cosine_loss)
        found = {name: Term(each.sum(), float(len(each))) for name, each in terms.items()}
        if wanted:
            assert projected is not None
            each = projection_errors(projected.to(target.dtype), self.representations(batch, draws).to(target.dtype))
            found["projection"] = Term(each.sum(), float(len(each)), self.config.projection_weight)
        return Losses(found)

    def times(self, drawn_B: Tensor) -> Tensor:
        """Times in (0, 1) of the draws."""
        return lognormal_times(drawn_B) if self.config.lognormal_times else drawn_B

    def training_input(self, batch: Mapping[str, Tensor], draws: Mapping[str, Tensor]) -> Tensor:
        """Scaled latents [B, C, S, S] in the dtype of the noise, some of the mirrored image."""
        rows = self._chosen(batch, self.config.input, draws, "flip")
        if tuple(rows.shape[1:]) != self.config.row_shape or not rows.dtype.is_floating_point:
            raise DataError(
                f"column '{self.config.input}' came with rows of {rows.dtype} {list(rows.shape[1:])}, but "
                f"method.image_size and method.channels need floats of {list(self.config.row_shape)}; train on a table "
                "encoded for this config"
            )
        if self.config.input == "moments":
            return self.scale.normalise(sample_moments(rows, draws["posterior"]))
        return self.scale.normalise(rows.to(draws["noise"].dtype))

    def training_condition(self, batch: Mapping[str, Tensor], draws: Mapping[str, Tensor]) -> Tensor:
        """Snippets [B, E] of length 1 with elements dropped and the others scaled up; or labels with some dropped."""
        if self.config.condition == "class":
            labels_B = batch[LABELS]
            if "drop" in draws:
                return torch.where(draws["drop"] < self.config.label_dropout, self.num_classes, labels_B)
            return labels_B
        snippets_BE = as_condition(self._chosen(batch, SNIPPETS, draws, "flip_snippet"))
        if "keep" not in draws:
            return snippets_BE
        kept_BE = draws["keep"] >= self.config.snippet_dropout
        return snippets_BE * kept_BE / (1 - self.config.snippet_dropout)

    def representations(self, batch: Mapping[str, Tensor], draws: Mapping[str, Tensor]) -> Tensor:
        """Projection targets [B, N, R]: stored ones, or those of the pixels, by the same coin."""
        coin = "flip_representation"
        if not self.config.online:
            return self._chosen(batch, REPRESENTATIONS, draws, coin)
        assert REPRESENTATIONS in self._frozen, "representations are computed online, but nobody called take_frozen"
        return self._frozen[REPRESENTATIONS](self._chosen(batch, PIXELS, draws, coin))[REPRESENTATIONS]

    def _chosen(self, batch: Mapping[str, Tensor], column: str, draws: Mapping[str, Tensor], coin: str) -> Tensor:
        """Rows of a column, or of the mirrored image where the coin says so; one coin for all without `coin`'s own."""
        rows = batch[column]
        if not self.config.horizontal_flip:
            return rows
        drawn_B = draws[coin] if coin in draws else draws["flip"]
        mirrored = (drawn_B < 0.5).view(-1, *[1] * (rows.ndim - 1))
        return torch.where(mirrored, rows.flip(-1) if column == PIXELS else batch[column + FLIP], rows)

    def conditions(self, ids: Tensor, plan: Conditioning) -> dict[str, Tensor]:
        """A row of the memory bank for each image, or its class."""
        if self.config.condition == "class":
            return {LABELS: plan.labels(ids)}
        return {SNIPPETS: plan.rows(ids, [SNIPPETS])[SNIPPETS]}

    @torch.no_grad()
    def generate(
        self, conditions: Mapping[str, Tensor], draws: Draws, settings: SamplingSettings, poll: Callable[[], None]
    ) -> Tensor:
        """Scaled float32 latents [N, C, S, S]; draws `x_0` once and `step_noise` per step of the sde."""
        return deque(self.trajectory(conditions, draws, settings, poll), maxlen=1).pop()

    @torch.no_grad()
    def trajectory(
        self, conditions: Mapping[str, Tensor], draws: Draws, settings: SamplingSettings, poll: Callable[[], None]
    ) -> Iterator[Tensor]:
        """The samples [N, C, S, S] after each step of the solver. Raises UserError for conditions that do not fit."""
        shape = Draw(self.config.input_shape, Normal())
        condition, null = self._sampling_condition(conditions, settings)
        velocity = guided_velocity(self.model, condition, null, settings.guidance)
        x = draws.take("x_0", shape).to(self.model.pos_embed.device)
        yield from solution(velocity, x, settings, lambda k: draws.take("step_noise", shape, k=k), poll)

    def _sampling_condition(
        self, conditions: Mapping[str, Tensor], settings: SamplingSettings
    ) -> tuple[Tensor, Tensor]:
        """What the images are conditioned on, and the null condition, on the network's device."""
        device = self.model.pos_embed.device
        if self.config.condition == "class":
            labels_B = conditions[LABELS]
            if len(labels_B) and not 0 <= int(labels_B.min()) <= int(labels_B.max()) <= self.num_classes:
                raise UserError(
                    f"labels {int(labels_B.min())} to {int(labels_B.max())} were asked for, but the model has classes "
                    f"0 to {self.num_classes - 1}; choose labels in that range"
                )
            if settings.guidance.scale != 1.0 and self.config.label_dropout == 0:
                raise UserError(
                    "sample.settings.guidance needs a trained null class, but method.label_dropout is 0; set "
                    "guidance.scale to 1 or train with label_dropout above 0"
                )
            return labels_B.to(device), torch.full_like(labels_B, self.num_classes).to(device)
        snippets_BE = conditions[SNIPPETS].to(device, torch.float32)
        if snippets_BE.ndim != 2 or snippets_BE.shape[1] != self.config.snippet_dim:
            raise UserError(
                f"snippets of shape {list(snippets_BE.shape)} were given, but the network takes [N, "
                f"{self.config.snippet_dim}]; use a memory bank of the encoder that it was trained with"
            )
        if not bool(torch.isfinite(snippets_BE).all()):
            raise DataError("the memory bank holds snippets that are not finite; build it anew")
        if settings.normalise_snippets:
            snippets_BE = as_condition(snippets_BE)
        return snippets_BE, torch.zeros_like(snippets_BE)


def velocity_errors(velocity: Tensor, target: Tensor, cosine: bool) -> dict[str, Tensor]:
    """`mse` [B]: mean square; `cosine` [B]: mean over places of 1 - cosine over channels."""
    found = {"mse": (velocity - target).square().flatten(1).mean(dim=1)}
    if cosine:
        found["cosine"] = (1 - F.cosine_similarity(velocity, target, dim=1)).flatten(1).mean(dim=1)
    return found


def projection_errors(projected_BNR: Tensor, truth_BNR: Tensor) -> Tensor:
    """Mean over tokens of minus the cosine, [B] (REPA's loss). Raises DataError for another number of tokens."""
    if projected_BNR.shape != truth_BNR.shape:
        raise DataError(
            f"representations have shape {list(truth_BNR.shape[1:])}, the network projects to "
            f"{list(projected_BNR.shape[1:])}; encode them on the network's grid, or set method.repr_dim"
        )
    return -(F.normalize(projected_BNR, dim=-1) * F.normalize(truth_BNR, dim=-1)).sum(dim=-1).mean(dim=1)
