"""The autocast policy: bf16 products on request; masters, gradients, losses and averages stay fp32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from solo import make_engine, micro_batches
from toys import SIDE, TableCondition

from hpc_gen.methods.protocol import Turn
from hpc_gen.training.precision import autocast, set_determinism

CPU = torch.device("cpu")
TURN = Turn("net", "train")


@pytest.fixture
def global_settings() -> Iterator[None]:
    kept = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
    fill = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.set_num_threads(kept[0])
    torch.use_deterministic_algorithms(kept[1])
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_products_run_in_the_named_precision(precision: str, dtype: torch.dtype) -> None:
    with autocast(CPU, precision):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize("name", ["fp16", "float32", "BF16", ""])
def test_an_unknown_precision_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown precision '{name}'; use 'fp32' or 'bf16'"):
        autocast(CPU, name)


class Watching(TableCondition):
    """Remembers in which precision its network ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.dtype, torch.dtype]] = []
        self.net.register_forward_hook(lambda module, args, out: self.seen.append((module.weight.dtype, out.dtype)))


def step(precision: str) -> tuple[Watching, dict[str, torch.Tensor], float]:
    method = Watching()
    engine = make_engine(method, precision=precision)
    batch = {
        "pixels": torch.randint(
            0, 256, (8, 1, SIDE, SIDE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
        ),
        "code": torch.randn(8, 3, generator=torch.Generator().manual_seed(1)),
    }
    micros = micro_batches(method, TURN, batch, 4)
    result = engine.step(TURN, micros, 0.01)
    evaluated = engine.evaluate(TURN, micros)["loss"]
    assert evaluated < result.total  # the step helped
    return method, engine.state(), result.total


def test_a_bf16_step_keeps_fp32_masters_moments_and_losses() -> None:
    method, state, loss = step("bf16")
    assert set(method.seen) == {(torch.float32, torch.bfloat16)}
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in method.net.parameters())
    exact_method, exact, exact_loss = step("fp32")
    assert set(exact_method.seen) == {(torch.float32, torch.float32)}
    assert loss != exact_loss
    assert loss == pytest.approx(exact_loss, rel=1e-2)
    # a loss in bf16 would have 8 bits; this one is a sum of fp32 terms
    assert loss != float(torch.tensor(loss).bfloat16())


def test_determinism_and_threads_are_set(global_settings: None) -> None:
    set_determinism(True, 2)
    assert torch.get_num_threads() == 2
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    set_determinism(False, 1)
    assert torch.get_num_threads() == 1
    assert not torch.are_deterministic_algorithms_enabled()
