"""What all engines share: one turn over micro-batches around the objective, its guard, evaluation, state and loading.

An engine says how gradients are begun, reduced, measured and applied; that the losses are global means, that a step
which is not finite changes nothing, and what the state is called, is decided here once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from hpc_gen.config.experiment import TrainConfig
from hpc_gen.methods.protocol import Losses, Method, Turn
from hpc_gen.runtime import spans
from hpc_gen.runtime.errors import CheckpointError
from hpc_gen.runtime.ranks import Ranks
from hpc_gen.training.checkpoint.pieces import Below, Pieces, kind_of
from hpc_gen.training.engines.base import MicroBatch, Parts, StepResult
from hpc_gen.training.engines.layout import Layout
from hpc_gen.training.engines.whole import Plain, gathered
from hpc_gen.training.optimizers import RoleOptimizer
from hpc_gen.training.precision import autocast


class ObjectiveEngine:
    """Base of the engines; a subclass fills `_optimizers`, `_parts` and `_layouts` and gives the hooks at the end."""

    name = ""

    def __init__(
        self, method: Method, modules: Mapping[str, nn.Module], config: TrainConfig, ranks: Ranks, device: torch.device
    ) -> None:
        """`modules`: the method's own roles. Names of the state are those of the modules as they are given here."""
        self._method = method
        self._ranks = ranks
        self._config = config
        self._device = device
        self._modules = dict(modules)
        self._groups = {role: method.parameter_groups(role) for role in self._modules}
        self._optimizers: dict[str, RoleOptimizer] = {}
        self._parts: dict[str, dict[str, Tensor]] = {}
        self._layouts: dict[str, dict[str, Layout]] = {}
        self._names = {role: _names(module) for role, module in self._modules.items()}
        self._plain = {role: Plain(module) for role, module in self._modules.items() if self._groups[role]}
        self._used: dict[tuple[str, str], frozenset[str]] = {}
        self._stepping: str | None = None  # the role for which modes and requires_grad are set
        self.data_rank, self.data_ranks, self.leads_data = ranks.rank, ranks.world_size, True
        for role, module in self._modules.items():
            if not self._groups[role]:
                module.requires_grad_(False)

    def _ready(self) -> None:
        """The last line of a subclass's constructor: buffers lie where they will stay."""
        self._buffer_versions = {b: b._version for module in self._modules.values() for b in module.buffers()}
        self._moving: set[Tensor] | None = None  # buffers that a step has changed; None: no step was made yet

    def modules(self) -> dict[str, nn.Module]:
        """The roles by name."""
        return self._modules

    def trained_roles(self) -> list[str]:
        """Roles that have an optimizer."""
        return list(self._optimizers)

    def parts(self, role: str) -> dict[str, Tensor]:
        """See Holder."""
        return self._parts[role]

    def layouts(self, role: str) -> dict[str, Layout]:
        """See Holder."""
        return self._layouts[role]

    def whole(self, parts: Parts | None = None) -> AbstractContextManager[None]:
        """See Holder."""
        return gathered(self._plain, self._layouts, self._parts if parts is None else parts, self._ranks, self._device)

    # -- a step -------------------------------------------------------------------------------------------------------

    def step(
        self, turn: Turn, micro_batches: Sequence[MicroBatch], lr: float, highest_loss: float | None = None
    ) -> StepResult:
        """One optimizer step of `turn.role` over the global batch; see Engine."""
        self._train_only(turn.role)
        placed = [self._placed(micro) for micro in micro_batches]
        counts = self._global_counts(turn, placed)
        before = [(buffer, buffer.clone()) for buffer in self._moving_buffers()]
        self._begin(turn.role, len(placed))
        sums: dict[str, Tensor] = {}
        for index, (batch, draws) in enumerate(placed):
            with spans.span("forward_backward", self._device):
                with autocast(self._device, self._config.precision):
                    losses = self._objective(turn, batch, draws)
                total = self._weighted(losses, counts)
                for name, term in losses.terms.items():
                    value = term.sum.detach().double()
                    sums[name] = sums[name] + value if name in sums else value
                self._backward(turn.role, total, last=index == len(placed) - 1)
        with spans.span("reduce"):
            self._reduce(turn.role)
            self._sync_buffers()
        weights = {name: term.weight for name, term in losses.terms.items()}
        means = self._means(sums, counts)
        loss = sum(weights[name] * mean for name, mean in means.items() if weights[name] != 0.0)
        sound = all(math.isfinite(mean) for mean in means.values()) and (highest_loss is None or loss <= highest_loss)
        with spans.span("optimizer", self._device):
            grad_norm = self._apply(turn, lr * turn.lr_scale, sound)
        finite = sound and math.isfinite(grad_norm)
        if not finite:
            for buffer, kept in before:  # a running statistic that took in a NaN would never lose it again
                buffer.copy_(kept)
        return StepResult(losses=means, total=loss, grad_norm=grad_norm, finite=finite)

    def _train_only(self, role: str) -> None:
        """requires_grad on the stepped role alone; every role in train mode (DESIGN section 4, objective)."""
        if self._stepping == role:  # as the step before left them
            return
        self._stepping = role
        self._require_gradients(role)
        for module in self._modules.values():
            module.train()

    @torch.no_grad()
    def _sync_buffers(self) -> None:
        """Buffers that the forward has changed (running statistics, power iterations) become rank 0's everywhere.

        Otherwise each rank would keep its own, a checkpoint could hold only one, and a resumed run would differ.
        """
        moving = self._moving if self._moving is not None else set()
        for buffer, version in self._buffer_versions.items():
            if buffer._version != version:
                if self._ranks.world_size > 1:
                    self._ranks.broadcast_(buffer)
                moving.add(buffer)
                self._buffer_versions[buffer] = buffer._version
        self._moving = moving

    def _moving_buffers(self) -> list[Tensor]:
        """Buffers that some step has changed; all of them before the first step, which has to find out."""
        return list(self._buffer_versions if self._moving is None else self._moving)

    def _placed(self, micro: MicroBatch) -> MicroBatch:
        if self._device.type == "cpu":
            return micro
        batch, draws = micro
        return (
            {name: tensor.to(self._device, non_blocking=True) for name, tensor in batch.items()},
            {name: tensor.to(self._device, non_blocking=True) for name, tensor in draws.items()},
        )

    def _global_counts(self, turn: Turn, placed: Sequence[MicroBatch]) -> dict[str, float]:
        counts: dict[str, float] = {}
        for batch, draws in placed:
            for name, count in self._method.counts(turn, batch, draws).items():
                counts[name] = counts.get(name, 0.0) + count
        names = sorted(counts)
        vector = torch.tensor([counts[name] for name in names], dtype=torch.float64)
        return dict(zip(names, self._sum_over_data(vector).tolist(), strict=True))

    def _sum_over_data(self, vector: Tensor) -> Tensor:
        """Sum of a small CPU tensor over the ranks that lead their share of the batch."""
        return self._ranks.all_reduce_sum_cpu(vector if self.leads_data else torch.zeros_like(vector))

    def _weighted(self, losses: Losses, counts: Mapping[str, float]) -> Tensor:
        """sum of weight * sum / global count: what is differentiated."""
        assert losses.terms.keys() == counts.keys(), "objective and counts name different terms"
        # a term that counts nothing in this whole batch (empty masks) stays in the graph with factor 0: its backward
        # pass reaches the same parameters as in every other step
        parts = [
            t.sum * (t.weight / counts[n] if counts[n] > 0 else 0.0) for n, t in losses.terms.items() if t.weight != 0.0
        ]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total.float()

    def _means(self, sums: Mapping[str, Tensor], counts: Mapping[str, float]) -> dict[str, float]:
        names = sorted(sums)
        vector = self._sum_over_data(torch.stack([sums[name] for name in names]).cpu())
        return {n: v / counts[n] if counts[n] > 0 else 0.0 for n, v in zip(names, vector.tolist(), strict=True)}

    def _same_reach(self, turn: Turn, touched: Sequence[str]) -> frozenset[str]:
        """Parameters that this kind of turn reaches: found at its first step and then required to stay the same.

        A parameter that only some ranks reach would make the ranks' optimizers drift apart, so that is refused.
        """
        key, names = (turn.role, turn.purpose), frozenset(touched)
        if key not in self._used:
            same = all(other == names for other in self._ranks.all_gather_objects(names))
            assert same, f"turn '{turn.purpose}' reaches different parameters on different ranks"
            self._used[key] = names
        assert names == self._used[key], f"turn '{turn.purpose}' no longer reaches the same parameters"
        return names

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def evaluate(self, turn: Turn, micro_batches: Iterable[MicroBatch]) -> dict[str, float]:
        """Global mean of each term and their weighted total `loss`; a rank without rows passes no micro-batch."""
        self._stepping = None
        for module in self._modules.values():
            module.eval()  # no forward may move a buffer here, or ranks would part; step() puts them back
        with torch.no_grad():
            return self._evaluate(turn, micro_batches)

    def _evaluate(self, turn: Turn, micro_batches: Iterable[MicroBatch]) -> dict[str, float]:
        sums: dict[str, Tensor] = {}
        counts: dict[str, float] = {}
        weights: dict[str, float] = {}
        for micro in micro_batches:  # one at a time: a validation set need not fit into memory
            batch, draws = self._placed(micro)
            for name, count in self._method.counts(turn, batch, draws).items():
                counts[name] = counts.get(name, 0.0) + count
            with autocast(self._device, self._config.precision):
                losses = self._method.objective(turn, batch, draws)
            for name, term in losses.terms.items():
                weights[name] = term.weight
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + term.sum.detach().double().cpu()
        gathered_sums = self._ranks.all_gather_objects(
            {name: (float(value), counts[name], weights[name]) for name, value in sums.items()}
        )
        names = sorted({name for part in gathered_sums for name in part})
        out: dict[str, float] = {}
        total = 0.0
        for name in names:
            parts = [part[name] for part in gathered_sums if name in part]
            out[name] = math.fsum(p[0] for p in parts) / max(math.fsum(p[1] for p in parts), 1e-30)
            total += parts[0][2] * out[name]
        return {"loss": total, **out}

    # -- state --------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor | Pieces]:
        """Parameters, buffers and optimizer state by name; the live tensors."""
        out: dict[str, Tensor | Pieces] = {}
        for role, module in self._modules.items():
            tensors = dict(module.named_buffers(remove_duplicate=False))
            tensors |= {n: p.detach() for n, p in module.named_parameters()} if role not in self._parts else {}
            for name, source in self._names[role].items():
                parts = self._parts.get(role, {})
                held = self._layouts[role][source].state(parts[source]) if source in parts else tensors[source]
                out[f"model/{role}/{name}"] = held
        for role, optimizer in self._optimizers.items():
            for key, held in optimizer.state().items():
                out[f"optim/{role}/{key}"] = held
        return out

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over model and optimizer state. Raises CheckpointError on missing, extra or misshapen model keys."""
        for role, module in self._modules.items():
            given = Below(tensors, f"model/{role}/")
            if odd := sorted(self._names[role].keys() ^ set(given)):
                raise CheckpointError(f"role '{role}' and the checkpoint differ in {len(odd)} keys, first '{odd[0]}'")
            own = dict(module.named_buffers(remove_duplicate=False)) | dict(module.named_parameters())
            for name, source in self._names[role].items():
                found = kind_of(given, name)[1]
                layout = self._layouts.get(role, {}).get(source)
                shape = layout.shape if layout is not None else tuple(own[source].shape)
                if found != shape:
                    raise CheckpointError(
                        f"model/{role}/{name} has shape {found} in the checkpoint, {shape} in the model; "
                        "was the method section changed?"
                    )
                if layout is not None:
                    layout.read(self._parts[role][source], given, name)
                else:
                    own[source].copy_(given[name])
        for role, optimizer in self._optimizers.items():
            optimizer.load(Below(tensors, f"optim/{role}/"))
        self._loaded()

    # -- what engines do differently ----------------------------------------------------------------------------------

    def _require_gradients(self, role: str) -> None:
        """requires_grad on the parameters that `role` trains, and on none of the other roles."""
        for other, optimizer in self._optimizers.items():
            parameters = dict(self._modules[other].named_parameters())
            for name in optimizer.parameters:
                parameters[name].requires_grad_(other == role)

    def _objective(self, turn: Turn, batch: Mapping[str, Tensor], draws: Mapping[str, Tensor]) -> Losses:
        return self._method.objective(turn, batch, draws)

    def _begin(self, role: str, micro_batches: int) -> None:
        """Before the first backward pass of a step."""
        raise NotImplementedError

    def _backward(self, role: str, total: Tensor, last: bool) -> None:
        """Differentiate the total of one micro-batch; `last`: no other follows in this step."""
        total.backward()

    def _reduce(self, role: str) -> None:
        """Wait until gradients are sums over all ranks."""

    def _apply(self, turn: Turn, lr: float, sound: bool) -> float:
        """Clip and step where `sound` and the gradient is finite; returns the norm before clipping."""
        raise NotImplementedError

    def _loaded(self) -> None:
        """After `load` has written masters and moments."""


def _names(module: nn.Module) -> dict[str, str]:
    """Key of the state dict -> name of the parameter or buffer that it shows; tied parameters have one name."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        found[name] = first.setdefault(id(tensor), name)
    return found
