"""Three toy methods through the public protocol: what the five real ones will ask of training and sampling.

- TWO_PLAYER: generator and discriminator with an R1 turn in every fourth iteration, and a buffer that each forward of
  the discriminator changes (GDD).
- TABLE_CONDITION: no labels; each image is conditioned on a float column of the table (GMem's snippets).
- FIRST_TOKENS, REFINED_TOKENS and `codec`: a chain of two trainings with a table-making stage between (DiGIT).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn import functional as F

from hpc_gen.data.write import write_table
from hpc_gen.methods.protocol import (
    ColumnSpec,
    Conditioning,
    Losses,
    ParallelPlan,
    ParameterGroup,
    TableFacts,
    Term,
    Turn,
)
from hpc_gen.methods.registry import MethodEntry
from hpc_gen.runtime.randomness import Draw, Draws, Integers, Normal
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages.build import build_method, open_table, table_facts
from hpc_gen.stages.run_setup import load_run
from hpc_gen.stages.units import StageContext, Unit
from hpc_gen.training.checkpoint import read

SIDE = 4  # images are 4 x 4, grey


class NoKeys(BaseModel):
    """A section without keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _Toy:
    """What the toys share; each gives `_roles` and the rest of the protocol."""

    _roles: dict[str, nn.Module]

    def roles(self) -> dict[str, nn.Module]:
        return self._roles

    def initialise(self, role: str, generator: torch.Generator) -> None:
        for name, tensor in self._roles[role].state_dict(keep_vars=True).items():
            if name.endswith("power"):
                tensor.fill_(1.0)
            else:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)

    def parameter_groups(self, role: str) -> list[ParameterGroup]:
        return [ParameterGroup(tuple(name for name, _ in self._roles[role].named_parameters()))]

    def turns(self, iteration: int, images_seen: int) -> list[Turn]:
        return [Turn("net", "train")]

    def parallel_plan(self, role: str) -> ParallelPlan:
        return ParallelPlan()


class _Critic(nn.Module):
    """Logit of an image; `power` is a power-iteration vector that every train-mode forward moves."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(SIDE * SIDE, 12)
        self.last = nn.Linear(12, 1)
        self.register_buffer("power", torch.ones(12))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                # depends on the batch too, so ranks would drift apart if the engine did not keep buffers together
                self.power.mul_(0.9).add_(self.first(x.flatten(1)).abs().mean(0), alpha=0.1)
        return self.last(torch.tanh(self.first(x.flatten(1)) / self.power.norm())).squeeze(1)


class TwoPlayer(_Toy):
    """A GAN on grey images: turns G, D, and R1 in every fourth iteration with a quarter of the rate."""

    def __init__(self) -> None:
        with torch.device("meta"):
            self.generator = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, SIDE * SIDE))
            self.discriminator = _Critic()
        self._roles = {"generator": self.generator, "discriminator": self.discriminator}

    def turns(self, iteration: int, images_seen: int) -> list[Turn]:
        found = [Turn("generator", "g"), Turn("discriminator", "d")]
        return [*found, Turn("discriminator", "r1", lr_scale=0.25)] if iteration % 4 == 3 else found

    def draws(self, turn: Turn) -> dict[str, Draw]:
        return {} if turn.purpose == "r1" else {"z": Draw((6,), Normal())}

    def columns(self) -> dict[str, ColumnSpec]:
        return {"pixels": ColumnSpec(("uint8",), (1, SIDE, SIDE))}

    def counts(self, turn: Turn, batch: Mapping[str, Tensor], draws: Mapping[str, Tensor]) -> dict[str, float]:
        size = float(len(batch["pixels"]))
        return {"d": {"fake": size, "real": size}, "g": {"fool": size}, "r1": {"penalty": size}}[turn.purpose]

    def objective(self, turn: Turn, batch: Mapping[str, Tensor], draws: Mapping[str, Tensor]) -> Losses:
        real = batch["pixels"].float() / 127.5 - 1
        size = float(len(real))
        if turn.purpose == "g":
            fool = F.softplus(-self.discriminator(self._images(draws["z"])))
            return Losses({"fool": Term(fool.sum(), size)})
        if turn.purpose == "d":
            with torch.no_grad():
                fake_images = self._images(draws["z"])
            fake = F.softplus(self.discriminator(fake_images)).sum()
            return Losses({"fake": Term(fake, size), "real": Term(F.softplus(-self.discriminator(real)).sum(), size)})
        keep = torch.is_grad_enabled()  # validation calls without gradients, and this turn needs one inside
        with torch.enable_grad():
            real.requires_grad_(True)
            (slope,) = torch.autograd.grad(self.discriminator(real).sum(), real, create_graph=keep)
        return Losses({"penalty": Term(slope.square().sum(), size, weight=0.5)})

    def _images(self, z: Tensor) -> Tensor:
        return torch.tanh(self.generator(z)).view(-1, 1, SIDE, SIDE)

    def conditions(self, ids: Tensor, plan: Conditioning) -> dict[str, Tensor]:
        return {}

    def generate(
        self, conditions: Mapping[str, Tensor], draws: Draws, settings: Any, poll: Callable[[], None]
    ) -> Tensor:
        poll()
        return ((self._images(draws.take("z", Draw((6,), Normal()))) + 1) * 127.5).round().to(torch.uint8)


class TableCondition(_Toy):
    """Images from a code column: x = W code + noise. It asks for no labels, and the table has none."""

    def __init__(self) -> None:
        with torch.device("meta"):
            self.net = nn.Linear(3, SIDE * SIDE)
        self._roles = {"net": self.net}

    def draws(self, turn: Turn) -> dict[str, Draw]:
        return {"noise": Draw((3,), Normal())}

    def columns(self) -> dict[str, ColumnSpec]:
        return {"pixels": ColumnSpec(("uint8",), (1, SIDE, SIDE)), "code": ColumnSpec(("float32",), (3,))}

    def counts(self, turn: Turn, batch: Mapping[str, Tensor], draws: Mapping[str, Tensor]) -> dict[str, float]:
        return {"square": float(len(batch["pixels"]))}

    def objective(self, turn: Turn, batch: Mapping[str, Tensor], draws: Mapping[str, Tensor]) -> Losses:
        target = batch["pixels"].float() / 127.5 - 1
        made = self.net(batch["code"] + 0.01 * draws["noise"]).view_as(target)
        return Losses({"square": Term((made - target).square().mean(dim=(1, 2, 3)).sum(), float(len(target)))})

    def conditions(self, ids: Tensor, plan: Conditioning) -> dict[str, Tensor]:
        return plan.rows(ids, ("code",))

    def generate(
        self, conditions: Mapping[str, Tensor], draws: Draws, settings: Any, poll: Callable[[], None]
    ) -> Tensor:
        poll()
        made = self.net(conditions["code"]).view(-1, 1, SIDE, SIDE)
        return ((made.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)


class _NextToken(nn.Module):
    """Logits of each token from the one before it; token `vocabulary` begins a sequence."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary + 1, 8)
        self.logits = nn.Linear(8, vocabulary)

    def forward(self, before: Tensor) -> Tensor:
        return self.logits(self.embed(before))


