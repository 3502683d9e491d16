"""Bytes that each rank will hold, by class, before anything is allocated: for any engine and number of ranks.

Classes:
  parameters    fp32 masters, and buffers
  copies        what the networks compute with, where that is not the masters: parameters in another format, or gathered
                from other ranks
  gradients     as they wait for the optimizer
  reduction     whole gradients that are not reduced yet, and the buffers for that
  optimizer     two moments, fp32
  averages      fp32, every average of `train.ema`
  activations   of one micro-batch, by a backward pass on tensors without memory (fake_step.py)
Told is the most loaded rank, rank 0: torch gives it the longer part of what does not divide. How fsdp cuts is not
computed here but asked: `fully_shard` is applied to the networks on the meta device, in process groups of ranks that do
not exist. With tensor parallelism activations are told as if nobody shared them: too many. Not counted: networks of
`train.frozen` (nor their FLOPs), the batches of the feed, workspaces of kernels, fragmentation, NCCL's buffers (a GB or
two).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from hpc_gen.config.experiment import TrainConfig
from hpc_gen.methods.protocol import Method, ParallelPlan
from hpc_gen.runtime.progress import count, format_bytes
from hpc_gen.runtime.ranks import Ranks, fake_ranks
from hpc_gen.training.engines.base import Holder

CLASSES = ("parameters", "copies", "gradients", "reduction", "optimizer", "averages", "activations")
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
    """Bytes of one rank by class; `on_host`: classes that lie in host memory (train.engine.offload).

    `late`: classes that grow while the backward pass lets go of activations, so that only the larger of both counts.
    """

    world_size: int
    engine: str
    bytes: Mapping[str, int]
    on_host: frozenset[str] = frozenset()
    late: frozenset[str] = frozenset()

    @property
    def device_bytes(self) -> int:
        """The most that lies on the device at once."""
        here = {name: size for name, size in self.bytes.items() if name not in self.on_host}
        late = sum(size for name, size in here.items() if name in self.late)
        activations = here.get("activations", 0)
        return sum(here.values()) - late - activations + max(late, activations)

    def lines(self) -> list[str]:
        """For people: a line per class, then the sum."""
        found = [f"{self.engine} on {count(self.world_size, 'rank')}; bytes of the most loaded one"]
        for name in CLASSES:
            if name not in self.bytes:
                found.append(f"{name:<12} {'?':>8}")
                continue
            where = "  in host memory" if name in self.on_host else "  as activations go" if name in self.late else ""
            found.append(f"{name:<12} {format_bytes(self.bytes[name]):>8}{where}")
        return [*found, f"{'together':<12} {format_bytes(self.device_bytes):>8}"]

    def summary(self) -> str:
        """In one line."""
        parts = [f"{name} {format_bytes(self.bytes[name])}" for name in CLASSES if self.bytes.get(name)]
        return f"{format_bytes(self.device_bytes)} per rank: {', '.join(parts)}"


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
    engine = config.engine
    shares = [share for role in trained for share in _whole(method, role, roles[role], engine.tensor_parallel)]
    if engine.name == "fsdp":
        with fake_ranks(world_size) as ranks:
            shares = _cut(method, [roles[role] for role in trained], trained, config, ranks, shares)
    elif engine.name == "deepspeed":
        shares = [Share(s.numel, math.ceil(s.numel / world_size) if s.trained else s.numel, s.trained) for s in shares]
    found = _by_class(shares, config, world_size)
    found["parameters"] += buffers + MASTER * frozen
    if activation_bytes is not None:
        found["activations"] = activation_bytes
    return _plan(found, config, world_size)


def plan_of(method: Method, holder: Holder, roles: Sequence[str], config: TrainConfig, world_size: int) -> MemoryPlan:
    """The plan of an engine that is there, by what it says it holds of its trained `roles`; without activations."""
    shares = []
    for role in roles:
        trained = {name for group in method.parameter_groups(role) for name in group.names}
        plan = method.parallel_plan(role)
        for name, layout in holder.layouts(role).items():
            unit = _unit(plan, role, name)
            shares.append(Share(math.prod(layout.shape), layout.numel, name in trained, unit))
    return _plan(_by_class(shares, config, world_size), config, world_size)


def _plan(found: Mapping[str, int], config: TrainConfig, world_size: int) -> MemoryPlan:
    engine = config.engine
    host = frozenset(("parameters", "gradients", "optimizer", "averages")) if engine.offload == "cpu" else frozenset()
    late = frozenset()
    if engine.name == "fsdp":
        late = frozenset(("gradients",) if _keeps_whole(config, world_size) else ("gradients", "reduction"))
    return MemoryPlan(world_size, _told(config, world_size), found, host, late - host)


def _whole(method: Method, role: str, module: nn.Module, ways: int) -> list[Share]:
    """Every parameter, held whole but for the layers that `ways` tensor-parallel ranks share."""
    plan = method.parallel_plan(role)
    found = []
    for name, parameter in module.named_parameters():
        layer, _, key = name.rpartition(".")
        split = plan.tensor_splits.get(layer) if ways > 1 else None
        local = parameter.numel()
        if split is not None and not (split.kind == "row" and key == "bias"):
            local //= ways
        found.append(Share(parameter.numel(), local, parameter.requires_grad, _unit(plan, role, name)))
    return found


def _unit(plan: ParallelPlan, role: str, name: str) -> str:
    """The unit of sharding that a parameter belongs to, "" for none."""
    units = () if plan.differentiates_inside else plan.fsdp_units
    return next((f"{role}.{each}" for each in units if name.startswith(f"{each}.")), "")


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
        "reduction": 0,
        "gradients": MASTER * held_trained,
        "optimizer": MOMENTS * held_trained,
        "averages": MASTER * averages * held,
    }
    seen = 2 if engine.param_dtype is not None else MASTER  # bytes of a parameter as the networks see it
    whole, whole_trained = _sum(shares), _sum(shares, trained=True)
    if engine.name == "fsdp":
        rest = _sum(share for share in shares if not share.unit)
        # the rest is gathered all through a step; of the units two at a time (stage 3), or all (stage 2)
        found["copies"] = seen * (whole if engine.zero_stage == 2 else rest + 2 * _largest(shares))
        largest = max(_largest(shares), _sum((s for s in shares if not s.unit), trained=True))
        found["reduction"] = seen * (whole_trained if _keeps_whole(config, world_size) else largest) + MASTER * largest
    elif engine.name == "deepspeed":
        found["copies"] = seen * (held_trained + 2 * _largest(shares) if engine.zero_stage == 3 else whole)
        found["reduction"] = int(engine.bucket_mb * 2**20)
        if engine.zero_stage == 1:
            found["gradients"] = seen * whole_trained
    return found


def _keeps_whole(config: TrainConfig, world_size: int) -> bool:
    """Whether whole gradients stay over the micro-batches of a step: stage 2 of fsdp, which reduces them once."""
    several = config.global_batch // (world_size * config.micro_batch_for(world_size)) > 1
    return config.engine.zero_stage == 2 and several


def _largest(shares: Sequence[Share]) -> int:
    """Elements of the largest unit, 0 where there are none."""
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
