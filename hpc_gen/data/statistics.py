"""Per-channel sums of a column, mergeable in any grouping: exact for integers, float64 for the rest."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Number = int | float


def has_channels(column: Tensor) -> bool:
    """Whether statistics per channel mean something: images and latents [N, C, H, W], vectors [N, C] of floats.

    Sequences of tokens [N, T, C] or codes [N, T] have none, and their sums in float64 would need gigabytes.
    """
    return column.ndim > 3 or (column.ndim == 2 and column.is_floating_point())


@dataclass(frozen=True)
class ChannelSums:
    """Sums over rows and space: `count` values per channel, `sum` and `sum_squares` of each channel."""

    count: int
    sum: tuple[Number, ...]
    sum_squares: tuple[Number, ...]

    @classmethod
    def of(cls, column: Tensor) -> ChannelSums:
        """Sums of [N, C, ...] over all axes but the second. uint8 sums are exact integers."""
        values = column.reshape(column.shape[0], column.shape[1], -1).transpose(0, 1).reshape(column.shape[1], -1)
        exact = not column.dtype.is_floating_point
        values = values.to(torch.int64 if exact else torch.float64)
        return cls(values.shape[1], tuple(values.sum(1).tolist()), tuple((values * values).sum(1).tolist()))

    @classmethod
    def merge(cls, parts: Iterable[ChannelSums]) -> ChannelSums:
        """Sums of the union, added in the order given (so that the same parts give the same bits)."""
        parts = list(parts)
        return cls(
            sum(part.count for part in parts),
            tuple(sum(values) for values in zip(*(part.sum for part in parts), strict=True)),
            tuple(sum(values) for values in zip(*(part.sum_squares for part in parts), strict=True)),
        )

    def mean_and_std(self) -> dict[str, list[float]]:
        """Per-channel mean and population standard deviation in units of the stored values, float64."""
        mean = [float(total / self.count) for total in self.sum]
        # n * sum(x^2) - sum(x)^2 stays an exact integer for integer columns.
        spread = [
            max(0.0, float((self.count * squares - total * total) / self.count**2))
            for total, squares in zip(self.sum, self.sum_squares, strict=True)
        ]
        return {"mean": mean, "std": [math.sqrt(value) for value in spread]}

    def to_json(self) -> dict[str, Any]:
        """JSON object; integers and floats survive the round trip exactly."""
        return {"count": self.count, "sum": list(self.sum), "sum_squares": list(self.sum_squares)}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> ChannelSums:
        """Inverse of `to_json`."""
        return cls(int(document["count"]), tuple(document["sum"]), tuple(document["sum_squares"]))
