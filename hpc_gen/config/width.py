"""`train.width`: the numbers of ranks that an attempt may have. Which it has must not change what is trained."""

from __future__ import annotations

from collections.abc import Sequence

from hpc_gen.config.engine import EngineConfig
from hpc_gen.config.errors import KeyProblem


def fits_engine(engine: EngineConfig, ranks: int) -> bool:
    """Whether so many ranks can be cut the way the engine is told to: into tensor-parallel teams, into shards."""
    return ranks % engine.tensor_parallel == 0 and ranks % (engine.shards or 1) == 0


def check_widths(
    widths: Sequence[int] | None, global_batch: int, micro_batch: int | None, ranks: int, engine: EngineConfig
) -> None:
    """Raises KeyProblem where a width cannot share out the global batch, or would change the micro-batch."""
    if widths is None:
        return
    if len(set(widths)) < len(widths):
        raise KeyProblem("train.width", f"'train.width' = {list(widths)} names a number of ranks twice; name each once")
    if micro_batch is None:
        raise KeyProblem(
            "train.width",
            "'train.width' needs 'train.micro_batch': with null a rank's micro-batch is its whole share of the global "
            f"batch, which changes with the number of ranks; set it, as to {global_batch // max(widths) or 1}",
        )
    whole = [width for width in widths if fits_engine(engine, width)]
    fitting = [width for width in whole if global_batch % (engine.data_ranks(width) * micro_batch) == 0]
    for place, width in enumerate(widths):
        if width not in whole:
            raise KeyProblem(
                f"train.width.{place}",
                f"'train.width' allows {width} ranks, which 'train.engine.tensor_parallel' = {engine.tensor_parallel} "
                f"or 'train.engine.shards' = {engine.shards} does not divide; use {whole or 'multiples'}",
            )
        if width not in fitting:
            data_ranks = engine.data_ranks(width)
            raise KeyProblem(
                f"train.width.{place}",
                f"'train.width' allows {width} ranks, but {data_ranks} * 'train.micro_batch' = {data_ranks} * "
                f"{micro_batch} does not divide 'train.global_batch' = {global_batch}; use "
                + (str(fitting) if fitting else f"divisors of {global_batch} / {micro_batch}"),
            )
    if ranks != 1 and ranks not in widths:
        raise KeyProblem(
            "train.ranks",
            f"'train.ranks' = {ranks} is not one of 'train.width' = {list(widths)}; leave 'train.ranks' out: with a "
            "width every attempt starts with what is there",
        )
