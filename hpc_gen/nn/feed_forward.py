"""The plain feed-forward layer of transformers; legend of shapes: B batch, N tokens, D width."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class FeedForward(nn.Module):
    """Two linear maps with a tanh-approximated GELU between them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Tokens [B, N, D]."""
        return self.fc2(F.gelu(self.fc1(x_BND), approximate="tanh"))
