"""ZeRO-1, ZeRO-2 and ZeRO-3 by deepspeed: one deepspeed engine per trained role, around the objective.

deepspeed cuts, gathers, reduces, scales and clips; the arithmetic of AdamW is ours (training/optimizers.py), applied to
the stretches of its flat partitions that belong to each parameter, so that parameters which a turn does not reach stay
as they are, every parameter counts its own steps, and checkpoints are those of every other engine.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hpc_gen.config.experiment import TrainConfig
from hpc_gen.methods.protocol import Losses, Method, Turn
from hpc_gen.runtime import env
from hpc_gen.runtime.errors import UserError
from hpc_gen.runtime.ranks import Ranks
from hpc_gen.training.checkpoint.pieces import Pieces
from hpc_gen.training.engines.flat_steps import FlatSteps, stretches_3, stretches_12
from hpc_gen.training.engines.layout import Layout
from hpc_gen.training.engines.objective import ObjectiveEngine
from hpc_gen.training.engines.units import cast_at_border
from hpc_gen.training.optimizers import RoleOptimizer
from hpc_gen.training.precision import autocast

SCALER = "engine/loss_scale"  # of fp16, in checkpoints: other engines pass over it


class DeepspeedEngine(ObjectiveEngine):
    """Each role's masters and moments lie in deepspeed's flat partitions."""

    name = "deepspeed"

    def __init__(
        self, method: Method, modules: Mapping[str, nn.Module], config: TrainConfig, ranks: Ranks, device: torch.device
    ) -> None:
        """`modules`: the method's own roles, materialised with the same values on every rank."""
        super().__init__(method, modules, config, ranks, device)
        ranks.mesh((ranks.world_size,), ("data",))  # deepspeed wants a process group, whatever the world size
        self._library = _imported(device, ranks)
        _check_format(self._library, config)
        self._engines: dict[str, Any] = {}
        self._clients: dict[str, FlatSteps] = {}
        self._touched: set[str] = set()
        for role, module in self._modules.items():
            module.to(device)
            if self._groups[role]:
                self._hold(role)
        self._ready()

    # -- construction -------------------------------------------------------------------------------------------------

    def _hold(self, role: str) -> None:
        """Hand a role to deepspeed, and find where its partitions keep each parameter."""
        module = self._modules[role]
        values = {name: p.detach().float().cpu().clone() for name, p in module.named_parameters()}
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        if (dtype := _format(self._config)) is not torch.float32:
            cast_at_border(module, dtype)
        client = self._clients[role] = FlatSteps(list(trained.values()))
        wrapped = _Objective(self._method, module, self._device, self._config.precision)
        for parameter in module.parameters():
            # "not to be sent to the other ranks", where it is already; deepspeed fails to send one without an axis
            parameter.ds_optim_param = True
        with _errors_only():  # it warns of an optimizer that it does not know: ours
            engine, zero, _, _ = self._library.initialize(model=wrapped, optimizer=client, config=self._settings())
        for parameter in module.parameters():
            del parameter.ds_optim_param
        self._engines[role] = engine
        for name, parameter in trained.items():
            parameter.register_post_accumulate_grad_hook(self._noting(name))
        stretches = stretches_3 if self._config.engine.zero_stage == 3 else stretches_12
        layouts, parts = stretches(zero, trained, shapes, self._ranks)
        held = {name: nn.Parameter(part, requires_grad=True) for name, part in parts.items()}
        for name in shapes.keys() - trained.keys():  # deepspeed leaves frozen ones alone, or rounds them: ours to keep
            layouts[name] = Layout.whole(shapes[name])
            held[name] = nn.Parameter(values[name].to(self._device), requires_grad=False)
        held, self._layouts[role] = {n: held[n] for n in shapes}, {n: layouts[n] for n in shapes}
        self._parts[role] = {name: p.detach() for name, p in held.items()}
        optimizer = RoleOptimizer(held, self._groups[role], self._config.optimizer, self._layouts[role])
        self._optimizers[role] = optimizer
        client.follow(optimizer, parts)
        with torch.no_grad():
            for name, part in self._parts[role].items():  # not what a rounded parameter would make of them
                self._layouts[role][name].fill(part, values[name])
        self._show(role)

    def _settings(self) -> dict[str, Any]:
        """deepspeed's own configuration."""
        engine, clip = self._config.engine, self._config.optimizer.clip
        on_gpu = self._device.type == "cuda"
        zero: dict[str, Any] = {
            "stage": engine.zero_stage,
            "reduce_bucket_size": max(2, int(engine.bucket_mb * 2**20) // 4),
            "overlap_comm": on_gpu,
            "contiguous_gradients": True,
            "stage3_param_persistence_threshold": 0,  # a parameter that stays gathered would outlive a load
        }
        if engine.offload == "cpu":
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
            if engine.zero_stage == 3:
                zero["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # only its throughput timer asks
            "gradient_accumulation_steps": 1,  # boundaries are told by hand
            "gradient_clipping": clip if clip is not None else 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},
            "steps_per_print": 2**62,
        }
        if engine.param_dtype == "bf16":
            settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
        if engine.param_dtype == "fp16":
            settings["fp16"] = {"enabled": True, "loss_scale": engine.loss_scale or 0.0}
        return settings

    def _noting(self, name: str) -> Callable[[Tensor], None]:
        def note(parameter: Tensor) -> None:
            self._touched.add(name)

        return note

    # -- a step -------------------------------------------------------------------------------------------------------

    def _require_gradients(self, role: str) -> None:
        for other, optimizer in self._optimizers.items():
            parameters = dict(self._modules[other].named_parameters())
            for name in optimizer.parameters:
                parameters[name].requires_grad_(other == role)

    def _objective(self, turn: Turn, batch: Mapping[str, Tensor], draws: Mapping[str, Tensor]) -> Losses:
        engine = self._engines[turn.role]
        sums = engine(turn, batch, draws)
        terms = engine.module.losses.terms
        return Losses({name: replace(term, sum=sums[name]) for name, term in terms.items()})

    def _begin(self, role: str, micro_batches: int) -> None:
        self._touched.clear()

    def _backward(self, role: str, total: Tensor, last: bool) -> None:
        engine = self._engines[role]
        engine.set_gradient_accumulation_boundary(last)
        # deepspeed takes means over ranks; ours are sums, the counts being divided out already
        engine.backward(total * self._ranks.world_size, scale_wrt_gas=False)

    def _apply(self, turn: Turn, lr: float, sound: bool) -> float:
        engine, client = self._engines[turn.role], self._clients[turn.role]
        names = [name for name in self._optimizers[turn.role].parameters if name in self._touched]
        client.prepare(lr, self._same_reach(turn, names) if sound else frozenset())
        engine.step()
        return math.inf if engine.optimizer.overflow else float(engine.get_global_grad_norm())

    # -- state --------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor | Pieces]:
        """As of every engine; with fp16 also the loss scale of each role."""
        found = super().state()
        for role, engine in self._engines.items():
            if self._config.engine.param_dtype == "fp16":
                scaler = engine.optimizer.loss_scaler
                values = [float(getattr(scaler, name, 0)) for name in _SCALER_FIELDS]
                found[f"{SCALER}/{role}"] = torch.tensor(values, dtype=torch.float64)
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """As of every engine; a loss scale is taken where there is one."""
        super().load(tensors)
        for role, engine in self._engines.items():
            if f"{SCALER}/{role}" in tensors and self._config.engine.param_dtype == "fp16":
                values = dict(zip(_SCALER_FIELDS, tensors[f"{SCALER}/{role}"].tolist(), strict=True))
                for name, value in values.items():
                    if hasattr(engine.optimizer.loss_scaler, name):
                        setattr(engine.optimizer.loss_scaler, name, value if name == "cur_scale" else int(value))

    def _loaded(self) -> None:
        for role in self._engines:
            self._show(role)

    @torch.no_grad()
    def _show(self, role: str) -> None:
        """Give the networks the values of the masters."""
        zero, module = self._engines[role].optimizer, self._modules[role]
        if self._config.engine.zero_stage == 3:
            for index in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(index)
        else:
            zero.update_lp_params()
        for name, parameter in module.named_parameters():
            if name not in self._optimizers[role].parameters:
                with self._library.zero.GatheredParameters([parameter], modifier_rank=0):
                    if parameter.numel():
                        parameter.copy_(self._parts[role][name])


