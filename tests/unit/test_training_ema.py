"""Averages of the weights: arithmetic, frozen parameters, and swapping them in for a while."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hpc_gen.training.ema import EmaSet, update_ema_


def pair() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"a": nn.Linear(3, 2), "b": nn.Linear(2, 1, bias=False)}


def shift_(module: nn.Module, by: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by)


def test_update_is_the_formula_in_place() -> None:
    ema, new = [torch.tensor([1.0, 2.0]), torch.tensor(4.0)], [torch.tensor([3.0, 6.0]), torch.tensor(0.0)]
    kept = [t.data_ptr() for t in ema]
    update_ema_(ema, new, 0.75)
    assert [t.tolist() for t in ema] == [[1.5, 3.0], 3.0]
    assert [t.data_ptr() for t in ema] == kept
    assert new[0].tolist() == [3.0, 6.0]


def test_averages_begin_at_the_weights_and_follow_each_its_own_decay() -> None:
    modules = pair()
    start = {name: p.detach().clone() for name, p in modules["a"].named_parameters()}
    ema = EmaSet(modules, {"slow": 0.9, "fast": 0.5, "none": 0.0})
    assert all(torch.equal(ema.averages["a"]["slow"][name], value) for name, value in start.items())
    for _ in range(2):
        shift_(modules["a"], 1.0)
        ema.update(["a"])
    # weights: start + 1, start + 2; average of an offset o: (1 - d) * (d * 1 + 2)
    for name, decay in (("slow", 0.9), ("fast", 0.5), ("none", 0.0)):
        offset = (1 - decay) * (decay + 2)
        for key, value in start.items():
            torch.testing.assert_close(ema.averages["a"][name][key], value + offset)


def test_only_the_named_roles_advance_and_frozen_parameters_never_do() -> None:
    modules = pair()
    modules["a"].bias.requires_grad_(False)
    ema = EmaSet(modules, {"main": 0.5})
    before = {role: {k: v.clone() for k, v in ema.tensors(role).items()} for role in modules}
    shift_(modules["a"], 1.0)
    shift_(modules["b"], 1.0)
    modules["a"].weight.requires_grad_(False)  # a turn of another role switches this off: it is still averaged
    ema.update(["a"])
    assert torch.equal(ema.tensors("b")["main/weight"], before["b"]["main/weight"])
    assert torch.equal(ema.tensors("a")["main/bias"], before["a"]["main/bias"])
    torch.testing.assert_close(ema.tensors("a")["main/weight"], before["a"]["main/weight"] + 0.5)


def test_averages_are_fp32_copies_with_the_names_of_a_checkpoint() -> None:
    modules = {"a": nn.Linear(3, 2).to(torch.bfloat16)}
    ema = EmaSet(modules, {"main": 0.5, "long": 0.99})
    assert set(ema.tensors("a")) == {"main/weight", "main/bias", "long/weight", "long/bias"}
    assert {t.dtype for t in ema.tensors("a").values()} == {torch.float32}
    shift_(modules["a"], 1.0)
    assert not torch.equal(ema.tensors("a")["main/bias"], modules["a"].bias.detach().float())


def test_applied_swaps_in_and_back_and_the_average_goes_on() -> None:
    modules = pair()
    ema = EmaSet(modules, {"main": 0.5})
    shift_(modules["a"], 1.0)
    raw = modules["a"].weight.detach().clone()
    average = ema.averages["a"]["main"]["weight"].clone()
    with ema.applied("main"):
        assert torch.equal(modules["a"].weight, average)
    assert torch.equal(modules["a"].weight, raw)
    with ema.applied(None):
        assert torch.equal(modules["a"].weight, raw)
    assert torch.equal(ema.averages["a"]["main"]["weight"], average)
    with pytest.raises(RuntimeError, match="inside"), ema.applied("main"):
        raise RuntimeError("inside")
    assert torch.equal(modules["a"].weight, raw)  # also when sampling fails or is stopped
    optimizer = torch.optim.SGD(modules["a"].parameters(), lr=1.0)
    modules["a"].weight.sum().backward()
    optimizer.step()
    ema.update(["a"])  # follows the weights that the optimizer moves, not a stale copy
    torch.testing.assert_close(ema.averages["a"]["main"]["weight"], 0.5 * average + 0.5 * (raw - 1.0))


def test_without_averages_nothing_is_kept() -> None:
    ema = EmaSet(pair(), {})
    ema.update(["a", "b"])
    assert ema.tensors("a") == {}
