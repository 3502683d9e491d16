"""Data-parallel engine: every rank holds all parameters; gradients are summed in fixed-order flat buckets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from hpc_gen.config.experiment import TrainConfig
from hpc_gen.methods.protocol import Losses, Method, Turn
from hpc_gen.runtime.errors import CheckpointError
from hpc_gen.runtime.ranks import Ranks
from hpc_gen.training.checkpoint.pieces import Below
from hpc_gen.training.engines.base import MicroBatch, StepResult
from hpc_gen.training.engines.buckets import GradientBuckets
from hpc_gen.training.optimizers import RoleOptimizer
from hpc_gen.training.precision import autocast


class DdpEngine:
    """Wraps the objective, not the network, so losses that differentiate inside the forward reduce correctly too."""

    name = "ddp"

    def __init__(
        self, method: Method, modules: Mapping[str, nn.Module], config: TrainConfig, ranks: Ranks, device: torch.device
    ) -> None:
        """`modules`: the method's own roles, materialised with the same values on every rank."""
        self._method = method
        self._ranks = ranks
        self._config = config
        self._device = device
        self._modules = dict(modules)
        self._optimizers: dict[str, RoleOptimizer] = {}
        self._buckets: dict[str, GradientBuckets] = {}
        self._used: dict[tuple[str, str], set[nn.Parameter]] = {}
        for role, module in self._modules.items():
            module.to(device)
            groups = method.parameter_groups(role)
            if groups:
                optimizer = RoleOptimizer(module, groups, config.optimizer)
                self._optimizers[role] = optimizer
                bucket_bytes = int(config.engine.bucket_mb * 2**20)
                self._buckets[role] = GradientBuckets(list(optimizer.parameters.values()), ranks, bucket_bytes)
            else:
                module.requires_grad_(False)
        self._buffer_versions = {b: b._version for module in self._modules.values() for b in module.buffers()}
        self._moving: set[Tensor] | None = None  # buffers that a step has changed; None: no step was made yet
        self._stepping: str | None = None  # the role for which modes and requires_grad are set
        self._trainable = {role: list(o.parameters.values()) for role, o in self._optimizers.items()}

    def modules(self) -> dict[str, nn.Module]:
        """The roles by name."""
        return self._modules

    def trained_roles(self) -> list[str]:
        """Roles that have an optimizer."""
        return list(self._optimizers)

    def step(
        self, turn: Turn, micro_batches: Sequence[MicroBatch], lr: float, highest_loss: float | None = None
    ) -> StepResult:
        """One optimizer step of `turn.role` over the global batch; see Engine."""
        buckets, optimizer = self._buckets[turn.role], self._optimizers[turn.role]
        self._train_only(turn.role)
        placed = [self._placed(micro) for micro in micro_batches]
        counts = self._global_counts(turn, placed)
        before = [(buffer, buffer.clone()) for buffer in self._moving_buffers()]
        buckets.begin()
        sums: dict[str, Tensor] = {}
        for index, (batch, draws) in enumerate(placed):
            with autocast(self._device, self._config.precision):
                losses = self._method.objective(turn, batch, draws)
            total = self._weighted(losses, counts)
            for name, term in losses.terms.items():
                value = term.sum.detach().double()
                sums[name] = sums[name] + value if name in sums else value
            if index == len(placed) - 1:
                buckets.arm()
            total.backward()
        buckets.finish()
        self._sync_buffers()
        weights = {name: term.weight for name, term in losses.terms.items()}
        result = self._finish(turn, buckets, optimizer, self._means(sums, counts), weights, lr, highest_loss)
        if not result.finite:
            for buffer, kept in before:  # a running statistic that took in a NaN would never lose it again
                buffer.copy_(kept)
        return result

    def _finish(
        self,
        turn: Turn,
        buckets: GradientBuckets,
        optimizer: RoleOptimizer,
        means: dict[str, float],
        weights: dict[str, float],
        lr: float,
        highest_loss: float | None,
    ) -> StepResult:
        norm = buckets.norm()
        grad_norm = float(norm)
        loss = sum(weights[name] * mean for name, mean in means.items() if weights[name] != 0.0)
        finite = math.isfinite(grad_norm) and all(math.isfinite(mean) for mean in means.values())
        finite = finite and (highest_loss is None or loss <= highest_loss)
        if finite:
            clip = self._config.optimizer.clip
            if clip is not None and grad_norm > clip:
                buckets.scale(clip / (norm + 1e-6))
            buckets.detach_untouched(self._used_parameters(turn, buckets))
            optimizer.step(lr * turn.lr_scale)
        return StepResult(losses=means, total=loss, grad_norm=grad_norm, finite=finite)

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
        gathered = self._ranks.all_gather_objects(
            {name: (float(value), counts[name], weights[name]) for name, value in sums.items()}
        )
        names = sorted({name for part in gathered for name in part})
        out: dict[str, float] = {}
        total = 0.0
        for name in names:
            parts = [part[name] for part in gathered if name in part]
            out[name] = math.fsum(p[0] for p in parts) / max(math.fsum(p[1] for p in parts), 1e-30)
            total += parts[0][2] * out[name]
        return {"loss": total, **out}

    def state(self) -> dict[str, Tensor]:
        """Parameters, buffers and optimizer state by name; the live tensors."""
        out: dict[str, Tensor] = {}
        for role, module in self._modules.items():
            for name, tensor in module.state_dict(keep_vars=False).items():
                out[f"model/{role}/{name}"] = tensor
        for role, optimizer in self._optimizers.items():
            for name, tensor in optimizer.state().items():
                out[f"optim/{role}/{name}"] = tensor
        return out

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over model and optimizer state. Raises CheckpointError on missing, extra or misshapen model keys."""
        for role, module in self._modules.items():
            own = module.state_dict(keep_vars=False)
            given = Below(tensors, f"model/{role}/")
            if own.keys() != given.keys():
                odd = sorted(own.keys() ^ given.keys())
                raise CheckpointError(f"role '{role}' and the checkpoint differ in {len(odd)} keys, first '{odd[0]}'")
            for name, tensor in own.items():
                stored = given[name]  # read from disk here, so only once
                if tensor.shape != stored.shape:
                    raise CheckpointError(
                        f"model/{role}/{name} has shape {tuple(stored.shape)} in the checkpoint, "
                        f"{tuple(tensor.shape)} in the model; was the method section changed?"
                    )
                tensor.copy_(stored)
        for role, optimizer in self._optimizers.items():
            optimizer.load(Below(tensors, f"optim/{role}/"))

    def _train_only(self, role: str) -> None:
        """requires_grad on the stepped role alone; every role in train mode (DESIGN section 4, objective)."""
        if self._stepping == role:  # as the step before left them
            return
        self._stepping = role
        for other, parameters in self._trainable.items():
            for parameter in parameters:
                parameter.requires_grad_(other == role)
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
        self._ranks.all_reduce_sum_cpu(vector)
        return dict(zip(names, vector.tolist(), strict=True))

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
        vector = torch.stack([sums[name] for name in names]).cpu()
        self._ranks.all_reduce_sum_cpu(vector)
        return {n: v / counts[n] if counts[n] > 0 else 0.0 for n, v in zip(names, vector.tolist(), strict=True)}

    def _used_parameters(self, turn: Turn, buckets: GradientBuckets) -> set[nn.Parameter]:
        """Parameters that this kind of turn reaches: found at its first step and then required to stay the same.

        A parameter that only some ranks reach would make the ranks' optimizers drift apart, so that is refused.
        """
        key = (turn.role, turn.purpose)
        if key not in self._used:
            self._used[key] = set(buckets.touched)
            indices = [i for i, p in enumerate(self._trainable[turn.role]) if p in buckets.touched]
            same = all(other == indices for other in self._ranks.all_gather_objects(indices))
            assert same, f"turn '{turn.purpose}' reaches different parameters on different ranks"
        assert buckets.touched == self._used[key], f"turn '{turn.purpose}' no longer reaches the same parameters"
        return self._used[key]
