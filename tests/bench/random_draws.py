"""(e) Draws per second: randomness as a function of (seed, purpose, n, k) against a generator that just runs on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from measure import Table, by_turns

from hpc_gen.runtime.randomness import Distribution, Draw, Integers, Normal, Stream, Uniform

BATCH = 64
CASES: tuple[tuple[str, tuple[int, ...], Distribution], ...] = (
    ("256 normals (16 x 16 pixels)", (1, 16, 16), Normal()),
    ("4,096 normals (latents 16 x 16 x 16)", (16, 16, 16), Normal()),
    ("1 uniform (label dropout)", (), Uniform()),
    ("1 integer (timestep)", (), Integers(0, 1000)),
)


def bench(quick: bool) -> list[Table]:
    """One table: a row per kind of draw."""
    torch.set_num_threads(1)
    rounds, batches = (3, 8) if quick else (7, 256)
    table = Table(
        "Draws per second",
        f"One thread, batches of {BATCH} samples, {rounds} rounds of {batches} batches. Peers: a torch generator that "
        "fills whole batches (draws then depend on how batches are cut), and a torch generator reseeded per sample. "
        "Ratio: time of Stream.batch over that of the peer.",
        ("one sample draws", "Stream.batch, samples/s", "ratio to running generator", "ratio to reseeded generator"),
    )
    for name, shape, distribution in CASES:
        stream, draw = Stream(0, "bench"), Draw(shape, distribution)
        running, reseeded = _torch_fill(distribution, shape), _torch_fill(distribution, shape)

        def ours(stream: Stream = stream, draw: Draw = draw) -> None:
            for begin in range(0, batches * BATCH, BATCH):
                stream.batch(draw, range(begin, begin + BATCH))

        def whole(fill: Callable[[torch.Generator, int], torch.Tensor] = running) -> None:
            generator = torch.Generator().manual_seed(0)
            for _ in range(batches):
                fill(generator, BATCH)

        def single(fill: Callable[[torch.Generator, int], torch.Tensor] = reseeded) -> None:
            generator = torch.Generator()
            for begin in range(0, batches * BATCH, BATCH):
                torch.cat([fill(generator.manual_seed(n), 1) for n in range(begin, begin + BATCH)])

        found = by_turns({"ours": ours, "whole": whole, "single": single}, rounds)
        table.add(
            name,
            found["ours"].per(batches * BATCH).show("{:,.0f}"),
            found["ours"].over(found["whole"]).show(),
            found["ours"].over(found["single"]).show(),
        )
    return [table]


def _torch_fill(distribution: Distribution, shape: tuple[int, ...]) -> Callable[[torch.Generator, int], torch.Tensor]:
    """The same distribution by torch: (generator, samples) -> tensor [samples, *shape]."""
    if isinstance(distribution, Normal):
        return lambda generator, count: torch.randn((count, *shape), generator=generator)
    if isinstance(distribution, Uniform):
        return lambda generator, count: torch.rand((count, *shape), generator=generator)
    low, high = distribution.low, distribution.high
    return lambda generator, count: torch.randint(low, high, (count, *shape), generator=generator)
