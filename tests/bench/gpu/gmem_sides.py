"""The two sides of the GMem bench: our engine with our method, and the plain re-statement, on the same weights and rows.

Import it after `bare.make_importable`. Rows and draws lie ready in host memory, pinned for a GPU, and travel with every
step; reading and drawing are not part of it.
"""

from __future__ import annotations

import gc
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from gmem_plain import PlainDiT, allow_anything, sampled, training_step
from torch import Tensor, nn
from torch.nn import functional as F

from hpc_gen.config.engine import EngineConfig
from hpc_gen.config.train import EmaConfig, OptimizerConfig, TrainConfig
from hpc_gen.methods.gmem.config import GmemConfig, SamplingSettings
from hpc_gen.methods.gmem.objective import ROLE, Gmem
from hpc_gen.methods.gmem.sampler import guided_velocity, solution
from hpc_gen.methods.materialise import materialise
from hpc_gen.runtime.randomness import Stream
from hpc_gen.runtime.ranks import Ranks
from hpc_gen.training.ema import EmaSet
from hpc_gen.training.engines.build import build_engine
from hpc_gen.training.fake_step import measure
from hpc_gen.training.precision import set_determinism

# The `method` and `train` sections of job_configs/gmem/sde_xl.yaml, but latents where it samples moments anew.
XL = GmemConfig(image_size=256, tokenizer_stride=16, channels=32, patch_size=1, hidden=1152, depth=28, heads=16)
TINY = GmemConfig(
    image_size=64, hidden=48, depth=5, heads=4, snippet_dim=24, projector_hidden=32, repr_dim=20
)  # fmt: skip
RATE = 2e-4
Batch = Mapping[str, Tensor]
Step = Callable[[Any], float]  # of one batch of the host; returns the loss


@dataclass(frozen=True)
class Setting:
    """What all cells share."""

    sizes: GmemConfig
    ranks: Ranks
    deterministic: bool = True
    threads: int = 1
    seed: int = 0

    @property
    def device(self) -> torch.device:
        """Of this rank."""
        return self.ranks.device


def train_section(setting: Setting, engine: str, compiled: bool) -> TrainConfig:
    """The published one around another engine; the number of images means nothing here."""
    images = 1024 * setting.ranks.world_size
    return TrainConfig(
        total_images=images,
        global_batch=images,
        ranks=setting.ranks.world_size,
        log_every=images,
        threads=setting.threads,
        deterministic=setting.deterministic,
        precision="bf16",
        optimizer=OptimizerConfig(lr=RATE, betas=(0.9, 0.95), weight_decay=0.0, clip=1.0),
        ema={"main": EmaConfig(decay=0.9999)},
        engine=EngineConfig(name=engine, compile="blocks" if compiled else None),
    )


def identity(setting: Setting) -> str:
    """Hash of the sections that all cells share: method and train."""
    told = [setting.sizes.model_dump(mode="json"), train_section(setting, "ddp", False).model_dump(mode="json")]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def flops_per_image(setting: Setting) -> float:
    """FLOPs of one image, forward and backward, by the counter of hpc_gen."""
    method = Gmem(setting.sizes)
    columns = {name: ("float16", tuple(spec.shape)) for name, spec in method.columns().items()}
    return measure(method, columns, train_section(setting, "ddp", False), 2).flops_per_image


