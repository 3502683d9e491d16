"""`train.width`: the numbers of ranks that an attempt may have. Which it has must not change what is trained."""

from __future__ import annotations

from collections.abc import Sequence

from hpc_gen.config.errors import KeyProblem


def check_widths(widths: Sequence[int] | None, global_batch: int, micro_batch: int | None, ranks: int) -> None:
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
    fitting = [width for width in widths if global_batch % (width * micro_batch) == 0]
    for place, width in enumerate(widths):
        if width not in fitting:
            raise KeyProblem(
                f"train.width.{place}",
                f"'train.width' allows {width} ranks, but {width} * 'train.micro_batch' = {width} * {micro_batch} does "
                f"not divide 'train.global_batch' = {global_batch}; use "
                + (str(fitting) if fitting else f"divisors of {global_batch} / {micro_batch}"),
            )
    if ranks != 1 and ranks not in widths:
        raise KeyProblem(
            "train.ranks",
            f"'train.ranks' = {ranks} is not one of 'train.width' = {list(widths)}; leave 'train.ranks' out: with a "
            "width every attempt starts with what is there",
        )
