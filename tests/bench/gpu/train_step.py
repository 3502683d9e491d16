"""Train DiT-XL/2 (noise prediction and energy) in bf16 on one GPU: images/s, MFU, peak memory, save stall, data wait.

One file for a machine with nothing but PyTorch 2.11 or newer:

    python train_step.py                     all cases, ten minutes at most
    python train_step.py --cases fsdp        those whose name holds a word
    python train_step.py --self-check        tiny shapes on the CPU: does every case run, do engines agree?

The networks are written again here, with the shapes and parameter names of hpc_gen.methods.energy.model, because that
module's config needs pydantic; tests/unit/test_gpu_bench.py compares names, shapes, outputs and FLOPs. Engines are
torch's own DDP and fully_shard around the objective, with fp32 masters, as the engines of hpc_gen place them; the feed,
the save to host memory and its writing thread do what training does. FLOPs count products, convolutions and attention of
forward and backward, nothing that is recomputed. compile and energy do not go together: torch.compile cannot
differentiate a backward pass again.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import platform
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

PEAK_TFLOPS = (("GH200", 989.4), ("H200", 989.4), ("H100 PCIe", 756.0), ("H100", 989.4), ("A100", 311.8))
TIMESTEPS, CLASSES = 1000, 1000


@dataclass(frozen=True)
class Shape:
    """DiT-XL/2 on 32 x 32 x 4 latents of 256-pixel images."""

    side: int = 32
    channels: int = 4
    patch: int = 2
    width: int = 1152
    depth: int = 28
    heads: int = 16

    @property
    def tokens(self) -> int:
        return (self.side // self.patch) ** 2


XL = Shape()
TINY = Shape(side=8, width=48, depth=2, heads=2)


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    variant: str
    engine: str
    compile: bool
    batch: int

    @property
    def name(self) -> str:
        return f"{self.variant} {self.engine}{' compile' if self.compile else ''}"


# ---------------------------------------------------------------- the network


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, second: bool) -> Tensor:
        batch, tokens, width = x.shape
        shape = (batch, tokens, self.heads, width // self.heads)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=2))
        if second:  # fused kernels have no second derivative
            mixed = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    x = F.layer_norm(x, (x.shape[-1],), eps=1e-6)
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(width, heads), Mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor, second: bool) -> Tensor:
        parts = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + parts[2][:, None] * self.attn(modulate(x, parts[0], parts[1]), second)
        return x + parts[5][:, None] * self.mlp(modulate(x, parts[3], parts[4]))


class FinalLayer(nn.Module):
    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(modulate(x, *self.adaLN_modulation(c).chunk(2, dim=1)))


class Named(nn.Module):
    """A module whose child has the name of the reference's checkpoints."""

    def __init__(self, name: str, child: nn.Module) -> None:
        super().__init__()
        self.add_module(name, child)

    def forward(self, *given: Tensor) -> Tensor:
        return next(iter(self.children()))(*given)


