"""The DALI feed: a pipeline carries each iteration to the device ahead of training, through pinned memory.

It moves what the torch feed makes, batch columns and draws alike, and changes no bit of it: on a GPU the copies run on
a stream of their own while the network trains; on a CPU (device None) the same pipeline runs without a driver. Flip and
normalisation stay in the objective, on the device: pixels travel as bytes, a quarter of the floats.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hpc_gen.data.decode import import_dali
from hpc_gen.data.feed import Iteration, MicroBatch
from hpc_gen.runtime.errors import UserError

# DALI has no such types: they travel as integers of their size.
_CARRIED = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8, torch.float8_e5m2: torch.uint8}


class DaliMover:
    """`move` for a `Feed`: iterations on `device`. An instance belongs to the feed's thread."""

    def __init__(self, device: torch.device, threads: int = 1) -> None:
        """`threads`: of DALI on the CPU. Raises UserError when the package is not installed."""
        self._dali = import_dali()
        self._device, self._threads = device, threads
        self._layout: tuple[Any, ...] = ()
        self._pipeline: Any = None
        self._waiting: list[Tensor] = []

    def __call__(self, iteration: Iteration) -> Iteration:
        """The same iteration with its tensors on the device."""
        micro_batches = [self._micro_batch(each) for each in iteration.micro_batches]
        return replace(iteration, micro_batches=micro_batches)

    def _micro_batch(self, given: MicroBatch) -> MicroBatch:
        flat = dict(given.batch)
        flat |= {f"{purpose}\0{name}": t for purpose, named in given.draws.items() for name, t in named.items()}
        moved = dict(zip(flat, self._moved(list(flat.values())), strict=True))
        draws = {
            purpose: {name: moved[f"{purpose}\0{name}"] for name in named} for purpose, named in given.draws.items()
        }
        return replace(given, batch={name: moved[name] for name in given.batch}, draws=draws)

    def _moved(self, tensors: list[Tensor]) -> list[Tensor]:
        if not tensors:
            return []
        carried = [t.view(_CARRIED[t.dtype]) if t.dtype in _CARRIED else t for t in tensors]
        layout = tuple((t.dtype, tuple(t.shape)) for t in carried)
        if self._pipeline is None or layout != self._layout:
            self._pipeline, self._layout = self._build(len(tensors)), layout
        self._waiting = [t.contiguous() for t in carried]
        outputs = self._pipeline.run()
        found = [self._as_torch(output, like) for output, like in zip(outputs, self._waiting, strict=True)]
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # of this thread; training goes on meanwhile
        return [t.view(like.dtype) if like.dtype in _CARRIED else t for t, like in zip(found, tensors, strict=True)]

    def _as_torch(self, output: Any, like: Tensor) -> Tensor:
        """A tensor of the caller's own: the pipeline uses its buffers again."""
        from nvidia.dali.plugin.pytorch import feed_ndarray

        target = torch.empty(like.shape, dtype=like.dtype, device=self._device)
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        feed_ndarray(output[0], target, cuda_stream=stream)
        return target

    def _build(self, number: int) -> Any:
        """A pipeline that takes `number` arrays as samples of a batch of one and gives them on the device."""
        from nvidia.dali import fn

        on_gpu = self._device.type == "cuda"
        device_id = (self._device.index or 0) if on_gpu else None
        pipeline = self._dali.Pipeline(
            batch_size=1,
            num_threads=self._threads,
            device_id=device_id,
            exec_async=False,
            exec_pipelined=False,
            prefetch_queue_depth=1,
        )
        with pipeline:
            given = fn.external_source(source=self._next, num_outputs=number, batch=True)
            pipeline.set_outputs(*(each.gpu() if on_gpu else each for each in given))
        try:
            pipeline.build()
        except RuntimeError as error:
            raise UserError(f"DALI cannot start ({str(error).splitlines()[0]}); set data.feed=torch") from error
        return pipeline

    def _next(self) -> list[list[Any]]:
        return [[t.numpy()] for t in self._waiting]