class Tokens(_Toy):
    """Next-token prediction over a token column, trained with a random half of the positions (a dynamic count)."""

    def __init__(self, column: str, vocabulary: int, length: int) -> None:
        self.column, self.vocabulary, self.length = column, vocabulary, length
        with torch.device("meta"):
            self.net = _NextToken(vocabulary)
        self._roles = {"net": self.net}

    def draws(self, turn: Turn) -> dict[str, Draw]:
        return {"keep": Draw((self.length,), Integers(0, 2))}

    def columns(self) -> dict[str, ColumnSpec]:
        return {self.column: ColumnSpec(("int64",), (self.length,))}

    def counts(self, turn: Turn, batch: Mapping[str, Tensor], draws: Mapping[str, Tensor]) -> dict[str, float]:
        return {"cross_entropy": float(draws["keep"].sum())}

    def objective(self, turn: Turn, batch: Mapping[str, Tensor], draws: Mapping[str, Tensor]) -> Losses:
        tokens, keep = batch[self.column], draws["keep"].float()
        before = torch.cat([torch.full_like(tokens[:, :1], self.vocabulary), tokens[:, :-1]], dim=1)
        each = F.cross_entropy(self.net(before).transpose(1, 2), tokens, reduction="none")
        return Losses({"cross_entropy": Term((each * keep).sum(), float(draws["keep"].sum()))})

    def conditions(self, ids: Tensor, plan: Conditioning) -> dict[str, Tensor]:
        return plan.rows(ids, (self.column,))

    def greedy(self, tokens: Tensor) -> Tensor:
        """Most likely token at each place given the one before it."""
        before = torch.cat([torch.full_like(tokens[:, :1], self.vocabulary), tokens[:, :-1]], dim=1)
        return self.net(before).argmax(dim=-1)

    def generate(
        self, conditions: Mapping[str, Tensor], draws: Draws, settings: Any, poll: Callable[[], None]
    ) -> Tensor:
        poll()
        levels = self.greedy(conditions[self.column]) * (255 // max(1, self.vocabulary - 1))
        return levels.to(torch.uint8).view(-1, 1, SIDE, SIDE).expand(-1, 3, -1, -1)


def codec(context: StageContext) -> CodecWorker:
    """Factory of the stage between the two trainings."""
    return CodecWorker(context)


class CodecWorker:
    """Maps the token table of this run to a table of refined tokens, by the first stage's trained network."""

    def __init__(self, context: StageContext) -> None:
        self.context = context
        self.table = open_table(context.workspace, context.experiment.data.table)
        self.checkpoint = read.newest(context.run)
        self.target = context.workspace / str(context.experiment.extra_stages[context.stage].options["table"])

    def units(self) -> list[Unit]:
        return [Unit("all", 0)]

    def fingerprint(self) -> str:
        return read.manifest_sha256(self.checkpoint.path)

    def do(self, unit: Unit, staging: Path, poll: Callable[[], None]) -> dict[str, Path]:
        poll()
        method = build_method(
            self.context.experiment,
            table_facts(self.table),
            lambda role: read.load_role(self.checkpoint.path, role, "main"),
        )
        assert isinstance(method, Tokens)
        tokens = self.table.read(torch.arange(self.table.rows), ("tokens",))["tokens"]
        with torch.no_grad():
            refined = method.greedy(tokens) + tokens
        write_table(staging, {"refined": refined}, shard_rows=64)
        return {
            str(self.target / path.name): path for path in sorted(staging.iterdir(), key=lambda p: p.suffix == ".json")
        }

    def finish(self) -> None:
        """Nothing is left to do."""


def _entry(build: Callable[[TableFacts], Any]) -> MethodEntry:
    return MethodEntry(config=NoKeys, settings=NoKeys, build=lambda config, facts: build(facts))


TWO_PLAYER = _entry(lambda facts: TwoPlayer())
TABLE_CONDITION = _entry(lambda facts: TableCondition())
FIRST_TOKENS = _entry(lambda facts: Tokens("tokens", vocabulary=3, length=SIDE * SIDE))
REFINED_TOKENS = _entry(lambda facts: Tokens("refined", vocabulary=5, length=SIDE * SIDE))


def experiment_of(run: RunFolder) -> Any:
    """The frozen experiment of a run."""
    return load_run(run).experiment
