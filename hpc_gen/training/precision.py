"""The one autocast policy that all engines share: fp32 masters, EMA and losses; bf16 matrix products on request."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Context for an objective: `fp32` changes nothing, `bf16` runs matrix products in bfloat16.

    Raises ValueError for another name (fp16 needs a loss scale and belongs to the deepspeed engine).
    """
    if precision == "fp32":
        return nullcontext()
    if precision == "bf16":
        return torch.autocast(device_type=device.type, dtype=torch.bfloat16)
    raise ValueError(f"unknown precision '{precision}'; use 'fp32' or 'bf16'")


def set_determinism(deterministic: bool, threads: int) -> None:
    """Fix what changes the last bits: thread count always; atomics, autotuning and TF32 when `deterministic`."""
    torch.set_num_threads(threads)
    # torch.use_deterministic_algorithms would import the whole of torch._inductor to tell the compiler as well: a
    # second of every rank's start. Nothing here is compiled; torch.compile would need that config's `deterministic` too
    torch.set_deterministic_debug_mode("error" if deterministic else "default")
    # torch would fill every new tensor with NaN as well, to show reads of uninitialised memory; results do not change
    torch.utils.deterministic.fill_uninitialized_memory = False
    if torch.cuda.is_available():
        torch.backends.cudnn.benchmark = not deterministic
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