class DiT(nn.Module):
    def __init__(self, shape: Shape, energy: bool) -> None:
        super().__init__()
        width, self.shape, self.energy = shape.width, shape, energy
        self.pos_embed = nn.Parameter(torch.zeros(1, shape.tokens, width), requires_grad=False)
        self.x_embedder = Named("proj", nn.Conv2d(shape.channels, width, shape.patch, shape.patch))
        self.t_embedder = Named("mlp", nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width)))
        self.y_embedder = Named("embedding_table", nn.Embedding(CLASSES + 1, width))
        self.blocks = nn.ModuleList(Block(width, shape.heads) for _ in range(shape.depth))
        self.final_layer = FinalLayer(width, shape.patch**2 * (1 if energy else shape.channels))
        if energy:
            head = nn.Sequential(nn.Linear(width, width // 2), nn.SiLU(), nn.Linear(width // 2, 1))
            self.energy_layer = Named("energy_head", head)

    def tokens(self, x: Tensor, t: Tensor, y: Tensor, second: bool) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            tokens = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        c = self.t_embedder(torch.cat([angles.cos(), angles.sin()], dim=1)) + self.y_embedder(y)
        for block in self.blocks:
            tokens = block(tokens, c, second)
        return tokens, c

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The noise in `x` [B, C, S, S]: predicted, or the slope of the energy."""
        if self.energy:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                tokens = self.tokens(x, t, y, second=True)[0]
                with torch.autocast(x.device.type, enabled=False):
                    energy = self.energy_layer(tokens.float().mean(dim=1)).sum()
                return torch.autograd.grad(energy, x, create_graph=True)[0]
        shape, grid = self.shape, self.shape.side // self.shape.patch
        values = self.final_layer(*self.tokens(x, t, y, second=False))
        values = values.view(-1, grid, grid, shape.patch, shape.patch, shape.channels).permute(0, 5, 1, 3, 2, 4)
        return values.reshape(-1, shape.channels, shape.side, shape.side)


class Objective(nn.Module):
    """Mean squared error of the noise; engines wrap this, not the network."""

    def __init__(self, dit: DiT) -> None:
        super().__init__()
        self.dit = dit
        betas = torch.linspace(0.0001, 0.02, TIMESTEPS, dtype=torch.float64)
        signal = (1 - betas).cumprod(0)
        self.register_buffer("signal", signal.sqrt().float(), persistent=False)
        self.register_buffer("sigma", (1 - signal).sqrt().float(), persistent=False)

    def forward(self, x: Tensor, noise: Tensor, t: Tensor, y: Tensor) -> Tensor:
        noisy = self.signal[t][:, None, None, None] * x + self.sigma[t][:, None, None, None] * noise
        return (noise - self.dit(noisy, t, y).float()).square().mean()


# ---------------------------------------------------------------- what it costs


@functools.cache
def flops_per_image(shape: Shape, energy: bool) -> float:
    """FLOPs of one image, forward and backward, on tensors without memory (as hpc_gen/training/fake_step.py)."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    class Count(TorchDispatchMode):
        flops = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            formula = flop_registry.get(func._overloadpacket)
            if formula is None and func.namespace == "aten":
                with self:
                    parts = func.decompose(*args, **(kwargs or {}))
                if parts is not NotImplemented:
                    return parts
            out = func(*args, **(kwargs or {}))
            if formula is not None:
                self.flops += formula(*args, **(kwargs or {}), out_val=out)
            return out

    with FakeTensorMode(allow_non_fake_inputs=True):
        objective = Objective(DiT(shape, energy))
        x = torch.zeros(2, shape.channels, shape.side, shape.side)
        index = torch.zeros(2, dtype=torch.int64)
        with Count() as count:
            objective(x, x.clone(), index, index).backward()
    return count.flops / 2


# ---------------------------------------------------------------- feed, save, engines


class Feed:
    """A thread that gathers rows of a table in host memory, draws noise and pins both, four batches ahead."""

    def __init__(self, shape: Shape, batch: int, device: torch.device) -> None:
        size, generator = (2048, shape.channels, shape.side, shape.side), torch.Generator().manual_seed(0)
        self._table = torch.randn(size, generator=generator)
        self._batch, self._device, self.wait_s = batch, device, 0.0
        self._ready: queue.Queue[tuple[Tensor, ...]] = queue.Queue(4)
        self._over = False
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        generator = torch.Generator().manual_seed(1)
        while not self._over:
            rows = torch.randint(0, len(self._table), (self._batch,), generator=generator)
            noise = torch.randn(self._batch, *self._table.shape[1:], generator=generator)
            t = torch.randint(0, TIMESTEPS, (self._batch,), generator=generator)
            made = (self._table[rows], noise, t, rows % CLASSES)
            if self._device.type == "cuda":
                made = tuple(each.pin_memory() for each in made)
            while not self._over:
                try:
                    self._ready.put(made, timeout=0.1)
                    break
                except queue.Full:
                    pass

    def __next__(self) -> tuple[Tensor, ...]:
        begun = time.perf_counter()
        made = self._ready.get()
        self.wait_s += time.perf_counter() - begun
        return tuple(each.to(self._device, non_blocking=True) for each in made)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return self

    def close(self) -> None:
        self._over = True


class Saver:
    """The state goes to host buffers, for which the loop waits, and a thread writes it to a file."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._buffers, self._thread = folder, {}, None  # type: ignore[var-annotated]

    def save(self, state: dict[str, Tensor]) -> float:
        """Seconds that the loop stood still."""
        begun = time.perf_counter()
        self.wait()
        for name, tensor in state.items():
            if name not in self._buffers:
                pinned = tensor.device.type == "cuda"
                self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            self._buffers[name].copy_(tensor, non_blocking=True)
        synchronize()
        self._thread = threading.Thread(target=self._write)
        self._thread.start()
        return time.perf_counter() - begun

    def _write(self) -> None:
        with open(self._folder / "state.bin", "wb") as stream:
            for tensor in self._buffers.values():
                stream.write(memoryview(tensor.view(-1).view(torch.uint8).numpy()))

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def wrapped(case: Case, objective: Objective, device: torch.device) -> nn.Module:
    """The objective in its engine; raises NotImplementedError with the reason for what cannot work."""
    energy = case.variant == "energy"
    if energy and case.compile:
        raise NotImplementedError("refused: torch.compile cannot differentiate a backward pass again")
    if case.compile:
        for block in objective.dit.blocks:
            block.compile(backend="inductor" if device.type == "cuda" else "aot_eager")  # no C++ compiler for a check
    if case.engine == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(objective, find_unused_parameters=energy)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for block in () if energy else objective.dit.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(objective, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return objective


def seeded(shape: Shape, energy: bool) -> Objective:
    torch.manual_seed(0)
    objective = Objective(DiT(shape, energy))
    for parameter in objective.parameters():  # nothing zero: gates and output would hide the blocks
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
    return objective


# ---------------------------------------------------------------- one case


def run(case: Case, shape: Shape, device: torch.device, seconds: float, most: int, folder: Path) -> dict[str, Any]:
    """Warm up, then train for about `seconds`; a save in the middle."""
    objective = seeded(shape, case.variant == "energy").to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = wrapped(case, objective, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), fused=device.type == "cuda")
    average = [local(p.detach()).clone() for p in trained]
    feed, saver = Feed(shape, case.batch, device), Saver(folder)
    losses: list[Tensor] = []

    def step() -> None:
        batch = next(feed)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(*batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 3.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(average, [local(p.detach()) for p in trained], 1e-4)
        losses.append(loss.detach())

    try:
        for _ in range(3):
            step()
        synchronize()
        feed.wait_s, stall, steps, begun = 0.0, 0.0, 0, time.perf_counter()
        while steps < most and (steps < 2 or time.perf_counter() - begun < seconds):
            step()
            steps += 1
        synchronize()
        elapsed = time.perf_counter() - begun
        for _ in range(2):  # the second finds its buffers pinned already
            state = {f"p{i}": local(p.detach()) for i, p in enumerate(trained)}
            state |= {f"a{i}": each for i, each in enumerate(average)}
            for i, p in enumerate(trained):
                state |= {f"o{i}{key}": local(value) for key, value in optimizer.state[p].items() if value.ndim}
            stall = saver.save(state)
            saver.wait()
    finally:
        feed.close()
    flops = flops_per_image(shape, case.variant == "energy")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    peak = next((value for part, value in PEAK_TFLOPS if part in name), None)
    rate = steps * case.batch / elapsed
    return {
        **asdict(case), "steps": steps, "images_per_s": rate, "step_ms": 1000 * elapsed / steps,
        "gflop_per_image": flops / 1e9, "tflops": rate * flops / 1e12,
        "mfu": rate * flops / (peak * 1e12) if peak else None,
        "peak_gb": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "save_stall_s": stall, "data_wait": feed.wait_s / elapsed, "losses": [float(each) for each in losses[:5]],
    }  # fmt: skip


COLUMNS = ("images_per_s", "step_ms", "tflops", "mfu", "peak_gb", "save_stall_s", "data_wait")


def line(name: str, found: dict[str, Any] | str) -> str:
    if isinstance(found, str):
        return f"{name:<24} {found}"
    values = (found[key] for key in COLUMNS)
    return f"{name:<24} {found['batch']:>5} " + " ".join(f"{'-' if v is None else f'{v:.3g}':>12}" for v in values)


def cases(standard: int, energy: int) -> list[Case]:
    return [
        Case(variant, engine, compiled, standard if variant == "standard" else energy)
        for variant in ("standard", "energy")
        for engine in ("ddp", "fsdp")
        for compiled in (False, True)
    ]


def main(argv: list[str] | None = None) -> int:
    """0: everything that can run has run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--self-check", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--cases", default="", help="only cases whose name holds this")
    parser.add_argument("--minutes", type=float, default=9.0, help="no case begins after this; none is cut short")
    parser.add_argument("--seconds", type=float, default=25.0, help="timed part of each case")
    parser.add_argument("--batch", type=int, nargs=2, default=(64, 16), metavar=("STANDARD", "ENERGY"))
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    given = parser.parse_args(argv)
    device = torch.device("cpu" if given.self_check or not torch.cuda.is_available() else "cuda")
    if device.type == "cpu" and not given.self_check:
        parser.error("there is no GPU here; --self-check tries the script on the CPU")
    shape, batch, steps = (TINY, (4, 4), 2) if given.self_check else (XL, tuple(given.batch), 10**6)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "gloo" if device.type == "cpu" else "nccl", store=dist.FileStore(os.path.join(folder, "store"), 1),
            rank=0, world_size=1,
        )  # fmt: skip
        try:
            found = table(given, shape, batch, steps, device, Path(folder))
        finally:
            dist.destroy_process_group()
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1))
    return check(found) if given.self_check else 0


