"""Parts of parameters: how engines cut them, blocks that are recomputed or compiled, and networks made plain again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_trials import dit
from hypothesis import given
from hypothesis import strategies as st
from solo import RecordingRanks, changed, clone, train_config
from torch import Tensor, nn

from hpc_gen.config.engine import EngineConfig
from hpc_gen.methods.materialise import materialise
from hpc_gen.runtime.randomness import Stream
from hpc_gen.training.checkpoint.pieces import Pieces
from hpc_gen.training.engines.build import build_engine
from hpc_gen.training.engines.layout import Layout
from hpc_gen.training.engines.units import chosen_blocks
from hpc_gen.training.engines.whole import Plain, gather


def covered(layouts: list[Layout], shape: tuple[int, ...]) -> Tensor:
    """How often each element of a tensor is held by the owners among these layouts."""
    count = torch.zeros(shape)
    for layout in layouts:
        held = layout.state(torch.ones(layout.numel))
        assert isinstance(held, Pieces)
        for box in held.boxes:
            count[box.slices] += box.tensor
    return count


SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@given(SHAPES, st.integers(1, 5))
def test_flat_shares_of_all_ranks_are_the_tensor(shape: tuple[int, ...], ranks: int) -> None:
    size = torch.Size(shape).numel()
    share = -(-size // ranks)
    layouts = [Layout.flat(shape, min(r * share, size), max(0, min(share, size - r * share))) for r in range(ranks)]
    assert bool((covered(layouts, shape) == 1).all())
    full = torch.arange(size, dtype=torch.float32).view(shape)
    back = torch.full(shape, -1.0)
    for rank, layout in enumerate(layouts):
        part = torch.zeros(layout.numel)
        layout.fill(part, full)
        assert torch.equal(part, full.flatten()[rank * share : rank * share + layout.numel])
        layout.put(part, back)
    assert torch.equal(back, full)


def test_fused_projections_are_split_each_by_itself() -> None:
    """Rows q, k, v of two heads: rank 1 of 2 holds the second head of each."""
    full = torch.arange(12.0).view(6, 2)
    layout = Layout.stretches((6, 2), 0, [(i * 2 + 1, 1) for i in range(3)])
    part = layout.cut({"w": full}, "w", like=torch.empty(3, 2))
    assert torch.equal(part, full[[1, 3, 5]])
    columns = Layout.stretches((6, 2), 1, [(1, 1)]).cut({"w": full}, "w", like=torch.empty(6, 1))
    assert torch.equal(columns, full[:, 1:])


def test_a_copy_of_another_ranks_part_gives_nothing_and_takes_all() -> None:
    layout = Layout.stretches((4, 2), 0, [(2, 2)], owner=False)
    part = torch.zeros(2, 2)
    layout.fill(part, torch.arange(8.0).view(4, 2))
    assert part.flatten().tolist() == [4, 5, 6, 7]
    held = layout.state(part)
    assert isinstance(held, Pieces) and held.boxes == ()
    whole = Layout.whole((2, 2))
    assert whole.state(part) is not None and not isinstance(whole.state(part), Pieces)


def test_gathering_copies_nothing_that_is_whole_here() -> None:
    part = torch.randn(3, 2)
    found = gather({"w": part}, {"w": Layout.whole((3, 2))}, RecordingRanks(), torch.device("cpu"))
    assert found["w"].data_ptr() == part.data_ptr()


class Hooked(nn.Module):
    """A tied weight, a hook of the method's own, and a submodule that an engine may replace."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.first.register_forward_hook(lambda module, args, out: out + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_a_network_is_shown_plain_and_comes_back_as_it_was() -> None:
    module = Hooked()
    plain = Plain(module)
    x = torch.randn(2, 3)
    expected = module(x)
    full = {name: p.detach().clone() for name, p in module.named_parameters()}
    assert set(full) == {"first.weight", "first.bias"} == set(plain.shapes)
    # an engine comes: hooks, another forward, another submodule, parameters of its own
    module.first.register_forward_pre_hook(lambda *unused: pytest.fail("an engine's hook ran"))
    module.first.register_forward_hook(lambda *unused: pytest.fail("an engine's hook ran"))
    module.__dict__["forward"] = lambda x: pytest.fail("an engine's forward ran")
    module.second = nn.Linear(7, 7)
    module.first.weight = nn.Parameter(torch.zeros(1))
    with plain.shown(full):
        assert torch.equal(module(x), expected)  # the method's own hook has run
        assert not module.first.weight.requires_grad and module.second.weight is module.first.weight
    assert module.first.weight.shape == (1,) and module.second.in_features == 7
    with pytest.raises(pytest.fail.Exception):
        module(x)
    with pytest.raises(RuntimeError, match="inside"), plain.shown(full):
        raise RuntimeError("inside")
    assert module.first.weight.shape == (1,)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ()),
        ({"checkpointing": "full"}, ("a", "b", "c", "d", "e")),
        ({"checkpointing": "selective"}, ("a", "c", "e")),
        ({"checkpointing": "selective", "checkpoint_every": 3}, ("a", "d")),
    ],
)
def test_blocks_that_are_recomputed(settings: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert chosen_blocks(("a", "b", "c", "d", "e"), EngineConfig.model_validate(settings)) == expected


def trained(variant: str, engine: dict[str, Any], count: bool = True) -> tuple[dict[str, Tensor], int, list[float]]:
    """Three steps: the state, how often a block's attention ran (where it is counted), and the losses."""
    method = dit(variant=variant)
    built = build_engine(
        method, materialise(method, 0), train_config(engine=engine), RecordingRanks(), torch.device("cpu")
    )
    passes: list[int] = []
    for block in method.model.dit.blocks if count else ():
        block.attn.register_forward_hook(lambda *unused: passes.append(1))
    (turn,) = method.turns(0, 0)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(3):
        batch = {
            "pixels": torch.randint(0, 256, (4, 1, 8, 8), generator=generator, dtype=torch.uint8),
            "labels": torch.randint(0, 3, (4,), generator=generator),
        }
        draws = {
            name: Stream(0, name).batch(draw, [4 * step + i for i in range(4)])
            for name, draw in method.draws(turn).items()
        }
        losses.append(built.step(turn, [(batch, draws)], 0.01).total)
    return clone(built.state()), len(passes), losses


@pytest.mark.parametrize("variant", ["standard", "energy"])
def test_recomputed_blocks_give_the_same_bits(variant: str) -> None:
    """Also where the backward pass is differentiated again; and they are recomputed, the chosen ones alone."""
    kept, passes, _ = trained(variant, {})
    for settings, more in (({"checkpointing": "full"}, 3), ({"checkpointing": "selective"}, 2)):
        state, again, _ = trained(variant, settings)
        assert changed(kept, state) == set()
        assert again >= passes + 3 * more  # three steps


def test_compiled_blocks_compute_the_same_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiler's tracing and without its code generator, which costs half a minute of C++ here."""
    compiled: list[Any] = []
    original = torch.compile

    def without_code(function: Any, **settings: Any) -> Any:
        compiled.append(function)
        return original(function, backend="aot_eager", **settings)

    monkeypatch.setattr(torch, "compile", without_code)
    _, _, losses = trained("standard", {"compile": "blocks", "checkpointing": "selective"}, count=False)
    assert len(compiled) == 3
    assert losses == pytest.approx(trained("standard", {})[2], rel=1e-5)
