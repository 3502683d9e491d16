"""The ddp engine on one rank: one optimizer step of one role, and its state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from solo import changed, clone, make_engine, micro_batches
from tiny_method import PIXELS, Config, TinyMethod
from torch import Tensor
from toys import SIDE, TableCondition, Tokens, TwoPlayer

from hpc_gen.methods.protocol import Losses, ParameterGroup, Term, Turn
from hpc_gen.runtime.errors import CheckpointError
from hpc_gen.training.engines.ddp import DdpEngine

TRAIN = Turn("net", "train")
G, D, R1 = Turn("generator", "g"), Turn("discriminator", "d"), Turn("discriminator", "r1", lr_scale=0.25)


def tiny_batch(size: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (size, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return {"pixels": pixels, "labels": torch.zeros(size, dtype=torch.int64)}


def grey_batch(size: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {"pixels": torch.randint(0, 256, (size, 1, SIDE, SIDE), generator=generator, dtype=torch.uint8)}


def token_batch(size: int = 8) -> dict[str, Tensor]:
    return {"tokens": torch.randint(0, 3, (size, SIDE * SIDE), generator=torch.Generator().manual_seed(3))}


def tiny(**changes: Any) -> tuple[TinyMethod, DdpEngine]:
    method = TinyMethod(Config())
    return method, make_engine(method, **changes)


def step_game(engine: DdpEngine, method: TwoPlayer, turn: Turn, counter: int = 0) -> Any:
    return engine.step(turn, micro_batches(method, turn, grey_batch(), 4, counter), 0.01)


@pytest.mark.parametrize("cut", [4, 2, 1])
def test_the_cut_into_micro_batches_does_not_matter(cut: int) -> None:
    """Terms are sums over the global count, so accumulation is one large batch up to rounding."""
    method, whole = tiny(optimizer={"clip": 0.5})
    other_method, other = tiny(optimizer={"clip": 0.5})
    for counter in range(3):
        a = whole.step(TRAIN, micro_batches(method, TRAIN, tiny_batch(), 8, counter), 0.01)
        b = other.step(TRAIN, micro_batches(other_method, TRAIN, tiny_batch(), cut, counter), 0.01)
        assert b.total == pytest.approx(a.total, rel=1e-6)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-6)
    for name, value in whole.state().items():
        torch.testing.assert_close(other.state()[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_a_dynamic_count_is_divided_out_globally() -> None:
    """Masks differ per micro-batch: the mean of means would be another number than the mean over all kept tokens."""
    method, pieces = (
        Tokens("tokens", vocabulary=3, length=SIDE * SIDE),
        Tokens("tokens", vocabulary=3, length=SIDE * SIDE),
    )
    a, b = make_engine(method), make_engine(pieces)
    micros = micro_batches(method, TRAIN, token_batch(), 1)
    for number, (_, draws) in enumerate(micros):
        draws["keep"][:, number + 1 :] = 0  # 1 to 8 places at most: unequal shares
    joined = [
        tuple({k: torch.cat([m[part][k] for m in micros]) for k in micros[0][part]} for part in (0, 1)),
    ]
    with torch.no_grad():
        losses = [method.objective(TRAIN, *micro).terms["cross_entropy"] for micro in micros]
    expected = sum(float(t.sum) for t in losses) / sum(t.count for t in losses)
    mean_of_means = sum(float(t.sum) / max(1.0, t.count) for t in losses) / len(losses)
    assert abs(mean_of_means - expected) > 1e-3  # else this test could not fail
    whole = a.step(TRAIN, joined, 0.01)  # type: ignore[arg-type]
    cut = b.step(TRAIN, micros, 0.01)
    assert whole.total == pytest.approx(expected, rel=1e-5)
    assert cut.total == pytest.approx(expected, rel=1e-5)
    for name, value in a.state().items():
        torch.testing.assert_close(b.state()[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_step_in_which_nothing_counts_has_loss_zero_and_no_gradient() -> None:
    """All masks of a global batch may be empty by chance."""
    method = Tokens("tokens", vocabulary=3, length=SIDE * SIDE)
    engine = make_engine(method)
    micros = micro_batches(method, TRAIN, token_batch(), 4)
    engine.step(TRAIN, micros, 0.01)
    for _, draws in micros:
        draws["keep"].zero_()
    result = engine.step(TRAIN, micros, 0.01)
    assert (result.total, result.grad_norm, result.finite) == (0.0, 0.0, True)


def reference_step(clip: float | None, lr: float) -> tuple[Tensor, float, float]:
    """One step by plain PyTorch: new weight, loss, norm before clipping."""
    method, engine = tiny()
    (net,) = engine.modules().values()
    (batch, draws) = micro_batches(method, TRAIN, tiny_batch(), 8)[0]
    weight = net.weight.detach().clone().requires_grad_(True)
    images = batch["pixels"].flatten(1).float() / 255
    loss = ((images + 0.1 * draws["noise"]) @ weight.T).flatten().sub(images.mean(1)).square().mean()
    optimizer = torch.optim.AdamW([weight], lr=lr, betas=(0.9, 0.95), eps=1e-2, weight_decay=0.1)
    loss.backward()
    norm = weight.grad.norm() if clip is None else torch.nn.utils.clip_grad_norm_([weight], clip)
    optimizer.step()
    return weight.detach(), loss.item(), norm.item()


@pytest.mark.parametrize("clip", [None, 0.05, 1e6])
@pytest.mark.parametrize("lr_scale", [1.0, 0.25])
def test_one_step_is_adamw_on_the_clipped_mean(clip: float | None, lr_scale: float) -> None:
    # a large eps: without it the first AdamW step is lr * sign(gradient), whatever the clipping
    method, engine = tiny(optimizer={"clip": clip, "weight_decay": 0.1, "eps": 1e-2})
    result = engine.step(replace(TRAIN, lr_scale=lr_scale), micro_batches(method, TRAIN, tiny_batch(), 2), 0.02)
    weight, loss, norm = reference_step(clip, 0.02 * lr_scale)
    assert result.losses == {"mse": pytest.approx(loss, rel=1e-5)}
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)  # before clipping
    assert norm > 0.05 * 2
    torch.testing.assert_close(engine.state()["model/net/weight"], weight, rtol=0, atol=1e-6)
    if clip == 0.05:
        unclipped, _, _ = reference_step(None, 0.02 * lr_scale)
        assert (weight - unclipped).abs().max() > 1e-4


class Frugal(TinyMethod):
    """Two weighted terms, one of them only logged; a second parameter that no turn uses."""

    logged = 0.0

    def __init__(self) -> None:
        super().__init__(Config())
        self._net.register_parameter("spare", torch.nn.Parameter(torch.empty(3, device="meta")))

    def parameter_groups(self, role: str) -> list[ParameterGroup]:
        return [ParameterGroup(("weight",), weight_decay=0.0), ParameterGroup(("spare",), weight_decay=0.5)]

    def counts(self, turn: Turn, batch: Mapping[str, Tensor], draws: Mapping[str, Tensor]) -> dict[str, float]:
        return {**super().counts(turn, batch, draws), "seen": 1.0}

    def objective(self, turn: Turn, batch: Mapping[str, Tensor], draws: Mapping[str, Tensor]) -> Losses:
        mse = super().objective(turn, batch, draws).terms["mse"]
        return Losses({"mse": replace(mse, weight=0.5), "seen": Term(torch.tensor(self.logged), 1.0, weight=0.0)})


def test_weights_of_terms_and_parameters_without_a_gradient() -> None:
    method = Frugal()
    method.logged = 6.0
    engine = make_engine(method, optimizer={"weight_decay": 0.5})
    before = clone(engine.state())
    result = engine.step(TRAIN, micro_batches(method, TRAIN, tiny_batch(), 4), 0.1)
    assert result.losses["seen"] == pytest.approx(6.0)
    assert result.total == pytest.approx(0.5 * result.losses["mse"])
    state = engine.state()
    # no gradient reached `spare`: AdamW must not even decay it, nor keep moments for it
    assert torch.equal(state["model/net/spare"], before["model/net/spare"])
    assert {key for key in state if key.startswith("optim/")} == {
        f"optim/net/weight/{kind}" for kind in ("exp_avg", "exp_avg_sq", "step")
    }


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_no_weight(where: str) -> None:
    method, engine = tiny()
    engine.step(TRAIN, micro_batches(method, TRAIN, tiny_batch(), 4), 0.01)
    before = clone(engine.state())
    (net,) = engine.modules().values()
    if where == "gradient":  # a finite loss, an infinite slope
        handle = net.weight.register_hook(lambda grad: grad * float("inf"))
        bad = engine.step(TRAIN, micro_batches(method, TRAIN, tiny_batch(), 4), 0.01)
        handle.remove()
    else:
        bad = engine.step(Turn("net", "bad"), micro_batches(method, Turn("net", "bad"), tiny_batch(), 4), 0.01)
    assert not bad.finite
    assert changed(before, engine.state()) == set()
    after = engine.step(TRAIN, micro_batches(method, TRAIN, tiny_batch(), 4), 0.01)  # nothing of it lingers
    assert after.finite
    twin_method, twin = tiny()
    for _ in range(2):
        twin.step(TRAIN, micro_batches(twin_method, TRAIN, tiny_batch(), 4), 0.01)
    assert changed(twin.state(), engine.state()) == set()


@pytest.mark.parametrize(("turn", "other"), [(G, "discriminator"), (D, "generator"), (R1, "generator")])
def test_only_the_stepped_role_changes(turn: Turn, other: str) -> None:
    method = TwoPlayer()
    engine = make_engine(method)
    before = clone(engine.state())
    assert step_game(engine, method, turn).finite
    moved = changed(before, engine.state())
    assert any(name.startswith(f"model/{turn.role}/") for name in moved)
    # G runs the discriminator in train mode, which moves its power-iteration buffer, and nothing else of it
    assert {name for name in moved if f"/{other}/" in name} <= {"model/discriminator/power"}
    for role, module in engine.modules().items():
        assert module.training
        assert all(p.requires_grad == (role == turn.role) for p in module.parameters())
        if role != turn.role:
            assert all(p.grad is None for p in module.parameters())


def test_a_frozen_role_has_no_optimizer_and_never_moves() -> None:
    class Frozen(TwoPlayer):
        def parameter_groups(self, role: str) -> list[ParameterGroup]:
            return [] if role == "discriminator" else super().parameter_groups(role)

    method = Frozen()
    engine = make_engine(method)
    assert engine.trained_roles() == ["generator"]
    before = clone(engine.state())
    step_game(engine, method, G)
    assert {name for name in changed(before, engine.state()) if "discriminator" in name} == {
        "model/discriminator/power"
    }
    assert not any(name.startswith("optim/discriminator") for name in engine.state())


def test_a_turn_must_keep_reaching_the_same_parameters() -> None:
    """Otherwise ranks, or a run and its resumed twin, would decay different parameters."""
    method = TwoPlayer()
    engine = make_engine(method)
    step_game(engine, method, D)
    step_game(engine, method, R1)  # another kind of turn may reach others: the last bias has no slope
    original = method.objective
    method.objective = lambda turn, batch, draws: original(  # type: ignore[method-assign]
        R1 if turn is D else turn, batch, draws
    )
    method.counts = lambda turn, batch, draws: {"penalty": 4.0}  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="turn 'd' no longer reaches the same parameters"):
        step_game(engine, method, D)


def play(engine: DdpEngine, method: TwoPlayer, iterations: range) -> None:
    for iteration in iterations:
        for turn in method.turns(iteration, iteration * 8):
            assert step_game(engine, method, turn, iteration).finite


def test_state_goes_round_and_training_continues_bit_for_bit() -> None:
    method = TwoPlayer()
    engine = make_engine(method)
    play(engine, method, range(5))  # an R1 turn among them
    saved = clone(engine.state())
    assert "model/discriminator/power" in saved
    play(engine, method, range(5, 10))

    resumed_method = TwoPlayer()
    resumed = make_engine(resumed_method, seed=99)
    resumed.load(saved)
    assert changed(saved, resumed.state()) == set()
    play(resumed, resumed_method, range(5, 10))
    assert changed(engine.state(), resumed.state()) == set()
    assert changed(saved, engine.state()) >= {"optim/generator/0.weight/step", "model/discriminator/power"}


def test_loading_copies_and_forgets_what_was_there() -> None:
    method, engine = tiny()
    fresh = clone(engine.state())
    engine.step(TRAIN, micro_batches(method, TRAIN, tiny_batch(), 4), 0.01)
    stepped = clone(engine.state())
    given = clone(stepped)
    engine.load(given)
    engine.step(TRAIN, micro_batches(method, TRAIN, tiny_batch(), 4), 0.01)
    assert changed(given, stepped) == set()  # the live tensors are not the given ones
    engine.load(fresh)  # a checkpoint from before the first step has no moments
    assert changed(fresh, engine.state()) == set()


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda t: t.pop("model/net/bias"), "role 'net' and the checkpoint differ in 1 keys, first 'bias'"),
        (
            lambda t: t.update({"model/net/extra": torch.zeros(1)}),
            "role 'net' and the checkpoint differ in 1 keys, first 'extra'",
        ),
        (
            lambda t: t.update({"model/net/bias": torch.zeros(1, 16)}),
            r"model/net/bias has shape \(1, 16\) in the checkpoint, \(16,\) in the model; was the method section changed\?",
        ),
        (
            lambda t: t.update({"optim/net/gone/step": torch.zeros(())}),
            "optimizer state 'gone/step' belongs to no parameter",
        ),
        (
            lambda t: t.update({"optim/net/bias/momentum": torch.zeros(16)}),
            "optimizer state 'bias/momentum' belongs to no parameter",
        ),
        (
            lambda t: t.update({"optim/net/bias/exp_avg": torch.zeros(3)}),
            r"optimizer state 'bias/exp_avg' has shape \(3,\), the parameter \(16,\)",
        ),
        (lambda t: t.pop("optim/net/bias/exp_avg_sq"), "optimizer state of 'bias' lacks 'exp_avg_sq'"),
    ],
)
def test_load_errors_name_the_key(spoil: Any, sentence: str) -> None:
    method = TableCondition()
    engine = make_engine(method)
    batch = {**grey_batch(), "code": torch.ones(8, 3)}
    engine.step(TRAIN, micro_batches(method, TRAIN, batch, 8), 0.01)
    tensors = clone(engine.state())
    spoil(tensors)
    with pytest.raises(CheckpointError, match=sentence):
        engine.load(tensors)


def test_evaluate_is_the_mean_of_the_batch_and_changes_nothing() -> None:
    method = TwoPlayer()
    engine = make_engine(method)
    play(engine, method, range(2))
    before = clone(engine.state())
    whole = engine.evaluate(D, micro_batches(method, D, grey_batch(), 8))
    uneven = engine.evaluate(D, micro_batches(method, D, grey_batch(), 3))
    assert uneven == {name: pytest.approx(value, rel=1e-5) for name, value in whole.items()}
    assert whole["loss"] == pytest.approx(whole["fake"] + whole["real"])
    assert changed(before, engine.state()) == set()  # buffers too: the critic moves one in train mode

    play(engine, method, range(2, 6))
    twin_method = TwoPlayer()
    twin = make_engine(twin_method)
    play(twin, twin_method, range(6))
    assert changed(twin.state(), engine.state()) == set()  # the steps after it are as if it had not been


def test_evaluate_without_rows_on_this_rank() -> None:
    """With fewer blocks than ranks some rank has none; it still takes part in the gathering."""
    _, engine = tiny()
    assert engine.evaluate(TRAIN, []) == {"loss": 0.0}


def test_the_tiny_method_is_the_size_the_tests_think() -> None:
    _, engine = tiny()
    assert engine.state()["model/net/weight"].shape == (1, PIXELS)


def test_a_non_finite_step_leaves_moved_buffers_alone() -> None:
    """A running statistic that took in a NaN would never lose it again."""
    method = TwoPlayer()
    engine = make_engine(method)
    power = method.discriminator.power
    bad_batch = [(grey_batch(), {"z": torch.full((8, 6), float("nan"))})]
    start = power.clone()
    assert not engine.step(D, bad_batch, 0.01).finite and torch.equal(power, start)  # at the very first step, too
    assert step_game(engine, method, D).finite
    moved = power.clone()
    assert not torch.equal(moved, start)
    assert not engine.step(D, bad_batch, 0.01).finite and torch.equal(power, moved)
    assert step_game(engine, method, D, 1).finite and not torch.equal(power, moved)
