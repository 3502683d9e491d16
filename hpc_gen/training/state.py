"""What the loop must remember beside weights: the clock, the digest, the guard's counters, the open log interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hpc_gen.runtime.errors import CheckpointError

_UINT64 = 2**64


@dataclass
class TrainState:
    """Saved as `train/*` tensors, so that a resumed run logs and guards exactly as an undisturbed one.

    `digest`: sum mod 2**64 over all samples up to the last save or load of the hash of (position, row, draws), over all
    ranks; `digest_here`: this rank's part since then. Their global sum is the same on any number of ranks.
    `draw_counter`: k of every draw, the number of roll-backs, so that a repeated stretch draws afresh.
    `recent`: losses of the last steps by turn, where the guard watches for spikes.
    `best_loss`: lowest validation loss at a checkpoint so far; `best_images`: the place of that checkpoint (-1: none).
    """

    images_seen: int = 0
    digest: int = 0
    digest_here: int = 0
    draw_counter: int = 0
    non_finite_total: int = 0
    non_finite_run: int = 0
    best_loss: float = float("inf")
    best_images: int = -1
    recent: dict[str, list[float]] = field(default_factory=dict)
    window: dict[str, float] = field(default_factory=dict)
    window_steps: int = 0

    def add_digest(self, part: int) -> None:
        """Add this rank's digest of one iteration."""
        self.digest_here = (self.digest_here + part) % _UINT64

    def merge_digests(self, parts: Sequence[int]) -> None:
        """Fold every rank's part into the global digest; parts start afresh."""
        self.digest = (self.digest + sum(parts)) % _UINT64
        self.digest_here = 0

    def add_losses(self, losses: Mapping[str, float]) -> None:
        """Add one iteration's values to the open log interval."""
        for name, value in losses.items():
            self.window[name] = self.window.get(name, 0.0) + value
        self.window_steps += 1

    def close_window(self) -> dict[str, float]:
        """Means over the log interval, which starts afresh."""
        means = {name: value / max(1, self.window_steps) for name, value in self.window.items()}
        self.window, self.window_steps = {}, 0
        return means

    def tensors(self) -> dict[str, Tensor]:
        """`train/NAME` -> 0-dim int64 or float64 tensor; `train/recent/TURN` float64 [steps]."""
        out = {
            "train/images_seen": torch.tensor(self.images_seen),
            "train/digest": torch.tensor(self.digest - _UINT64 if self.digest >= _UINT64 // 2 else self.digest),
            "train/draw_counter": torch.tensor(self.draw_counter),
            "train/non_finite_total": torch.tensor(self.non_finite_total),
            "train/non_finite_run": torch.tensor(self.non_finite_run),
            "train/best_loss": torch.tensor(self.best_loss, dtype=torch.float64),
            "train/best_images": torch.tensor(self.best_images),
            "train/window_steps": torch.tensor(self.window_steps),
        }
        for name, value in self.window.items():
            out[f"train/window/{name}"] = torch.tensor(value, dtype=torch.float64)
        for purpose, losses in self.recent.items():
            out[f"train/recent/{purpose}"] = torch.tensor(losses, dtype=torch.float64)
        return out

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> TrainState:
        """The state that `tensors()` gave. Raises CheckpointError naming a key that is missing."""
        try:
            state = cls(
                images_seen=int(tensors["train/images_seen"]),
                digest=int(tensors["train/digest"]) % _UINT64,
                draw_counter=int(tensors["train/draw_counter"]),
                non_finite_total=int(tensors["train/non_finite_total"]),
                non_finite_run=int(tensors["train/non_finite_run"]),
                best_loss=float(tensors["train/best_loss"]),
                best_images=int(tensors["train/best_images"]),
                window_steps=int(tensors["train/window_steps"]),
            )
        except KeyError as error:
            raise CheckpointError(f"the checkpoint has no entry {error}; it was written by another version") from error
        prefix = "train/recent/"
        state.recent = {key[len(prefix) :]: tensors[key].tolist() for key in tensors if key.startswith(prefix)}
        prefix = "train/window/"
        state.window = {key[len(prefix) :]: float(tensors[key]) for key in tensors if key.startswith(prefix)}
        return state
