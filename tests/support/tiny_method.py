"""The smallest method that trains: one weight, few tensors, quick saves; it can be told to lose its mind.

`method: {name: "tiny_method:ENTRY", ...}`. A turn is named by what happens in it: "train" is healthy, "bad" gives NaN
whatever is drawn, "unlucky" gives NaN where the draw `fate` of its first sample says so (other draws may be lucky).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

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
from hpc_gen.runtime.randomness import Draw, Draws, Uniform

PIXELS = 64


class Config(BaseModel):
    """Places on the clock (images_seen before the step)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    bad_at: tuple[int, ...] = ()
    bad_from: int | None = None
    unlucky: tuple[int, ...] = ()


class Settings(BaseModel):
    """No sampler settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TinyMethod:
    """Learns to tell the brightness of a noisy image."""

    def __init__(self, config: Config) -> None:
        self._config = config
        with torch.device("meta"):
            self._net = nn.Linear(PIXELS, 1, bias=False)

    def roles(self) -> dict[str, nn.Module]:
        return {"net": self._net}

    def initialise(self, role: str, generator: torch.Generator) -> None:
        for parameter in self._net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)

    def parameter_groups(self, role: str) -> list[ParameterGroup]:
        return [ParameterGroup(tuple(name for name, _ in self._net.named_parameters()))]

    def turns(self, iteration: int, images_seen: int) -> list[Turn]:
        bad_from = self._config.bad_from
        if images_seen in self._config.bad_at or (bad_from is not None and images_seen >= bad_from):
            return [Turn("net", "bad")]
        return [Turn("net", "unlucky" if images_seen in self._config.unlucky else "train")]

    def draws(self, turn: Turn) -> dict[str, Draw]:
        return {"noise": Draw((PIXELS,)), "fate": Draw((), Uniform())}

    def counts(self, turn: Turn, batch: Mapping[str, Tensor], draws: Mapping[str, Tensor]) -> dict[str, float]:
        return {"mse": float(len(batch["labels"]))}

    def objective(self, turn: Turn, batch: Mapping[str, Tensor], draws: Mapping[str, Tensor]) -> Losses:
        images = batch["pixels"].flatten(1).float() / 255
        guess = self._net(images + 0.1 * draws["noise"]).flatten()
        loss = (guess - images.mean(1)).square().sum()
        if turn.purpose == "bad" or (turn.purpose == "unlucky" and is_unlucky(float(draws["fate"][0]))):
            loss = loss * float("nan")
        return Losses({"mse": Term(loss, float(len(guess)))})

    def columns(self) -> dict[str, ColumnSpec]:
        return {"pixels": ColumnSpec(("uint8",), (1, 8, 8)), "labels": ColumnSpec(("int64",), ())}

    def parallel_plan(self, role: str) -> ParallelPlan:
        return ParallelPlan()

    def conditions(self, ids: Tensor, plan: Conditioning) -> dict[str, Tensor]:
        return {}

    def generate(
        self, conditions: Mapping[str, Tensor], draws: Draws, settings: Any, poll: Callable[[], None]
    ) -> Tensor:
        raise NotImplementedError("this method only trains")


def is_unlucky(fate: float) -> bool:
    """Whether a sample's fate, in [0, 1), makes the loss of an unlucky turn NaN."""
    return fate < 0.5


def build(config: Config, facts: TableFacts) -> TinyMethod:
    """The method on the meta device; any table of 8 x 8 grey images will do."""
    return TinyMethod(config)


ENTRY = MethodEntry(config=Config, settings=Settings, build=build)
