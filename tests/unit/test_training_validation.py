"""Validation: fixed rows, fixed draws, the same mean however it is cut over micro-batches and ranks."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from solo import RecordingRanks, changed, clone, make_engine
from torch import Tensor
from toys import SIDE, TwoPlayer

from hpc_gen.config.train import ValidateConfig
from hpc_gen.data.table import Table
from hpc_gen.data.write import write_table
from hpc_gen.methods.protocol import Losses, Term, Turn
from hpc_gen.runtime.randomness import Draw, Integers, Stream
from hpc_gen.training.engines.ddp import DdpEngine
from hpc_gen.training.validation import validate

ROWS = 20


@pytest.fixture
def table(tmp_path: Path) -> Table:
    pixels = torch.randint(0, 256, (ROWS, 1, SIDE, SIDE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    write_table(tmp_path / "held-out", {"pixels": pixels}, shard_rows=8)
    return Table.open(tmp_path / "held-out")


class Watching(TwoPlayer):
    """Remembers the rows of pixels and the draws it was asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Turn, Tensor, dict[str, Tensor]]] = []

    def draws(self, turn: Turn) -> dict[str, Draw]:
        return {**super().draws(turn), "pair": Draw((), Integers(0, 1000), per="group")}

    def objective(self, turn: Turn, batch: Any, draws: Any) -> Losses:
        self.seen.append((turn, batch["pixels"], dict(draws)))
        return super().objective(turn, batch, draws)


class OneOf(RecordingRanks):
    """Claims to be one rank of several; what the others would gather is what it gathers alone."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        self.rank, self.world_size = rank, world_size

    def all_gather_objects(self, obj: Any) -> list[Any]:
        return [obj]


def run(
    method: TwoPlayer, engine: DdpEngine, table: Table, ranks: RecordingRanks | None = None, polls: list[int] | None = None,
    **changes: Any,
) -> dict[str, float]:  # fmt: skip
    settings = {"seed": 5, "micro_batch": 4, "coupling_group": 1, **changes}
    config = ValidateConfig(every_images=8, num_images=settings.pop("num_images", 16))
    ranks = ranks or RecordingRanks()
    return validate(
        method,
        engine,
        table,
        config,
        ranks=ranks,
        shared=lambda: nullcontext(lambda: (polls if polls is not None else []).append(1)),
        **settings,
    )


def test_rows_and_draws_are_fixed(table: Table) -> None:
    method = Watching()
    engine = make_engine(method)
    polls: list[int] = []
    found = run(method, engine, table, polls=polls)
    assert set(found) == {"g/loss", "g/fool", "d/loss", "d/fake", "d/real"}
    assert len(polls) == 8  # two turns of four blocks
    for purpose in ("g", "d"):
        mine = [seen for seen in method.seen if seen[0].purpose == purpose]
        assert torch.equal(torch.cat([s[1] for s in mine]), table.read(torch.arange(16), ("pixels",))["pixels"])
        expected = Stream(5, f"validate/{purpose}/z").batch(Draw((6,)), list(range(16)))
        assert torch.equal(torch.cat([s[2]["z"] for s in mine]), expected)
    assert run(method, engine, table) == found
    assert run(method, engine, table, seed=6)["d/fake"] != found["d/fake"]  # another seed draws otherwise


def test_the_number_follows_the_weights_and_moves_nothing(table: Table) -> None:
    method = TwoPlayer()
    engine = make_engine(method)
    first = run(method, engine, table)
    with torch.no_grad():
        method.discriminator.last.bias.add_(1.0)
    before = clone(engine.state())
    second = run(method, engine, table)
    assert second["d/fake"] > first["d/fake"] and second["d/real"] < first["d/real"]
    assert changed(before, engine.state()) == set()


@pytest.mark.parametrize("micro_batch", [1, 3, 16, 50])
def test_the_cut_does_not_matter(table: Table, micro_batch: int) -> None:
    method = TwoPlayer()
    engine = make_engine(method)
    assert run(method, engine, table, micro_batch=micro_batch) == pytest.approx(run(method, engine, table), rel=1e-5)


def test_more_rows_than_the_table_has_means_all_of_them(table: Table) -> None:
    method = Watching()
    engine = make_engine(method)
    run(method, engine, table, num_images=1000, micro_batch=8)
    assert [len(pixels) for turn, pixels, _ in method.seen if turn.purpose == "d"] == [8, 8, 4]


def test_groups_are_whole_and_share_their_draws(table: Table) -> None:
    method = Watching()
    engine = make_engine(method)
    run(method, engine, table, num_images=15, micro_batch=4, coupling_group=4)
    seen = [(pixels, draws) for turn, pixels, draws in method.seen if turn.purpose == "d"]
    assert sum(len(pixels) for pixels, _ in seen) == 12  # the last 3 rows are no whole group
    drawn = torch.cat([draws["pair"] for _, draws in seen])
    assert torch.equal(drawn, Stream(5, "validate/d/pair").batch(Draw((), Integers(0, 1000)), [0, 1, 2]))


def test_ranks_share_the_blocks(table: Table) -> None:
    """Every block is on exactly one rank, also where some have none."""
    pieces: list[Tensor] = []
    totals = []
    for rank in range(3):
        method = Watching()
        engine = make_engine(method, ranks=OneOf(rank, 3))
        found = run(method, engine, table, ranks=OneOf(rank, 3), num_images=8)
        pixels = [p for turn, p, _ in method.seen if turn.purpose == "d"]
        assert len(pixels) == [1, 1, 0][rank]
        pieces += pixels
        totals.append(found.get("d/real", math.nan))
    assert torch.equal(torch.cat(pieces), table.read(torch.arange(8), ("pixels",))["pixels"])
    method = TwoPlayer()
    assert (totals[0] + totals[1]) / 2 == pytest.approx(run(method, make_engine(method), table, num_images=8)["d/real"])


def test_terms_of_a_single_turn_have_no_prefix(table: Table) -> None:
    class Alone(TwoPlayer):
        def turns(self, iteration: int, images_seen: int) -> list[Turn]:
            return [Turn("discriminator", "d")]

        def objective(self, turn: Turn, batch: Any, draws: Any) -> Losses:
            size = float(len(batch["pixels"]))
            return Losses(
                {
                    "fake": Term(torch.tensor(3.0 * size), size, weight=2.0),
                    "real": Term(torch.tensor(size), size, weight=0.0),
                }
            )

    method = Alone()
    assert run(method, make_engine(method), table) == {"loss": 6.0, "fake": 3.0, "real": 1.0}