def table(
    given: argparse.Namespace, shape: Shape, batch: tuple[int, ...], steps: int, device: torch.device, folder: Path
) -> dict[str, Any]:
    """Every case, printed as it comes."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu"
    print(f"{name}, torch {torch.__version__}, {shape}", flush=True)
    print(f"{'case':<24} {'batch':>5} " + " ".join(f"{column:>12}" for column in COLUMNS), flush=True)
    begun, found = time.perf_counter(), {}
    for case in cases(*batch):
        if given.cases and given.cases not in case.name:
            continue
        if time.perf_counter() - begun > 60 * given.minutes:
            found[case.name] = "not begun: the time is up"
        else:
            try:
                found[case.name] = run(case, shape, device, given.seconds, steps, folder)
            except NotImplementedError as error:
                found[case.name] = str(error)
            except torch.OutOfMemoryError:
                found[case.name] = f"out of memory at batch {case.batch}; try --batch"
            if case.compile:
                torch._dynamo.reset()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        print(line(case.name, found[case.name]), flush=True)
    return found


def check(found: dict[str, Any]) -> int:
    """On the CPU: every case ran or was refused with a reason, and the engines agree on their losses."""
    wrong = []
    for name, each in found.items():
        if isinstance(each, str):
            wrong += [] if each.startswith("refused") and "energy" in name else [f"{name}: {each}"]
        elif not all(map(math.isfinite, each["losses"])) or each["images_per_s"] <= 0 or each["gflop_per_image"] <= 0:
            wrong.append(f"{name}: {each}")
    for variant in ("standard", "energy"):
        told = [each["losses"] for name, each in found.items() if name.startswith(variant) and isinstance(each, dict)]
        for other in told[1:]:
            if any(abs(a - b) > 0.02 * abs(a) for a, b in zip(told[0], other, strict=True)):
                wrong.append(f"{variant}: losses of engines differ: {told[0]} and {other}")
    print("\n".join(wrong) if wrong else "self-check: every case that can run has run, and the engines agree")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
