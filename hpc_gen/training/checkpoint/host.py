"""Host copies of a rank's share: made once, ahead of the first save, and filled by each save as fast as memory allows.

The copy is all that a save stops the loop for. Fresh memory costs several times the copy itself (the kernel hands out
each page at its first touch), so the buffers are made and touched in a thread while the first steps run.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from hpc_gen.training.checkpoint.pieces import Box, Pieces

Share = Mapping[str, Tensor | Pieces]
Key = tuple[str, tuple[int, ...]]  # name; offsets of a box, () for a whole tensor


class HostBuffers:
    """Buffers by tensor name and by box; they are used again as long as shapes and types stay."""

    def __init__(self) -> None:
        self._held: dict[Key, Tensor] = {}
        self._maker: threading.Thread | None = None

    def reserve(self, share: Share) -> None:
        """Begin to make the buffers for a share, in the background; its values are not looked at."""
        self.settle()
        wanted = [
            (key, torch.empty_like(tensor, device="meta"), tensor.is_cuda)
            for key, tensor in _parts(share)
            if not _fits(self._held.get(key), tensor)
        ]
        if wanted:
            self._maker = threading.Thread(target=self._make, args=(wanted,), name="checkpoint-buffers", daemon=True)
            self._maker.start()

    def settle(self) -> None:
        """Until no buffer is being made."""
        if self._maker is not None:
            self._maker.join()
            self._maker = None

    def copy(self, share: Share) -> dict[str, Tensor | Pieces]:
        """The share in host memory; what it is made of may change afterwards. Buffers of other names are let go."""
        self.settle()
        parts = list(_parts(share))
        held: dict[Key, Tensor] = {}
        for key, tensor in parts:
            host = self._held.pop(key, None)
            held[key] = host if host is not None and _fits(host, tensor) else _buffer(tensor, tensor.is_cuda)
        self._held = held
        sources = [tensor for _, tensor in parts]
        devices = {tensor.device for tensor in sources if tensor.is_cuda}
        with torch.no_grad():
            if devices:
                for host, tensor in zip(held.values(), sources, strict=True):
                    host.copy_(tensor, non_blocking=True)  # behind the kernels of the last step, all in one queue
            else:
                torch._foreach_copy_(list(held.values()), sources)
        for device in devices:
            torch.cuda.synchronize(device)
        return {name: _in_host(name, value, held) for name, value in share.items()}

    def _make(self, wanted: list[tuple[Key, Tensor, bool]]) -> None:
        try:
            for key, like, pinned in wanted:
                self._held[key] = _buffer(like, pinned).zero_()
        except RuntimeError:  # no memory: the save makes the rest itself, and says what is wrong if that fails as well
            return


def _parts(share: Share) -> Iterator[tuple[Key, Tensor]]:
    """Every tensor of a share with its key."""
    for name, value in share.items():
        if isinstance(value, Pieces):
            for box in value.boxes:
                yield (name, box.offsets), box.tensor.detach()
        else:
            yield (name, ()), value.detach()


def _in_host(name: str, value: Tensor | Pieces, held: Mapping[Key, Tensor]) -> Tensor | Pieces:
    if isinstance(value, Pieces):
        boxes = tuple(Box(box.offsets, held[name, box.offsets]) for box in value.boxes)
        return Pieces(value.shape, value.dtype, boxes)
    return held[name, ()]


def _buffer(like: Tensor, pinned: bool) -> Tensor:
    """Host memory; pinned where values come from a GPU, which is the only kind that it fills at full speed."""
    if pinned:
        try:
            return torch.empty_like(like, device="cpu", pin_memory=True)
        except RuntimeError:  # more than may be pinned
            pass
    return torch.empty_like(like, device="cpu")


def _fits(host: Tensor | None, tensor: Tensor) -> bool:
    return host is not None and host.shape == tensor.shape and host.dtype == tensor.dtype
