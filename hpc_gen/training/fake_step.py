"""What one step of a method costs, with no memory and no GPU: its FLOPs, and the bytes that its activations hold.

The objective and its backward pass run on tensors that have shape and dtype but no values (torch's FakeTensor). FLOPs
are those of matrix products, convolutions and attention, two per multiply-add, by the formulas of torch's flop_counter
(its own mode stumbles over losses that differentiate inside the forward). What is recomputed by activation
checkpointing is not counted, so MFU means the same for every engine; a method that recomputes by its own objective
(forward-over-reverse of the energy variant) is counted as it computes.

Draws and labels of one number per sample keep their values, so that counts which follow from them (steps of an inner
loop) are real; where a decision hangs on a network's output, the answer is yes and the number is one.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from hpc_gen.config.experiment import TrainConfig
from hpc_gen.methods.protocol import Method, Turn
from hpc_gen.runtime.randomness import Draw, Stream
from hpc_gen.training.engines.units import cast_at_border, prepare_blocks
from hpc_gen.training.precision import autocast

ITERATIONS = 64  # over which turns that do not happen every time are averaged
CPU = torch.device("cpu")
SEEN = {"bf16": torch.bfloat16, "fp16": torch.float16, None: None}  # train.engine.param_dtype
FREE_SIDE = 16  # a side of -1 in a column's shape


@dataclass(frozen=True)
class FakeStep:
    """Cost of training: `flops_per_image` over all turns; `activation_bytes` of one micro-batch, the largest turn's.

    `turn_flops`: FLOPs of one image in each kind of turn.
    """

    flops_per_image: float
    activation_bytes: int
    turn_flops: Mapping[str, float]
    micro_batch: int


def measure(
    method: Method,
    columns: Mapping[str, tuple[str, tuple[int, ...]]],
    config: TrainConfig,
    micro_batch: int,
    as_engine: bool = False,
) -> FakeStep:
    """Cost of the method's turns.

    `method`: on the meta device; its modules are given fake memory, so do not use it for anything else. `columns`:
    dtype and row shape of the table's columns. `as_engine`: parameters in the format of `train.engine`, with its
    activation checkpointing; then the FLOPs count what is recomputed, too, and the bytes are those to expect.
    """
    turns: Counter[Turn] = Counter()
    for iteration in range(ITERATIONS):
        turns.update(method.turns(iteration, iteration * config.global_batch))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    roles = method.roles()
    seen = SEEN[config.engine.param_dtype] if as_engine else None
    for role, module in roles.items():
        _fill(module, mode, seen if method.parameter_groups(role) else None, keep_blocks=as_engine)
    if as_engine:
        _as_engine(method, roles, config, seen)
    trained = {role: [p for p in module.parameters() if p.requires_grad] for role, module in roles.items()}
    flops: dict[str, float] = {}
    largest = 0
    for turn in turns:
        for role, parameters in trained.items():
            for parameter in parameters:
                parameter.requires_grad_(role == turn.role)
        batch = {name: _column(*columns[name], micro_batch, mode) for name in method.columns()}
        draws = {
            name: _draw(draw, micro_batch // (config.coupling_group if draw.per == "group" else 1), mode)
            for name, draw in method.draws(turn).items()
        }
        count, held = _one(method, turn, batch, draws, autocast(CPU, config.precision), mode)
        flops[turn.purpose], largest = count / micro_batch, max(largest, held)
    total = sum(flops[turn.purpose] * number for turn, number in turns.items()) / ITERATIONS
    return FakeStep(total, largest, flops, micro_batch)


def _one(
    method: Method,
    turn: Turn,
    batch: Mapping[str, Tensor],
    draws: Mapping[str, Tensor],
    policy: AbstractContextManager[object],
    mode: FakeTensorMode,
) -> tuple[float, int]:
    """FLOPs and bytes of one micro-batch of one turn."""
    hooks = [
        # as soon as it is there it goes into the engine's gradients, which are counted as gradients
        parameter.register_post_accumulate_grad_hook(_drop)
        for module in method.roles().values()
        for parameter in module.parameters()
        if parameter.requires_grad
    ]
    cost = _Cost()
    try:
        with mode, _Decisions(), cost:
            with policy:
                losses = method.objective(turn, batch, draws)
            total = sum(term.sum.float() * term.weight for term in losses.terms.values() if term.weight != 0.0)
            assert isinstance(total, Tensor), "a turn without a trained term"
            del losses
            total.backward()
            del total
    finally:
        for hook in hooks:
            hook.remove()
    return float(cost.flops), cost.peak


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def _as_engine(method: Method, roles: Mapping[str, nn.Module], config: TrainConfig, seen: torch.dtype | None) -> None:
    """What engines do to networks and changes bytes."""
    prepare_blocks(method, roles, config.engine.model_copy(update={"compile": None}))
    for role, module in roles.items():
        if seen is not None and method.parameter_groups(role):
            cast_at_border(module, seen)


def _fill(module: nn.Module, mode: FakeTensorMode, seen: torch.dtype | None, keep_blocks: bool) -> None:
    """Fake memory on the CPU for a module on the meta device; `seen`: format of its parameters, None = their own.

    Blocks that recompute by themselves are told not to, unless `keep_blocks`.
    """
    known: dict[int, Any] = {}
    for part in module.modules():
        if getattr(part, "checkpoint_blocks", False) and not keep_blocks:
            part.checkpoint_blocks = False  # type: ignore[assignment]
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in known:
                    parameter = isinstance(tensor, nn.Parameter)
                    dtype = seen if seen is not None and parameter else tensor.dtype
                    with mode:
                        fake = torch.empty(tensor.shape, dtype=dtype, device="cpu")
                    known[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if parameter else fake
                held[name] = known[id(tensor)]


def _column(dtype: str, shape: tuple[int, ...], micro_batch: int, mode: FakeTensorMode) -> Tensor:
    sides = tuple(side if side > 0 else FREE_SIDE for side in shape)
    if not sides:
        return torch.zeros(micro_batch, dtype=getattr(torch, dtype))
    with mode:
        return torch.empty((micro_batch, *sides), dtype=getattr(torch, dtype))


def _draw(draw: Draw, number: int, mode: FakeTensorMode) -> Tensor:
    if not draw.shape:
        return Stream(0, "fake step").batch(draw, range(number))
    with mode:
        return torch.empty((number, *draw.shape), dtype=draw.dtype)


class _Decisions(TorchDispatchMode):
    """Operators on tensors that all have values are computed; a value that is asked of a fake tensor is made up."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_iter((args, kwargs or {})) if isinstance(leaf, Tensor)]
        if tensors and not any(isinstance(each, FakeTensor) for each in tensors):
            with _disable_current_modes():
                return func(*args, **(kwargs or {}))
        if func is torch.ops.aten._local_scalar_dense.default:
            dtype = tensors[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        return func(*args, **(kwargs or {}))


class _Cost(TorchDispatchMode):
    """FLOPs of what operators compute, and bytes of the storages they have made that are alive: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(func._overloadpacket)
        if formula is None and func.namespace == "aten":
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        given = {leaf.untyped_storage()._cdata for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **kwargs)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        for leaf in tree_iter(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                self._made(leaf.untyped_storage())
        return out

    def _made(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)
