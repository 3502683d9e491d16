"""Bytes that each rank will hold, by class, before anything is allocated: for any engine and number of ranks.

Classes:
  parameters    fp32 masters, and buffers
  copies        what the networks compute with, where that is not the masters: parameters in another format or gathered
                from other ranks, and what backward passes hold of whole gradients before they are reduced
  gradients     as they wait for the optimizer
  optimizer     two moments, fp32
  averages      fp32, every average of `train.ema`
  activations   of one micro-batch, by a backward pass on tensors without memory (fake_step.py)
Told is the most loaded rank, rank 0: torch gives it the longer part of what does not divide. How fsdp cuts is not
computed here but asked: `fully_shard` is applied to the networks on the meta device, in process groups of ranks that do
not exist. Not counted: the batches of the feed, workspaces of kernels, fragmentation, NCCL's buffers (a GB or two).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from hpc_gen.config.experiment import TrainConfig
from hpc_gen.methods.protocol import Method
from hpc_gen.runtime.progress import format_count
from hpc_gen.runtime.ranks import Ranks, fake_ranks

CLASSES = ("parameters", "copies", "gradients", "optimizer", "averages", "activations")
MASTER = 4  # bytes of an fp32 number
MOMENTS = 2 * MASTER


@dataclass(frozen=True)
class Share:
    """One parameter: elements of all of it and of this rank's part; whether it is trained; its unit ("" = the rest)."""

    numel: int
    local: int
    trained: bool
    unit: str = ""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank by class; `on_host`: classes that lie in host memory (train.engine.offload)."""

    world_size: int
    engine: str
    bytes: Mapping[str, int]
    on_host: frozenset[str] = frozenset()

    @property
    def device_bytes(self) -> int:
        """All that lies on the device."""
        return sum(size for name, size in self.bytes.items() if name not in self.on_host)

    def lines(self) -> list[str]:
        """For people: a line per class, then the sum."""
        found = [f"{self.engine} on {self.world_size} ranks; bytes of the most loaded one"]
        for name in CLASSES:
            if name not in self.bytes:
                found.append(f"{name:<12} {'?':>8}")
                continue
            where = "  in host memory" if name in self.on_host else ""
            found.append(f"{name:<12} {_size(self.bytes[name]):>8}{where}")
        return [*found, f"{'together':<12} {_size(self.device_bytes):>8}"]

    def summary(self) -> str:
        """In one line."""
        parts = [f"{name} {_size(self.bytes[name])}" for name in CLASSES if self.bytes.get(name)]
        return f"{_size(self.device_bytes)} per rank: {', '.join(parts)}"


def plan_memory(
    method: Method, config: TrainConfig, world_size: int, activation_bytes: int | None = None
) -> MemoryPlan:
    """The plan of a method whose roles are on the meta device; `activation_bytes`: of fake_step.py, None = unknown.

    fsdp: cuts the method's modules, which are good for nothing else afterwards. Raises UserError where the ranks do not
    fit the engine (`engines.build.refuse` says it in words before).
    """
    roles = method.roles()
    buffers = sum(b.numel() * b.element_size() for module in roles.values() for b in module.buffers())
    trained = [role for role in roles if method.parameter_groups(role)]
    frozen = sum(p.numel() for role, module in roles.items() if role not in trained for p in module.parameters())
    shares = [share for role in trained for share in _whole(method, role, roles[role])]
    engine = config.engine
    if engine.name == "fsdp":
        with fake_ranks(world_size) as ranks:
            shares = _cut(method, [roles[role] for role in trained], trained, config, ranks, shares)
    elif engine.name == "deepspeed":
        shares = [Share(s.numel, math.ceil(s.numel / world_size) if s.trained else s.numel, s.trained) for s in shares]
    found = _by_class(shares, config, world_size)
    found["parameters"] += buffers + MASTER * frozen
    if activation_bytes is not None:
        found["activations"] = activation_bytes
    host = frozenset(("parameters", "gradients", "optimizer")) if engine.offload == "cpu" else frozenset()
    return MemoryPlan(world_size, _told(config, world_size), found, host)


def _whole(method: Method, role: str, module: nn.Module) -> list[Share]:
    plan = method.parallel_plan(role)
    units = () if plan.differentiates_inside else plan.fsdp_units
    found = []
    for name, parameter in module.named_parameters():
        unit = next((each for each in units if name.startswith(f"{each}.")), "")
        found.append(Share(parameter.numel(), parameter.numel(), parameter.requires_grad, unit and f"{role}.{unit}"))
    return found


def _cut(
    method: Method,
    modules: Sequence[nn.Module],
    roles: Sequence[str],
    config: TrainConfig,
    ranks: Ranks,
    shares: Sequence[Share],
) -> list[Share]:
    """The same shares with what rank 0 holds of each, as `fully_shard` decides."""
    from torch.distributed.fsdp import fully_shard

    shards = config.engine.shards or ranks.world_size
    copies = ranks.world_size // shards
    shape, names = ((shards,), ("shard",)) if copies == 1 else ((copies, shards), ("copy", "shard"))
    mesh = ranks.mesh(shape, names)
    root = _Root(dict(zip(roles, modules, strict=True)))
    for role, module in zip(roles, modules, strict=True):
        plan = method.parallel_plan(role)
        for name in () if plan.differentiates_inside else plan.fsdp_units:
            fully_shard(module.get_submodule(name), mesh=mesh)
    scalars = {p for p in root.parameters() if p.dim() == 0}  # they stay whole on every rank
    fully_shard(root, mesh=mesh, ignored_params=scalars)
    local = [p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in root.parameters()]
    return [Share(s.numel, held, s.trained, s.unit) for s, held in zip(shares, local, strict=True)]


class _Root(nn.Module):
    """All trained roles as one module: what no unit owns is sharded together."""

    def __init__(self, roles: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.roles = nn.ModuleDict(roles)

    def forward(self) -> None:
        """Never called; torch wants one."""


def _by_class(shares: Sequence[Share], config: TrainConfig, world_size: int) -> dict[str, int]:
    engine, averages = config.engine, len(config.ema)
    held, held_trained = _sum(shares, local=True), _sum(shares, local=True, trained=True)
    found = {
        "parameters": MASTER * held,
        "copies": 0,
        "gradients": MASTER * held_trained,
        "optimizer": MOMENTS * held_trained,
        "averages": MASTER * averages * held,
    }
    seen = 2 if engine.param_dtype is not None else MASTER  # bytes of a parameter as the networks see it
    whole, whole_trained = _sum(shares), _sum(shares, trained=True)
    if engine.name == "fsdp":
        found["copies"] = _gathered(shares, config, world_size, seen)
    elif engine.name == "deepspeed":
        bucket = int(engine.bucket_mb * 2**20)
        found["copies"] = seen * (held_trained if engine.zero_stage == 3 else whole) + bucket
        if engine.zero_stage == 1:
            found["gradients"] = seen * whole_trained
        if engine.zero_stage == 3:
            found["copies"] += seen * 2 * _largest(shares)
    return found


def _gathered(shares: Sequence[Share], config: TrainConfig, world_size: int, seen: int) -> int:
    """What fsdp gathers: the rest always; of the units two at a time (stage 3) or all (stage 2)."""
    rest = _sum(share for share in shares if not share.unit)
    largest = max(_largest(shares), _sum((s for s in shares if not s.unit), trained=True))
    several = config.global_batch // (world_size * config.micro_batch_for(world_size)) > 1
    if config.engine.zero_stage == 3:
        parameters, gradients = rest + 2 * _largest(shares), largest
    else:
        # whole gradients stay over the micro-batches of a step, and are reduced once
        parameters, gradients = _sum(shares), _sum(shares, trained=True) if several else largest
    return seen * (parameters + gradients) + MASTER * largest


def _largest(shares: Sequence[Share]) -> int:
    """Elements of the largest unit; of the largest parameter where there are none."""
    units: dict[str, int] = {}
    for share in shares:
        if share.unit:
            units[share.unit] = units.get(share.unit, 0) + share.numel
    return max(units.values(), default=0)


def _sum(shares: Iterable[Share], local: bool = False, trained: bool = False) -> int:
    return sum((s.local if local else s.numel) for s in shares if s.trained or not trained)


def _told(config: TrainConfig, world_size: int) -> str:
    engine = config.engine
    name = engine.name if engine.name == "ddp" else f"{engine.name} stage {engine.zero_stage}"
    if engine.shards is not None and engine.shards < world_size:
        name += f", {world_size // engine.shards} copies of {engine.shards} shards"
    return name + (f", parameters seen in {engine.param_dtype}" if engine.param_dtype else "")


def _size(number: int) -> str:
    return f"{format_count(number)}B"
