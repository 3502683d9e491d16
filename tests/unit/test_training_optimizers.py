"""AdamW called at its kernel: the same bits as torch.optim.AdamW, without what importing that costs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hpc_gen.config.experiment import OptimizerConfig
from hpc_gen.methods.protocol import ParameterGroup
from hpc_gen.runtime.errors import CheckpointError
from hpc_gen.training.optimizers import RoleOptimizer

CONFIG = OptimizerConfig(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05)
GROUPS = [
    ParameterGroup(("0.weight", "2.weight"), weight_decay=None, lr_scale=1.0),
    ParameterGroup(("0.bias",), weight_decay=0.0, lr_scale=1.0),
    ParameterGroup(("2.bias",), weight_decay=0.0, lr_scale=0.5),
]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 37), nn.Tanh(), nn.Linear(37, 5))


def gradients(module: nn.Module, step: int, without: str | None) -> None:
    generator = torch.Generator().manual_seed(step)
    for name, parameter in module.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.grad = None if name == without else drawn * 10.0 ** (step % 5 - 3)


def torchs(module: nn.Module) -> torch.optim.AdamW:
    named = dict(module.named_parameters())
    decays = [CONFIG.weight_decay if g.weight_decay is None else g.weight_decay for g in GROUPS]
    groups = [{"params": [named[n] for n in g.names], "weight_decay": d} for g, d in zip(GROUPS, decays)]
    return torch.optim.AdamW(groups, lr=0.0, betas=CONFIG.betas, eps=CONFIG.eps, fused=True)


def test_the_same_bits_as_torchs_own() -> None:
    ours, theirs = network(), network()
    optimizer, peer = RoleOptimizer(ours, GROUPS, CONFIG), torchs(theirs)
    for step in range(40):
        if step == 20:  # taken over by a fresh one, as on resume
            state = {name: tensor.clone() for name, tensor in optimizer.state().items()}
            optimizer = RoleOptimizer(ours, GROUPS, CONFIG)
            optimizer.load(state)
        without = "2.bias" if step % 7 == 3 else None
        rate = 1e-2 * (1 - step / 50)
        gradients(ours, step, without)
        gradients(theirs, step, without)
        optimizer.step(rate)
        for group, scale in zip(peer.param_groups, (1.0, 1.0, 0.5)):
            group["lr"] = rate * scale
        peer.step()
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
            assert torch.equal(a, b), (step, name)
    found = optimizer.state()
    for name, parameter in theirs.named_parameters():
        for kind, value in peer.state[parameter].items():
            assert torch.equal(found[f"{name}/{kind}"], value), (name, kind)
            assert found[f"{name}/{kind}"].dtype == value.dtype
    assert len(found) == 12 and int(found["2.bias/step"]) < 40


def test_a_parameter_without_gradient_has_no_state_and_does_not_move() -> None:
    module = network()
    optimizer = RoleOptimizer(module, GROUPS, CONFIG)
    before = module[2].bias.detach().clone()
    gradients(module, 0, "2.bias")
    optimizer.step(0.1)
    assert torch.equal(module[2].bias, before)
    assert not any(name.startswith("2.bias/") for name in optimizer.state())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.weight/exp_avg": torch.zeros(2, 2)}, r"'0\.weight/exp_avg' has shape \(2, 2\), the parameter \(37, 13\)"),
        ({"9.weight/exp_avg": torch.zeros(2)}, r"'9\.weight/exp_avg' belongs to no parameter"),
        ({"0.weight/momentum": torch.zeros(37, 13)}, "belongs to no parameter"),
        ({"0.weight/step": None}, r"of '0\.weight' lacks 'step'"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change: dict, message: str) -> None:
    module = network()
    optimizer = RoleOptimizer(module, GROUPS, CONFIG)
    gradients(module, 0, None)
    optimizer.step(0.1)
    state = {name: tensor for name, tensor in {**optimizer.state(), **change}.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        RoleOptimizer(network(), GROUPS, CONFIG).load(state)