_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class _Objective(nn.Module):
    """The objective of one role as the module that deepspeed is given; with our autocast, as it switches others off."""

    losses: Losses

    def __init__(self, method: Method, role: nn.Module, device: torch.device, precision: str) -> None:
        super().__init__()
        self._method, self._device, self._precision = method, device, precision
        self.role = role

    def forward(self, turn: Turn, batch: Mapping[str, Tensor], draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sum of each term; the terms are kept in `losses`."""
        with autocast(self._device, self._precision):
            self.losses = self._method.objective(turn, batch, draws)
        return {name: term.sum for name, term in self.losses.terms.items()}


def _format(config: TrainConfig) -> torch.dtype:
    return {None: torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.engine.param_dtype]


def _imported(device: torch.device, ranks: Ranks) -> Any:
    """The deepspeed package, quiet. Raises UserError where it is not installed or cannot start."""
    env.set_default("LOCAL_RANK", str(ranks.local_rank))
    if device.type == "cpu":
        env.set_default("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
        from deepspeed.utils import logger
    except Exception as error:  # its import looks for compilers and devices
        raise UserError(
            f"train.engine.name = deepspeed, but deepspeed cannot be imported ({error}); install it with "
            "`pip install hpc-gen[deepspeed]`, or use train.engine.name=fsdp"
        ) from error
    logger.setLevel(logging.WARNING)
    # at every step, of names that this torch has new ones for
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    if device.type == "cpu":
        # It would compile a shared-memory sum when it starts (half a minute, and a compiler), whose ranks spin for ever
        # once one of them is killed; gloo does the same sums and ends with an error.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextmanager
def _errors_only() -> Iterator[None]:
    """deepspeed's log without warnings for a while."""
    from deepspeed.utils import logger

    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_format(library: Any, config: TrainConfig) -> None:
    accelerator = library.accelerator.get_accelerator()
    wanted = config.engine.param_dtype
    if (wanted == "fp16" and not accelerator.is_fp16_supported()) or (
        wanted == "bf16" and not accelerator.is_bf16_supported()
    ):
        raise UserError(
            f"train.engine.param_dtype = {wanted}, but deepspeed has no {wanted} on this "
            f"{accelerator.device_name()}; remove it"
        )
