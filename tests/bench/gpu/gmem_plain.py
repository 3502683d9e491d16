"""A plain re-statement of GMem's network and training step, written from specs/gmem.md sections 3.1 and 4 with torch alone.

It trains as the reference does: DistributedDataParallel around the network, bf16 autocast, TF32 and whatever kernels
torch likes, torch's AdamW, an average that is moved parameter by parameter, a loss that is read out every step. Its
compiled form compiles what the reference's decorators do: blocks, final layer and time embedding. In two things it is
better off: it is wrapped once where the reference is wrapped twice, and the dropout of snippets is a given mask, so
that its losses can be compared with ours.

Names of parameters are the official ones; `sizes` is anything with the keys of our `method:` section.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DROPOUT, DECAY, RATE, CLIP = 0.4, 0.9999, 2e-4, 1.0


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x) * self.weight


class Rotary(nn.Module):
    def __init__(self, width: int, grid: int) -> None:
        super().__init__()
        half = width // 2
        angles = torch.outer(torch.arange(grid).float(), 10000.0 ** (-torch.arange(0, half, 2).float() / half))
        angles = angles.repeat_interleave(2, dim=1)
        both = torch.cat([angles[:, None].expand(-1, grid, -1), angles[None].expand(grid, -1, -1)], dim=-1)
        self.register_buffer("freqs_cos", both.cos().view(-1, width))
        self.register_buffer("freqs_sin", both.sin().view(-1, width))

    def forward(self, x: Tensor) -> Tensor:
        pairs = x.unflatten(-1, (-1, 2))
        turned = torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)
        return x * self.freqs_cos + turned * self.freqs_sin


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(rotary(q).to(v.dtype), rotary(k).to(v.dtype), v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


class SwiGLU(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.attn, self.mlp = Attention(width, heads), SwiGLU(width, int(2 / 3 * (4 * width)))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor, rotary: Rotary) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, rotary)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class FinalLayer(nn.Module):
    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm_final, self.linear = RMSNorm(width), nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class TimeEmbedding(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class Named(nn.Module):
    """A module whose child has the name of the reference's checkpoints."""

    def __init__(self, name: str, child: nn.Module) -> None:
        super().__init__()
        self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        return next(iter(self.children()))(x)


class PlainDiT(nn.Module):
    """Patch size 1, SwiGLU, rotary, RMS norm, no norm of queries: the published network."""

    def __init__(self, sizes: Any) -> None:
        super().__init__()
        width, inner, self.side, self.tap = sizes.hidden, sizes.projector_hidden, sizes.input_size, 4
        self.pos_embed = nn.Parameter(torch.zeros(1, self.side**2, width), requires_grad=False)
        self.x_embedder = Named("proj", nn.Conv2d(sizes.channels, width, 1))
        self.t_embedder = TimeEmbedding(width)
        self.condition_projection = Named("linear", nn.Linear(sizes.snippet_dim, width))
        self.feat_rope = Rotary(width // sizes.heads, self.side)
        self.blocks = nn.ModuleList(Block(width, sizes.heads) for _ in range(sizes.depth))
        layers = (
            nn.Linear(width, inner),
            nn.SiLU(),
            nn.Linear(inner, inner),
            nn.SiLU(),
            nn.Linear(inner, sizes.repr_dim),
        )
        self.projector = nn.ModuleList([nn.Sequential(*layers)])
        self.final_layer = FinalLayer(width, sizes.channels)

    def forward(self, x: Tensor, t: Tensor, snippet: Tensor, project: bool = True) -> tuple[Tensor, Tensor | None]:
        """Velocity of x [B, C, S, S] at times t [B], and projected tokens [B, N, R]."""
        tokens = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder(t) + self.condition_projection(snippet)
        z = None
        for number, block in enumerate(self.blocks, 1):
            tokens = block(tokens, c, self.feat_rope)
            if project and number == self.tap:
                z = self.projector[0](tokens)
        velocity = self.final_layer(tokens, c).transpose(1, 2)
        return velocity.reshape(len(x), -1, self.side, self.side), z

    def compile_parts(self) -> None:
        """What the reference decorates."""
        for part in (*self.blocks, self.final_layer, self.t_embedder):
            part.__dict__["forward"] = torch.compile(part.forward)


def loss_of(model: Callable[..., Any], batch: Mapping[str, Tensor]) -> Tensor:
    """The three losses: squared error, cosine, and half of the projection's."""
    t = torch.sigmoid(batch["t"])[:, None, None, None]
    x_t, target = t * batch["x1"] + (1 - t) * batch["noise"], batch["x1"] - batch["noise"]
    snippet = F.normalize(batch["snippet"], dim=-1) * batch["keep"] / (1 - DROPOUT)
    velocity, z = model(x_t, t.flatten(), snippet)
    velocity = velocity.float()
    projection = -(F.normalize(z.float(), dim=-1) * F.normalize(batch["representation"], dim=-1)).sum(dim=-1).mean()
    cosine = (1 - F.cosine_similarity(velocity, target, dim=1)).mean()
    return (velocity - target).square().mean() + cosine + 0.5 * projection


def allow_anything() -> None:
    """The reference's choice of kernels, whatever was chosen before."""
    torch.set_deterministic_debug_mode("default")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    inductor = sys.modules.get("torch._inductor.config")  # there once something was compiled
    if hasattr(inductor, "deterministic"):
        inductor.deterministic = False


def training_step(model: PlainDiT, device: torch.device) -> Callable[[Mapping[str, Tensor]], float]:
    """One optimizer step on a batch of the host; needs a process group."""
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}

    def step(batch: Mapping[str, Tensor]) -> float:
        placed = {name: each.to(device, non_blocking=True) for name, each in batch.items()}
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = loss_of(wrapped, placed)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                average[name].mul_(DECAY).add_(parameter, alpha=1 - DECAY)
        return loss.item()

    return step


@torch.no_grad()
def sampled(model: PlainDiT, x: Tensor, snippet: Tensor, points: int, noise: Tensor) -> Tensor:
    """`heun_sde` of the network, without guidance."""
    return heun_sde(lambda x, t_B: model(x, t_B, snippet, False)[0], x, points, noise)


def heun_sde(velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, points: int, noise: Tensor) -> Tensor:
    """Heun's SDE with the form `linear`, norm 1 and the last step `mean`: two calls of the network per drift."""
    grid = torch.linspace(0, 1 - 0.004, points, device=x.device)
    dt = grid[1] - grid[0]

    def drift(x: Tensor, t: Tensor) -> Tensor:
        t_B = t.expand(len(x))
        score = (t * velocity(x, t_B) - x) / (1 - t)
        return velocity(x, t_B) + (1 - t) * score

    for k, t in enumerate(grid[:-1]):
        x = x + (2 * (1 - t)).sqrt() * dt.sqrt() * noise[k]
        first = drift(x, t)
        x = x + dt * (first + drift(x + dt * first, t + dt)) / 2
    return x + 0.004 * drift(x, grid[-1])