class Sides:
    """Builds either side from the same initial values, which are drawn once."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._values: dict[str, Tensor] = {}

    def _method(self) -> Gmem:
        method = Gmem(self.setting.sizes)
        if self._values:
            method.model.to_empty(device="cpu")
            method.model.load_state_dict(self._values)
        else:
            materialise(method, self.setting.seed)
            self._values = {name: each.clone() for name, each in method.model.state_dict().items()}
        return method

    def ours(self, engine: str, compiled: bool) -> Step:
        """A step of our engine, and of the average after it as the loop does."""
        setting, config = self.setting, train_section(self.setting, engine, compiled)
        set_determinism(config.deterministic, config.threads)
        method = self._method()
        built = build_engine(method, method.roles(), config, setting.ranks, setting.device)
        average = EmaSet(built.modules(), {name: each.decay for name, each in config.ema.items()}, built)
        (turn,) = method.turns(0, 0)

        def step(batch: tuple[Batch, Batch]) -> float:
            result = built.step(turn, [batch], RATE)
            assert result.finite, f"a step that is not finite: {result}"
            average.update([ROLE])
            return result.total

        return step

    def plain(self, compiled: bool) -> Step:
        """A step of the plain re-statement."""
        allow_anything()
        return training_step(self._plain_network(compiled), self.setting.device)

    def _plain_network(self, compiled: bool = False) -> PlainDiT:
        if not self._values:
            self._method()
        with torch.device("meta"):
            model = PlainDiT(self.setting.sizes)
        model.to_empty(device=self.setting.device).load_state_dict(self._values)
        if compiled:
            model.compile_parts()
        return model

    def batches(self, side: str, size: int, number: int = 2) -> list[Any]:
        """Batches of `size` rows of this rank, as the side takes them: the same latents, times, noise and masks."""
        return [self._batch(side, size, index) for index in range(number)]

    def _batch(self, side: str, size: int, index: int) -> Any:
        setting = self.setting
        method, first = Gmem(setting.sizes), (index * setting.ranks.world_size + setting.ranks.rank) * size
        (turn,) = method.turns(0, 0)
        generator = torch.Generator().manual_seed(first)
        columns = {
            name: torch.randn(size, *spec.shape, generator=generator).half() for name, spec in method.columns().items()
        }
        positions = range(first, first + size)
        draws = {name: Stream(0, f"bench/{name}").batch(each, positions) for name, each in method.draws(turn).items()}
        if side == "plain":
            return self._pinned(_as_reference(method, columns, draws))
        return self._pinned(columns), self._pinned(draws)

    def _pinned(self, tensors: Batch) -> dict[str, Tensor]:
        return {k: v.pin_memory() if self.setting.device.type == "cuda" else v for k, v in tensors.items()}

    # -- the sampler --------------------------------------------------------------------------------------------------

    def samplers(self, images: int, points: int) -> dict[str, Callable[[], Tensor]]:
        """Heun's SDE in fp32, ours with one call of the network per drift and the reference's with two."""
        setting, method = self.setting, self._method()
        ours, theirs = method.model.to(setting.device).eval(), self._plain_network().eval()
        draw = torch.Generator().manual_seed(1)
        snippet = F.normalize(torch.randn(images, setting.sizes.snippet_dim, generator=draw), dim=-1).to(setting.device)
        x = torch.randn(images, *setting.sizes.input_shape, generator=draw).to(setting.device)
        noise = torch.randn(points, *x.shape, generator=draw)
        velocity = guided_velocity(ours, snippet, torch.zeros_like(snippet), SamplingSettings().guidance)

        @torch.no_grad()
        def one_call() -> Tensor:
            set_determinism(setting.deterministic, setting.threads)
            *_, last = solution(velocity, x, SamplingSettings(points=points), lambda k: noise[k], lambda: None)
            return last

        def two_calls(freely: bool) -> Tensor:
            allow_anything() if freely else set_determinism(setting.deterministic, setting.threads)
            return sampled(theirs, x, snippet, points, noise.to(setting.device))

        return {
            "hpc-gen, one call of the network per drift": one_call,
            "plain, two calls, kernels as ours": lambda: two_calls(freely=False),
            "plain, two calls, TF32 allowed as in the reference": lambda: two_calls(freely=True),
        }


def _as_reference(method: Gmem, columns: Batch, draws: Batch) -> dict[str, Tensor]:
    """What the reference's loader gives: the mirrored or the plain row, already chosen, in float32."""

    def chosen(name: str) -> Tensor:
        mirrored = (draws["flip"] < 0.5).view(-1, *[1] * (columns[name].ndim - 1))
        return torch.where(mirrored, columns[f"{name}_flip"], columns[name]).float()

    return {
        "x1": chosen("latents"),
        "snippet": chosen("cls_tokens"),
        "representation": chosen("representations"),
        "noise": draws["noise"],
        "t": draws["t"],
        "keep": (draws["keep"] >= method.config.snippet_dropout).float(),
    }


def timed(action: Callable[[], Any], device: torch.device) -> float:
    """Seconds of an action until the device has done it."""
    _wait(device)
    begun = time.perf_counter()
    action()
    _wait(device)
    return time.perf_counter() - begun


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def memory(which: str, device: torch.device) -> float | None:
    return getattr(torch.cuda, which)(device) / 2**30 if device.type == "cuda" else None


def release(device: torch.device, before: set[int], smallest: int = 2**20) -> None:
    """Give back what an engine held. Its hooks on parameters tie it into knots that Python's collector does not see.

    So whatever lies on the device, is not of the storages `before` and has at least `smallest` bytes is emptied.
    """
    gc.collect()
    for storage in storages(device):
        if storage.data_ptr() not in before and storage.nbytes() >= smallest:
            storage.resize_(0)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def storages(device: torch.device) -> list[torch.UntypedStorage]:
    """Of all tensors on a device that Python knows, but those without memory of their own (fake ones, DTensors)."""
    found = []
    for each in gc.get_objects():
        if type(each) in (Tensor, nn.Parameter) and each.device.type == device.type:
            found.append(each.untyped_storage())
    return found
